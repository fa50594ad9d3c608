"""A real SLURM for this session, where it can be had."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
from slurm_lab import TOOL, Cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Four nodes; the tests that break something take the last two."""
    if os.geteuid() != 0:
        pytest.skip("a SLURM of several nodes on one machine needs root")
    if not TOOL.exists():
        pytest.skip(f"{TOOL} is not there")
    try:
        cluster = Cluster(4)
    except RuntimeError as error:
        if shutil.which("slurmctld") is None:
            pytest.skip(f"SLURM's packages are not to be had here: {error}")
        raise
    yield cluster
    cluster.down()
