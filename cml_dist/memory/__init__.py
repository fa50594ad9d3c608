"""What a run will need, before it runs.

``live_bytes.py`` watches storages come and go, ``footprint.py`` has a meta-step, ``strategies.py`` a rank,
``choose.py`` the means that a budget allows, ``forecast.py`` the whole of ``cml-dist plan``.
"""
