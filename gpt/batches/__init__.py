"""Batches for a model, and the metrics of its answers to them.

Imports `gpt.model` and what is below it.
"""
