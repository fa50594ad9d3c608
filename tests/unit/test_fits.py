"""Regression at test: the score on a fixed grid, and the picture of a few fits."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from cml_dist.cli import main
from cml_dist.config.load import parse_config
from cml_dist.data.base import Domain
from cml_dist.data.sinusoid import SinusoidDomain
from cml_dist.distributed.world import World
from cml_dist.meta.inner import adapt
from cml_dist.run import checkpoint as checkpoints
from cml_dist.run.assemble import assemble
from cml_dist.run.folder import run_config
from cml_dist.run.trainer import train
from cml_dist.telemetry.console import Console

ALONE = World(accelerator=None, rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
BASE = {
    "domain": {"name": "sinusoid", "family": "mixed", "shots": 5, "queries": 5},
    "model": {"backbone": "mlp", "hidden": [8, 8], "colearner": {"depth": 1}},
    "train": {"steps": 2, "episodes_per_step": 2},
    "eval": {"val_episodes": 2, "episodes": 4},
    "engine": {"name": "graph"},
    "parallel": {"threads": 1},
}


def trained(folder, **method):
    settings = {**BASE, "method": {"inner_steps": 1, **method}, "run": {"dir": str(folder), "precision": "fp64"}}
    assert train(parse_config(settings), Console(quiet=True)).finished
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("runs") / "cml", name="cml")


def test_the_score_on_the_grid_is_that_of_the_adapted_learner_beside_the_one_on_random_points(run):
    report, scores = json.loads((run / "eval.json").read_text()), np.load(run / "eval_scores.npz")
    parts = assemble(run_config(str(run), []), ALONE, Console(quiet=True), training=False)
    params = checkpoints.load(checkpoints.path_of(run / "checkpoints", 2)).params()
    for learner in ("meta", "co"):
        by_hand = []
        for index in range(4):
            episode, grid = parts.domain.episode("test", index), parts.domain.grid("test", index)
            adapted = adapt(params, episode, parts.model.problem, parts.model.method, learner)
            (outputs,) = parts.model.problem.answers(adapted, replace(episode, query=grid), (learner,))
            by_hand.append((outputs - grid.targets).square().mean().item())
        assert scores[f"{learner}_grid"] == pytest.approx(by_hand, rel=1e-12)
        found = report[learner]["grid"]
        assert found["mean"] == pytest.approx(np.mean(by_hand)) and found["episodes"] == 4
        assert found["ci95"] == pytest.approx(3.182446 * np.std(by_hand, ddof=1) / 2, rel=1e-5)  # t of 3
        assert report[learner]["mean"] == pytest.approx(scores[learner].mean()) != pytest.approx(found["mean"])
        assert report["untrained"][learner]["grid"]["mean"] > 0


def test_the_table_has_it_below_and_the_picture_shows_learner_and_co_learner(run, tmp_path, capfd):
    picture = tmp_path / "new" / "fits.svg"
    assert main(["eval", str(run), "--plot", str(picture)]) == 0
    said = capfd.readouterr().out
    assert said.index("untrained CML-dagger") < said.index("CML, on the grid") < said.index("CML-dagger, on the grid")
    drawn = picture.read_text()
    for who in ("CML", "CML-dagger"):
        assert all(f"<!-- {who}, {when} -->" in drawn for when in ("before adaptation", "1 step", "10 steps"))
    assert all(f"<!-- {what} -->" in drawn for what in ("true curve", "support points", "episode 3", "x", "y"))
    assert "<!-- CML, test split, step 2 (best) -->" in drawn


@pytest.mark.parametrize("method", [{"name": "maml"}, {"name": "maml_pp"}, {"name": "anil"}])
def test_a_method_without_a_co_learner_is_drawn_alone(method, tmp_path):
    picture = tmp_path / "fits.PNG"
    assert main(["eval", str(trained(tmp_path / "run", **method)), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("fits.jpg", "fits.jpg; give a name that ends in .png, .pdf or .svg"),
        ("fits.png", "the episodes of this run are none"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_the_test(name, told, run, tmp_path, monkeypatch, capfd):
    if name == "fits.png":
        monkeypatch.setattr(SinusoidDomain, "grid", Domain.grid)  # as for images
    tests = len(list((run / "evals").iterdir()))
    assert main(["eval", str(run), "--plot", str(tmp_path / name)]) == 2
    err = capfd.readouterr().err
    assert err.startswith("error: --plot") and told in err and err.count("\n") == 1
    assert len(list((run / "evals").iterdir())) == tests and not list(tmp_path.iterdir())
