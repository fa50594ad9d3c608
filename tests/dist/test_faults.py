"""A small part of the fault campaign (benchmarks/fault_campaign.py): after a fault, the run that was never disturbed."""

from __future__ import annotations

import json
import shutil

import pytest
from fault_cases import KINDS
from fault_lab import References, Setup, differences, may_mount, play

pytestmark = [
    pytest.mark.slow,  # of the kill of a rank the same is in test_train.py
    pytest.mark.timeout(3600),  # two starts each, and whichever test comes first makes the undisturbed runs
]
CASES = (
    ("kill-rank", "ddp"),
    ("kill-writer-in-save", "single"),
    ("signal-storm", "ddp"),
    ("kill-in-validation", "ddp"),
    ("flipped-bit", "single"),
    ("disk-full", "single"),
)


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    return References(tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.parametrize(("kind", "setup"), CASES)
def test_a_fault_ends_all_and_leaves_no_trace(tmp_path, references, kind, setup):
    """All gone within 60 s, the culprit named, and the same command finishes the same run to the bit."""
    if KINDS[kind].needs_mount and not may_mount():
        pytest.skip("may not mount a file system here")
    result = play(kind, KINDS[kind].play, setup, f"tests/{kind}", tmp_path / "case", references)
    assert not result.violation, f"{result.did}: {result.violation}"
    assert result.exit_s and result.starts >= 2


def test_the_comparison_sees_a_bit(tmp_path, references):
    reference = references.folder(Setup(processes=1))
    folder = tmp_path / "run"
    shutil.copytree(reference, folder)
    assert differences(folder, reference) == []
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    record = json.loads(lines[40])
    lines[40] = json.dumps(record | {"loss": record["loss"] * (1 + 2**-50)})
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (told,) = differences(folder, reference)
    assert told.startswith("metrics.jsonl differs first in line 41")
