"""``cml-dist repro``: the tables as data, verdicts by hand, and a row of each from nothing to its verdict."""

from __future__ import annotations

import csv
import fnmatch
import math
import re
from pathlib import Path

import numpy as np
import pytest
from graphs import write_graph
from image_sets import write_set

from cml_dist.cli import main
from cml_dist.config.keys import flatten
from cml_dist.config.load import load_config, read_yaml
from cml_dist.config.repro import find_table, settings_of, sweeps_of, tables
from cml_dist.config.schema import RunConfig
from cml_dist.experiments.compare import Difference
from cml_dist.experiments.sweep import work
from cml_dist.experiments.verdict import judge
from cml_dist.memory.forecast import known_inputs, network_structure
from cml_dist.run.interval import Estimate, estimate

ROOT = Path(__file__).resolve().parents[2]
TABLES = ["controls", "depth", "gamma", "image_sets", "mini_imagenet", "nodes", "resnet12", "sinusoid"]
TINY = ("run.device=cpu", "parallel.threads=1", "eval.val_episodes=2", "eval.episodes=20")
FAST = ("sinusoid", "--rows", "cml-10", "--budget", "0.001", "--seeds", "1")


# --------------------------------------------------------------------------- verdicts


SURE = Estimate(1.0, 0.1)
"""Over episodes."""


def difference(*each: float, episodes: Estimate | None = None) -> Difference:
    over = estimate(np.array(each))
    return Difference(tuple(range(len(each))), episodes or Estimate(over.mean, abs(over.mean) / 2), over)


@pytest.mark.parametrize(
    ("found", "said", "lower"),
    [
        # The half width is t 4.303 (2 degrees of freedom) times 0.1 / sqrt 3, which is 0.25.
        (difference(1.9, 2.0, 2.1), "holds", "does not hold"),
        (difference(-1.9, -2.0, -2.1), "does not hold", "holds"),
        # Mean 2, deviation 1: 4.303 / sqrt 3 = 2.48 holds 0; with a fourth seed 3.182 / 2 = 1.59 would not.
        (difference(1.0, 2.0, 3.0), "undecided (about 1 more seed would decide)", ""),
        (difference(-1.0, -2.0, -3.0), "undecided (about 1 more seed would decide)", ""),
        # Mean 0.5, deviation 1: t / sqrt n below 0.5 first at n = 18, 2.110 / 4.243 = 0.497.
        (difference(-0.5, 0.5, 1.5), "undecided (about 15 more seeds would decide)", ""),
        (difference(-1.0, 0.0, 1.0), "undecided (not even 1,000 seeds would decide)", ""),
        (difference(1.9, 2.0, 2.1, episodes=Estimate(2.0, 2.5)),
         "undecided (more test episodes would decide (eval.episodes))", ""),
        (difference(2.0), "holds (by episodes alone, of one seed)", "does not hold (by episodes alone, of one seed)"),
        (difference(2.0, episodes=Estimate(2.0, 2.5)), "undecided (by episodes alone, of one seed)", ""),
        (difference(math.nan, 1.0), "undecided (scores are not finite)", ""),
        (Difference((), SURE, Estimate(1.0)), "undecided (no seed in common)", ""),
    ],
)  # fmt: skip
def test_a_claim_holds_where_both_intervals_exclude_0_on_its_side(found, said, lower):
    assert str(judge(found)) == said
    assert str(judge(found, lower_is_better=True)) == (lower or said)


# --------------------------------------------------------------------------- tables


def config_of(table: str, row: str, budget: float = 1.0) -> RunConfig:
    (sweep,) = sweeps_of({row: find_table(table).rows[row]}, 1, "out", "elsewhere", budget)
    return load_config(sweep.base, sweep.runs()[0].overrides)


def test_these_are_all_tables_and_rows_of_one_name_are_one_run():
    assert list(tables()) == TABLES
    seen: dict[tuple[str, str], RunConfig] = {}
    for table in TABLES:
        rows = {name: row for name, row in find_table(table).rows.items() if not row.absent}
        for sweep in sweeps_of(rows, 1, "out", "elsewhere"):
            for run in sweep.runs():
                config = load_config(sweep.base, run.overrides)
                assert seen.setdefault((sweep.base, run.name), config) == config, (table, run.name)
                assert (getattr(config.domain, "root", None) or "elsewhere/").startswith("elsewhere/")
    assert len(seen) == 93


def test_rows_have_the_parameters_that_the_paper_counts_and_its_figures():
    def parameters(row: str) -> int:
        config = config_of("controls", row)
        return sum(p.numel() for p in network_structure(config, known_inputs(config)).parameters())

    counted = {name: parameters(f"{name}-1shot") for name in ("cml", "maml_wide", "maml")}
    assert counted == {"cml": 203_210, "maml_wide": 232_261, "maml": 121_093}
    row = find_table("gamma").rows["cml-5shot"]
    assert row.published == {"meta": (65.84, 0.46), "co": (66.43, 0.43)} and row.baseline == "maml-5shot"


def test_a_budget_shortens_steps_schedules_and_validations_and_nothing_else():
    whole, part = (config_of("mini_imagenet", "mamlpp+cml-1shot", budget) for budget in (1, 0.01))
    assert (part.train.steps, part.method.multi_step_loss, part.method.multi_step_every) == (300, 75, 5)
    assert (whole.num_validations, part.num_validations) == (60, 10)
    assert config_of("mini_imagenet", "maml-1shot", 0.5).num_validations == 30
    changed = {"train": ["steps"], "method": ["multi_step_loss", "multi_step_every"], "eval": ["every"], "run": ["dir"]}
    for name, section in whole:
        same = {key: value for key, value in section if key not in changed.get(name, ())}
        assert same == {key: value for key, value in getattr(part, name) if key in same}, name
    assert "train.steps" not in settings_of(find_table("sinusoid").rows["maml-10"], "data")


def test_a_run_is_estimated_by_the_examples_that_pass_through_the_network_in_a_meta_step():
    """Episodes x (steps x support + query); Sharp-MAML's inner steps read the support set twice, its meta-step all."""
    names = {"cml-1shot": 4 * (5 + 75), "mamlpp-5shot": 4 * (5 * 25 + 75), "sharp-5shot": 4 * 2 * (5 * 2 * 25 + 75)}
    assert {name: work(config_of("mini_imagenet", name)) for name in names} == names
    assert work(config_of("sinusoid", "cml-5")) == 4 * (5 + 10)


def test_each_setting_of_a_recipe_has_a_source_in_the_tables_that_use_it():
    for table in TABLES:
        for name, row in find_table(table).rows.items():
            recipe = flatten(read_yaml(ROOT / f"configs/recipes/{row.recipe}.yaml"))
            keys = [key for key in recipe if not key.startswith(("checkpoint.", "run."))]
            bare = [key for key in keys if not any(fnmatch.fnmatchcase(key, known) for known in row.sources)]
            assert not bare, (table, name)


def test_a_setting_without_a_source_and_a_baseline_that_is_no_row_are_refused(tmp_path, capfd):
    head = "title: t\nabout: a\nrecipe: sinusoid\nrows:\n  a: {set: {method.name: maml}}\n"
    for text, said in (
        (head, "row a sets method.name, and no source says where that is from"),
        (head.replace("{set: {method.name: maml}}", "{baseline: b}"), "row a has the baseline b, which is no row"),
        (f"borrows: {{controls: [noice-1shot]}}\n{head}sources: {{method.*: ours}}\n", "use noise-1shot"),
        (f"like: gama\n{head}", "mine.yaml is like gama; use a shipped one: controls, "),
    ):
        (tmp_path / "mine.yaml").write_text(text)
        assert main(["repro", str(tmp_path / "mine.yaml"), "--list"]) == 2
        assert said in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["mini_imagnet"], "there is no table mini_imagnet; did you mean mini_imagenet"),
        (["sinusoid", "--rows", "cml-11"], "no row matches 'cml-11'; did you mean cml-10"),
        (["sinusoid", "--budget", "2"], "--budget is 2; give the fraction of training"),
        (["nodes", "domain.split=all"], "domain.split of citeseer-gmeta-1shot is all, and a row is of one split"),
        (["sinusoid", "train.step=3"], "train.step is not a setting; did you mean train.steps?"),
        (["sinusoid", "run.dir=a"], "run.dir is set, and a table has many runs; leave it out; --out says it for all"),
        (["sinusoid", "method.name=boil"], "with these settings row cml-5 is the same as its baseline maml-5;"),
        (["sinusoid", "run.seed=7"], "run.seed is set, and a table has many runs; leave it out; --seeds says it"),
    ],
)
def test_what_cannot_be_is_one_line(words, said, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert main(["repro", *words]) == 2
    assert said in capfd.readouterr().err and not list(tmp_path.iterdir())


def test_data_that_are_missing_or_a_part_are_said_and_which_rows_they_stop(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    write_set(Path("data/cifar_fs"), size=32, images=20)
    page = ROOT / "docs/how-to/reproduce.md"
    Path("mine.yaml").write_text(re.search(r"```yaml\n(.*?)```", page.read_text(), re.S)[1])
    slurm = ["--slurm", "--time=60", "--processes-per-node=1", "--dry-run"]
    assert main(["repro", "mine.yaml", *slurm, "domain.root=data/cifar_fs"]) == 0
    assert "method.gamma=0.5" in capfd.readouterr().out
    assert main(["repro", "image_sets", "--rows", "1shot"]) == 1
    err = capfd.readouterr().err
    assert "fc100-cml-1shot: data/fc100 is not there; cml-dist data pack SOURCE data/fc100 --download fc100\n" in err
    assert "data/cifar_fs is a part: 4 of its 4 val classes have 16 images or more, and an episode takes 5" in err
    assert "error: no row of image_sets can run here" in err
    assert main(["repro", "image_sets", "--rows", "1shot", *slurm, "domain.ways=2"]) == 0
    out, err = capfd.readouterr()
    assert out.startswith("#!") and "#SBATCH --array=0-5\n" in out
    assert "omniglot-cml-1shot" in err and "cifar_fs" not in err
    write_graph(Path("data/citeseer.npz"), nodes=(12, 12, 7, 12, 12, 12))
    for words, said in (
        (("image_sets", "--rows=cifar_fs-cml-1shot", "domain.ways=2", "domain.unlabelled=5"), "have 21 images or more"),
        (("image_sets", "--rows=cifar_fs-cml-1shot", "domain.ways=2", "domain.unlabelled=4", "domain.distractors=3"),
         "and an episode takes 5 classes, any of them; pack the whole set"),
        (("nodes", "--rows=citeseer-gmeta-1shot"), "1 have the 11 nodes that an episode takes of each"),
    ):  # fmt: skip
        assert main(["repro", *words]) == 1
        assert said in capfd.readouterr().err


# --------------------------------------------------------------------------- from nothing to a verdict


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, list[dict[str, str]]]:
    """MAML and CML on curves at a thousandth of their length, and the rows of the CSV."""
    place = tmp_path_factory.mktemp("repro")
    written = [f"--csv={place / 'table.csv'}", f"--md={place / 'table.md'}", f"--latex={place / 'table.tex'}"]
    assert main(["repro", *FAST, f"--out={place}", "--at-once=2", *written, *TINY]) == 0
    return place, list(csv.DictReader((place / "table.csv").read_text().splitlines()))


def test_a_row_of_a_table_comes_to_its_verdict(trained, capfd):
    place, rows = trained
    assert [(row["row"], row["learner"]) for row in rows] == [
        ("maml-10", "meta"), ("cml-10", "meta"), ("cml-10, dagger", "co"),
    ]  # fmt: skip
    base, cml = (np.load(place / f"budget-0.001/sinusoid/{n}-10,seed=0/eval_scores.npz") for n in ("maml", "cml"))
    for row in rows[1:]:
        apart = estimate(cml[row["learner"]] - base["meta"])
        assert float(row["difference"]) == pytest.approx(apart.mean)
        assert float(row["difference_episodes_ci95"]) == pytest.approx(apart.ci95)
        side = "undecided" if abs(apart.mean) < apart.ci95 else "holds" if apart.mean < 0 else "does not hold"
        assert row["verdict"] == f"{side} (by episodes alone, of one seed)" and row["difference_seeds_ci95"] == ""
    for name in ("table.md", "table.tex"):
        text = (place / name).read_text()
        assert text.count("at 0.001 of the training") == 2 and text.count("Trained for 0.001 of the meta-steps") == 2
        assert "cml-10, dagger below maml-10" in text


def test_finished_runs_are_not_trained_again_but_tested_anew_and_other_settings_refused(trained, monkeypatch, capfd):
    place, _ = trained
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*seed=0/*")}
    assert main(["repro", *FAST, f"--out={place}", *TINY]) == 0
    out = capfd.readouterr().out
    assert "runs: 2 finished\n" in out and "by episodes alone, of one seed" in out and "Started" not in out
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert main(["repro", *FAST, f"--out={place}", *TINY, "optim.lr=0.5"]) == 1
    assert "holds a run of another configuration: optim.lr was 0.001, is 0.5" in capfd.readouterr().err
    monkeypatch.setenv("COLUMNS", "60")
    for show, shown in (
        ("--list", r"cml-10 +maml-10 +1 of 1 +0 s *$"),
        ("--plan", r"cml-10,seed=0 +finished +30 +30 +-$"),
    ):
        assert main(["repro", *FAST, f"--out={place}", show, *TINY]) == 0
        assert re.search(shown, capfd.readouterr().out, re.M)
    for said in ("runs: 2 to go on with\n", "runs: 2 finished\n"):
        assert main(["repro", *FAST, f"--out={place}", *TINY, "eval.episodes=25"]) == 0
        out = capfd.readouterr().out
        assert said in out and "undecided (by" in out
    assert len(np.load(place / "budget-0.001/sinusoid/cml-10,seed=0/eval_scores.npz")["meta"]) == 25
    assert main(["repro", *FAST, f"--out={place}", *TINY, "eval.episodes=25", "train.steps=40", "--plan"]) == 0
    out = capfd.readouterr().out
    assert re.search(r"cml-10,seed=0 +to go on with +30 +40 ", out) and "not run" in out


SMALL = ("model.filters=4", "domain.ways=2", "domain.queries=2")
ROWS = {
    "controls": ("maml_wide-1shot", SMALL), "depth": ("depth_0-1shot", SMALL), "gamma": ("gamma_0.5-5shot", SMALL),
    "image_sets": ("fc100-cml-1shot", SMALL), "mini_imagenet": ("mamlpp+cml-1shot", SMALL),
    "nodes": ("citeseer-gmeta_code+cml-1shot", ()), "resnet12": ("cifar_fs-resnet12-cml-1shot", SMALL[1:]),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("table", ROWS)
def test_a_row_of_every_other_table_comes_to_its_verdict(table, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for name in ("mini_imagenet", "fc100", "cifar_fs"):
        write_set(Path("data", name), size=16, images=10)
    write_graph(Path("data/citeseer.npz"))
    row, settings = ROWS[table]
    seeds = 2 if table == "nodes" else 1
    words = ["--budget=0.001", f"--seeds={seeds}", "--at-once=2", "--csv=table.csv"]
    assert main(["repro", table, "--rows", row, *words, *settings, *TINY]) == 0, capfd.readouterr().err
    found = {line["row"]: line for line in csv.DictReader(Path("table.csv").read_text().splitlines())}
    assert found[row]["verdict"].startswith(("holds", "does not hold", "undecided ("))
    assert found[row]["seeds"] == str(seeds) and bool(found[row]["difference_seeds_ci95"]) == (seeds > 1)
