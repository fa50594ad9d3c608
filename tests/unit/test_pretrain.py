"""``cml-dist pretrain``: the body as a plain classifier of the training classes, and a run that starts from it."""

from __future__ import annotations

import itertools
import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from image_sets import CLASSES, pixels, seed_of, write_set

from cml_dist.cli import main
from cml_dist.config.load import load_config
from cml_dist.data.base import Domain
from cml_dist.data.build import build_domain
from cml_dist.data.pixels import as_png
from cml_dist.data.shard_writer import new_shard_set
from cml_dist.nets.build import make_network
from cml_dist.run import checkpoint as checkpoints
from cml_dist.run.hooks import nothing

IMAGES = 5
TINY = (
    "model.filters=4", "domain.ways=3", "domain.shots=1", "domain.queries=2", "domain.batch=8", "train.steps=3",
    "train.episodes_per_step=2", "eval.every=2", "eval.val_episodes=2", "eval.episodes=3", "parallel.threads=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_set(tmp_path_factory.mktemp("data") / "set", size=16, images=IMAGES)


def pretrain(images: Path, folder: Path, *more: str, on_step=nothing) -> int:
    return main(["pretrain", str(images), f"run.dir={folder}", *TINY, *more], on_step=on_step)


def params(folder: Path, step: int = 3) -> dict[str, torch.Tensor]:
    return checkpoints.load(checkpoints.path_of(folder / "checkpoints", step)).params()


def configured(images: Path, *more: str):
    return load_config("pretrain", [f"domain.root={images}", *TINY, *more])


def domain_of(images: Path, *more: str) -> Domain:
    return build_domain(configured(images, *more).domain, train_seed=0, eval_seed=0)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, images) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "body"
    assert pretrain(images, folder) == 0
    return folder


@pytest.mark.parametrize("turns", [1, 4])
def test_each_training_image_comes_once_in_an_epoch_with_the_number_of_its_class(turns, images):
    domain = domain_of(images, f"domain.augment.rotate_classes={str(turns > 1).lower()}", "domain.batch=6")
    classes, batches = CLASSES["train"], CLASSES["train"] * IMAGES * turns // 6
    assert domain.output_dim == classes * turns
    known = np.stack([pixels(seed_of("train", c, i), 16) for c in range(classes) for i in range(IMAGES)])
    seen = []
    for index in range(batches):
        episode = domain.episode("train", index)
        assert len(episode.support.inputs) == 0
        assert torch.equal(episode.query.inputs, domain.episode("train", index).query.inputs)
        for image, label in zip(episode.query.inputs, episode.query.targets.tolist(), strict=True):
            turn, number = divmod(label, classes)
            upright = np.rot90(image.numpy(), -turn, axes=(1, 2))
            (place,) = np.flatnonzero((known == upright).all(axis=(1, 2, 3)))
            assert place // IMAGES == number
            seen.append((int(place), turn))
    assert len(set(seen)) == len(seen) == classes * IMAGES * turns
    again = [domain.episode("train", index).query.targets.tolist() for index in (0, batches)]
    assert again[0] != again[1], "another epoch, another order"


def test_a_step_is_that_of_a_plain_classifier(images, tmp_path):
    plain = ("optim.name=sgd", "optim.lr=0.1", "optim.schedule=constant", "train.steps=1", "run.precision=fp64")
    assert pretrain(images, tmp_path / "run", *plain, "eval.final=false") == 0
    config, domain = configured(images, *plain), domain_of(images)
    net = make_network(config, domain.input_shape, domain.output_dim).double()
    batches = [domain.prepare(domain.episode("train", i), torch.device("cpu"), torch.float64).query for i in (0, 1)]
    losses = [torch.nn.functional.cross_entropy(net(b.inputs)[0], b.targets) for b in batches]
    (sum(losses) / 2).backward()
    found = params(tmp_path / "run", 1)
    for name, value in net.named_parameters():
        step = 0.0 if value.grad is None else 0.1 * value.grad  # a bias before a norm is left out
        assert (found[name] - (value - step)).abs().max() < 1e-12, name


def test_a_pretraining_that_was_stopped_goes_on_to_the_bit(pretrained, images, tmp_path):
    def stop(step, what):
        if (step, what) == (1, "episode"):
            signal.raise_signal(signal.SIGINT)

    assert pretrain(images, tmp_path / "run", on_step=stop) == 130
    assert pretrain(images, tmp_path / "run") == 0
    found, expected = params(tmp_path / "run"), params(pretrained)
    assert all(torch.equal(found[n], expected[n]) for n in expected)
    tests = [json.loads((folder / "eval.json").read_text()) for folder in (tmp_path / "run", pretrained)]
    assert tests[0] == tests[1]


def test_it_is_judged_by_the_nearest_centroid(pretrained, images):
    best, domain, scores = json.loads((pretrained / "eval.json").read_text()), domain_of(images), []
    net = make_network(configured(images), domain.input_shape, domain.output_dim)
    net.take_over(params(pretrained, best["step"]))
    for index in range(3):
        episode = domain.prepare(domain.episode("test", index), torch.device("cpu"), torch.float32)
        with torch.no_grad():
            support, query = (torch.nn.functional.normalize(net.body(b.inputs).pooled) for b in episode.batches)
        nearest = torch.cdist(query, support).argmin(1)  # of one shot a class
        scores.append((nearest == episode.query.targets).double().mean().item())
    assert best["meta"]["mean"] == pytest.approx(np.mean(scores))


def test_a_run_starts_from_it(pretrained, images, tmp_path, capsys):
    few = ("domain.ways=3", "domain.queries=2", "train.steps=1", "eval.val_episodes=2", "eval.episodes=2")
    start = (f"domain.root={images}", f"model.init_from={pretrained}", "model.filters=4", "parallel.threads=1")
    assert main(["train", "mini_imagenet", f"run.dir={tmp_path / 'run'}", *few, *start]) == 0
    said = capsys.readouterr().out
    assert "body: 16 of 16 tensors" in said and "head.weight is 6x4 there, 3x4 here" in said
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["domain"]["batch"] is None


def test_it_is_tested_on_a_set_of_other_classes_and_planned(pretrained, images, tmp_path, capsys):
    with new_shard_set(tmp_path / "other", name="other", image_size=(16, 16), channels=3, source="made") as writer:
        for split, name, image in itertools.product(("test",), "abc", range(IMAGES)):
            writer.add(split, f"{split}-{name}", f"{split}-{name}/{image}", as_png(pixels(ord(name) + image, 16)))
    assert main(["eval", str(pretrained), "--on", str(tmp_path / "other")]) == 0
    assert "classifier, nearest centroid" in capsys.readouterr().out
    settings = (f"domain.root={images}", *TINY, "--gpus", "1", "--gpu-memory-gib", "1", "--json")
    assert main(["plan", "pretrain", *settings]) == 0
    net = make_network(configured(images), (3, 16, 16), CLASSES["train"])
    assert json.loads(capsys.readouterr().out)["num_parameters"] == sum(p.numel() for p in net.parameters())


def test_its_batches_have_the_size_that_is_read(images, tmp_path):
    domain = domain_of(images, "domain.size=24")
    assert domain.episode("train", 0).query.inputs.shape[2:] == domain.episode("val", 0).query.inputs.shape[2:]
    assert pretrain(images, tmp_path / "run", "domain.size=24") == 0


def test_what_does_not_fit_is_one_line(pretrained, images, tmp_path, capsys):
    def refused(code: int) -> str:
        assert code != 0
        return capsys.readouterr().err

    assert "there is no packed image set at" in refused(pretrain(tmp_path / "none", tmp_path / "run"))
    assert "domain.batch is not a setting" in refused(pretrain(images, tmp_path / "run", "domain.name=sinusoid"))
    assert "domain.batch is 500, but small has 30" in refused(pretrain(images, tmp_path / "run", "domain.batch=500"))
    assert "but method.inner_steps is 1" in refused(pretrain(images, tmp_path / "run", "method.inner_steps=1"))
    assert "holds a run of another configuration" in refused(pretrain(images, pretrained, "optim.lr=0.5"))
    assert "and no learner to be exported" in refused(main(["export", str(pretrained)]))
    assert not (tmp_path / "run").exists()
