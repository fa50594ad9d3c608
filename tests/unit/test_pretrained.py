"""Pre-trained weights: a folder, an export, a timm name with its tag and a hub name, from the hub's cache alone."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from test_partition import images_of
from timm.models import save_for_hf

from cml_dist.config.load import parse_config
from cml_dist.config.schema import ModelConfig
from cml_dist.errors import ConfigError, ModelError
from cml_dist.nets.build import build_net
from cml_dist.nets.timm_backbone import trained_with
from cml_dist.run.export import read_weights
from cml_dist.run.trainer import train
from cml_dist.telemetry.console import Console

SHAPE = (3, 32, 32)


def body_of(pretrained: str | bool, backbone: str = "test_resnet", **settings) -> torch.nn.Module:
    model = ModelConfig(backbone=backbone, pretrained=pretrained, **settings)
    return build_net(model, input_shape=SHAPE, output_dim=3, seed=0, colearner=False).body


def same(body: torch.nn.Module, plain: torch.nn.Module) -> bool:
    own = plain.state_dict()
    return all(torch.equal(value, own[name]) for name, value in body.model.state_dict().items())


@pytest.fixture(scope="module")
def plain() -> torch.nn.Module:
    torch.manual_seed(5)
    return timm.create_model("test_resnet", num_classes=7)


@pytest.fixture(scope="module")
def saved(plain, tmp_path_factory) -> Path:
    """What timm saves, as for a hub."""
    folder = tmp_path_factory.mktemp("saved")
    save_for_hf(plain, folder, safe_serialization=True)
    said = json.loads((folder / "config.json").read_text())
    said["pretrained_cfg"] |= {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, 48, 48]}
    (folder / "config.json").write_text(json.dumps(said))
    return folder


@pytest.fixture()
def hub(saved, tmp_path, monkeypatch) -> Path:
    """The hub's cache, with one repository under two names; whoever asks the network fails."""
    for name in ("some--body", "timm--test_resnet.r160_in1k"):
        repository = tmp_path / f"models--{name}"
        shutil.copytree(saved, repository / "snapshots" / "abc")
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("the network was asked"))
    return tmp_path


def test_a_folder_gives_weights_and_what_is_said_of_their_images(saved, plain, tmp_path):
    assert same(body_of(str(saved), norm="frozen"), plain)
    assert trained_with("test_resnet", str(saved), 3) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), (48, 48), "bilinear")
    other = shutil.copytree(saved, tmp_path / "torch")
    (other / "model.safetensors").unlink()
    torch.save(plain.state_dict(), other / "pytorch_model.bin")
    assert same(body_of(str(other), norm="frozen"), plain)


@pytest.mark.parametrize("name", ["hf-hub:some/body", "hf-hub:some/body@main", "test_resnet.r160_in1k", True])
def test_what_the_hubs_cache_holds_needs_no_network(name, hub, plain):
    assert same(body_of(name, norm="frozen"), plain)


@pytest.mark.parametrize("name", ["hf-hub:no/body", "test_resnet2.r160", "test_vit.r160_in1k"])
def test_what_neither_cache_nor_network_has_is_said_with_the_remedy(name, hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises((ModelError, ConfigError)) as error:
        body_of(name, "test_vit")
    said = str(error.value)
    if name.startswith("test_resnet2"):
        assert "there is no such file" in said
    else:
        assert "not in the hub's cache" in said and "set model.pretrained to that folder" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architecture": "resnet18"}, "weights of resnet18, but model.backbone is test_resnet; set model.back"),
        ({"architecture": None, "architectures": ["Bert"]}, "names no timm model"),
        ({"model_args": {"num_classes": 7, "act_layer": "gelu"}}, "built with act_layer, which cannot be repeated"),
    ],
)
def test_weights_of_another_model_are_refused(change, said, saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "other")
    told = {**json.loads((folder / "config.json").read_text()), **change}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in told.items() if value is not None}))
    with pytest.raises(ConfigError, match=said):
        body_of(str(folder))


def test_a_folder_that_holds_none_and_a_tag_that_is_none_are_refused(saved, tmp_path):
    with pytest.raises(ConfigError, match="has none of model.safetensors, pytorch_model.bin"):
        body_of(str(tmp_path))
    shutil.copy(saved / "model.safetensors", tmp_path)
    with pytest.raises(ConfigError, match="has no config.json"):
        body_of(str(tmp_path))
    with pytest.raises(ConfigError, match="knows no weights test_resnet.nothing, .*use one of test_resnet.r160_in1k"):
        body_of("test_resnet.nothing")
    with pytest.raises(ConfigError, match="weights of test_vit, but model.backbone is test_resnet"):
        body_of("test_vit.r160_in1k")


@pytest.mark.parametrize("head", ["linear", "centroid"])
def test_a_run_begins_with_the_body_of_another_one(head, tmp_path):
    settings = {
        "domain": images_of(tmp_path),
        "model": {"backbone": "test_resnet", "head": head},
        "method": {"name": "maml"},
        "train": {"steps": 1, "episodes_per_step": 1},
        "eval": {"val_episodes": 1, "episodes": 2, "untrained": False},
        "run": {"dir": str(tmp_path / "run")},
    }
    assert train(parse_config(settings), Console(quiet=True)).finished
    body = body_of(str(tmp_path / "run"))
    expected = read_weights(tmp_path / "run" / "export")
    assert all(torch.equal(value, expected[f"body.{name}"]) for name, value in body.named_parameters())
    mean, _, size, _ = trained_with("test_resnet", str(tmp_path / "run" / "export"), 3)
    described = json.loads((tmp_path / "run" / "export" / "model.json").read_text())
    assert list(mean) == pytest.approx(described["preprocessing"]["mean"])
    assert list(size) == described["input_shape"][1:]
    statistics = dict(body_of(str(tmp_path / "run"), norm="frozen").named_buffers())["model.bn1.running_mean"]
    assert statistics.any()  # of the run's first training episode
