"""Many runs that differ in parameters: sweeps and the ablation.

Imports `flow` and what is below it.
"""
