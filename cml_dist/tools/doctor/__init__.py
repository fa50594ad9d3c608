"""``cml-dist doctor``: one look at a machine, or at a whole world of processes, before a long run."""
