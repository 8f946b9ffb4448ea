"""A run told to a person: the page, the model card, the terminal's summary, the status.

Imports `verdict`, `data` and what is below them.
"""
