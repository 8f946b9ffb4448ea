"""One stage executed: parameters in, exit code out; resume states; several processes.

Imports `data`, `tracking` and what is below them.
"""
