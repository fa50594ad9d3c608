"""The timm adapter: weight files, taps, refusals, and the way back to plain timm."""

from __future__ import annotations

import re

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import Conv2dSame, use_fused_attn
from torch import nn

from cml_dist.config.schema import ModelConfig
from cml_dist.errors import ConfigError, ModelError
from cml_dist.nets.border import border_warning, watch_stem
from cml_dist.nets.build import build_net
from cml_dist.nets.guard import Hardsigmoid, check_twice_differentiable, couples_examples, prepare_for_second_order
from cml_dist.nets.network import CmlNet
from cml_dist.nets.timm_backbone import timm_export

SHAPE = (3, 32, 32)


def _net(backbone: str, shape: tuple[int, ...] = SHAPE, ways: int = 5, **settings) -> CmlNet:
    return build_net(
        ModelConfig(backbone=backbone, **settings), input_shape=shape, output_dim=ways, seed=0, colearner=True
    )


def _weight_file(folder, name: str, **kwargs):
    """A file of plain timm weights with a classifier and running statistics that are not the initial ones."""
    torch.manual_seed(3)
    model = timm.create_model(name, num_classes=7, **kwargs)
    state = model.state_dict()
    for key, value in state.items():
        if key.endswith("running_mean"):
            value.normal_()
        if key.endswith("running_var"):
            value.uniform_(0.5, 2.0)
    path = folder / f"{name}.safetensors"
    save_file(state, path)
    return path, model.eval()


@pytest.mark.parametrize(
    ("backbone", "shape", "tap_dims"),
    [("test_resnet", SHAPE, 3), ("test_vit", SHAPE, 2), ("test_mambaout", (3, 64, 64), 3), ("test_convnext", SHAPE, 3)],
)
@pytest.mark.parametrize("depth", range(5))
def test_taps_and_depths(backbone: str, shape: tuple[int, ...], tap_dims: int, depth: int) -> None:
    net = _net(backbone, shape, colearner={"depth": depth, "width": 24})
    features = net.body(torch.randn(2, *shape))
    assert tuple(features.tap.shape[1:]) == net.body.tap_shape and len(net.body.tap_shape) == tap_dims
    assert features.pooled.shape == (2, net.body.pooled_dim)
    if tap_dims == 3:  # channels first, whatever the model's own layout
        assert features.tap.shape[1] == net.body.model.num_features
    outputs = net(torch.randn(2, *shape), ("meta", "co"))
    assert [tuple(output.shape) for output in outputs] == [(2, 5), (2, 5)]
    assert len(net.colearner.blocks) == depth


@pytest.mark.parametrize(
    ("conv", "size", "said"),
    [
        (nn.Conv2d(3, 4, 16, 16), (84, 84), "last 4 rows and 4 columns of .* 84x84 (9 % .* fit are 80 and 96 "),
        (nn.Conv2d(3, 4, 14, 14), (32, 32), "last 4 rows and 4 columns .* (23 % .* fit are 28 and 42 "),
        (nn.Conv2d(3, 4, 4, 4), (32, 38), "last 0 rows and 2 columns of .* 38x32 (5 % .* fit are 36x32 and 40x32 "),
        (nn.Conv2d(3, 4, 16, 16), (80, 80), None),
        (nn.Conv2d(3, 4, 7, 2, 3), (85, 85), None),
        (Conv2dSame(3, 4, 3, 2), (84, 84), None),  # it pads inside, as TensorFlow does
        (nn.Sequential(nn.ZeroPad2d((0, 12, 0, 12)), nn.Conv2d(3, 4, 16, 16)), (84, 84), None),
    ],
)
def test_the_border_that_is_never_seen(conv: nn.Module, size: tuple[int, int], said: str | None) -> None:
    ran = watch_stem(conv)
    inputs = torch.zeros(1, 3, *size, requires_grad=True)
    conv(inputs).sum().backward()
    found, unseen = border_warning("x", size, *ran[0]), bool((inputs.grad == 0).all(1).any())
    assert unseen is (said is not None)
    assert found is None if said is None else re.search(said.replace("(", r"\("), found)


def test_guard_switches_off_what_breaks_second_order() -> None:
    for backbone in ("test_resnet", "test_efficientnet", "test_vit"):
        net = _net(backbone)
        assert not net.training
        assert not any(getattr(module, "inplace", False) for module in net.modules())
        assert not any(getattr(module, "fused_attn", False) for module in net.modules())
    assert use_fused_attn(), "timm's global switch must be as it was"


@pytest.mark.parametrize(("backbone", "side"), [("resnet18", 48), ("mobilenetv3_small_050", 64), ("levit_128s", 48)])
def test_check_accepts_models_that_start_on_a_kink_or_need_the_guard(backbone: str, side: int) -> None:
    # resnet18 starts with gains of exactly 0, so with half of its ReLUs on their kink.
    check_twice_differentiable(_net(backbone, (3, side, side)), (3, side, side), 5, backbone)


def test_fused_attention_is_refused_by_name() -> None:
    net = _net("test_vit")
    for module in net.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = True
    with pytest.raises(ModelError, match="test_vit cannot be differentiated.*scaled_dot_product.*not implemented"):
        check_twice_differentiable(net, SHAPE, 5, "test_vit")


def test_levit_does_not_cache_functions_of_its_parameters() -> None:
    net = _net("levit_128s", (3, 48, 48)).double()  # a move to another dtype or device makes timm a new cache
    inputs = torch.randn(2, 3, 48, 48).double()
    (before,) = net(inputs)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("attention_biases"):
                parameter += torch.randn_like(parameter)
    (after,) = net(inputs)
    assert not torch.allclose(before, after)


def test_hardsigmoid_is_computed_by_its_parts() -> None:
    net = _net("mobilenetv3_small_050")
    assert any(isinstance(module, Hardsigmoid) for module in net.modules())
    inputs = torch.linspace(-5, 5, 41)
    torch.testing.assert_close(Hardsigmoid()(inputs), torch.nn.functional.hardsigmoid(inputs))


def test_frozen_norm_keeps_statistics_and_couples_nothing(tmp_path) -> None:
    path, _ = _weight_file(tmp_path, "test_resnet")
    net = _net("test_resnet", norm="frozen", pretrained=str(path))
    assert not couples_examples(net)
    statistics = {name: value.clone() for name, value in net.named_buffers()}
    assert any(name.endswith("running_var") and not torch.all(value == 1) for name, value in statistics.items())
    inputs = torch.randn(4, *SHAPE)
    together, alone = net(inputs, ("meta", "co")), net(inputs[:1], ("meta", "co"))
    for many, one in zip(together, alone, strict=True):
        torch.testing.assert_close(many[:1], one, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, statistics[name]) for name, value in net.named_buffers())
    assert couples_examples(_net("test_resnet"))


def test_frozen_norm_needs_statistics() -> None:
    with pytest.raises(ConfigError, match="model.norm is frozen.*test_resnet has no pre-trained statistics"):
        _net("test_resnet", norm="frozen")
    assert not couples_examples(_net("test_vit", norm="frozen"))


LOADED = ["resnet12", "test_resnet", "test_vit", "levit_128s", "deit_tiny_distilled_patch16_224"]


@pytest.mark.parametrize("name", LOADED)
def test_local_weight_file_is_loaded_without_its_classifier(tmp_path, name: str) -> None:
    fixed = timm.get_pretrained_cfg(name).fixed_input_size
    path, plain = _weight_file(tmp_path, name, **({"img_size": SHAPE[1:]} if fixed else {}))
    net = _net(name, pretrained=str(path), norm="frozen")
    inputs = torch.randn(2, *SHAPE)
    with torch.no_grad():
        expected = plain.forward_head(plain.forward_features(inputs), pre_logits=True)
        torch.testing.assert_close(net.body(inputs).pooled, expected, rtol=1e-4, atol=1e-4)


def test_weight_file_of_three_channels_serves_grey_images(tmp_path) -> None:
    path, plain = _weight_file(tmp_path, "test_resnet")
    net = _net("test_resnet", (1, 32, 32), pretrained=str(path))
    torch.testing.assert_close(net.body.model.conv1[0].weight, plain.conv1[0].weight.sum(1, keepdim=True))


def test_weight_file_that_does_not_fit_is_refused(tmp_path) -> None:
    path, _ = _weight_file(tmp_path, "test_vit")
    with pytest.raises(ModelError, match="does not fit model.backbone test_resnet: .*Missing key.*conv1"):
        _net("test_resnet", pretrained=str(path))
    with pytest.raises(ConfigError, match="there is no such file"):
        _net("test_resnet", pretrained=str(tmp_path / "none.pth"))
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelError, match="broken.safetensors does not fit"):
        _net("test_resnet", pretrained=str(broken))


def test_pth_weight_file(tmp_path) -> None:
    torch.manual_seed(4)
    plain = timm.create_model("test_vit", num_classes=3)
    torch.save({"state_dict": plain.state_dict()}, tmp_path / "vit.pth")
    net = _net("test_vit", (3, 160, 160), pretrained=str(tmp_path / "vit.pth"))
    assert torch.equal(net.body.model.pos_embed, plain.pos_embed)
    small = _net("test_vit", (3, 64, 64), pretrained=str(tmp_path / "vit.pth"))  # timm resamples the positions
    assert torch.equal(small.body.model.blocks[0].attn.qkv.weight, plain.blocks[0].attn.qkv.weight)


def test_published_weights_that_cannot_be_had() -> None:
    with pytest.raises(ModelError, match="published weights of levit_256d cannot be had: .*set model.pretrained to"):
        _net("levit_256d", pretrained=True)


def test_unknown_backbone_names_the_nearest() -> None:
    with pytest.raises(ModelError, match="'resnt18' is neither conv4, mlp, gcn nor.*resnet18"):
        _net("resnt18")


def test_image_size_that_the_model_refuses() -> None:
    said = "edgenext_xx_small cannot take images of 8x8 px, 3 channels: .*made for 256x256 px, 3 channels"
    with pytest.raises(ModelError, match=said):
        _net("edgenext_xx_small", (3, 8, 8))


EXPORTED = ["resnet12", "test_resnet", "test_vit", "test_convnext", "deit_tiny_distilled_patch16_224", "levit_128s"]


@pytest.mark.parametrize("name", EXPORTED)
def test_export_loads_in_plain_timm_with_equal_logits(tmp_path, name: str) -> None:
    fixed = timm.get_pretrained_cfg(name).fixed_input_size
    path, _ = _weight_file(tmp_path, name, **({"img_size": SHAPE[1:]} if fixed else {}))
    net = _net(name, pretrained=str(path), norm="frozen", ways=4)
    params = {key: value.detach() + 0.01 for key, value in net.named_parameters() if not key.startswith("colearner")}
    state, kwargs = timm_export(net, params)
    save_file(state, tmp_path / "model.safetensors")

    plain = timm.create_model(name, num_classes=4, checkpoint_path=str(tmp_path / "model.safetensors"), **kwargs).eval()
    inputs = torch.randn(3, *SHAPE)
    with torch.no_grad():
        (expected,) = torch.func.functional_call(net, params, (inputs,))
        torch.testing.assert_close(plain(inputs), expected, rtol=1e-3, atol=1e-4)


def test_export_with_batch_statistics_carries_timms_initial_buffers() -> None:
    net = _net("test_resnet", ways=4)
    params = {key: value.detach() for key, value in net.named_parameters()}
    state, kwargs = timm_export(net, params)
    plain = timm.create_model("test_resnet", num_classes=4, **kwargs)
    plain.load_state_dict(state, strict=True)
    assert torch.all(state["bn1.running_var"] == 1)
    prepare_for_second_order(plain, "batch")
    inputs = torch.randn(3, *SHAPE)
    torch.testing.assert_close(plain(inputs), net(inputs)[0], rtol=1e-4, atol=1e-5)


def test_export_of_a_body_alone_whose_first_constants_are_whole_numbers() -> None:
    net = _net("levit_128s", ways=4)
    assert not next(net.buffers()).is_floating_point()
    state, _ = timm_export(net, dict(net.named_parameters()), with_head=False)
    assert not any(name.startswith("head") for name in state)
    assert torch.equal(state["stem.conv1.linear.weight"], net.body.model.stem.conv1.linear.weight)


def test_what_is_tied_is_exported_under_all_its_names() -> None:
    net = _net("coat_tiny", (3, 64, 64), ways=4)
    state, _ = timm_export(net, dict(net.named_parameters()), with_head=False)
    assert torch.equal(state["cpe1.proj.weight"], net.body.model.cpe1.proj.weight)
    assert torch.equal(state["serial_blocks1.0.cpe.proj.weight"], state["cpe1.proj.weight"])


def test_export_of_a_file_reads_back_as_pretrained(tmp_path) -> None:
    net = _net("test_vit")
    state, _ = timm_export(net, dict(net.named_parameters()))
    save_file(state, tmp_path / "again.safetensors")
    again = _net("test_vit", pretrained=str(tmp_path / "again.safetensors"), ways=2)
    for (name, ours), theirs in zip(net.body.named_parameters(), again.body.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_pooling_without_a_linear_way_back_is_refused() -> None:
    net = _net("crossvit_tiny_240", (3, 240, 240))
    assert net.body.tap_shape == (net.body.pooled_dim,)
    with pytest.raises(ModelError, match="crossvit_tiny_240 has a classifier of its own kind"):
        timm_export(net, dict(net.named_parameters()))
