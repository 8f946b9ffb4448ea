"""What ran and what it made: runs, compare, lineage, reproduce.

Imports `tracking` and what is below it.
"""
