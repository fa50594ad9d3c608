"""Parts of a network by name: what adapts, what is trained, and what a frozen part costs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from image_sets import write_set
from safetensors.torch import load_file

import cml_dist
from cml_dist.config.load import load_config, parse_config
from cml_dist.config.schema import ModelConfig, RunConfig
from cml_dist.errors import CmlError, ConfigError
from cml_dist.memory.forecast import forecast
from cml_dist.nets.build import build_net, make_network
from cml_dist.nets.partition import freeze, select
from cml_dist.run.export import read_weights
from cml_dist.run.trainer import train
from cml_dist.telemetry.console import Console


def net_of(backbone: str, shape=(3, 32, 32)):
    return build_net(ModelConfig(backbone=backbone), input_shape=shape, output_dim=3, seed=0, colearner=True)


def test_terms_select_by_part_block_and_glob():
    net = net_of("conv4")
    names = [n for n, _ in net.named_parameters() if not n.startswith("colearner.")]
    assert select(net, ("body", "head"), "x") == names
    assert select(net, ("head", "last:1"), "x") == [n for n in names if n.startswith(("body.block4.", "head."))]
    assert select(net, ("body.block?.conv.weight",), "x") == [f"body.block{i}.conv.weight" for i in range(1, 5)]
    assert not any(n.startswith("colearner") for n in select(net, ("*",), "x"))


@pytest.mark.parametrize(
    ("backbone", "block"),
    [("test_vit", "body.model.blocks.5."), *((name, "body.model.layer4.0.") for name in ("test_resnet", "resnet12"))],
)
def test_the_last_block_of_a_timm_model(backbone, block):
    chosen = select(net_of(backbone), ("last:1",), "x")
    assert [n for n in chosen if n.startswith(block)]
    assert all(n.startswith((block, "body.model.norm.")) for n in chosen)


@pytest.mark.parametrize(
    ("term", "words"),
    [
        ("boddy", "nearest|body"),
        ("last:9", "the body has 4 blocks"),
        ("body.blok1.*", "block1"),
        ("colearner", "no param"),
    ],
)
def test_a_term_that_selects_nothing_is_refused(term, words):
    with pytest.raises(ConfigError, match=words):
        select(net_of("conv4"), (term,), "method.adapts")


def test_what_is_frozen_becomes_a_constant():
    net = net_of("test_vit")
    before = dict(net.named_parameters())
    freeze(net, select(net, ("head", "last:2"), "x"))
    left, constants = dict(net.named_parameters()), dict(net.named_buffers())
    assert {n for n in left if n.startswith("body.")} == set(select(net_of("test_vit"), ("last:2",), "x"))
    assert set(before) == set(left) | set(constants)
    for name in constants:
        assert torch.equal(constants[name], before[name])
    # What lies below every trained parameter builds no graph.
    features = net.body.model.patch_embed(torch.randn(2, 3, 32, 32))
    assert not features.requires_grad


def images_of(folder):
    return {"name": "images", "root": str(write_set(folder / "set", size=32)), "ways": 3, "shots": 2, "queries": 2}


SETTINGS = {
    "domain": {"name": "sinusoid", "shots": 5, "queries": 5},
    "model": {"backbone": "mlp", "hidden": [8, 8], "trained": ["head", "last:1"]},
    "method": {"inner_steps": 2, "adapts": ["head"]},
    "train": {"steps": 4, "episodes_per_step": 2},
    "eval": {"val_episodes": 2, "episodes": 3, "every": 0},
}


def test_a_run_with_frozen_and_adapting_parts(tmp_path):
    """Trained, exported and loaded again: the frozen part is that of the start, and only the head adapts."""
    config = parse_config({**SETTINGS, "run": {"dir": str(tmp_path / "run")}})
    assert train(config, Console()).finished
    net = build_net(config.model, input_shape=(1,), output_dim=1, seed=0, colearner=True)
    start, exported = dict(net.named_parameters()), load_file(tmp_path / "run" / "export" / "model.safetensors")
    moved = {n for n in exported if not torch.equal(exported[n], start[n])}
    assert moved == {"body.layers.1.weight", "body.layers.1.bias", "head.weight", "head.bias"}
    assert json.loads((tmp_path / "run" / "export" / "model.json").read_text())["rule"]["adapts"] == [
        "head.bias",
        "head.weight",
    ]
    learner = cml_dist.load(tmp_path / "run")
    adapted = learner.adapt([[0.0], [1.0]], [0.5, 1.0])
    changed = {n for n, p in adapted._network.items() if not torch.equal(p, exported[n])}
    assert changed == {"head.weight", "head.bias"}


def test_resume_refuses_other_parts(tmp_path):
    run = {"run": {"dir": str(tmp_path / "run")}}
    train(parse_config({**SETTINGS, **run}), Console())
    other = {**SETTINGS, "model": {**SETTINGS["model"], "trained": ["head"]}, **run}
    with pytest.raises(CmlError, match="model.trained was"):
        train(parse_config(other), Console())


def test_what_adapts_must_be_trained(tmp_path):
    other = {**SETTINGS, "method": {"adapts": ["body"]}, "model": {**SETTINGS["model"], "trained": ["head"]}}
    with pytest.raises(ConfigError, match="method.adapts has 'body', which selects no parameter"):
        train(parse_config({**other, "run": {"dir": str(tmp_path / "run")}}), Console())
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_resume_refuses_other_frozen_weights(tmp_path):
    """Frozen weights are in no checkpoint, so the file that they come from must still be the same."""
    timm = pytest.importorskip("timm")
    settings = {
        "domain": {**images_of(tmp_path), "size": "set"},
        "method": {"inner_steps": 1},
        "train": {"steps": 2, "episodes_per_step": 1},
        "eval": {"val_episodes": 1, "every": 0, "final": False},
        "run": {"dir": str(tmp_path / "run")},
    }
    weights = tmp_path / "weights.pth"
    model = {"backbone": "test_resnet", "pretrained": str(weights), "norm": "frozen", "trained": ["head", "last:1"]}
    for seed in (0, 1):
        torch.manual_seed(seed)
        torch.save(timm.create_model("test_resnet").state_dict(), weights)
        config = parse_config({**settings, "model": model, "train": {"steps": 2 + seed, "episodes_per_step": 1}})
        if seed == 0:
            assert train(config, Console()).finished
        else:
            with pytest.raises(CmlError, match="frozen weights or statistics are not those"):
                train(config, Console())


def test_cml_trains_with_the_whole_body_frozen(tmp_path):
    """The cosine of the learners' gradients lives in the body: here there is none to report."""
    model = {**SETTINGS["model"], "trained": ["head"]}
    config = parse_config({**SETTINGS, "model": model, "run": {"dir": str(tmp_path / "run")}})
    assert train(config, Console()).finished
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["colearner_loss"] is not None and line.get("gradient_cosine") is None


def test_last_counts_blocks_that_are_frozen_too():
    net = net_of("test_vit")
    freeze(net, select(net, ("head", "body.model.blocks.0.*"), "model.trained"))
    with pytest.raises(ConfigError, match="selects no parameter"):
        select(net, ("last:1",), "method.adapts")
    assert all(".blocks.0." in n for n in select(net, ("last:6",), "method.adapts"))


def test_a_frozen_head_is_exported(tmp_path):
    net = net_of("test_resnet")
    freeze(net, select(net, ("body",), "model.trained"))
    from cml_dist.nets.timm_backbone import timm_export

    state, _ = timm_export(net, {n: p.detach() for n, p in net.named_parameters()})
    assert torch.equal(state["fc.weight"], net.head.weight)


def test_a_test_reads_no_training_images(tmp_path, monkeypatch):
    """It needs the shapes of an episode, which the settings say."""
    from cml_dist.data.images import ImageDomain
    from cml_dist.run.folder import run_config
    from cml_dist.run.report import evaluate_run

    settings = {
        "domain": images_of(tmp_path),
        "model": {"filters": 4},
        "train": {"steps": 1, "episodes_per_step": 1},
        "eval": {"val_episodes": 1, "episodes": 2, "every": 0, "untrained": False},
        "run": {"dir": str(tmp_path / "run")},
    }
    assert train(parse_config(settings), Console()).finished
    read, load = [], ImageDomain.load
    monkeypatch.setattr(ImageDomain, "load", lambda self, split, *rest: read.append(split) or load(self, split, *rest))
    evaluate_run(run_config(str(tmp_path / "run"), ["memory.budget_gib=1"]), "best", Console())
    assert set(read) == {"test"}


def test_norms_and_biases_are_terms():
    net = net_of("test_vit")
    names = [n for n, _ in net.named_parameters() if not n.startswith("colearner.")]
    norms, biases = select(net, ("norms",), "x"), select(net, ("biases",), "x")
    assert norms == [n for n in names if "norm" in n] and "body.model.norm.weight" in norms
    assert biases == [n for n in names if n.endswith(".bias")] and "head.bias" in biases
    assert select(net_of("conv4"), ("norms",), "x") == [
        f"body.block{block}.norm.{kind}" for block in range(1, 5) for kind in ("weight", "bias")
    ]


def lora_of(folder: Path, *, rank: int, **more: dict) -> RunConfig:
    """A small ViT whose frozen body adapts by factors."""
    return parse_config(
        {
            "domain": images_of(folder),
            "model": {"backbone": "test_vit", "trained": ["head"]},
            "method": {"inner_steps": 3, "inner_lr": 0.1, "adapts": ["head", f"lora:{rank}"]},
            "train": {"steps": 2, "episodes_per_step": 1},
            "eval": {"val_episodes": 1, "episodes": 2, "every": 0},
            "run": {"dir": str(folder / "run")},
            **more,
        }
    )


def test_low_rank_factors_beside_a_frozen_body(tmp_path):
    """Trained and exported: W is as it was, the factors adapt in use, and timm's own file has W + B A."""
    config = lora_of(tmp_path, rank=2)
    assert train(config, Console()).finished
    start = dict(net_of("test_vit").named_parameters())
    exported, plain = read_weights(tmp_path / "run" / "export"), load_file(tmp_path / "run/export/model.safetensors")
    weight = "body.model.blocks.0.attn.qkv.weight"
    assert torch.equal(exported[weight], start[weight])
    b, a = (exported[f"rule.lora.{weight}.{factor}"] for factor in "BA")
    assert b.shape == (start[weight].shape[0], 2) and a.shape == (2, start[weight].shape[1]) and b.any()
    assert torch.allclose(plain["blocks.0.attn.qkv.weight"], start[weight] + b @ a)
    learner = cml_dist.load(tmp_path / "run")
    images = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8).numpy()
    adapted = learner.adapt(list(images), ["a", "b", "c"])
    assert not torch.equal(adapted._network[weight], start[weight] + b @ a)
    assert adapted._network["body.model.blocks.0.norm1.weight"].equal(exported["body.model.blocks.0.norm1.weight"])


def test_a_plan_counts_the_factors_as_what_adapts(tmp_path):
    config = lora_of(tmp_path, rank=4, engine={"name": "adjoint", "trajectory": "all"})
    found = forecast(config, 1, 8.0)
    net = make_network(config, (3, 32, 32), 3)
    factors = sum(p.numel() for n, p in net.named_parameters() if n.startswith(("rule.lora.", "head.")))
    assert 0 < factors < sum(b.numel() for b in net.buffers()) / 4
    assert found["rows"][0]["adapted"] == 3 * 4 * factors


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("method.adapts=lora:2",), "the body has no linear layers"),
        (("method.adapts=lora:0",), "which selects no parameter"),
        (("method.adapts=lora:2", "method.name=anil"), "anil adapts the head alone: set method.name=maml"),
        (("method.adapts=lora:2", "method.name=meta_sgd"), "whose factors move by plain SGD: set method.name=maml"),
        (("method.adapts=lora:2", "method.inner_optim=adam"), "and method.inner_optim=sgd"),
        (("method.adapts=lora:2", "model.head=ridge"), "set model.head=linear or shared"),
    ],
)
def test_where_factors_make_no_sense_they_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        make_network(load_config("glyphs", settings), (1, 28, 28), 5)
