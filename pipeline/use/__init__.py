"""A model in use: generate, chat, classify, export.

Imports `show`.
"""
