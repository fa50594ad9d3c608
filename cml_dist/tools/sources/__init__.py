"""Where images to pack come from: files (``tree.py``), and the layouts in which sets are kept (``layouts.py``)."""
