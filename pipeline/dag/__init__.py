"""The DVC side: the graph, what is out of date, the cache, stages run through `dvc repro`.

DVC decides what runs. Only this package imports it. It imports `project` and `show`.
"""
