"""The Prefect side: the flow, the server and its pages, the agent, deployments, slots, notices.

Prefect runs the stages. Only this package and `sweep` import it. It imports `run`, `report` and
the packages below them.
"""
