"""``cml-dist analyse`` on one process and on two: the same numbers."""

from __future__ import annotations

import json

import pytest
from launching import run_ranks

from cml_dist.cli import main

SETTINGS = (
    "domain.shots=5", "domain.queries=5", "model.hidden=[8, 8]", "method.inner_steps=2", "engine.name=graph",
    "train.steps=4", "train.episodes_per_step=2", "eval.val_episodes=2", "eval.final=false",
    "checkpoint.keep_every=2", "parallel.threads=1", "run.device=cpu",
)  # fmt: skip


@pytest.mark.slow
def test_numbers_are_those_of_one_process_on_two(tmp_path):
    assert main(["train", "sinusoid", f"run.dir={tmp_path / 'run'}", *SETTINGS]) == 0
    words = ["analyse", str(tmp_path / "run"), "--episodes", "6", "--out"]
    assert main([*words, str(tmp_path / "one")]) == 0
    code, said = run_ranks(2, "-m", "cml_dist", *words, str(tmp_path / "two"))
    assert code == 0, said
    one, two = (json.loads((tmp_path / out / "analysis.json").read_text()) for out in ("one", "two"))
    assert one == two and one["runs"][0]["checkpoints"][0]["cka"][0] > 0
