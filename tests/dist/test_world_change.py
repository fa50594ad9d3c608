"""Another world: a run goes on with more or fewer processes, and under another strategy, as if nothing had changed.

A world changes in which order terms are summed, and nothing else: float64 to 1e-10 where the strategy can (DeepSpeed
cannot), float32 to what rounding does.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from launching import run_ranks

from cml_dist.config.plan import share
from cml_dist.run import checkpoint as checkpoints
from cml_dist.telemetry.metrics import read_metrics

SETTINGS = (
    "domain.shots=5", "domain.queries=5", "model.hidden=[8, 8]", "method.inner_steps=2", "engine.name=graph",
    "eval.val_episodes=5", "eval.episodes=7", "checkpoint.every=1000", "parallel.threads=1", "optim.lr=0.01", "optim.warmup_steps=6",
)  # fmt: skip
TIMES = ("seconds", "episodes_per_s", "peak_memory_gib")
EPISODES = 3
"""Of a meta-step: one process has all, two share them unevenly, and of four one is idle."""


def go(folder: Path, processes: int, steps: int, *overrides: str) -> None:
    """Train up to a step in a world; under the constant schedule the length of a run changes no step."""
    strategy = overrides if any("strategy" in word for word in overrides) else (*overrides, "parallel.strategy=auto")
    words = (f"run.dir={folder}", *SETTINGS, f"train.episodes_per_step={EPISODES}", f"train.steps={steps}", *strategy)
    code, out = run_ranks(processes, "-m", "cml_dist", "train", "sinusoid", *words)
    assert code == 0, out


def curve(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(folder / name)]


def newest(folder: Path) -> dict[str, torch.Tensor]:
    """Parameters and moments of the newest checkpoint."""
    found = checkpoints.load_newest(folder / "checkpoints", pytest.fail)
    return {name: found.read(name) for name in found.layout}


def worlds(folder: Path) -> list[tuple[int, int, str]]:
    """(step, processes, strategy) of each start, as the run folder tells."""
    sessions = map(json.loads, (folder / "sessions.jsonl").read_text().splitlines())
    found = [(s["step"], s["plan"]) for s in sessions]
    for _, plan in found:
        processes = plan["processes"]
        assert plan["episodes_by_rank"] == [len(share(EPISODES, rank, processes)) for rank in range(processes)]
    return [(step, plan["processes"], plan["strategy"]) for step, plan in found]


def assert_close(one: list[dict], two: list[dict], rel: float) -> None:
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            # Names are the same, and so is what a step did not measure.
            is_number = isinstance(value, (int, float)) and isinstance(b[key], (int, float))
            same = value == pytest.approx(b[key], rel=rel, abs=rel) if is_number else value == b[key]
            assert same, (a["step"], key, value, b[key])


def largest_difference(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    assert one.keys() == two.keys() and all(one[name].dtype == two[name].dtype for name in one)
    return max((one[name].double() - two[name].double()).abs().max().item() for name in one)


def test_one_two_four_and_one_process_again_are_one_run(tmp_path):
    """float64, Adam, validation at each leg's end, the test of the best step at the end."""
    moved, undisturbed = tmp_path / "moved", tmp_path / "undisturbed"
    exact = ("run.precision=fp64", "eval.every=4")
    go(undisturbed, 1, 16, *exact)
    for steps, processes in ((4, 1), (8, 2), (12, 4), (16, 1)):
        go(moved, processes, steps, *exact, f"eval.final={str(steps == 16).lower()}", f"parallel.processes={processes}")
    assert worlds(moved) == [(0, 1, "single"), (4, 2, "ddp"), (8, 4, "ddp"), (12, 1, "single")]
    assert_close(curve(moved), curve(undisturbed), 1e-10)
    assert_close(curve(moved, "validation.jsonl"), curve(undisturbed, "validation.jsonl"), 1e-10)
    assert largest_difference(newest(moved), newest(undisturbed)) < 1e-10
    tests = [json.loads((folder / "eval.json").read_text()) for folder in (moved, undisturbed)]
    assert tests[0]["step"] == tests[1]["step"] and tests[0]["chosen"] == tests[1]["chosen"] == "best"
    for learner in ("meta", "co"):
        for key in ("mean", "ci95", "episodes"):
            assert tests[0][learner][key] == pytest.approx(tests[1][learner][key], rel=1e-10), (learner, key)
    # It could fail: a leg on other episodes, or without Adam's moments, ends elsewhere by far more.
    assert curve(moved)[0]["loss"] != pytest.approx(curve(moved)[4]["loss"], rel=1e-3)
    state = newest(moved)
    assert {state[name].item() for name in state if name.startswith("moment/step/")} == {16.0}


def test_zero_2_goes_on_as_ddp(tmp_path):
    """float32: Adam's moments out of DeepSpeed's partitions on 2 ranks, to 4 ranks and to one: the same next step."""
    saved = tmp_path / "saved"
    go(saved, 2, 5, "eval.every=0", "eval.final=false", "parallel.strategy=zero2")
    before = newest(saved)
    further = {}
    for processes, strategy in ((2, "zero2"), (4, "ddp"), (1, "single")):
        folder = tmp_path / f"{strategy}-{processes}"
        shutil.copytree(saved, folder)
        go(folder, processes, 6, "eval.every=0", "eval.final=false", f"parallel.strategy={strategy}")
        assert worlds(folder) == [(0, 2, "zero2"), (5, processes, strategy)]
        further[strategy, processes] = curve(folder), newest(folder)
    lines, there = further.pop(("zero2", 2))
    assert largest_difference(there, before) > 1e-3, "the step moved something"
    for world, (also, elsewhere) in further.items():
        assert also[:5] == lines[:5]
        assert_close(also, lines, 1e-6)
        assert largest_difference(elsewhere, there) < 1e-6, world


def test_a_trajectory_through_zero_2_and_ddp_is_that_of_one_process(tmp_path):
    """float32, SGD with momentum, which leaves rounding as small as it is (Adam divides by it)."""
    moved, undisturbed = tmp_path / "moved", tmp_path / "undisturbed"
    sgd = ("optim.name=sgd", "optim.momentum=0.9", "eval.every=4")
    go(undisturbed, 1, 8, *sgd)
    go(moved, 2, 4, *sgd, "eval.final=false", "parallel.strategy=zero2")
    go(moved, 2, 8, *sgd, "parallel.strategy=ddp")
    assert worlds(moved) == [(0, 2, "zero2"), (4, 2, "ddp")]
    assert_close(curve(moved), curve(undisturbed), 1e-5)
    assert largest_difference(newest(moved), newest(undisturbed)) < 1e-5
    tests = [json.loads((folder / "eval.json").read_text()) for folder in (moved, undisturbed)]
    assert tests[0]["step"] == tests[1]["step"]
    assert tests[0]["meta"]["mean"] == pytest.approx(tests[1]["meta"]["mean"], rel=1e-5)
