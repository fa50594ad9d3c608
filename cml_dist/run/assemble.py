"""From a configuration to the parts of a run: data, network, meta-model. Shared by training, evaluation and export."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass

import torch

from cml_dist import user_code
from cml_dist.config.plan import RunPlan, make_plan
from cml_dist.config.schema import RunConfig
from cml_dist.data.as_trained import read_as_trained
from cml_dist.data.base import SPLITS, Domain
from cml_dist.data.build import build_domain
from cml_dist.distributed.world import World, set_arithmetic
from cml_dist.memory.choose import autocast_type, engine_of, fit_memory
from cml_dist.meta.model import MetaModel
from cml_dist.meta.problem import Problem
from cml_dist.meta.rule import InnerRule, Method
from cml_dist.methods.check import check_rule, made_up_episode
from cml_dist.nets.build import make_network, method_of
from cml_dist.nets.guard import check_twice_differentiable
from cml_dist.nets.network import CmlNet
from cml_dist.run.features import keep_features
from cml_dist.run.trained import trained_inputs
from cml_dist.run.warm_start import check_start, normalise_as_before, read_start
from cml_dist.telemetry.console import Console, preparing
from cml_dist.user_code import blamed, is_code

DOWNLOAD_S = 3600.0
"""Published weights come over any link; the library that fetches them gives up by itself where nothing comes."""


@dataclass(frozen=True)
class Parts:
    """What a run is made of.

    Attributes:
        net: with its initial values, on the CPU; kept for its structure (export needs it).
        model: owns the parameters.
        plan: with engine, micro-batch, trajectory and copies as the memory budget decided.
        threads: of this process.
        kept: splits whose episodes give the body's features; None: that is open yet.
        taken_over: by ``model.init_from``, in words by part, and first from where; None: nothing, or not now.
    """

    domain: Domain
    net: CmlNet
    model: MetaModel
    dtype: torch.dtype
    plan: RunPlan
    threads: int
    kept: tuple[str, ...] | None = None
    taken_over: dict[str, str] | None = None


def import_own(config: RunConfig) -> None:
    """Import code of the user's own that settings name: a fault in it is to be found before anything else."""
    for value in (config.method.name, config.model.backbone, config.domain.name):
        if is_code(value):
            user_code.load(value)


def assemble(
    config: RunConfig, world: World, console: Console, splits: Collection[str] = (), *, training: bool = True
) -> Parts:
    """Build the parts on every rank; each machine's first rank goes first, to fill caches once.

    Args:
        splits: brought into memory now, so that a damaged image is found before the work starts.
        training: whether meta-gradients will be computed, so that the memory budget must hold them.

    Collective: all ranks, and all fail together.
    """
    plan, threads = make_plan(config, world.size, os.environ), set_arithmetic(config, world)
    dtype = getattr(torch, config.run.dtype)

    def tell(done: int, total: int, what: str) -> None:
        world.heartbeat.beat(f"{what} ({done} of {total})")
        if world.local_rank == 0:
            progress(done, total, what)

    def find_data() -> Domain:
        import_own(config)
        seeds = {"train_seed": config.run.seed, "eval_seed": config.eval.seed}
        how = {"processes": world.local_size, "progress": tell, "trained": trained, "tell": console.note}
        domain = build_domain(config.domain, **seeds, splits=SPLITS if training else [config.eval.split], **how)
        if training:
            read_as_trained(config, domain, console.note)
            normalise_as_before(config, domain, start, console)
        return domain

    def load() -> None:
        world.heartbeat.beat("loading the data")
        for split in splits:
            domain.load(split, tell)

    def make() -> CmlNet:
        world.heartbeat.beat("building the network", DOWNLOAD_S if config.model.pretrained else 0.0)
        net = make_network(config, domain.input_shape, domain.output_dim, start=start and start.values)
        if world.local_rank == 0 and config.method.order == 2:
            check_twice_differentiable(net, domain.input_shape, domain.output_dim, config.model.backbone)
        return net.to(dtype)

    world.heartbeat.beat("looking for the data")
    start = world.run_on_all_ranks(lambda: read_start(config, console.warn))
    trained = None
    if not training:  # as rank 0 sees it: another machine may not see the newest checkpoint yet
        found = world.run_on_all_ranks(lambda: trained_inputs(config, console.warn) if world.is_main else None)
        trained = world.gather(found)[0]
    with preparing(console) as progress:
        domain = world.local_main_process_first(find_data)  # fills the cache of embedded or remote data
    net = world.local_main_process_first(make)  # fills the cache of pre-trained weights
    taken_over = world.run_on_all_ranks(lambda: check_start(config, net, start, console.warn))

    def make_method() -> Method:
        method = method_of(config, net)
        if type(method.rule) is not InnerRule:
            params = {n: p.detach() for n, p in net.named_parameters()}
            problem = Problem(net, domain.loss, domain.score, dict(net.named_buffers()))
            ways, like = getattr(config.domain, "ways", 0), next(net.parameters())
            with blamed(config.method.name, "fails in a trial"):
                check_rule(problem, method, params, made_up_episode(domain.input_shape, ways, domain.output_dim, like))
        return method

    method = world.run_on_all_ranks(make_method)
    kept = None
    if training:  # once network and method are known to be sound
        kept = keep_features(config, net, domain, world, console, splits, training=True)
    with preparing(console) as progress:
        world.run_on_all_ranks(load)  # every rank decodes at once
    world.heartbeat.beat("measuring memory")
    device = world.device
    plan = world.run_on_all_ranks(lambda: fit_memory(config, plan, net, method, domain, device, training=training))
    means = {"micro_batch": plan.micro_batch, "autocast": autocast_type(config), "clip_value": config.optim.clip_value}
    model = MetaModel(net, domain.loss, domain.score, method, engine_of(plan), **means)
    # An episode of many inner steps and micro-batches may take longer than parallel.hang_timeout_s; a pass hardly can.
    model.problem.on_pass = world.heartbeat.touch
    return Parts(domain, net, model, dtype, plan, threads, kept, taken_over)
