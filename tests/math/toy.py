"""Small smooth networks and episodes in float64, and a straightforward CML to hold ours against."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from cml_dist.meta.problem import Problem
from cml_dist.meta.rule import Method
from cml_dist.nets.network import CmlNet
from cml_dist.nets.warp import add_warps, warped
from cml_dist.types import Batch, Episode, Features, Params

NUM_CLASSES = 3


class Vector(nn.Module):
    """Two smooth hidden layers; no norm."""

    shape = (5,)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh())
        self.colearner = nn.Linear(6, NUM_CLASSES)
        self.head = nn.Linear(6, NUM_CLASSES)

    def forward(self, x: Tensor) -> Features:
        hidden = self.layers(x)
        return Features(hidden, hidden)


class Warped(Vector):
    """The same with a warp layer behind each of the two, moved off the identity."""

    tap_shape = (6,)

    def __init__(self) -> None:
        super().__init__()
        add_warps(self, "toy", "linear", residual=False)
        for layer, _ in self.warp_places():
            layer.warp.weight.data += 0.5 * torch.randn_like(layer.warp.weight)

    def warp_places(self) -> list[tuple[nn.Module, int]]:
        return [(layer, layer.out_features) for layer in (self.layers[0], self.layers[2])]

    def forward(self, x: Tensor) -> Features:
        first, _, second, _ = self.layers
        tap = torch.tanh(second(warped(first, torch.tanh(first(x)))))
        return Features(tap, warped(second, tap))


class Map(nn.Module):
    """Convolution, batch statistics, smooth activation."""

    shape = (1, 6, 6)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4, track_running_stats=False)
        self.colearner = nn.Sequential(nn.Flatten(), nn.Linear(4 * 36, NUM_CLASSES))
        self.head = nn.Linear(4, NUM_CLASSES)

    def forward(self, x: Tensor) -> Features:
        tap = torch.tanh(self.norm(self.conv(x)))
        return Features(tap, tap.mean((2, 3)))


class Attention(nn.Module):
    """Tokens, layer norm, softmax attention written out."""

    shape = (4, 6)

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.qkv = nn.Linear(6, 18)
        self.colearner = nn.Sequential(nn.Flatten(), nn.Linear(24, NUM_CLASSES))
        self.head = nn.Linear(6, NUM_CLASSES)

    def forward(self, x: Tensor) -> Features:
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        tokens = x + torch.softmax(q @ k.mT / 6**0.5, dim=-1) @ v
        return Features(tokens, tokens.mean(1))


BODIES = {"vector": Vector, "warped": Warped, "map": Map, "attention": Attention}


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, targets)


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.argmax(1) == targets).double().mean()


def make_net(family: str, colearner: bool = True, seed: int = 0) -> CmlNet:
    torch.manual_seed(seed)
    body = BODIES[family]().double()
    head, co = body.head, body.colearner
    del body.head, body.colearner
    return CmlNet(body, head, co if colearner else None)


def make_problem(net: CmlNet) -> tuple[Problem, Params]:
    params = {n: p.detach().clone() for n, p in net.named_parameters()}
    return Problem(net, cross_entropy, accuracy, dict(net.named_buffers())), params


def make_episode(family: str, index: int = 0) -> Episode:
    generator = torch.Generator().manual_seed(100 + index)

    def batch(count: int) -> Batch:
        inputs = torch.randn(count, *BODIES[family].shape, generator=generator, dtype=torch.float64)
        return Batch(inputs, torch.arange(count) % NUM_CLASSES)

    return Episode(batch(6), batch(9), "train", index, ways=NUM_CLASSES)


def uneven_episode(ways: int = NUM_CLASSES, index: int = 0) -> Episode:
    """For :class:`Vector`: classes of unequal numbers of support examples (1, 2, 3, 1, 2, ..), in no order."""
    generator = torch.Generator().manual_seed(200 + index)

    def batch(targets: Tensor) -> Batch:
        targets = targets[torch.randperm(len(targets), generator=generator)]
        return Batch(torch.randn(len(targets), *Vector.shape, generator=generator, dtype=torch.float64), targets)

    support = torch.cat([torch.full((1 + c % 3,), c) for c in range(ways)])
    return Episode(batch(support), batch(torch.arange(3 * ways) % ways), "train", index, ways=ways)


def features_of(p: Params, x: Tensor) -> Tensor:
    """The body :class:`Vector`, written out."""
    hidden = torch.tanh(x @ p["body.layers.0.weight"].T + p["body.layers.0.bias"])
    return torch.tanh(hidden @ p["body.layers.2.weight"].T + p["body.layers.2.bias"])


def logits_of(p: Params, x: Tensor) -> Tensor:
    """Body and head of :class:`Vector`, written out."""
    return features_of(p, x) @ p["head.weight"].T + p["head.bias"]


def colearner_of(p: Params, x: Tensor) -> Tensor:
    """Body and co-learner (one linear layer) of :class:`Vector`, written out."""
    return features_of(p, x) @ p["colearner.weight"].T + p["colearner.bias"]


def partial(loss: Callable[[Params], Tensor], at: Params, names: Iterable[str], order: int = 2) -> Params:
    """The partial gradient of ``loss`` by ``names``, all else held; of first order it is a constant."""
    grads = torch.func.grad(lambda moved: loss({**at, **moved}))({n: at[n] for n in names})
    return {n: g.detach() if order == 1 else g for n, g in grads.items()}


def total_gradient(objective: Callable[[Params], Tensor], params: Params) -> tuple[float, Params]:
    """Value and gradient of an objective by all of ``params``, by autograd; zeros where it does not depend on one."""
    leaves = {n: p.detach().clone().requires_grad_() for n, p in params.items()}
    value = objective(leaves)
    grads = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
    return value.item(), dict(zip(leaves, grads, strict=True))


def slopes(objective: Callable[[Params], Tensor], params: Params, eps: float = 1e-5) -> dict[str, tuple[Tensor, float]]:
    """By tensor of ``params``: a random direction in it, and the central difference of the objective along it."""
    generator, found = torch.Generator().manual_seed(1), {}
    for name, p in params.items():
        direction = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        above, below = (objective({**params, name: p + step * direction}).item() for step in (eps, -eps))
        found[name] = direction, (above - below) / (2 * eps)
    return found


def check_slopes(grads: Params, found: dict[str, tuple[Tensor, float]], rel: float = 1e-6) -> None:
    """Hold a gradient against the central differences of :func:`slopes`, tensor by tensor."""
    for name, (direction, slope) in found.items():
        assert (grads[name] * direction).sum().item() == pytest.approx(slope, rel=rel, abs=1e-9), name


def check_equal(ours: Params, theirs: Params, rel: float = 1e-12) -> None:
    """Two gradients are equal, tensor by tensor, to rounding: ``rel`` of a tensor and a hundredth of it of all."""
    assert ours.keys() == theirs.keys()
    total = sum(g.square().sum() for g in theirs.values()).sqrt()
    for name, g in theirs.items():
        assert ours[name].shape == g.shape, name
        error = (ours[name] - g).norm()
        assert error <= rel * g.norm() + 0.01 * rel * total, f"{name}: {error:.2e} of {g.norm():.2e}"


def plain_losses(net: CmlNet, params: Params, episode: Episode, method: Method) -> list[Tensor]:
    """Query loss of each learner after eq. 5, as differentiable expressions of ``params``: an unrolled loop, nothing
    of the package's core."""
    fast = dict(params)
    for _ in range(method.inner_steps):
        (outputs,) = functional_call(net, fast, (episode.support.inputs,))
        loss = cross_entropy(outputs, episode.support.targets)
        names = [n for n in fast if not n.startswith("colearner.")]
        grads = torch.autograd.grad(loss, [fast[n] for n in names], create_graph=True)
        for name, grad in zip(names, grads, strict=True):
            rate = method.rule.head_lr if name.startswith("head.") else method.rule.body_lr
            fast[name] = fast[name] - rate * (grad.detach() if method.order == 1 else grad)
    learners = ("meta", "co") if net.colearner is not None else ("meta",)
    outputs = functional_call(net, fast, (episode.query.inputs,), {"learners": learners})
    return [cross_entropy(out, episode.query.targets) for out in outputs]


def plain_objective(net: CmlNet, params: Params, episode: Episode, method: Method) -> Tensor:
    """Eq. 5 and 6 as one differentiable expression of ``params``: an unrolled loop, nothing of the package's core."""
    losses = plain_losses(net, params, episode, method)
    return losses[0] if len(losses) == 1 else losses[0] + method.gamma * losses[1]


def plain_gradient(net: CmlNet, params: Params, episode: Episode, method: Method) -> Params:
    leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
    grads = torch.autograd.grad(
        plain_objective(net, leaves, episode, method), list(leaves.values()), materialize_grads=True
    )
    return dict(zip(leaves, grads, strict=True))


def relative_error(a: Params, b: Params) -> float:
    """L2 distance of two gradients over the norm of the second."""
    distance = sum((a[n] - b[n]).square().sum() for n in b).sqrt()
    return (distance / sum(g.square().sum() for g in b.values()).sqrt()).item()
