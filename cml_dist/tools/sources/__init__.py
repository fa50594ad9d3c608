"""Where images to pack come from: one file a layout, and the table of layouts (``layouts.py``)."""
