"""Which model is better: promotion, the judge, lm-eval.

Imports `tracking` and what is below it.
"""
