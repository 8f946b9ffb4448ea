"""Whole stages against the loops of a textbook."""
