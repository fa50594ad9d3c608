"""What a run will need, before it runs: ``live_bytes.py`` watches storages come and go, ``footprint.py`` has a meta-step."""
