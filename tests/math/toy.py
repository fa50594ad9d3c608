"""Small smooth networks and episodes in float64, and a straightforward CML to hold ours against."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cml_dist.meta.problem import Method, Problem
from cml_dist.nets.network import CmlNet
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


BODIES = {"vector": Vector, "map": Map, "attention": Attention}


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

    return Episode(batch(6), batch(9), "train", index)


def plain_objective(net: CmlNet, params: Params, episode: Episode, method: Method) -> Tensor:
    """Eq. 5 and 6 as one differentiable expression of ``params``: an unrolled loop, nothing of the package's core."""
    fast = dict(params)
    for _ in range(method.inner_steps):
        (outputs,) = functional_call(net, fast, (episode.support.inputs,))
        loss = cross_entropy(outputs, episode.support.targets)
        names = [n for n in fast if not n.startswith("colearner.")]
        grads = torch.autograd.grad(loss, [fast[n] for n in names], create_graph=True)
        for name, grad in zip(names, grads, strict=True):
            rate = method.head_lr if name.startswith("head.") else method.body_lr
            fast[name] = fast[name] - rate * (grad.detach() if method.order == 1 else grad)
    learners = ("meta", "co") if net.colearner is not None else ("meta",)
    outputs = functional_call(net, fast, (episode.query.inputs,), {"learners": learners})
    losses = [cross_entropy(out, episode.query.targets) for out in outputs]
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
