"""How a process of a world ends. Imports neither torch nor anything else that takes time."""

from __future__ import annotations

import os
import sys

from cml_dist.parallel.launched import launched_or_alone
from cml_dist.parallel.watch import this_watch


def leave(code: int, cause: str = "", *, everywhere: bool = False) -> int:
    """End at once in a world of several processes, which hears the ``cause``; in a world of one, return ``code``.

    Args:
        code: exit code.
        cause: why this rank fails, in one line; empty where it does not.
        everywhere: see :meth:`Watch.fail`.

    After a fault the others may never come, and a process group that is torn down in order would wait for them. After
    success, torch's gloo threads that a DDP module still holds abort the interpreter while it goes down ("terminate
    called without an active exception", about one exit in five on a busy machine), and the launcher would report a
    finished run as a failed one. Everything that matters is closed or synced by then.
    """
    if cause:
        this_watch().fail(cause, everywhere=everywhere)
    sys.stdout.flush()
    sys.stderr.flush()
    if launched_or_alone().size > 1:
        os._exit(code)
    return code
