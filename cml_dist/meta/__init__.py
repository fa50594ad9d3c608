"""The core, torch only. Read ``inner.py`` (what an inner step is), then ``gradient.py`` (what the meta-gradient is)."""
