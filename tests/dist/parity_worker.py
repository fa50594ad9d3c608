"""Run by every rank of a launch: a few meta-steps of each case of the parity matrix; rank 0 saves the parameters."""

from __future__ import annotations

import itertools
import sys

import torch
from torch import Tensor

from cml_dist.config.load import parse_config
from cml_dist.config.schema import ModelConfig, OptimConfig
from cml_dist.domains.base import Domain, episode_rng
from cml_dist.meta.model import MetaModel
from cml_dist.meta.problem import Method
from cml_dist.nets.build import build_net
from cml_dist.parallel.leave import leave
from cml_dist.parallel.strategy import DataParallel
from cml_dist.parallel.world import World, join_world
from cml_dist.run.optim import build_optimizer
from cml_dist.run.stream import EpisodeStream, rank_share
from cml_dist.types import Batch, Episode

NETS = {
    "conv4": (ModelConfig(backbone="conv4", filters=8), (1, 16, 16)),
    "resnet": (ModelConfig(backbone="test_resnet", colearner={"depth": 1, "width": 8}), (3, 32, 32)),
    "vit": (ModelConfig(backbone="test_vit", colearner={"depth": 1, "width": 8}), (3, 32, 32)),
}
ENGINES = ("graph", "adjoint")
EPISODES = (1, 4, 5)
"""Of a meta-step over all ranks: fewer than ranks, as many, and numbers that no world size here divides."""
STEPS = 2
WAYS = 3


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
        return episode.to(device)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(outputs, targets)

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.argmax(1) == targets).double().mean()


def train(world: World, net_name: str, engine: str, batch: int, optimizer: str) -> dict[str, Tensor]:
    """Parameters after a few meta-steps in float64."""
    model_config, shape = NETS[net_name]
    domain = RandomImages(shape)
    net = build_net(model_config, input_shape=shape, output_dim=WAYS, seed=0, colearner=True).double()
    model = MetaModel(net, domain.loss, domain.score, Method(2, 0.1, 0.2, gamma=0.7), engine)
    config = OptimConfig(name=optimizer, lr=1e-2)
    strategy = DataParallel(world, model, build_optimizer(config, model))
    for step in range(STEPS):
        indices = rank_share(step, batch, world.rank, world.size)
        stream = EpisodeStream(domain, "train", indices, device=world.device, dtype=torch.float64)
        strategy.gradient(stream, batch)
        _, taken = strategy.apply(config.lr, clip_norm=0.5)
        assert taken
    return {name: value.clone() for name, value in strategy.params().items()}


def matrix(world: World) -> dict[str, dict[str, Tensor]]:
    cases = itertools.product(NETS, ENGINES, EPISODES, ("sgd",))
    return {"/".join(map(str, case)): train(world, *case) for case in cases}


if __name__ == "__main__":
    torch.set_num_threads(1)
    this = join_world(parse_config({"domain": {"name": "sinusoid"}}))
    result = matrix(this)
    if this.is_main:
        torch.save({"world": this.size, "params": result}, sys.argv[1])
    this.close()
    leave(0)
