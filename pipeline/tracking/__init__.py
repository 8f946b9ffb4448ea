"""The MLflow side: the connection, a stage's run, the model registry, runs sent later.

MLflow records. Only this package imports it. It imports `dag` and the packages below it.
"""
