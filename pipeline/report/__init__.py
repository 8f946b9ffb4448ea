"""Reports for users: the page, the model card, the terminal's summary, the status.

Imports `verdict`, `data` and the packages below them.
"""
