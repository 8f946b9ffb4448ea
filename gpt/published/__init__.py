"""Weights as others publish them, read and written: GPT-2's formats and GGUF.

Imports `gpt.model` and what is below it.
"""
