"""What joins the stages: parameters, the DAG, tracking, the Prefect flow, the command line."""
