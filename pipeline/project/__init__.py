"""The project on disk: `params.yaml` and its sections, the table of stages, git, locks, folders.

Imports no other wing of the pipeline.
"""
