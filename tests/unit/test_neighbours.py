"""MGAug, WarpGrad and T-Net on the networks of runs: what is pruned, where warp layers stand, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from cml_dist.cli import main
from cml_dist.config.load import merge, parse_config
from cml_dist.config.methods import method_title
from cml_dist.config.schema import RunConfig
from cml_dist.errors import ConfigError
from cml_dist.meta.inner import adapt
from cml_dist.meta.problem import Problem
from cml_dist.methods.check import made_up_episode
from cml_dist.nets.build import make_network, method_of
from cml_dist.nets.network import CmlNet

GREY, COLOUR, VECTOR = (1, 28, 28), (3, 32, 32), (1,)
SHAPES = {"conv4": GREY, "resnet12": COLOUR, "mlp": VECTOR}


def config_of(*words: str, backbone: str = "conv4") -> RunConfig:
    domain = {"name": "sinusoid" if backbone == "mlp" else "glyphs"}
    return parse_config(merge({"domain": domain, "model": {"backbone": backbone}}, words))


def made(*words: str, backbone: str) -> tuple[RunConfig, CmlNet]:
    config = config_of(*words, backbone=backbone)
    return config, make_network(config, SHAPES[backbone], 5)


@pytest.mark.parametrize(
    ("backbone", "method"), [("conv4", "maml"), ("conv4", "maml_pp"), ("resnet12", "maml"), ("mlp", "maml")]
)
def test_a_pruned_channel_is_dead(backbone, method):
    """Behind its layer's norm, whatever gain and bias that has, and behind the sum of a residual block."""
    words = f"method.name={method} method.inner_steps=1 method.augment=mgaug method.augment_ratios=[0.4]".split()
    config, net = made(*words, backbone=backbone)
    params = {n: p.detach() + 0.1 for n, p in net.named_parameters()}
    augment, rule = method_of(config, net).augment, method_of(config, net).rule
    episode = made_up_episode(SHAPES[backbone], 5, 5, next(net.parameters()))
    seen = {**dict(net.named_buffers()), **rule.network(params, 0)}
    (masks,) = augment.masks(seen, dict, episode)
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, inputs, out: outputs.update({name: out})

    for name, module in net.named_modules():
        module.register_forward_hook(keep(name))
    pruned = {n: value * masks.get(n, 1.0) for n, value in seen.items()}
    functional_call(net, pruned, (episode.support.inputs,))
    assert len(augment.groups) == {"conv4": 4, "resnet12": 12, "mlp": 2}[backbone]
    for group in augment.groups:
        dead = masks[group[0]].flatten() == 0
        assert dead.sum() == round(0.4 * len(dead))
        values = outputs[group[-1].rpartition(".")[0]].transpose(0, 1).flatten(1)
        if backbone != "mlp":  # there a ReLU of the whole layer follows
            assert values[~dead].any(1).all()
        assert not values[dead].any()


@pytest.mark.parametrize(
    ("backbone", "words"),
    [
        ("conv4", "name=warpgrad warp=linear"),
        ("conv4", "name=tnet warp=conv"),
        ("conv4", "name=warpgrad warp_residual=true"),
        ("resnet12", "name=warpgrad"),
        ("mlp", "name=tnet warp_residual=true"),
        ("mlp", "name=warpgrad"),
    ],
)
def test_warp_layers_are_the_identity_at_the_start_and_never_adapt(backbone, words):
    settings = [f"method.{word}" for word in words.split()]
    config, net = made(*settings, "method.inner_steps=1", backbone=backbone)
    _, plain = made("method.name=maml", backbone=backbone)
    warps = {n: p.detach() for n, p in net.named_parameters() if ".warp." in n}
    assert len(warps) == {"conv4": 4, "resnet12": 4, "mlp": 2}[backbone]
    assert {n for n, _ in net.named_parameters()} - warps.keys() == {n for n, _ in plain.named_parameters()}
    episode = made_up_episode(SHAPES[backbone], 5, 5, next(net.parameters()))
    torch.testing.assert_close(net(episode.query.inputs), plain(episode.query.inputs), rtol=1e-4, atol=1e-5)
    params = {n: p.detach() for n, p in net.named_parameters()}
    problem = Problem(net, torch.nn.functional.cross_entropy, lambda outputs, targets: outputs.sum(), {})
    after = adapt(params, episode, problem, method_of(config, net))
    moved = {n for n, p in params.items() if not torch.equal(after[n], p)}
    unadded = {n for n in params if backbone == "conv4" and n.endswith("conv.bias")}  # their gradient is exactly 0
    assert moved == params.keys() - warps.keys() - unadded


@pytest.mark.parametrize(
    ("backbone", "last", "before"),
    [
        ("resnet12", {"body.model.layer4.0.conv3.weight", "body.model.warp.weight"}, ".layer3."),
        ("mlp", {"body.layers.1.weight", "body.layers.1.bias", "body.layers.1.warp.weight"}, ".layers.0."),
    ],
)
def test_the_last_warp_layer_is_of_the_last_block(backbone, last, before):
    config, net = made("method.name=warpgrad", "model.trained=[head,last:1]", backbone=backbone)
    trained = {n for n, _ in net.named_parameters() if n.startswith("body.")}
    assert last <= trained and not any(before in name for name in trained)


RESNET = ("model.backbone=resnet18",)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("method.name=warpgrad", *RESNET),
            "method.warp is conv, but model.backbone resnet18 has no places for warp layers; set "
            "model.backbone=conv4, resnet12 or mlp, or another method.name",
        ),
        (
            ("method.augment=mgaug", *RESNET),
            "method.augment_pruning is width, but model.backbone resnet18 does not say what its channels are; set "
            "method.augment_pruning=parameters or catfish, or model.backbone=conv4, resnet12, mlp or gcn",
        ),
        (
            ("method.name=warpgrad", "method.adapts=[body.*.warp.*]"),
            "method.adapts selects warp layers alone, which never adapt under method.name warpgrad; name what stands "
            "between them, or leave method.adapts out",
        ),
        (
            ("method.augment=mgaug", "model.trained=[head]"),
            "method.augment prunes the body, which is frozen; leave method.augment out, or set model.trained to more, "
            "e.g. [head,last:1]",
        ),
        (
            ("method.name=warpgrad", "model.trained=[head]"),
            "method.name warpgrad trains warp layers, which model.trained freezes; set model.trained=[body,head], or "
            "add last:1 or body.*.warp.*",
        ),
        (
            ("method.name=maml_pp", "method.adapts=[norms,head]"),
            "method.adapts has norms, but under method.name maml_pp BatchNorm has values for each step, which do not "
            "adapt; leave norms out",
        ),
        *(
            (
                ("model.head=shared", *words),
                "model.head is shared, but the head does not adapt: all classes keep the same vector; let it adapt "
                "(method.name, method.adapts, method.head_lr), or set model.head=centroid",
            )
            for words in (("method.name=boil",), ("method.adapts=[body]",), ("method.head_lr=0",))
        ),
    ],
)
def test_what_a_network_does_not_offer_is_refused(words, message):
    config = config_of(*words)
    with pytest.raises(ConfigError) as caught:
        method_of(config, make_network(config, COLOUR, 5))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("words", "title"),
    [
        ("method.name=maml method.augment=mgaug", "MGAug"),
        ("method.augment=mgaug", "CML + MGAug"),
        ("method.name=noise method.augment=mgaug", "MAML + noise + MGAug"),
        ("method.name=boil method.colearner=true method.augment=mgaug", "BOIL + CML + MGAug"),
        ("method.name=warpgrad", "WarpGrad"),
        ("method.name=tnet method.colearner=true", "T-Net + CML"),
        # Of a frozen body the features say nothing of the task.
        ("method.name=cml model.trained=[head] model.colearner.kind=dense", "MAML + CML (guessing)"),
        # Steps on unlabelled examples are steps.
        ("method.name=maml model.head=centroid method.inner_steps=0", "ProtoNet"),
        (
            "method.name=maml model.head=centroid method.inner_steps=0 domain.unlabelled=1",
            "MAML (centroid head, refined labels)",
        ),
    ],
)
def test_titles(words, title):
    assert method_title(config_of(*words.split())) == title


def test_plan_counts_sub_networks_and_warp_layers(capfd):
    def plan(*words: str) -> tuple[dict, str]:
        told = ["plan", "sinusoid", "--gpus", "1", "--gpu-memory-gib", "8", "method.inner_steps=1", *words]
        assert main([*told, "--json"]) == 0
        found = json.loads(capfd.readouterr().out)
        assert main(told) == 0
        return found, capfd.readouterr().out

    (maml, _), (augmented, said) = plan("method.name=maml"), plan("method.name=maml", "method.augment=mgaug")
    assert "1 sub-network (width pruned by 0.2) besides" in said
    gradient = maml["rows"][0]["gradients"]  # the whole network's is kept while the sub-network's is computed
    assert augmented["rows"][0]["activations"] - maml["rows"][0]["activations"] > 0.9 * gradient
    warped, _ = plan("method.name=warpgrad")
    assert warped["num_parameters"] - maml["num_parameters"] == 2 * 40 * 40
