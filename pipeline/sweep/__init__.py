"""Many runs that differ in parameters: a grid, a search or a list.

Imports `flow` and what is below it.
"""
