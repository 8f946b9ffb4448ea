"""Documents cleaned: texts mended, poor ones and duplicates removed.

Imports nothing of the project.
"""
