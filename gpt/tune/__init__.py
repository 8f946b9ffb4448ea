"""What fine-tuning adds to training: adapters, preferences, the overlap of train and test rows.

Imports `gpt.batches`, `gpt.model` and what is below them.
"""
