"""What a training will take: steps, time, memory, disk.

Imports `run` and what is below it.
"""
