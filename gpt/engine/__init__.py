"""The compiled decoding step, which whoever generates may hand over.

No training imports it, so that a change of it retrains nothing. Imports `gpt.generation`,
`gpt.model` and what is below them.
"""
