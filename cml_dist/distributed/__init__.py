"""Who carries the meta-gradient: the world of processes, and the strategies."""
