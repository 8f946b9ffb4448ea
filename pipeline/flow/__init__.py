"""Everything of Prefect: the flow, its server and pages, the agent, deployments, slots, notices.

Prefect runs. Only this wing and `sweep` import it. Imports `run`, `report` and what is below
them.
"""
