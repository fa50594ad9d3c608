"""How a run is started on a cluster: the shipped launch files, filled in and submitted. No torch."""
