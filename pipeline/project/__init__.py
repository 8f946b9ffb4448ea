"""The project on disk: `params.yaml` and its sections, the table of stages, git, locks, folders.

It imports no other package of the pipeline.
"""
