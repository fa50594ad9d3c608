"""A trained network on other data: by its own statistics, and what does not fit is said by its cause."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from image_sets import delivered, pixels, write_set

from cml_dist.cli import main
from cml_dist.config.load import load_config, merge, parse_config
from cml_dist.data.build import build_domain
from cml_dist.data.pixels import as_png
from cml_dist.data.shard_writer import new_shard_set
from cml_dist.distributed.world import World
from cml_dist.errors import CheckpointError, ConfigError, DataError
from cml_dist.run import checkpoint as checkpoints
from cml_dist.run.export import Wanted, export_again
from cml_dist.run.folder import on_set, run_config
from cml_dist.run.report import evaluate_run
from cml_dist.run.trained import trained_inputs
from cml_dist.run.trainer import train
from cml_dist.telemetry.console import Console

ALONE = World(accelerator=None, rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
SIZE = 16


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_set(tmp_path_factory.mktemp("sets") / "own", images=4, size=SIZE)


@pytest.fixture(scope="module")
def dark(tmp_path_factory) -> Path:
    """Only a test split, half as bright: without statistics of its own."""
    folder = tmp_path_factory.mktemp("sets") / "dark"
    with new_shard_set(folder, name="dark", image_size=(SIZE, SIZE), channels=3) as writer:
        for number in range(3):
            for image in range(4):
                noisy = pixels(10 * number + image, SIZE) // 5 * 2 + pixels(100 + number, SIZE) // 5 * 3
                writer.add("test", f"c{number}", f"{number}/{image}", as_png(noisy // 2))
    return folder


@pytest.fixture(scope="module")
def run(root, tmp_path_factory) -> Path:
    """A network whose answers depend on the statistics: batch statistics of features would hide them."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    settings = {
        "domain": {"name": "images", "root": str(root), "ways": 3, "shots": 1, "queries": 3},
        "model": {"backbone": "test_vit"},
        "method": {"name": "maml", "body_lr": 0.001, "head_lr": 0.03, "inner_steps": 5},
        "train": {"steps": 1, "episodes_per_step": 1},
        "eval": {"every": 0, "val_episodes": 1, "episodes": 8, "untrained": False},
        "parallel": {"threads": 1},
        "run": {"dir": str(folder)},
    }
    train(parse_config(settings), Console(quiet=True))
    return folder


def evaluated(folder: Path, *overrides: str) -> str:
    """What a test says; its scores are then in the folder."""
    said = io.StringIO()
    evaluate_run(run_config(folder, overrides), "best", Console(said))
    return said.getvalue()


def scores(folder: Path) -> list[float]:
    """Of the newest test."""
    return np.load(max((folder / "evals").glob("*.npz")))["meta"].tolist()


def delivered_on(folder: Path, root: Path, export: Path) -> list[float]:
    """The scores of the export on the test of a run, with another set."""
    config = run_config(folder, [f"domain.root={root}", "domain.mean=[0,0,0]", "domain.std=[1,1,1]"])
    domain = build_domain(config.domain, train_seed=0, eval_seed=config.eval.seed, splits=["test"])
    return delivered(export, domain, config.eval.episodes)


def test_what_is_tested_is_what_is_delivered_and_says_so(run, dark, root, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    said = evaluated(folder, f"domain.root={dark}")
    assert said.count("Images are normalised as those of the run were (mean 0.") == 1
    assert np.allclose(scores(folder), delivered_on(folder, dark, run))
    assert "normalised" not in evaluated(folder, f"domain.root={root}")
    # Exported with the other set at hand, the statistics are still the model's.
    wanted = Wanted(to=str(tmp_path / "out"))
    export_again(run_config(folder, [f"domain.root={dark}"]), wanted, Console(quiet=True))
    here, there = (json.loads((path / "model.json").read_text()) for path in (tmp_path / "out", run / "export"))
    assert here["preprocessing"] == there["preprocessing"]


def test_statistics_on_the_command_line_win(run, dark, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    evaluated(folder, f"domain.root={dark}")
    by_those_of_the_run = scores(folder)
    evaluated(folder, f"domain.root={dark}", "domain.mean=[0.25,0.25,0.25]", "domain.std=[0.1,0.1,0.1]")
    assert scores(folder) != by_those_of_the_run


def without_record(folder: Path) -> None:
    """As an earlier version left it: the checkpoint says nothing of what the network reads."""
    for path in (folder / "checkpoints").iterdir():
        whole = checkpoints.load(path)
        state = {key: value for key, value in whole.state.items() if key != "inputs"}
        tensors = [(name, whole.read(name)) for name in whole.layout]
        checkpoints.save(ALONE, path.parent, whole.step, state, whole.layout, tensors)


def test_a_run_of_an_earlier_version_is_tested_by_its_sessions(run, dark, root, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    without_record(folder)
    assert "Images are normalised as those of the run were" in evaluated(folder, f"domain.root={dark}")
    assert np.allclose(scores(folder), delivered_on(folder, dark, run))
    (folder / "sessions.jsonl").write_text("{}\n")
    evaluated(folder)
    bright = write_set(tmp_path / "bright", images=4, size=SIZE)
    assert "does not say what images its network was trained on" in evaluated(folder, f"domain.root={bright}")


@pytest.mark.parametrize(
    ("other", "overrides", "said"),
    [
        ({"size": 32}, (), "are 32 px in colour, but the network reads 16 px in colour; pack .* --image-size 16$"),
        ({"channels": 1}, (), "are 16 px in grey, but the network reads 16 px in colour; pack them with --channels 3$"),
        ({"size": 8, "channels": 1}, (), "pack them with --image-size 16 --channels 3"),
        ({}, ("domain.ways=2",), r"ask for 2 outputs \(domain.ways\), but the network has 3; set domain.ways=3"),
        ({"classes": 2}, (), "split 'test' of small has 2 classes; use a set with 3"),
    ],
)
def test_another_size_colour_or_number_of_classes_is_said_first(run, tmp_path, other, overrides, said):
    folder = shutil.copytree(run, tmp_path / "run")
    for path in (folder / "checkpoints").iterdir():  # no weight is read before
        path.write_bytes(path.read_bytes()[:-1000] + bytes(1000))
    if "classes" in other:
        with new_shard_set(tmp_path / "set", name="small", image_size=(SIZE, SIZE), channels=3) as writer:
            for number in range(other["classes"]):
                for image in range(4):
                    writer.add("test", f"{number}", f"{number}/{image}", as_png(pixels(image, SIZE)))
    else:
        write_set(tmp_path / "set", images=4, **{"size": SIZE, **other})
    with pytest.raises(DataError, match=said):
        evaluated(folder, f"domain.root={tmp_path / 'set'}", *overrides)


def test_several_sets_make_one_table_and_each_is_the_test_on_it_alone(run, root, dark, tmp_path, capsys):
    alone, folder = (shutil.copytree(run, tmp_path / name) for name in ("alone", "run"))
    by_one = [evaluated(alone, f"domain.root={place}", "eval.episodes=5") and scores(alone) for place in (root, dark)]
    assert main(["eval", str(folder), "--on", str(root), str(dark), "eval.episodes=5", "--checkpoint", "best"]) == 0
    kept = sorted((folder / "evals").glob("*.json"))[1:]  # the first is that of training
    assert [np.load(path.with_suffix(".npz"))["meta"].tolist() for path in kept] == by_one
    own, other = (json.loads(path.read_text()) for path in kept)
    assert own["overrides"] == {"eval.episodes": 5}
    assert other["overrides"] == {"eval.episodes": 5, "domain.root": str(dark)}
    *_, title, rows = capsys.readouterr().out.partition("test splits, step 1 (best)")
    assert title
    for place, test in ((root, own), (dark, other)):
        mean, ci95 = (f"{100 * test['meta'][key]:.2f} %" for key in ("mean", "ci95"))
        (row,) = (line.split("  ") for line in rows.splitlines() if str(place) in line)
        assert [cell.strip() for cell in row if cell.strip()] == [str(place), "MAML", mean, f"± {ci95}", "5", "33.33 %"]


def test_all_sets_are_looked_at_before_the_first_is_tested(run, root, tmp_path, capsys):
    folder, large = shutil.copytree(run, tmp_path / "run"), write_set(tmp_path / "large", images=4, size=32)
    before = sorted(path.name for path in (folder / "evals").iterdir())
    assert main(["eval", str(folder), "--on", str(root), str(large)]) != 0
    assert "are 32 px in colour, but the network reads 16 px in colour" in capsys.readouterr().err
    assert sorted(path.name for path in (folder / "evals").iterdir()) == before
    with pytest.raises(SystemExit):
        main(["eval", str(folder), "--on", "eval.episodes=5"])
    assert "--on: name a set before the settings" in capsys.readouterr().err


def test_sets_are_packed_ones_and_glyphs_in_either_direction(run, root):
    images = on_set(run_config(run, ["domain.shots=2"]), "glyphs")
    assert (images.domain.name, images.domain.root, images.domain.ways, images.domain.shots) == ("glyphs", None, 3, 2)
    glyphs = on_set(load_config("glyphs", ["domain.ways=7"]), str(root))
    assert (glyphs.domain.name, glyphs.domain.root, glyphs.domain.ways) == ("images", str(root), 7)
    with pytest.raises(ConfigError, match="--on names image sets, but domain.name of the run is sinusoid"):
        on_set(load_config("sinusoid", []), str(root))


@pytest.mark.parametrize(
    ("overrides", "ways"),
    [([], 3), (["model.head=centroid"], None), (["model.head=ridge", "method.colearner=true"], None),
     (["model.head=ridge", "method.colearner=true", "model.colearner.kind=dense"], 3)],
)  # fmt: skip
def test_the_number_of_classes_is_fixed_where_each_has_an_output_of_its_own(run, overrides, ways):
    assert trained_inputs(run_config(run, overrides), pytest.fail).output_dim == ways


def test_a_border_that_is_never_seen_is_said_before_training_and_in_the_plan(tmp_path, capsys):
    settings = [f"domain.root={write_set(tmp_path / 'set', images=4, size=34)}", "domain.name=images", "domain.ways=3"]
    settings += ["domain.queries=3", "model.backbone=test_convnext", "model.colearner.depth=0", "eval.final=false"]
    settings += ["train.steps=1", "train.episodes_per_step=1", "eval.val_episodes=1", f"run.dir={tmp_path / 'run'}"]
    settings += ["parallel.threads=1"]
    said = "test_convnext never sees the last 2 rows and 2 columns of images of 34x34 (11 % of the pixels)"
    console = io.StringIO()
    train(load_config("glyphs", settings), Console(console))
    text = console.getvalue()
    assert text.index(said) < text.index("step 1/1") and "sizes that fit are 32 and 36" in text
    assert main(["plan", "glyphs", *settings, "--gpus", "1", "--gpu-memory-gib", "1"]) == 0
    shown = capsys.readouterr()
    assert said in shown.out + shown.err


def test_training_goes_on_with_its_own_data_alone(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    larger = write_set(tmp_path / "larger", images=4, size=32)
    config = run_config(folder, [f"domain.root={larger}", "eval.episodes=7"])
    with pytest.raises(CheckpointError, match="the data is not that of the run"):
        train(parse_config(merge(config.model_dump(mode="json"), [])), Console(quiet=True))
