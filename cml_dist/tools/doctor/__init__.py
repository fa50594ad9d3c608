"""``cml-dist doctor``: one look at a machine, or at a whole world of processes, before a long run.

``examine.py`` has the list of checks and joins the world as a run would; ``findings.py`` makes one report of what all
ranks found. A check is a function that yields findings: ``installed.py``, ``machine.py``, ``run.py``.
"""
