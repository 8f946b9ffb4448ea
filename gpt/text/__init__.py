"""Texts from outside: formats of files, and the records in them.

Imports `gpt.base`.
"""
