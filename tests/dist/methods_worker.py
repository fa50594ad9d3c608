"""Run by every rank of a launch: a few meta-steps of each method, head and kind of co-learner; rank 0 saves them.

    methods_worker.py OUT    # with tests/math in PYTHONPATH

The networks are small and smooth, so that float32 can be compared. One launch runs all strategies of its world size;
between them the ranks meet anew.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from parity_worker import WAYS, RandomImages, config_of, join
from torch import Tensor
from toy import BODIES, make_net

from cml_dist.config.plan import make_plan
from cml_dist.config.schema import GraphNodesConfig
from cml_dist.data.graph_nodes import GraphNodesDomain
from cml_dist.meta.gradient import Engine
from cml_dist.meta.model import MetaModel
from cml_dist.meta.rule import InnerRule, Method, part_of
from cml_dist.meta.unlabelled import Unlabelled
from cml_dist.methods.inner_optim import Adam, Momentum
from cml_dist.methods.lora import Lora
from cml_dist.methods.maml_pp import MamlPlusPlus
from cml_dist.methods.meta_sgd import MetaSgd
from cml_dist.methods.mgaug import Pruning
from cml_dist.methods.sharp import SharpSgd
from cml_dist.methods.warpgrad import WarpGrad, is_warp
from cml_dist.nets.gcn import GCN
from cml_dist.nets.heads import build_head
from cml_dist.nets.network import CmlNet
from cml_dist.nets.partition import freeze
from cml_dist.distributed.exit import leave
from cml_dist.distributed.strategy import DataParallel
from cml_dist.distributed.world import World
from cml_dist.distributed.zero import build_strategy
from cml_dist.run.stream import episode_stream, rank_share
from cml_dist.types import BODY, COLEARNER, HEAD, EachTime, Episode, Params

ZERO = ("zero1", "zero2", "zero3")
FURTHER = ("zero0", "zero2+optimizer", "zero3+optimizer", "zero3+all")
"""Of the cases that reduce inside the meta-step alone."""
RUNS = {
    1: (("single", "float64"), ("single", "float32")),
    2: (*((strategy, "float32") for strategy in (*ZERO, *FURTHER)), ("ddp", "float64")),
}
"""(strategy, type) by world size."""
EPISODES = (3, 1, 3)
"""Of one meta-step after another over all ranks: a number that 2 does not divide, and fewer than ranks."""
LR, CLIP_NORM, GAMMA = 0.1, 0.5, 0.7
FEATURES = 6
"""Of both bodies."""


@dataclass(frozen=True)
class Case:
    """A method with its co-learner.

    Attributes:
        body: of ``toy.py``, or ``gcn`` for nodes.
        adapts: the one part that does; None: body and head.
        colearner: ``dense``, ``prototypes``, ``untrained`` (frozen) or ``adapts`` (both heads do).
        diagnose: the cosine of the learners' meta-gradients is asked for.
        frozen: the body is constant.
        squares: the loss is that of one-hot labels: under cross-entropy what all classes share, such as a shared
            head's vector and a ridge head's offset, has a gradient of zero.
        augment: sub-networks besides.
        nodes: settings of the domain of nodes.
        unlabelled: what is done with their unlabelled ones.
    """

    body: str
    rule: InnerRule
    steps: int = 2
    order: int = 2
    adapts: str | None = None
    head: str = "linear"
    colearner: str = "dense"
    trajectory: str = "all"
    micro_batch: int | None = None
    diagnose: bool = False
    frozen: bool = False
    squares: bool = False
    clip_value: float | None = None
    ascent: float = 0.0
    augment: Pruning | None = None
    nodes: dict[str, Any] = field(default_factory=dict)
    unlabelled: Unlabelled | None = None


RATES, SLOW = (0.4, 0.3), (0.08, 0.06)
SGD = InnerRule(*RATES)
PLUS_PLUS = MamlPlusPlus(
    *RATES, steps=2, norms=("body.norm.weight", "body.norm.bias"), multi_step_loss=2, multi_step_every=1
)
"""A multi-step loss in two meta-steps of three, with other weights in each."""
SHARP = SharpSgd(*RATES, radius=0.3)
LORA = Lora(*RATES, rank=2, beside=(("body.qkv.weight", 18, 6),))
PRUNING = Pruning("width", (0.2, 0.5), tuple((f"body.layers.{n}.weight", f"body.layers.{n}.bias") for n in (0, 2)))
CASES = {
    "maml": Case("attention", SGD, diagnose=True),
    "fomaml": Case("attention", SGD, order=1),
    "anil": Case("vector", SGD, adapts=HEAD, colearner="prototypes"),
    "boil": Case("vector", SGD, adapts=BODY),
    "meta_sgd": Case("attention", MetaSgd(*RATES), micro_batch=2),
    "maml_pp": Case("attention", PLUS_PLUS),
    "clip_value": Case("vector", SGD, clip_value=0.02),
    "sharp_lower": Case("vector", SHARP),
    "sharp_upper": Case("vector", SGD, ascent=0.3),
    "sharp_both": Case("attention", SHARP, micro_batch=2, ascent=0.3, clip_value=0.05),
    "momentum": Case("vector", Momentum(*SLOW)),
    "adam": Case("attention", Adam(*SLOW)),
    "sqrt": Case("vector", Adam(*SLOW), steps=3, trajectory="sqrt"),
    "shared": Case("vector", SGD, head="shared", colearner="prototypes", squares=True),
    "centroid": Case("attention", SGD, head="centroid", colearner="prototypes"),
    "ridge": Case("vector", SGD, steps=1, head="ridge", colearner="prototypes", squares=True),
    "protonet": Case("attention", SGD, steps=0, head="centroid", colearner="prototypes"),
    "untrained": Case("vector", SGD, colearner="untrained"),
    "both_adapt": Case("vector", SGD, colearner="adapts"),
    "lora": Case("attention", LORA, adapts=HEAD, micro_batch=2),
    "nodes": Case("gcn", SGD, steps=3),
    "nodes_dropout": Case("gcn", SGD, nodes={"dropout": 0.5}),
    "subgraphs": Case("gcn", SGD, head="prototype", nodes={"base": "g_meta", "cap": 6}),
    "mgaug": Case("vector", SGD, augment=PRUNING),
    "warpgrad": Case("warped", WarpGrad(*RATES), micro_batch=2),
    "tnet": Case("warped", SGD),
    "unlabelled": Case("gcn", SGD, steps=1, nodes={"unlabelled": 2}, unlabelled=Unlabelled(2, 1.0, 0.7, 2.0)),
    "lora_frozen": Case("attention", LORA, adapts=HEAD, frozen=True),
}


REDUCED_INSIDE = [name for name, case in CASES.items() if case.ascent or case.clip_value is not None]


class Noise(RandomImages):
    """Episodes that say how many classes they have."""

    def __init__(self, case: Case) -> None:
        super().__init__(BODIES[case.body].shape)
        self._squares = case.squares

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if not self._squares:
            return super().loss(outputs, targets)
        return (outputs - torch.nn.functional.one_hot(targets, WAYS)).square().sum(1).mean()

    def episode(self, split: str, index: int) -> Episode:
        return replace(super().episode(split, index), ways=WAYS)

    def prepare(self, episode: Episode, device: torch.device, dtype: torch.dtype) -> Episode:
        return replace(super().prepare(episode, device, dtype), ways=episode.ways)


def nodes_of(case: Case) -> GraphNodesDomain:
    """Episodes of the nodes of a small graph of noise."""
    rng, count = np.random.default_rng(5), 60
    features = {"feat_data": 4 * rng.standard_normal(count * 5), "feat_indices": np.tile(np.arange(5), count)}
    features |= {"feat_indptr": np.arange(count + 1) * 5, "feat_shape": (count, 5)}
    with tempfile.TemporaryDirectory() as folder:
        path, edges = f"{folder}/small.npz", rng.integers(0, count, (2, 3 * count))
        np.savez(path, edge_index=edges, labels=np.arange(count) % (3 * WAYS), **features)
        how = {"ways": WAYS, "shots": 2, "queries": 2, "split": 5, "split_sizes": (WAYS,) * 3, **case.nodes}
        return GraphNodesDomain(GraphNodesConfig(name="graph_nodes", root=path, **how), {"train": 7})


def make(case: Case) -> tuple[CmlNet, Method, Noise | GraphNodesDomain]:
    """The network with its initial values in float64, its method, and the episodes."""
    made = make_net("vector" if case.body == "gcn" else case.body)
    made.body = GCN(5, (8, FEATURES)).double() if case.body == "gcn" else made.body
    head = made.head if case.head == "linear" else build_head(case.head, FEATURES, WAYS).double()
    net = CmlNet(made.body, head, made.colearner, prototypes=case.colearner == "prototypes")
    if case.colearner == "untrained":
        freeze(net, [n for n, _ in net.named_parameters() if part_of(n) != COLEARNER], colearner=True)
    if case.frozen:
        freeze(net, [n for n, _ in net.named_parameters() if part_of(n) != BODY])
    rule, both_adapt = case.rule, case.colearner == "adapts"
    if case.adapts is not None:
        rule = replace(rule, adapts=frozenset(n for n in net.adaptable() if part_of(n) == case.adapts))
    if both_adapt:
        rule = replace(rule, parts=(BODY, HEAD, COLEARNER))
    if any(map(is_warp, net.adaptable())):
        rule = replace(rule, adapts=frozenset(n for n in net.adaptable() if not is_warp(n)))
    net.add_rule(rule.init(net.adaptable()), rule.replaces)
    domain = nodes_of(case) if case.body == "gcn" else Noise(case)
    how = {"ascent": case.ascent, "augment": case.augment, "unlabelled": case.unlabelled}
    return net, Method(case.steps, rule, GAMMA, case.order, both_adapt, **how), domain


def train(world: World, case: Case, strategy_name: str, dtype_name: str) -> dict[str, Any]:
    """Some meta-steps.

    Returns:
        ``params`` after them; ``norms`` that were reported; ``grads`` of the first one, where the strategy shows them;
        ``terms``: of all episodes of all ranks, sum and count by name.
    """
    world.accelerator.free_memory()  # the engine of the case before
    gc.freeze()  # each engine collects garbage several times: without what was imported that is quick
    config, dtype = config_of(strategy_name, dtype_name, "sgd", "cpu"), getattr(torch, dtype_name)
    net, method, domain = make(case)
    engine = Engine("adjoint", case.trajectory)
    how = {"micro_batch": case.micro_batch, "clip_value": case.clip_value}
    model = MetaModel(net.to(dtype), domain.loss, domain.score, method, engine, **how)
    strategy = build_strategy(config, make_plan(config, world.size, os.environ), world, model)
    found: dict[str, Any] = {"terms": {}}
    norms = []
    for step, episodes in enumerate(EPISODES):
        indices = list(rank_share(step, episodes, world.rank, world.size))
        diagnose = frozenset(indices if case.diagnose else ())
        stream = partial(episode_stream, domain, "train", indices, device=world.device, dtype=dtype)
        for sums in world.gather(strategy.gradient(EachTime(stream), episodes, diagnose, step)):
            for term, value in sums.items():
                found["terms"][term] = found["terms"].get(term, 0.0) + value
        if step == 0 and isinstance(strategy, DataParallel):
            found["grads"] = {n: p.grad.clone() for n, p in zip(model.names, model.values, strict=True)}
        norm, taken = strategy.apply(LR / (1 + step), CLIP_NORM)
        assert taken
        norms.append(norm)
    found["norms"] = torch.tensor(norms, dtype=torch.float64)
    found["params"] = {name: value.to("cpu", copy=True) for name, value in strategy.params().items()}
    _check_the_same_everywhere(world, found["params"])
    return found


def _check_the_same_everywhere(world: World, params: Params) -> None:
    """To the bit: each rank updates its own, or has them from the one that does."""

    def check() -> None:
        for name, value in params.items():
            assert torch.equal(value, first[name]), f"{name} is another at rank {world.rank}"

    first: dict[str, Tensor] = world.gather(params)[0]
    world.run_on_all_ranks(check)


def main(out: Path) -> None:
    found: dict[str, Any] = {}
    for strategy, dtype in RUNS[int(os.environ.get("WORLD_SIZE", 1))]:
        world = join(config_of(strategy, dtype, "sgd", "cpu"))
        names = REDUCED_INSIDE if strategy in FURTHER else CASES
        found[f"{strategy}/{dtype}"] = {name: train(world, CASES[name], strategy, dtype) for name in names}
    if world.is_main:
        torch.save({"world": world.size, "found": found}, out)
    world.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
    leave(0)
