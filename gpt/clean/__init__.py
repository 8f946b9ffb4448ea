"""Documents cleaned: texts mended, poor ones and duplicates removed.

Imports `gpt.base`.
"""
