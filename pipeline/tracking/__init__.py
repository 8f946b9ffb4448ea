"""Everything of MLflow: the connection, a stage's run, the model registry, runs sent later.

MLflow remembers. Only this wing imports it. Imports `dag` and what is below it.
"""
