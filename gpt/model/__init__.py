"""The model itself: its architecture, its loss, its weights on disk, the device it works on.

Imports `gpt.base` and `gpt.tokens`.
"""
