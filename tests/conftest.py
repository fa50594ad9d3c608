"""For all tests."""

from __future__ import annotations

import gc
import os
import signal

# A shell that has started the tests in the background has them ignore Ctrl-C, and so all processes that they start:
# those that a test stops with it would go on for hours.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Before torch is imported. Several files are tested at once: threads of all of them on the same cores would spin while
# they wait for each other, and a test of seconds then takes minutes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Of whoever tests: tables are of one width wherever that is.
os.environ.pop("COLUMNS", None)

from collections.abc import Iterator  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402


def pytest_collection_finish() -> None:
    """What is imported by now stays: else each of thousands of collections of garbage looks through it."""
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def arithmetic_as_it_was() -> Iterator[None]:
    """The trainer sets threads and kernels for its process, which here is the tests'."""
    threads = torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def cpu_alone(request: pytest.FixtureRequest) -> Iterator[None]:
    """What is not in tests/gpu is tested on the CPU, also where there are GPUs."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.parent.name != "gpu":
            patch.setattr(torch.cuda, "is_available", lambda: False)
        yield
