"""What the data is: its report and its data sets in MLflow.

Imports `tracking` and what is below it.
"""
