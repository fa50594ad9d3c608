"""A run that starts from an earlier one: what is taken over, what a resume needs, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from image_sets import write_set
from safetensors.torch import load_file

from cml_dist.cli import main
from cml_dist.run import checkpoint as checkpoints
from cml_dist.run.folder import run_config

TINY = (
    "domain.ways=3", "domain.shots=1", "domain.queries=2", "model.filters=4", "method.inner_steps=1",
    "method.name=maml", "train.episodes_per_step=1", "eval.val_episodes=2", "eval.episodes=2", "eval.untrained=false",
    "parallel.threads=1", "engine.name=graph", "run.log_every=1",
)  # fmt: skip


def go(images: Path, folder: Path, *more: str) -> int:
    settings = ("train", "mini_imagenet", f"domain.root={images}", f"run.dir={folder}", *TINY, "train.steps=2", *more)
    return main([*settings])


def params(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return checkpoints.load(checkpoints.path_of(folder / "checkpoints", step)).params()


def started_with(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "start" / "model.safetensors")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_set(tmp_path_factory.mktemp("data") / "set", size=16)


@pytest.fixture(scope="module")
def earlier(tmp_path_factory, images) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "earlier"
    assert go(images, folder, "method.name=cml") == 0
    return folder


@pytest.mark.parametrize("part", ["", "export"])
def test_a_run_starts_from_the_parameters_of_another_and_says_what_it_took(part, earlier, images, tmp_path, capsys):
    assert go(images, tmp_path / "run", f"model.init_from={earlier / part}", "domain.ways=2", "method.name=cml") == 0
    said, then, now = capsys.readouterr().out, params(earlier, 2), started_with(tmp_path / "run")
    assert "body: 16 of 16 tensors\n" in said
    assert "head: 0 of 2 tensors; not taken: head.weight is 3x4 there, 2x4 here" in said
    assert ("co-learner: 8 of 10 tensors" if not part else "co-learner: 0 of 10 tensors: none there") in said
    assert all(torch.equal(now[n], then[n]) for n in then if n.startswith("body."))
    assert "nearest centroid" in said, "what the start is worth by itself"


def test_a_resumed_run_needs_no_folder_but_its_own_and_repeats_to_the_bit(earlier, images, tmp_path):
    source = shutil.copytree(earlier, tmp_path / "source")
    frozen = ("model.trained=[head]", f"model.init_from={source}")  # what is frozen is in no checkpoint
    assert go(images, tmp_path / "whole", *frozen, "train.steps=4") == 0
    assert go(images, tmp_path / "run", *frozen) == 0
    shutil.rmtree(source)
    assert go(images, tmp_path / "run", *frozen, "train.steps=4") == 0
    for folder in ("whole", "run"):
        assert torch.equal(started_with(tmp_path / folder)["body.block1.conv.weight"],
                           params(earlier, 2)["body.block1.conv.weight"])  # fmt: skip
    found, expected = params(tmp_path / "run", 4), params(tmp_path / "whole", 4)
    assert all(torch.equal(found[n], expected[n]) for n in expected)
    assert main(["eval", str(tmp_path / "run")]) == 0
    # And a run from one with frozen parameters has them by its export.
    assert go(images, tmp_path / "next", f"model.init_from={tmp_path / 'run'}") == 0
    assert torch.equal(started_with(tmp_path / "next")["body.block1.conv.weight"],
                       params(earlier, 2)["body.block1.conv.weight"])  # fmt: skip


def test_rates_are_taken_over_and_norms_a_step_become_those_of_the_first(images, tmp_path, capsys):
    learned = ("method.name=maml_pp", "method.inner_steps=2")
    assert go(images, tmp_path / "plus", *learned) == 0
    then = params(tmp_path / "plus", 2)
    assert go(images, tmp_path / "more", *learned, f"model.init_from={tmp_path / 'plus'}") == 0
    assert "learned rates: 10 of 10 tensors" in capsys.readouterr().out
    rate = "rule.lr.body.block1.conv.weight"
    assert torch.equal(started_with(tmp_path / "more")[rate], then[rate])
    assert go(images, tmp_path / "plain", f"model.init_from={tmp_path / 'plus'}") == 0
    said = capsys.readouterr().out
    assert "body: 16 of 16 tensors" in said and "learned rates: none here" in said
    norm = "body.block1.norm.weight"
    assert torch.equal(started_with(tmp_path / "plain")[norm], then[f"rule.norm.{norm}"][0])


def test_images_are_normalised_as_those_of_the_earlier_run(earlier, tmp_path):
    other = write_set(tmp_path / "other", size=16, images=9)
    used = {}
    for statistics in ("weights", "set"):
        folder = tmp_path / statistics
        assert go(other, folder, f"model.init_from={earlier}", f"domain.statistics={statistics}") == 0
        used[statistics] = json.loads((folder / "export" / "model.json").read_text())["preprocessing"]
    then = json.loads((earlier / "export" / "model.json").read_text())["preprocessing"]
    assert used["weights"] == then != used["set"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["model.init_from={earlier}", "model.filters=5"], "nothing of its body fits model.backbone conv4; not taken: "
         "body.block1.conv.weight is 4x3x3x3 there, 5x3x3x3 here"),
        (["model.init_from={earlier}", "model.norm=frozen"], "which has no statistics to freeze; set model.norm=batch"),
        (["model.init_from=/nowhere"], "/nowhere, which holds no parameters to start from (No such file or directory)"),
        (["model.init_from={earlier}", "model.pretrained=true"], "but model.pretrained is true"),
    ],
)  # fmt: skip
def test_what_cannot_be_started_from_is_one_line(settings, said, earlier, images, tmp_path, capsys):
    assert go(images, tmp_path / "run", *(word.format(earlier=earlier) for word in settings)) != 0
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_body_that_fits_in_part_is_warned_of(earlier, images, tmp_path, capsys):
    assert go(images, tmp_path / "run", f"model.init_from={earlier}", "model.extra_blocks=1") == 0
    assert "4 of 20 tensors of the body are not taken over, and start as without it" in capsys.readouterr().err


# --------------------------------------------------------------------------- method.inner_lr=auto


def lines(folder: Path) -> list[dict]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: one[key] for key in ("step", "loss", "grad_norm")} for one in found]


def test_the_inner_rate_is_the_best_of_a_ladder_and_becomes_the_runs_setting(earlier, images, tmp_path, capsys):
    start, some = f"model.init_from={earlier}", "eval.val_episodes=20"
    assert go(images, tmp_path / "auto", start, some, "method.inner_lr=auto") == 0
    said = capsys.readouterr().out
    rate = yaml.safe_load((tmp_path / "auto" / "config.yaml").read_text())["method"]["inner_lr"]
    rows = [line.split() for line in said.splitlines() if line.strip().startswith(("0.0", "0.1", "0.3", "1 "))]
    scores = {float(row[0]): float(row[1]) for row in rows}
    assert list(scores) == [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0] and scores[rate] == max(scores.values())
    assert [row[0] for row in rows if row[-1] == "chosen"] == [f"{rate:g}"] and "random values" not in said
    # The same run as with the number, and it goes on by the same command or with the number.
    assert go(images, tmp_path / "number", start, some, f"method.inner_lr={rate}") == 0
    assert lines(tmp_path / "auto") == lines(tmp_path / "number")
    exported = json.loads((tmp_path / "auto" / "export" / "model.json").read_text())["rule"]
    assert exported["head_lr"] == exported["body_lr"] == rate
    for setting in ("auto", rate):
        assert go(images, tmp_path / "auto", start, some, f"method.inner_lr={setting}") == 0
    assert "before training" not in capsys.readouterr().out, "it is chosen once"
    assert go(images, tmp_path / "auto", start, some, "method.inner_lr=0.7") == 1
    assert run_config(tmp_path / "auto", ["method.inner_lr=auto"]).method.inner_lr == rate
    asked = json.loads((tmp_path / "auto" / "sessions.jsonl").read_text().splitlines()[0])
    assert asked["inner_lr"] == "auto"
    assert f"method.inner_lr was {rate}, is 0.7" in capsys.readouterr().err


def test_a_rate_for_random_values_says_that_it_means_little(tmp_path, capsys):
    settings = ("method.inner_lr=auto", "train.steps=1", "train.episodes_per_step=1", "eval.val_episodes=3")
    assert main(["train", "sinusoid", f"run.dir={tmp_path / 'run'}", *settings, "eval.final=false"]) == 0
    assert "The network starts from random values" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["method.name=meta_sgd"], "method.name meta_sgd learns its rates: give the number that they start at"),
        (["method.inner_steps=0"], "but nothing adapts at it"),
        (["method.head_lr=0.1", "method.body_lr=0.2"], "but nothing adapts at it"),
    ],
)
def test_no_rate_is_chosen_where_none_would_count(settings, said, images, tmp_path, capsys):
    assert go(images, tmp_path / "run", "method.inner_lr=auto", *settings) == 2
    assert said in capsys.readouterr().err


def test_a_rate_that_is_none_is_refused_by_its_range(images, tmp_path, capsys):
    assert go(images, tmp_path / "run", "method.inner_lr=best") == 2
    assert "method.inner_lr is 'best'" in capsys.readouterr().err
