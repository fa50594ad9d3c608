"""What a run will need, before it runs: ``live_bytes.py`` watches storages, ``footprint.py`` has a meta-step."""
