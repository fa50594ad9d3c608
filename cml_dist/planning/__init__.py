"""What a run will need before it runs: ``live_bytes``, ``footprint``, ``strategies``, ``forecast``, in that order."""
