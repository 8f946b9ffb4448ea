"""Everything of DVC: the graph, what is out of date, the cache, stages run through `dvc repro`.

DVC decides. Only this wing imports it. Imports `project` and `show`.
"""
