"""What every stage stands on: errors, events, labels, and files that are whole or not there.

Imports nothing of the project.
"""
