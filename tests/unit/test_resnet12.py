"""ResNet-12: sizes and features, its place in timm, its parts, and what a run exports."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import timm
import torch
from image_sets import write_set
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import cml_dist
from cml_dist.config.load import parse_config
from cml_dist.config.schema import ModelConfig
from cml_dist.errors import ConfigError, ModelError
from cml_dist.nets.build import build_net, make_network
from cml_dist.nets.network import CmlNet
from cml_dist.nets.resnet12 import resnet12
from cml_dist.run.trainer import train
from cml_dist.telemetry.console import Console

WIDTHS = {"resnet12": (64, 128, 256, 512), "resnet12_wide": (64, 160, 320, 640)}


@timm.models.register_model
def resnet12_narrow(pretrained=False, **kwargs):
    return resnet12(pretrained, widths=(4, 4, 8, 16), **kwargs)


def net_of(side: int, channels: int = 3, device: str = "meta", **model) -> CmlNet:
    settings = ModelConfig(**{"backbone": "resnet12", **model})
    with torch.device(device):
        return build_net(settings, input_shape=(channels, side, side), output_dim=5, seed=0, colearner=True)


@pytest.mark.parametrize(("name", "published"), [("resnet12", 7_996_800), ("resnet12_wide", 12_424_320)])
def test_counts_and_shapes(name, published):
    """Of a block: three 3x3 and one 1x1 convolution without bias, and four norms. The co-learner: two narrow blocks."""
    widths = WIDTHS[name]
    pairs = zip((3, *widths[:-1]), widths, strict=True)
    assert published == sum(9 * (i + 2 * o) * o + i * o + 4 * 2 * o for i, o in pairs)
    for side, tap in ((84, 10), (32, 4)):
        net = net_of(side, backbone=name)
        assert sum(p.numel() for p in net.body.parameters()) == published
        assert net.body.tap_shape == (widths[-1], tap, tap) and net.body.pooled_dim == widths[-1]
        second = 9 * (widths[-1] + 64) * 64 + 2 * 2 * 64 + 65 * 5
        assert sum(p.numel() for p in net.colearner.parameters()) == second
        assert net.body.border_warning is None


def test_the_tap_lies_before_the_last_pool():
    net, images = net_of(32, device="cpu"), torch.randn(2, 3, 32, 32)
    features = net.body(images)
    assert features.tap.min() < 0  # leaky
    torch.testing.assert_close(F.max_pool2d(features.tap, 2).mean((2, 3)), features.pooled)


def test_initial_values_keep_their_size_backwards():
    for name, value in timm.create_model("resnet12").named_parameters():
        if value.ndim == 4:
            fan_out = value.shape[0] * value.shape[2] * value.shape[3]
            assert value.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.2), name


def test_too_small_images_are_refused_with_the_smallest_size():
    assert net_of(16).body.tap_shape == (512, 2, 2)
    with pytest.raises(ModelError, match="resnet12 cannot take images of 15x15 px, 3 channels: .* at least 16x16 px; "):
        net_of(15)


def test_timm_has_them_once_the_networks_are_imported():
    """The networks alone import no timm, which takes seconds. (The other order is that of this file.)"""
    code = (
        "import sys, cml_dist.nets; assert not {'timm', 'torch'} & sys.modules.keys()\n"
        "import timm; assert timm.create_model('resnet12', num_classes=0).num_features == 512"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


def test_plain_timm_uses():
    images = torch.zeros(2, 1, 32, 32)
    model = timm.create_model("resnet12", num_classes=7, in_chans=1, drop_rate=0.1)
    assert model(images).shape == (2, 7) and model.get_classifier().out_features == 7
    model.reset_classifier(0)
    assert model(images).shape == (2, 512)
    levels = timm.create_model("resnet12", in_chans=1, features_only=True)
    sizes = [(level.shape[1], 32 // level.shape[2]) for level in levels(images)]
    assert sizes == list(zip(levels.feature_info.channels(), levels.feature_info.reduction(), strict=True))


def test_weights_of_colour_images_serve_grey_ones(tmp_path):
    """Two convolutions read the image."""
    plain = timm.create_model("resnet12", num_classes=0)
    save_file(plain.state_dict(), tmp_path / "weights.safetensors")
    grey = net_of(32, 1, "cpu", norm="frozen", pretrained=str(tmp_path / "weights.safetensors")).body.model
    for conv in ("conv1", "downsample.0"):
        ours, theirs = (m.layer1[0].get_submodule(conv).weight for m in (grey, plain))
        torch.testing.assert_close(ours, theirs.sum(1, keepdim=True))
    with pytest.raises(ConfigError, match="resnet12 has no pre-trained statistics to freeze"):
        net_of(32, norm="frozen")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """MAML++ on the last block alone."""
    folder = tmp_path_factory.mktemp("run")
    root = str(write_set(folder / "set", images=4, size=16))
    settings = {
        "domain": {"name": "images", "root": root, "ways": 3, "shots": 1, "queries": 2},
        "model": {"backbone": "resnet12_narrow", "trained": ["head", "last:1"], "colearner": {"depth": 1, "width": 8}},
        "method": {"name": "maml_pp", "colearner": True, "inner_steps": 2},
        "train": {"steps": 1, "episodes_per_step": 1},
        "eval": {"every": 0, "val_episodes": 1, "episodes": 2, "untrained": False},
        "parallel": {"threads": 1},
        "run": {"dir": str(folder / "run")},
    }
    config = parse_config(settings)
    assert train(config, Console(quiet=True)).finished
    return config


def test_norms_a_step_of_what_is_trained(run):
    tensors = load_file(f"{run.run.dir}/export/learner.safetensors")
    rows = {n.removeprefix("rule.norm.body.model."): t for n, t in tensors.items() if n.startswith("rule.norm.")}
    norms = ("bn1", "bn2", "bn3", "downsample.1")
    assert rows.keys() == {f"layer4.0.{norm}.{kind}" for norm in norms for kind in ("weight", "bias")}
    assert all(t.shape == (2, 16) for t in rows.values())


def test_an_export_says_how_timm_comes_to_know_it(run):
    export = f"{run.run.dir}/export"
    with open(f"{export}/README.md") as file:
        assert "import cml_dist.nets\nimport timm\nmodel = timm.create_model(" in file.read()
    with open(f"{export}/config.json") as file:
        settings = json.load(file)
    again = timm.create_model(
        "resnet12_narrow", num_classes=3, checkpoint_path=f"{export}/model.safetensors", **settings["model_args"]
    )
    assert again.num_classes == 3
    adapted = cml_dist.load(run.run.dir).adapt(torch.zeros(3, 16, 16, 3, dtype=torch.uint8).numpy(), ["a", "b", "c"])
    assert len(adapted.predict(torch.zeros(2, 16, 16, 3, dtype=torch.uint8).numpy())) == 2


def test_factors_are_refused():
    model = {"backbone": "resnet12"}
    config = parse_config({"domain": {"name": "glyphs"}, "model": model, "method": {"adapts": ["head", "lora:2"]}})
    with pytest.raises(ConfigError, match="the body has no linear layers"), torch.device("meta"):
        make_network(config, (1, 28, 28), 5)
