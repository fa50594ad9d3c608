"""``domain.split=all``: a run for each class split in a folder of one, and the spread of their tests."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
from graphs import write_graph

from cml_dist.cli import main
from cml_dist.data.class_splits import class_split, num_class_splits

SETTINGS = (
    "train.steps=3", "train.episodes_per_step=2", "method.inner_steps=2", "method.inner_lr=0.5", "eval.every=0",
    "eval.val_episodes=3", "eval.episodes=6", "eval.untrained=false", "engine.name=graph", "parallel.threads=1",
)  # fmt: skip


def go(graph: Path, folder: Path, *overrides: str, **hook) -> int:
    return main(["train", "citeseer", f"domain.root={graph}", f"run.dir={folder}", *SETTINGS, *overrides], **hook)


@pytest.fixture(scope="module")
def graph(tmp_path_factory) -> Path:
    return write_graph(tmp_path_factory.mktemp("graph") / "graph.npz")


@pytest.fixture(scope="module")
def trained(graph, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "all"
    assert go(graph, folder, "domain.split=all", "domain.splits=3") == 0
    return folder


def files(folder: Path) -> dict[str, bytes]:
    """What a run computed."""
    kept = ("checkpoints/step-00000003.safetensors", "export/model.safetensors", "eval.json")
    return {name: (folder / name).read_bytes() for name in kept}


def test_each_part_is_the_ordinary_run_of_its_split(graph, trained, tmp_path):
    assert go(graph, tmp_path / "one", "domain.split=2") == 0
    assert files(trained / "split-002") == files(tmp_path / "one")
    assert files(trained / "split-001") != files(tmp_path / "one")


def test_the_table_has_the_mean_over_splits_its_interval_and_their_spread(trained):
    found = json.loads((trained / "splits.json").read_text())
    parts = [json.loads((trained / f"split-{k:03d}" / "eval.json").read_text()) for k in range(3)]
    assert found["splits"] == parts
    for learner in ("meta", "co"):
        scores = np.stack([np.load(trained / f"split-{k:03d}" / "eval_scores.npz")[learner] for k in range(3)])
        means, widths = scores.mean(1), [part[learner]["ci95"] for part in parts]
        assert found[learner] == {
            "mean": pytest.approx(scores.mean()),
            "ci95": pytest.approx(sum(width**2 for width in widths) ** 0.5 / 3),
            "splits_sd": pytest.approx(means.std(ddof=1)),
            "splits_min": means.min(),
            "splits_max": means.max(),
            "episodes": 18,
        }
        assert found[learner]["splits_sd"] > 0


def test_the_same_command_leaves_what_is_finished_and_trains_further_splits(graph, trained, capfd):
    before = {path: path.stat().st_mtime_ns for path in trained.glob("split-*/**/*") if path.is_file()}
    assert go(graph, trained, "domain.split=all", "domain.splits=4") == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "CML, mean of 4 splits" in capfd.readouterr().out
    assert go(graph, trained, "domain.split=all", "domain.splits=3") == 0
    assert len(json.loads((trained / "splits.json").read_text())["splits"]) == 3


def test_a_signal_stops_it_between_steps_and_the_same_command_goes_on(graph, trained, tmp_path, capfd):
    folder, splits = tmp_path / "all", ("domain.split=all", "domain.splits=3")

    def on_step(done: int, happened: str) -> None:
        if (done, happened) == (1, "step") and (folder / "split-001").exists():
            signal.raise_signal(signal.SIGUSR1)

    assert go(graph, folder, *splits, on_step=on_step) == 75
    assert not (folder / "split-002").exists() and not (folder / "splits.json").exists()
    capfd.readouterr()
    assert main(["status", "--check", str(folder)]) == 75
    assert capfd.readouterr().out == f"{folder}: stopped (1 of 3 splits finished; SIGUSR1)\n"
    assert go(graph, folder, *splits) == 0
    assert main(["status", "--check", str(folder)]) == 0
    for k in range(3):
        assert files(folder / f"split-00{k}") == files(trained / f"split-00{k}")


def test_it_is_tested_again_as_a_whole_and_exported_by_the_part(trained, capfd):
    before = (trained / "splits.json").read_bytes()
    assert main(["eval", str(trained), "eval.episodes=8"]) == 0
    (kept,) = (trained / "evals").glob("*-eval.episodes=8.json")
    found = json.loads(kept.read_text())
    assert found["meta"]["episodes"] == 24 and found["overrides"] == {"eval.episodes": 8}
    assert (trained / "splits.json").read_bytes() == before
    # Each split's run may have chosen an inner rate of its own.
    for outer, inner in ((trained, "auto"), (trained / "split-001", "0.1")):
        text = (outer / "config.yaml").read_text()
        (outer / "config.yaml").write_text(text.replace("inner_lr: 0.5", f"inner_lr: {inner}"))
    assert main(["eval", str(trained), "eval.episodes=8"]) == 0
    again = json.loads(max((trained / "evals").glob("*.json")).read_text())
    assert again["overrides"] == {"eval.episodes": 8}
    assert [a == b for a, b in zip(again["splits"], found["splits"], strict=True)] == [True, False, True]
    capfd.readouterr()
    assert main(["export", str(trained)]) == 2
    assert f"{trained} holds a run for each class split; name the folder of one" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("classes", "overrides", "said"),
    [
        ([12] * 6, ["domain.splits=3"], "domain.splits is 3, but domain.split is own: set domain.split=all"),
        ([12] * 6, ["domain.split=all", "domain.splits=91"], "there are 90 ways to divide the classes; set"),
        ([12] * 7, ["domain.split=all"], "domain.splits is null (all), but there are 630 ways to divide the classes"),
        ([12] * 5 + [3], ["domain.split=all"], "domain.ways is 2, but"),
        ([20, 20, 20, 20, 12, 12], ["domain.split=all", "domain.queries=15"], "domain.ways is 2, but"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused_before_anything_is_written(tmp_path, capfd, classes, overrides, said):
    graph = write_graph(tmp_path / "graph.npz", classes)
    assert go(graph, tmp_path / "all", *overrides) > 0
    assert said in capfd.readouterr().err and not (tmp_path / "all").exists()


def test_a_folder_of_one_kind_is_not_taken_for_the_other(graph, trained, tmp_path, capfd):
    assert go(graph, trained, "domain.split=1") == 1
    assert "domain.split was 'all', is 1" in capfd.readouterr().err
    assert go(graph, trained, "domain.split=all", "domain.splits=3", "method.gamma=0.5") == 1
    assert "method.gamma was 0.2, is 0.5" in capfd.readouterr().err


def test_ways_to_divide_classes_are_counted_and_none_comes_twice():
    assert num_class_splits(6, (2, 2, 2)) == 90 and num_class_splits(5, (2, 2, 2)) == 0
    ways = [class_split(6, (2, 2, 2), k) for k in range(90)]
    assert len(set(ways)) == 90 and all(sorted(sum(way, ())) == list(range(6)) for way in ways)
    assert len({train for train, _, _ in ways[:5]}) > 1  # the first few differ in all parts
    many = [class_split(20, (10, 5, 5), k) for k in range(5)]
    assert len(set(many)) == 5
