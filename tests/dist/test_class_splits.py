"""``domain.split=all`` on two ranks, which meet once and train one split after the other."""

from __future__ import annotations

import json

import pytest
from graphs import write_graph
from launching import run_ranks
from safetensors.torch import load_file

SETTINGS = (
    "domain.root={graph}", "train.steps=2", "train.episodes_per_step=3", "method.inner_steps=2", "method.inner_lr=0.5",
    "eval.every=0", "eval.val_episodes=3", "eval.episodes=5", "eval.untrained=false", "engine.name=graph",
    "parallel.threads=1",
)  # fmt: skip


@pytest.mark.parametrize("strategy", ["ddp", "zero1"])
def test_each_split_is_trained_as_by_one_process(tmp_path, strategy):
    graph = write_graph(tmp_path / "graph.npz")
    command = ("-m", "cml_dist", "train", "citeseer", *(word.format(graph=graph) for word in SETTINGS))
    splits = ("domain.split=all", "domain.splits=2")
    code, out = run_ranks(2, *command, *splits, f"run.dir={tmp_path}/two", f"parallel.strategy={strategy}")
    assert code == 0 and out.count("mean of 2 splits") == 2, out  # a row a learner, by rank 0 alone
    code, out = run_ranks(1, *command, "domain.split=1", f"run.dir={tmp_path}/one")
    assert code == 0, out
    one, two = (load_file(tmp_path / path / "export/model.safetensors") for path in ("one", "two/split-001"))
    assert one.keys() == two.keys()
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-6
    if strategy == "ddp":
        code, out = run_ranks(2, "-m", "cml_dist", "eval", f"{tmp_path}/two", "eval.split=val")
        assert code == 0, out
        (kept,) = (tmp_path / "two" / "evals").glob("*-eval.split=val.json")
        assert json.loads(kept.read_text())["meta"]["episodes"] == 10
