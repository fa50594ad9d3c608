"""``cml-dist doctor``: one look at a machine, or at a whole world of processes, before a long run.

``examine.py`` is the order of things; each check is a small function that yields findings: ``versions.py``,
``machine.py``, ``gpus.py``, ``slurm.py``, ``storage.py``, ``model.py``. What takes several processes is in ``ring.py``,
``clock.py`` and ``shared_folder.py``. They talk through ``board.py``, which works where the ring does not.
"""
