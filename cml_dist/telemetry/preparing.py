"""Progress of work whose parts become known as it goes: one running count for each thing that is prepared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from cml_dist.telemetry.console import Console, ProgressView


@contextmanager
def preparing(console: Console) -> Iterator[Callable[[int, int, str], None]]:
    """Yields ``progress(done, total, what)``, which shows a count for each new ``what`` until the block ends."""
    views: dict[str, ProgressView] = {}
    with ExitStack() as stack:

        def progress(done: int, total: int, what: str) -> None:
            if what not in views:
                views[what] = stack.enter_context(console.progress(what, total))
            views[what].update(done)

        yield progress
