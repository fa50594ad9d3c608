"""Run by every rank of a launch: a few meta-steps of each case of the parity matrix; rank 0 saves what came of them.

    parity_worker.py OUT           # on the CPU
    parity_worker.py OUT DEVICE    # cpu or cuda: the trajectories alone; with one GPU those of all strategies

Starting processes costs most, so one launch runs all cases of its world size; between strategies the ranks meet anew.
"""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from timm.models import register_model
from timm.models.vision_transformer import test_vit
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cml_dist.config.load import parse_config
from cml_dist.config.plan import make_plan
from cml_dist.config.schema import ModelConfig, RunConfig
from cml_dist.data.base import Domain, episode_rng
from cml_dist.meta.model import MetaModel
from cml_dist.meta.rule import Method
from cml_dist.nets.build import build_net
from cml_dist.nets.network import CmlNet
from cml_dist.nets.resnet12 import resnet12
from cml_dist.distributed.exit import leave
from cml_dist.distributed.strategy import DataParallel
from cml_dist.distributed.world import World, join_world, set_arithmetic
from cml_dist.distributed.zero import Zero, build_strategy
from cml_dist.run.stream import episode_stream, rank_share
from cml_dist.types import Batch, Episode



@register_model
def vit_tiny(pretrained: bool = False, **kwargs: object) -> torch.nn.Module:
    return test_vit(pretrained, depth=2, **kwargs)  # timm's own has six blocks, which are all alike


@register_model
def resnet12_tiny(pretrained: bool = False, **kwargs: object) -> torch.nn.Module:
    return resnet12(pretrained, widths=(4, 4, 8, 8), **kwargs)


NETS = {
    "conv4": (ModelConfig(backbone="conv4", filters=8), (1, 16, 16)),
    "resnet": (ModelConfig(backbone="test_resnet", colearner={"depth": 1, "width": 8}), (3, 32, 32)),
    "resnet12": (ModelConfig(backbone="resnet12_tiny", colearner={"depth": 1, "width": 8}), (3, 16, 16)),
    "vit": (ModelConfig(backbone="vit_tiny", colearner={"depth": 1, "width": 8}), (3, 32, 32)),
}
# At 32 px the last batch statistics are of 3 numbers (at 40 of 12): in float32 rounding alone moves the gradient severalfold.
FLOAT32_NETS = NETS | {"resnet": (NETS["resnet"][0], (3, 40, 40))}
ENGINES = ("graph", "adjoint")
EPISODES = (1, 4, 5)
"""Of a meta-step over all ranks, in float64: fewer than ranks, as many, and numbers that no world size here divides."""
PER_RANK = {2: (2, 4, 6, 5), 4: (4, 5)}
"""Of one meta-step after another over all ranks, in float32 by world size: 1, 2 and 3 a rank, and uneven."""
ZERO = {
    2: ("zero3+all", "zero0", "zero1", "zero2", "zero2+optimizer", "zero3", "zero3+optimizer"),
    4: ("zero1", "zero3"),
}
FURTHER = "zero3+optimizer"
"""Between zero3 and zero3+all: tested with the offloaded optimizer alone."""
STEPS = 2
WAYS = 3
LR = 1e-2
# Adam divides by the root of the squared gradient plus eps: with eps far above the rounding noise of a gradient whose
# true value is zero (a bias before BatchNorm), float32 can be compared.
ADAM = {"name": "adamw", "lr": LR, "weight_decay": 0.1, "eps": 1e-3}
SLOW_BODY = "adamw, slow body"
OPTIMS = {"adamw": ADAM, SLOW_BODY: ADAM | {"body_lr_scale": 0.1}}


@dataclass(frozen=True)
class Case:
    """One trajectory; ``key`` names it in the results."""

    strategy: str
    dtype: str
    net: str
    engine: str
    episodes: tuple[int, ...]  # of each meta-step, over all ranks
    optimizer: str = "sgd"

    @property
    def key(self) -> str:
        episodes = "-".join(map(str, self.episodes))
        return "/".join((self.strategy, self.dtype, self.net, self.engine, episodes, self.optimizer))


COUNTED = Case("", "float32", "vit", "graph", (2,))
RESUMED = {optimizer: Case("", "float32", "conv4", "adjoint", (5,), optimizer) for optimizer in OPTIMS}
ADAMW = Case("", "float32", "conv4", "graph", (5, 5), "adamw")


def cases(world: int, device: str | None = None) -> Iterator[Case]:
    """All of a world size, those of one strategy together (on 2 ranks, SAVED_BY first)."""
    if world == 1 and device == "cuda":  # plain ones first: DeepSpeed leaves a lone process in a world of one
        yield from (case for case in cases(1) if case.strategy != SAVED_BY)
        yield from (case for case in cases(2) if case.strategy != "ddp")
        return
    plain = "single" if world == 1 else "ddp"
    for strategy in ZERO.get(world, ()):
        nets = () if strategy == FURTHER else NETS if world == 2 else ("vit",)
        for net, engine in itertools.product(nets, ENGINES):
            yield Case(strategy, "float32", net, engine, PER_RANK[world])
        yield replace(ADAMW, strategy=strategy)
        yield replace(ADAMW, strategy=strategy, optimizer=SLOW_BODY)
    for net, engine, episodes in itertools.product(NETS, ENGINES, EPISODES):
        yield Case(plain, "float64", net, engine, (episodes,) * STEPS)
    if world == 1:
        for net, engine, episodes in itertools.product(NETS, ENGINES, PER_RANK.values()):
            yield Case(plain, "float32", net, engine, episodes)
        yield replace(ADAMW, strategy=plain)
        yield replace(ADAMW, strategy=plain, optimizer=SLOW_BODY)
        yield replace(ADAMW, strategy=SAVED_BY)  # no launcher, and still DeepSpeed


class RandomImages(Domain):
    """Episodes of noise: a pure function of (split, index)."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.input_shape, self.output_dim = shape, WAYS

    def episode(self, split: str, index: int) -> Episode:
        rng = episode_rng(7, split, index)

        def batch(count: int) -> Batch:
            return Batch(torch.from_numpy(rng.standard_normal((count, *self.input_shape))), torch.arange(count) % WAYS)

        return Episode(batch(WAYS), batch(2 * WAYS), split, index)

    def prepare(self, episode: Episode, device: torch.device, dtype: torch.dtype) -> Episode:
        def move(batch: Batch) -> Batch:
            return Batch(batch.inputs.to(device, dtype), batch.targets.to(device))

        return Episode(move(episode.support), move(episode.query), episode.split, episode.index)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(outputs, targets)

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.argmax(1) == targets).double().mean()


def config_of(strategy: str, dtype: str, optimizer: str, device: str = "auto") -> RunConfig:
    name, _, offload = strategy.partition("+")
    return parse_config(
        {
            "domain": {"name": "sinusoid"},
            "optim": OPTIMS.get(optimizer, {"name": optimizer, "lr": LR}),
            "parallel": {"strategy": name, "offload": offload or "none"},
            "run": {"precision": {"float64": "fp64", "float32": "fp32"}[dtype], "device": device},
        }
    )


def join(config: RunConfig) -> World:
    """Meet the other ranks, also for a second time in one process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return join_world(config)


@functools.cache
def _net(name: str, double: bool) -> CmlNet:
    """With its initial values; timm takes its time to make one."""
    model_config, shape = (NETS if double else FLOAT32_NETS)[name]
    return build_net(model_config, input_shape=shape, output_dim=WAYS, seed=0, colearner=True)


def prepare(world: World, case: Case) -> tuple[RunConfig, RandomImages, DataParallel | Zero]:
    world.accelerator.free_memory()  # the engine of the case before
    gc.freeze()  # or each further collection, of which DeepSpeed asks for many, goes through all modules again
    config = config_of(case.strategy, case.dtype, case.optimizer)
    domain = RandomImages((NETS if case.dtype == "float64" else FLOAT32_NETS)[case.net][1])
    net = copy.deepcopy(_net(case.net, case.dtype == "float64")).to(getattr(torch, case.dtype))
    # Small inner steps in float32: what rounding does to a meta-gradient grows with them.
    inner_lr = 0.1 if case.dtype == "float64" else 0.01
    model = MetaModel(net, domain.loss, domain.score, Method.sgd(2, inner_lr, 2 * inner_lr, gamma=0.7), case.engine)
    return config, domain, build_strategy(config, make_plan(config, world.size, os.environ), world, model)


def steps(
    world: World, case: Case, domain: RandomImages, strategy: DataParallel | Zero, first: int, count: int
) -> list[tuple[float, bool]]:
    """Some meta-steps, with a schedule; what each returned."""
    told = []
    for step in range(first, first + count):
        episodes = case.episodes[step % len(case.episodes)]
        indices = rank_share(step, episodes, world.rank, world.size)
        dtype = getattr(torch, case.dtype)
        stream = episode_stream(domain, "train", indices, device=world.device, dtype=dtype)
        strategy.gradient(stream, episodes)
        told.append(strategy.apply(_lr(case) / (1 + step), clip_norm=0.5))
    return told


def _lr(case: Case) -> float:
    """Smaller in float32: a ReLU that rounding switches moves a gradient by 1e-4, and not the parameters by 1e-6."""
    return LR / 10 if (case.dtype, case.optimizer) == ("float32", "sgd") else LR


def train(world: World, case: Case) -> dict[str, Tensor]:
    """Parameters after a few meta-steps, and as ``norms`` what was reported of the gradient."""
    _, domain, strategy = prepare(world, case)
    told = steps(world, case, domain, strategy, 0, len(case.episodes))
    assert all(taken for _, taken in told)
    norms = torch.tensor([norm for norm, _ in told], dtype=torch.float64)
    return {name: value.to("cpu", copy=True) for name, value in strategy.params().items()} | {"norms": norms}


def save(world: World, case: Case) -> dict[str, Tensor]:
    """All that a checkpoint would hold after a few meta-steps."""
    _, domain, strategy = prepare(world, case)
    assert strategy.saved_layout().keys() == {f"param/{name}" for name in strategy.params()}  # no moments yet
    steps(world, case, domain, strategy, 0, STEPS)
    return saved(world, strategy)


def saved(world: World, strategy: DataParallel | Zero) -> dict[str, Tensor]:
    tensors = dict(strategy.saved_tensors())
    layout = strategy.saved_layout()
    assert list(tensors) == list(layout)
    if world.is_main:
        assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == layout
    return {name: tensor.clone() for name, tensor in tensors.items()}


def resume(world: World, case: Case, state: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """What a checkpoint would hold right after loading one, and after a further step."""
    _, domain, strategy = prepare(world, case)
    strategy.load(lambda name: state[name].clone(), state.keys())
    loaded = saved(world, strategy)
    steps(world, case, domain, strategy, STEPS, 1)
    return {"loaded": loaded, "further": saved(world, strategy)}


def skip(world: World, case: Case) -> dict[str, Tensor]:
    """One step, one whose gradient is NaN on the last rank alone, one more; and the same without the NaN."""
    found = {}
    for bad in (True, False):
        _, domain, strategy = prepare(world, case)
        steps(world, case, domain, strategy, 0, 1)
        if bad:
            before = saved(world, strategy)
            episode = domain.prepare(domain.episode("train", 0), world.device, torch.float32)
            if world.rank == world.size - 1:
                episode.query.inputs[0] = float("nan")
            strategy.gradient(iter([episode]), world.size)
            norm, taken = strategy.apply(LR, clip_norm=0.5)
            assert not taken and not math.isfinite(norm), (norm, taken)
            after = saved(world, strategy)
            assert all(torch.equal(before[name], after[name]) for name in before), "a skipped step left its mark"
        steps(world, case, domain, strategy, 1, 1)
        found[bad] = saved(world, strategy)
    return {name: torch.stack([found[True][name], found[False][name]]) for name in found[True]}


def collectives(world: World, case: Case) -> dict[str, list[int]]:
    """Numbers of elements that each collective of a meta-step carried on this rank, by kind.

    The fourth step: DeepSpeed gathers ZeRO-3's parameters one by one until it has recorded how they are used. Sizes are
    those of the whole: what is reduced, or what is there after gathering.
    """
    _, domain, strategy = prepare(world, case)
    steps(world, case, domain, strategy, 0, 3)
    with _Counted() as counted:
        steps(world, case, domain, strategy, 3, 1)
    found = counted.found
    found["elements"] = [sum(torch.Size(shape).numel() for _, shape in strategy.saved_layout().values())]
    return found


class _Counted(TorchDispatchMode):
    """Sees each collective as torch dispatches it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func.name().partition("::")[2].strip("_").removesuffix("_base")
            whole = args[1] if name == "reduce_scatter" else args[0]
            tensors = [whole] if isinstance(whole, Tensor) else whole
            self.found.setdefault(name, []).extend(tensor.numel() for tensor in tensors)
        return func(*args, **(kwargs or {}))


SAVED_BY = "zero3+all"
RESUMED_BY = {1: ("single",), 2: ("ddp", "zero0", "zero2+optimizer", "zero3"), 4: ("ddp", "zero1")}
"""Who loads, by world size, what SAVED_BY has saved on 2 ranks."""


def main(out: Path, device: str | None = None) -> None:
    results: dict[str, dict] = {"params": {}, "resumed": {}, "skipped": {}, "collectives": {}}
    size = int(os.environ.get("WORLD_SIZE", 1))
    state_file = out.with_name("state.pt")
    chosen = cases(size, device)
    by_strategy = {name: list(group) for name, group in itertools.groupby(chosen, lambda case: case.strategy)}
    for strategy, group in by_strategy.items():
        config = config_of(strategy, group[0].dtype, "sgd", device or "cpu")
        world = join(config)
        if device == "cuda":
            set_arithmetic(config, world)  # or TF32 would stand for float32
        for case in group:
            results["params"][case.key] = train(world, case)
        if device is not None:
            continue
        if size == 2:
            results["collectives"][strategy] = collectives(world, replace(COUNTED, strategy=strategy))
            resumed = {optimizer: replace(case, strategy=strategy) for optimizer, case in RESUMED.items()}
            results["skipped"][strategy] = {optimizer: skip(world, case) for optimizer, case in resumed.items()}
            if strategy == SAVED_BY:
                state = {optimizer: save(world, case) for optimizer, case in resumed.items()}
                if world.is_main:
                    torch.save(state, state_file)
                world.run_on_all_ranks(lambda: None)
        if strategy in RESUMED_BY[size]:
            results["state"] = state = torch.load(state_file)
            results["resumed"][strategy] = {
                optimizer: resume(world, replace(case, strategy=strategy), state[optimizer])
                for optimizer, case in RESUMED.items()
            }
    if world.is_main:
        torch.save({"world": size, **results}, out)
    world.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), *sys.argv[2:])
    leave(0)
