"""``python -m cml_dist ...`` is ``cml-dist ...``."""

from __future__ import annotations

import sys

from cml_dist.cli import command

if __name__ == "__main__":
    sys.exit(command())
