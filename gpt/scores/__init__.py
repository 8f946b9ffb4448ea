"""Answers scored: likelihoods, text scores, and intervals by bootstrap.

Imports `gpt.clean`, `gpt.text`, `gpt.model` and what is below them.
"""
