"""``cml-dist compare``: paired differences over episodes and seeds, what is refused, and what is left out."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from image_sets import write_set

from cml_dist.cli import main
from cml_dist.config.load import dump_config, load_config
from cml_dist.errors import CmlError, ConfigError
from cml_dist.experiments.compare import TestedRun, compare, find_runs, read_run
from cml_dist.experiments.compare_tables import tables
from cml_dist.run.status import RunStatus, now


def write_run(folder: Path, scores, *settings: str, state: str = "finished", seconds: float = 0.5) -> Path:
    """The files that a finished run of two meta-steps leaves, with these scores of its test episodes."""
    config = load_config("glyphs", [f"run.dir={folder}", *settings])
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(config))
    status = RunStatus(state, "", 2, 2, now(), now(), "here", 1, 1)
    (folder / "status.json").write_text(status.text())
    scores = np.asarray(scores, float)
    np.savez(folder / "eval_scores.npz", meta=scores)
    test = {"score": "accuracy", "split": "test", "seed": config.eval.seed, "data": "ab"}
    test["meta"] = {"mean": scores.mean(), "episodes": len(scores)}
    (folder / "eval.json").write_text(json.dumps(test))
    lines = [{"step": n, "seconds": seconds, "peak_memory_gib": n / 4} for n in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    validated = [{"step": 1, "mean": 0.8}, {"step": 2, "mean": 0.9}]
    (folder / "validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in validated))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two seeds of MAML and of CML, and one of BOIL with two inner steps, on four episodes."""
    root = tmp_path_factory.mktemp("runs")
    own = {"maml": [[0.1, 0.5, 0.3, 0.7], [0.2, 0.4, 0.4, 0.6]], "cml": [[0.3, 0.5, 0.6, 0.8], [0.4, 0.3, 0.5, 0.6]]}
    for name, each in own.items():
        for seed, scores in enumerate(each):
            write_run(root / f"{name}-{seed}", scores, f"method.name={name}", f"run.seed={seed}")
    write_run(root / "boil", [0.5, 0.5, 0.5, 0.9], "method.name=boil", "method.inner_steps=2", seconds=2)
    return root


def test_figures_are_those_of_a_computation_by_hand(runs, tmp_path, capfd):
    written = {kind: tmp_path / f"table.{kind}" for kind in ("csv", "latex", "md")}
    words = [word for kind, path in written.items() for word in (f"--{kind}", str(path))]
    assert main(["compare", str(runs), *words]) == 0
    rows = {row["variant"]: row for row in csv.DictReader(written["csv"].read_text().splitlines())}
    base, cml, boil = (
        rows[f"method.name={name}, inner_steps={n}"] for name, n in (("maml", 1), ("cml", 1), ("boil", 2))
    )
    assert [*rows] == [base["variant"], boil["variant"], cml["variant"]] and base["difference"] == ""
    # CML - MAML: of the episodes 0.2, -0.05, 0.2, 0.05, of the seeds 0.15, 0.05.
    figures = {key: float(cml[key]) for key in cml if key.startswith("difference")}
    assert figures["difference"] == pytest.approx(0.1)
    assert figures["difference_episodes_ci95"] == pytest.approx(3.182446 * math.sqrt(0.045 / 3) / 2, rel=1e-6)
    assert figures["difference_seeds_se"] == pytest.approx(0.05)
    assert figures["difference_seeds_ci95"] == pytest.approx(12.706205 * 0.05, rel=1e-6)
    assert figures["difference_seeds_p"] == pytest.approx(1 - 2 * math.atan(2) / math.pi)
    assert float(cml["accuracy"]) == pytest.approx(0.5) and cml["seeds"] == "0 1"
    assert float(boil["difference"]) == pytest.approx(0.2) and boil["paired_seeds"] == "0"
    assert boil["difference_seeds_ci95"] == boil["difference_seeds_p"] == ""
    assert (float(boil["seconds"]), float(boil["steps_to_0.95"]), float(boil["peak_memory_gib"])) == (4, 2, 0.5)
    out, err = capfd.readouterr()
    assert "of one seed has no interval over seeds" in out and err == ""
    assert f"{boil['variant']}: the difference is of the common seeds, without 1" in out
    assert "& +10.00 $\\pm$ 19.49 & 5.00 & $\\pm$ 63.53 & 0.2952 \\\\\n" in written["latex"].read_text()
    row = "| method.name=cml, inner\\_steps=1 | +10.00 ± 19.49 | 5.00 | ± 63.53 | 0.2952 |\n"
    assert row in written["md"].read_text()


@pytest.mark.parametrize(
    "asked",
    [*(f"method.name=boil,{gap}inner_steps=2" for gap in ("", " ")), "method.name=boil", "inner_steps=2", "{}/boil"],
)
def test_the_baseline_is_a_name_or_a_run_folder(runs, asked):
    found = compare([read_run(run) for run in find_runs([str(runs)])], asked.format(runs))
    assert found.variants[0].name == "method.name=boil, inner_steps=2" and found.variants[0].difference is None


@pytest.mark.parametrize(("asked", "said"), [("method.name=anil", "none"), ("inner_steps=1", "2")])
def test_a_baseline_that_is_none_or_several_is_refused(runs, asked, said):
    with pytest.raises(ConfigError, match=f"is {said} of the variants; name one of: method.name=boil"):
        compare([read_run(run) for run in find_runs([str(runs)])], asked)


def test_names_leave_out_settings_of_what_is_not_there(tmp_path):
    for name, own in (("plain", ()), ("pruned", ("method.augment=mgaug", "method.augment_ratios=[0.5]"))):
        write_run(tmp_path / name, [0.1, 0.2], *own)
    found = compare([read_run(run) for run in find_runs([str(tmp_path)])])
    assert [v.name for v in found.variants] == ["augment=null", "augment=mgaug, augment_ratios=[0.5]"]


def test_names_leave_out_what_follows_from_the_method(tmp_path):
    for name in ("boil", "cml", "maml_pp", "maml"):
        write_run(tmp_path / name, [0.1, 0.2], f"method.name={name}", "method.inner_steps=1", "method.inner_lr=0.1")
    write_run(tmp_path / "wide", [0.1, 0.2], "method.inner_steps=1", "method.inner_lr=0.1", "model.filters=32")
    found = compare([read_run(run) for run in find_runs([str(tmp_path)])])
    assert [v.name.removesuffix(", model.filters=64") for v in found.variants] == [
        *(f"method.name={name}" for name in ("maml", "boil", "cml", "maml_pp")), "method.name=cml, model.filters=32",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("domain.shots=5", "domain.shots is 5, there 1"),
        ("eval.seed=1", "eval.seed is 1, there 0"),
        ("domain.draw=1", "domain.draw is 1, there 2"),
    ],
)
def test_other_test_episodes_are_refused(tmp_path, setting, said):
    write_run(tmp_path / "a", [0.1, 0.2], "domain.draw=2")
    write_run(tmp_path / "b", [0.1, 0.2], "domain.draw=2", setting)
    with pytest.raises(ConfigError, match=f"{tmp_path}/b was tested on other episodes than {tmp_path}/a: {said};"):
        compare([read_run(tmp_path / name) for name in "ab"])


def test_how_images_are_read_is_no_other_episode_and_a_rate_that_each_seed_chose_one_variant(tmp_path):
    for seed, rate in enumerate((0.01, 0.003)):
        run = write_run(tmp_path / f"auto-{seed}", [0.5, 0.7], f"run.seed={seed}", f"method.inner_lr={rate}")
        (run / "sessions.jsonl").write_text(json.dumps({"step": 0, "inner_lr": "auto"}) + "\n")
    write_run(tmp_path / "fixed", [0.5, 0.6], "domain.features=compute", "domain.size=32", "method.inner_lr=0.01")
    found = compare([read_run(run) for run in find_runs([str(tmp_path)])])
    assert [len(variant.runs) for variant in found.variants] == [2, 1]
    assert "inner_lr=auto" in found.variants[0].name


def test_other_data_and_numbers_of_episodes_are_refused(tmp_path):
    write_run(tmp_path / "a", [0.1, 0.2])
    write_run(tmp_path / "b", [0.1, 0.2, 0.3])
    test = json.loads((tmp_path / "b/eval.json").read_text())
    (tmp_path / "b/eval.json").write_text(json.dumps({**test, "data": "cd"}))
    with pytest.raises(ConfigError, match="the data's checksum is cd, there ab; eval.episodes is 3, there 2"):
        compare([read_run(tmp_path / name) for name in "ab"])


def broken(folder: Path, kind: str) -> None:
    if kind == "torn":
        (folder / "eval_scores.npz").write_bytes((folder / "eval_scores.npz").read_bytes()[:99])
    elif kind == "other":
        np.savez(folder / "eval_scores.npz", meta=np.array([0.1, 0.9]))
    elif kind == "untested":
        (folder / "eval.json").unlink()
    elif kind == "unfinished":
        (folder / "status.json").write_text((folder / "status.json").read_text().replace("finished", "stopped"))
    else:
        (folder / "config.yaml").write_text("method: [")


@pytest.mark.parametrize(
    ("kind", "said"),
    [("torn", "is damaged"), ("other", "are of two tests"), ("untested", "has no test"), ("unfinished", "(stopped)"),
     ("config", "is no valid YAML")],
)  # fmt: skip
def test_a_broken_folder_is_named_and_left_out(tmp_path, capfd, kind, said):
    for name in ("maml", "cml", "boil"):
        write_run(tmp_path / name, [0.1, 0.2], f"method.name={name}")
    broken(tmp_path / "boil", kind)
    (tmp_path / "nothing").mkdir()
    assert main(["compare", *(str(tmp_path / name) for name in ("maml", "cml", "boil", "nothing"))]) == 0
    out, err = capfd.readouterr()
    assert "boil" not in out and "method.name=cml" in out
    lines = err.splitlines()
    assert len(lines) == 2 and str(tmp_path / "boil") in lines[0] and said in lines[0]
    assert f"{tmp_path / 'nothing'} is no run folder" in lines[1]
    shutil.rmtree(tmp_path / "maml"), shutil.rmtree(tmp_path / "cml")
    assert main(["compare", str(tmp_path)]) == 2 and "no finished and tested run" in capfd.readouterr().err


def test_the_same_run_again_counts_once(tmp_path):
    for name in ("a", "b"):
        write_run(tmp_path / name, [0.1, 0.2], "parallel.threads=1" if name == "b" else "run.device=cpu")
    found = compare([read_run(tmp_path / name) for name in "ab"])
    assert len(found.variants) == 1 and len(found.variants[0].runs) == 1
    assert found.notes[0] == f"{tmp_path}/b is left out: the variant and seed of {tmp_path}/a again"


@pytest.mark.parametrize("seeds", [3, *(pytest.param(seeds, marks=pytest.mark.slow) for seeds in (2, 5, 10))])
def test_the_interval_over_seeds_holds_the_difference_19_times_in_20(seeds):
    """Runs of two methods that differ by 2 points, whose seeds share initial parameters and training episodes."""
    rng, held = np.random.default_rng(seeds), []
    for _ in range(2000):
        shared, noise = rng.normal(0, 0.03, seeds), rng.normal(0, 0.02, (2, seeds))
        means = 0.5 + shared + noise + np.array([[0.0], [0.02]])
        runs = [
            TestedRun("", seed, {"method.name": name, "method.colearner": name == "cml"}, {"eval.split": "test"}, "",
                      "accuracy", np.array([means[k, seed]] * 2))
            for k, name in enumerate(("maml", "cml")) for seed in range(seeds)
        ]  # fmt: skip
        over_seeds = compare(runs).variants[1].difference.over_seeds
        held.append(abs(over_seeds.mean - 0.02) < over_seeds.ci95)
    assert 0.93 < np.mean(held) < 0.97


def test_seeds_that_nothing_pairs_have_no_interval(tmp_path):
    write_run(tmp_path / "maml", [0.1, 0.2], "method.name=maml", "run.seed=1")
    write_run(tmp_path / "cml", [0.2, 0.4], "method.name=cml", "run.seed=2")
    found = compare([read_run(tmp_path / name) for name in ("maml", "cml")])
    difference = found.variants[1].difference
    assert difference.over_seeds.mean == pytest.approx(0.15) and math.isnan(difference.over_seeds.p)
    assert any("no seed in common" in note for note in found.notes)


def test_a_lower_error_is_reached_from_above():
    made = [TestedRun("", 0, {}, {}, "", "mse", np.zeros(2), ((1, 3.0), (2, 1.04), (3, 1.0)))]
    assert made[0].steps_to(0.95) == 2 and made[0].steps_to(1) == 3


def test_the_last_slope_is_of_the_last_third_of_the_validations():
    validations = [(100 * k, min(k, 7) + 0.1 * max(k - 7, 0)) for k in range(1, 11)]  # 1 in 100 steps, at the end 0.1
    made = [TestedRun("", 0, {}, {}, "", "mse", np.zeros(2), tuple(validations[:n])) for n in (10, 2)]
    assert made[0].last_slope == pytest.approx(1.0) and made[1].last_slope is None


def test_a_run_of_a_class_split_each_is_left_out_with_a_word(tmp_path):
    write_run(tmp_path / "all", [0.1, 0.2])
    config = load_config("citeseer", ["domain.split=all", "domain.splits=2", "domain.root=x.npz"])
    (tmp_path / "all/config.yaml").write_text(dump_config(config))
    with pytest.raises(CmlError, match="holds a run for each class split; name the folders of one of them"):
        read_run(tmp_path / "all")


def test_tables_fit_a_narrow_screen(runs):
    for _, columns, rows in tables(compare([read_run(run) for run in find_runs([str(runs)])])):
        widths = [max(map(len, column)) for column in zip(columns[1:], *(row[1:] for row in rows), strict=True)]
        assert sum(widths) + 3 * len(widths) <= 60 - len("method.name=maml,")


def test_runs_that_were_trained_on_two_copies_of_a_set_and_by_an_earlier_version(tmp_path, capfd):
    small = ("domain.ways=2", "domain.queries=2", "model.filters=4", "train.steps=1", "eval.val_episodes=1")
    for name in ("maml", "cml"):
        data = write_set(tmp_path / f"set-{name}", size=16)
        words = (f"domain.root={data}", f"run.dir={tmp_path / name}", f"method.name={name}", "eval.every=0")
        assert main(["train", "my_images", *words, *small, "eval.episodes=4"]) == 0
    earlier = json.loads((tmp_path / "cml/eval.json").read_text())
    assert len(earlier.pop("data")) == 64
    (tmp_path / "cml/eval.json").write_text(json.dumps(earlier))
    assert main(["compare", str(tmp_path)]) == 0
    assert "Paired difference to method.name=maml (" in capfd.readouterr().out
