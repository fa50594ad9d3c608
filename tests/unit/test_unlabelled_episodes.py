"""Unlabelled examples in episodes, of images and of nodes; what is refused; memory; and a run from end to end."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from graphs import write_graph
from image_sets import CLASSES, write_folder, write_set
from test_footprint import episode, network
from test_groups import scans
from test_images import AUGMENT, IMAGES, identify, make
from torch.nn import functional

import cml_dist
from cml_dist.cli import main
from cml_dist.config.load import load_config
from cml_dist.data.build import build_domain
from cml_dist.errors import ConfigError, DataError
from cml_dist.memory.footprint import meta_step_footprint
from cml_dist.memory.live_bytes import LiveBytes
from cml_dist.meta.model import MetaModel
from cml_dist.meta.rule import InnerRule, Method
from cml_dist.meta.unlabelled import Unlabelled
from cml_dist.tools.pack import pack
from cml_dist.types import Batch

SHORT = ("train.steps=2", "train.episodes_per_step=1", "eval.episodes=2", "eval.val_episodes=2", "eval.untrained=false")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("sets") / "small", images=IMAGES)


def same(one: Batch, other: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.tensors(), other.tensors(), strict=True))


@pytest.mark.parametrize("split", CLASSES)
def test_they_are_further_images_of_the_episodes_classes_and_of_others_without_labels(root, split):
    domain = make(root, queries=2, unlabelled=3, distractors=1)
    for index in range(5):
        found = domain.episode(split, index)
        own = [identify(domain, image, split) for batch in found.batches[:2] for image in batch.inputs]
        further = [identify(domain, image, split) for image in found.unlabelled.inputs]
        assert len({*own, *further}) == len(own) + len(further)
        classes, each = {number for number, _ in own}, Counter(number for number, _ in further)
        assert classes < set(each) and len(each) == 3 + 1 and set(each.values()) == {3}
        assert found.unlabelled.targets.eq(-1).all()


@pytest.mark.parametrize("settings", [{}, {"augment": AUGMENT}, {"augment": AUGMENT, "draw": 1}])
def test_support_and_query_set_are_as_without_them(root, settings):
    plain = make(root, queries=2, **settings)
    for count, others in ((1, 0), (3, 1)):
        domain = make(root, queries=2, unlabelled=count, distractors=others, **settings)
        for split in CLASSES:
            ours, theirs = (d.prepare(d.episode(split, 4), torch.device("cpu"), torch.float32) for d in (domain, plain))
            assert same(ours.support, theirs.support) and same(ours.query, theirs.query)
            assert same(
                ours.unlabelled, domain.prepare(domain.episode(split, 4), torch.device("cpu"), torch.float32).unlabelled
            )


@pytest.mark.parametrize("base", ["gcn", "g_meta"])
def test_nodes_are_drawn_beside_the_others_too(tmp_path, base):
    graph = write_graph(tmp_path / "g.npz")
    fixed = ["domain.split=3", "domain.split_sizes=[3,2,1]", "domain.ways=2", "eval.split=train", f"domain.base={base}"]
    words = [f"domain.root={graph}", "domain.dropout=0.5", "domain.cap=4", *fixed]
    plain, domain = (
        build_domain(load_config("citeseer", [*words, *more]).domain, train_seed=1, eval_seed=2, splits=["train"])
        for more in ([], ["domain.unlabelled=4", "domain.distractors=1"])
    )
    for index in range(3):
        ids = domain.episode("train", index)
        every = torch.cat([batch.inputs for batch in ids.batches])
        assert len(every.unique()) == len(every)
        assert Counter(domain.graph.labels[ids.unlabelled.inputs].tolist()) == dict.fromkeys(domain.splits["train"], 4)
        ours, theirs = (
            d.prepare(d.episode("train", index), torch.device("cpu"), torch.float32) for d in (domain, plain)
        )
        assert same(ours.support, theirs.support) and same(ours.query, theirs.query)
    most = domain.largest_episode(torch.float32)
    assert len(most.unlabelled.targets) == len(ours.unlabelled.targets) == 12
    for batch, bound in zip(ours.batches, most.batches, strict=True):
        assert batch.inputs.numel() <= bound.inputs.numel()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"queries": 2, "unlabelled": 4}, r"takes 2 \+ 2 \+ 4 images a class .* \+ unlabelled\)"),
        (
            {"queries": 2, "unlabelled": 1, "distractors": 2},
            "domain.ways is 3 and domain.distractors 2, but split 'val'",
        ),
    ],
)
def test_too_few_images_or_classes_are_named(root, settings, message):
    with pytest.raises(DataError, match=message):
        make(root, **settings)


def test_images_of_groups_are_refused(tmp_path):
    pack(write_folder(tmp_path / "scans", scans()), tmp_path / "set", group_by=r"patient(\d+)")
    with pytest.raises(ConfigError, match="has groups of images"):
        make(tmp_path / "set", ways=2, shots=1, queries=1, unlabelled=1)


@pytest.mark.parametrize(
    ("config", "words", "message"),
    [
        ("glyphs", ["method.unlabelled=soft_labels"], "domain.unlabelled is 0"),
        ("sinusoid", ["method.unlabelled=soft_labels"], "domain.unlabelled does not exist for sinusoid"),
        ("glyphs", ["domain.distractors=2"], "they lend nothing else: set domain.unlabelled"),
        ("glyphs", ["domain.unlabelled=2", "model.head=prototype"], "compares with support examples alone"),
    ],
)
def test_what_cannot_be_together_is_refused(config, words, message):
    with pytest.raises(ConfigError, match=message):
        load_config(config, words)


@pytest.mark.parametrize(("engine", "micro_batch"), [("graph", None), ("adjoint", 25)])
def test_memory_is_counted(engine, micro_batch):
    """Against the live bytes of a real meta-step, of more steps than are simulated."""
    torch.manual_seed(0)
    given, net, method = (
        episode(),
        network(),
        Method(2, InnerRule(0.1, 0.1), 1.0, unlabelled=Unlabelled(3, refinement=1.0)),
    )
    support, query = (replace(b, targets=torch.zeros(len(b.targets), dtype=torch.int64)) for b in given.batches)
    pool = Batch(torch.randn(50, support.inputs.shape[1]), torch.full((50,), -1))
    given = replace(given, support=support, query=query, unlabelled=pool)
    domain = functional.cross_entropy, lambda outputs, targets: outputs.detach().mean()
    model = MetaModel(net, *domain, method, engine, micro_batch=micro_batch)
    with LiveBytes() as live:
        live.standing([*model.parameters(), *model.buffers(), *(t for batch in given.batches for t in batch.tensors())])
        model([given], 1.0, frozenset({given.index}))[0].backward()
    found = meta_step_footprint(net, *domain, method, engine, given, micro_batch=micro_batch)
    # The step that makes the labels may be the largest, and is counted as if what follows it were still kept.
    most = 2 * found.adapted / 5 if engine == "adjoint" else 0
    assert live.peak * 0.98 - 1024 <= found.peak - found.episode <= live.peak * 1.02 + 1024 + most


def test_a_run_from_end_to_end(tmp_path, capfd):
    """Trained without and with, compared on the same test episodes, exported, and used with a pool of one's own."""
    packed = write_set(tmp_path / "set", images=IMAGES, size=16)
    shape = ("domain.ways=3", "domain.shots=1", "domain.queries=2", "model.filters=4", "run.device=cpu")
    words = (f"domain.root={packed}", "domain.name=images", *shape, *SHORT)
    pool = ("domain.unlabelled=3", "domain.distractors=1")
    runs = {"plain": (), "refined": pool}
    for name, more in runs.items():
        assert main(["train", "cifar_fs", *words, *more, f"run.dir={tmp_path / name}"]) == 0
    assert main(["compare", *(str(tmp_path / name) for name in runs)]) == 0
    assert "domain.unlabelled=3" in capfd.readouterr().out
    learner = cml_dist.load(tmp_path / "refined")
    pictures = torch.randint(0, 256, (9, 3, 16, 16), dtype=torch.uint8).numpy()
    alone, with_pool = (
        learner.adapt(list(pictures[:3]), "abc", unlabelled=more).probabilities(list(pictures[3:]))
        for more in ((), list(pictures[3:]))
    )
    assert (alone != with_pool).any()
    with pytest.raises(DataError, match="trained without"):
        cml_dist.load(tmp_path / "plain").adapt(list(pictures[:3]), "abc", unlabelled=list(pictures[3:]))
