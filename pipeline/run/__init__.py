"""Execution of a single stage: parameters, exit code, resume states, several processes.

Imports `data`, `tracking` and the packages below them.
"""
