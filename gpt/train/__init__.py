"""The one training loop: steps, recipe, optimizers, health, checkpoints.

Imports `gpt.batches`, `gpt.model` and what is below them.
"""
