"""Text to tokens and back, and tokens on disk.

Imports `gpt.base`.
"""
