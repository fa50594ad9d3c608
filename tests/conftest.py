"""For all tests."""

from __future__ import annotations

import os

# Before anything imports torch. Several files are tested at once: threads of all of them on the same cores would spin
# while they wait for each other, and a test of seconds then takes minutes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
