"""Answers scored: likelihoods, text scores, and intervals by bootstrap.

Imports `gpt.clean`, `gpt.model` and what is below them.
"""
