"""Conv-4, MLP, co-learners, the guard and the builder."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from cml_dist.config.schema import ModelConfig
from cml_dist.errors import ConfigError, ModelError
from cml_dist.nets.build import build_net
from cml_dist.nets.guard import check_twice_differentiable, couples_examples, prepare_for_second_order
from cml_dist.nets.network import CmlNet
from cml_dist.types import Features

RGB84, GREY28 = (3, 84, 84), (1, 28, 28)


def _net(
    shape: tuple[int, ...] = GREY28, seed: int = 0, with_colearner: bool = True, ways: int = 5, **model
) -> CmlNet:
    settings = ModelConfig(**{"backbone": "conv4" if len(shape) == 3 else "mlp", **model})
    return build_net(settings, input_shape=shape, output_dim=ways, seed=seed, colearner=with_colearner)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_conv4_has_the_papers_parameter_counts() -> None:
    net = _net(RGB84)
    assert _count(net.body) + _count(net.head) == 121_093
    assert _count(net.colearner) == 82_117
    control = _net(RGB84, extra_blocks=3)
    assert _count(control.body) + _count(control.head) == 232_261
    assert _count(control.colearner) == 82_117 and len(control.body.blocks()) == 7
    for name, value in net.body.named_parameters():
        assert torch.equal(control.body.get_parameter(name), value), "the first blocks start as they do without"


@pytest.mark.parametrize(("shape", "tap", "pooled"), [(RGB84, (64, 10, 10), 1600), (GREY28, (64, 3, 3), 64)])
@pytest.mark.parametrize("extra_blocks", [0, 2])
def test_conv4_features(shape: tuple[int, ...], tap: tuple[int, ...], pooled: int, extra_blocks: int) -> None:
    net = _net(shape, extra_blocks=extra_blocks)
    features = net.body(torch.randn(2, *shape))
    assert tuple(features.tap.shape) == (2, *tap) == (2, *net.body.tap_shape)
    assert tuple(features.pooled.shape) == (2, pooled) == (2, net.body.pooled_dim)
    assert torch.equal(nn.functional.max_pool2d(features.tap, 2).flatten(1), features.pooled)


def test_canonical_names_are_stable() -> None:
    names = list(dict(_net().named_parameters()))
    assert names[:4] == [f"body.block1.{name}" for name in ("conv.weight", "conv.bias", "norm.weight", "norm.bias")]
    assert names[16:18] == ["head.weight", "head.bias"]
    assert names[18] == "colearner.blocks.0.conv.weight" and names[-1] == "colearner.out.bias"
    assert list(dict(_net((1,)).named_parameters()))[:2] == ["body.layers.0.weight", "body.layers.0.bias"]


@pytest.mark.parametrize("depth", range(5))
@pytest.mark.parametrize("shape", [GREY28, (1,)])
def test_colearner_depths(shape: tuple[int, ...], depth: int) -> None:
    net = _net(shape, colearner={"depth": depth})
    meta, co = net(torch.randn(3, *shape), ("meta", "co"))
    assert meta.shape == co.shape == (3, 5)
    conv = 64 * 64 * 9 + 64 + 2 * 64
    expected = depth * conv + 64 * 5 + 5 if len(shape) == 3 else depth * (40 * 40 + 40) + 40 * 5 + 5
    assert _count(net.colearner) == expected


def test_colearner_reads_the_map_before_the_pooling() -> None:
    net = _net(GREY28, colearner={"depth": 0})
    inputs = torch.randn(3, *GREY28)
    features = net.body(inputs)
    (co,) = net(inputs, ("co",))
    torch.testing.assert_close(co, net.colearner.out(nn.functional.max_pool2d(features.tap, 2).flatten(1)))


def test_mlp_follows_its_settings() -> None:
    net = _net((1,), ways=1, hidden=(7, 9), colearner={"depth": 1})
    assert [tuple(p.shape) for p in net.body.parameters()] == [(7, 1), (7,), (9, 7), (9,)]
    assert _count(net.head) == 10 and _count(net.colearner) == 9 * 9 + 9 + 10
    assert net(torch.randn(6, 1))[0].shape == (6, 1)


# --------------------------------------------------------------------------- seeds


def _values(net: CmlNet, part: str) -> list[Tensor]:
    return [value for name, value in net.named_parameters() if name.startswith(part)]


def _equal(one: CmlNet, other: CmlNet, part: str) -> bool:
    return all(torch.equal(a, b) for a, b in zip(_values(one, part), _values(other, part), strict=True))


@pytest.mark.parametrize(("shape", "backbone"), [(GREY28, "conv4"), ((1,), "mlp"), ((3, 32, 32), "test_vit")])
def test_initial_values_are_a_function_of_the_seed(shape: tuple[int, ...], backbone: str) -> None:
    one, same, other = (_net(shape, seed, backbone=backbone) for seed in (3, 3, 4))
    for part in ("body", "head", "colearner"):
        assert _equal(one, same, part)
        assert not _equal(one, other, part)


@pytest.mark.parametrize(("shape", "backbone"), [(GREY28, "conv4"), ((3, 32, 32), "test_resnet")])
def test_colearner_does_not_move_body_and_head(shape: tuple[int, ...], backbone: str) -> None:
    reference = _net(shape, backbone=backbone)
    without = _net(shape, backbone=backbone, with_colearner=False)
    deeper = _net(shape, backbone=backbone, colearner={"depth": 4, "width": 8})
    assert without.colearner is None
    for changed in (without, deeper):
        assert _equal(reference, changed, "body") and _equal(reference, changed, "head")


def test_building_leaves_the_global_random_state() -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    for shape, backbone in ((GREY28, "conv4"), ((3, 32, 32), "test_vit")):
        net = _net(shape, backbone=backbone)
        check_twice_differentiable(net, shape, 5)
    assert torch.equal(torch.rand(3), expected)


# --------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("shape", "model", "message"),
    [
        ((1,), {"backbone": "conv4"}, r"conv4 reads images .* inputs have shape \(1,\); set model.backbone to mlp"),
        ((1,), {"backbone": "test_vit"}, "test_vit reads images"),
        (GREY28, {"backbone": "mlp"}, r"mlp reads vectors, but the domain's inputs have shape \(1, 28, 28\)"),
        (GREY28, {"norm": "frozen"}, "model.norm is frozen, but model.backbone conv4 has no pre-trained statistics"),
        (GREY28, {"pretrained": True}, "conv4 has no pre-trained weights"),
    ],
)
def test_settings_that_do_not_fit_are_refused(shape: tuple[int, ...], model: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _net(shape, **model)


def test_image_too_small_for_conv4() -> None:
    assert _net((3, 16, 16)).body.tap_shape == (64, 2, 2)
    with pytest.raises(ModelError, match="images are 15x16 px, too small for the four poolings"):
        _net((3, 16, 15))


# --------------------------------------------------------------------------- guard


def test_buffers_never_change_and_batches_are_coupled() -> None:
    norm = nn.BatchNorm2d(3)
    body = _Body(nn.Sequential(nn.Conv2d(1, 3, 3), norm, nn.ReLU(inplace=True), nn.Dropout(0.5)))
    assert couples_examples(body)
    prepare_for_second_order(body, "frozen")
    assert not couples_examples(body) and norm.running_var is not None
    before = {name: value.clone() for name, value in body.named_buffers()}
    functional_call(body, dict(body.named_parameters()), (torch.randn(4, *GREY28),))
    assert all(torch.equal(value, before[name]) for name, value in body.named_buffers())

    prepare_for_second_order(body, "batch")
    assert couples_examples(body) and not dict(body.named_buffers())
    assert not any(getattr(module, "inplace", False) or module.training for module in body.modules())
    inputs = 5 + torch.randn(4, *GREY28)
    maps = norm(body.layers[0](inputs))
    torch.testing.assert_close(maps.mean(dim=(0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    assert torch.equal(body(inputs).tap, body(inputs).tap)


def test_conv4_has_no_state_and_mlp_couples_nothing() -> None:
    assert couples_examples(_net()) and not dict(_net().named_buffers())
    assert not couples_examples(_net((1,)))


@pytest.mark.parametrize("with_colearner", [True, False])
@pytest.mark.parametrize("shape", [GREY28, (1,)])
def test_own_networks_are_twice_differentiable(shape: tuple[int, ...], with_colearner: bool) -> None:
    check_twice_differentiable(_net(shape, with_colearner=with_colearner), shape, 5)


class _Body(nn.Module):
    """A body around any layers that give a map."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, inputs: Tensor) -> Features:
        maps = self.layers(inputs)
        return Features(tap=maps, pooled=maps.mean(dim=(2, 3)))


class _Square(torch.autograd.Function):
    """x squared, whose backward runs outside autograd in one of three ways."""

    @staticmethod
    def forward(ctx, inputs: Tensor) -> Tensor:
        ctx.save_for_backward(inputs)
        return inputs.square()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (inputs,) = ctx.saved_tensors
        return 2 * inputs * grad


class _OnceSquare(_Square):
    backward = staticmethod(torch.autograd.function.once_differentiable(_Square.backward))


class _CutSquare(_Square):
    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (inputs,) = ctx.saved_tensors
        return 2 * inputs.detach() * grad


class _Apply(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.function = function

    def forward(self, inputs: Tensor) -> Tensor:
        return self.function.apply(self.conv(inputs))


def _custom(layers: nn.Module) -> CmlNet:
    torch.manual_seed(0)
    net = CmlNet(_Body(layers), nn.Linear(3, 5))
    prepare_for_second_order(net, "batch")
    return net


def test_check_accepts_a_right_second_derivative_and_refuses_wrong_ones() -> None:
    check_twice_differentiable(_custom(_Apply(_Square)), GREY28, 5)
    for function in (_OnceSquare, _CutSquare):
        with pytest.raises(ModelError, match="the second derivative of toy is wrong.*method.order=1"):
            check_twice_differentiable(_custom(_Apply(function)), GREY28, 5, "toy")


class _Cache(nn.Conv2d):
    """Keeps a value that other parameters gave."""

    def __init__(self) -> None:
        super().__init__(1, 3, 3)
        self.cache = {}

    def forward(self, inputs: Tensor) -> Tensor:
        self.cache.setdefault("scale", self.weight.mean(dim=(2, 3)).unsqueeze(-1))
        return self.cache["scale"] * super().forward(inputs)


def _tied() -> nn.Module:
    layers = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3))
    layers[2].weight = layers[1].weight
    return layers


@pytest.mark.parametrize("layers", [_Cache, _tied])
def test_check_refuses_what_is_no_function_of_its_parameters(layers) -> None:
    torch.manual_seed(0)  # of rare values the check cannot tell it
    with pytest.raises(ModelError, match="toy"):
        check_twice_differentiable(_custom(layers()), GREY28, 5, "toy")


def test_norm_without_a_batch_mode_is_refused() -> None:
    with pytest.raises(ModelError, match="InstanceNorm2d at body.layers.1 keeps running statistics"):
        _custom(nn.Sequential(nn.Conv2d(1, 3, 3), nn.InstanceNorm2d(3, track_running_stats=True)))


def test_stateless_copy_gives_the_same_outputs() -> None:
    net = _net()
    stateless = copy.deepcopy(net).to("meta")
    inputs = torch.randn(3, *GREY28)
    tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    outputs = functional_call(stateless, tensors, (inputs,), {"learners": ("meta", "co")})
    assert all(torch.equal(a, b) for a, b in zip(outputs, net(inputs, ("meta", "co")), strict=True))
