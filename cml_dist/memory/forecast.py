"""Know before you run: a configuration's memory and traffic under every strategy, without data, weights or a GPU."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from cml_dist.config.methods import has_classes
from cml_dist.config.plan import episode_in_words, make_plan
from cml_dist.config.schema import RunConfig
from cml_dist.config.shape import open_keys
from cml_dist.data.build import build_domain
from cml_dist.data.set_shape import is_here, known_shape
from cml_dist.errors import ConfigError
from cml_dist.memory.choose import MEANS, USABLE, KnownInputs, MemoryPlanner, in_words
from cml_dist.memory.strategies import STRATEGIES, Strategy
from cml_dist.nets.build import make_network, method_of
from cml_dist.nets.network import CmlNet
from cml_dist.registry import DOMAINS
from cml_dist.user_code import is_code

_SHAPE_FROM = {True: "as follows from the set", False: "the most that follows from a set: this one is not here"}


def forecast(
    config: RunConfig,
    gpus: int,
    gpu_memory_gib: float,
    *,
    image_size: int | None = None,
    channels: int | None = None,
    words: Sequence[str] = (),
) -> dict[str, Any]:
    """Every strategy's budget for ``config`` on ``gpus`` GPUs, and the fastest one that fits.

    Args:
        image_size, channels: see :func:`known_inputs`.
        words: configuration and overrides as they were typed, for the command.

    Returns:
        What ``cml-dist plan --json`` prints, memory of rows in bytes:

        - ``gpus``, ``gpu_memory_gib``, and ``usable_gib`` of each: ``memory.budget_gib``, or nine tenths;
        - ``episode``: its shape in words;
        - ``inputs``: the shape of one, and ``input_source``: how it is known;
        - ``warning``: which border of the images the backbone never sees; None: it sees all;
        - ``num_parameters``, ``num_constants``: elements that are meta-trained, and that are not;
        - ``episodes_per_rank``: of a meta-step, on the busiest rank;
        - ``rows``: of each strategy a :class:`RankBudget` with ``total``, ``fits``, and ``by``: the fastest means that
          fit it in words, else the leanest; ``means``: the same as settings;
        - ``recommended``, ``command``: number of the row to use, and what starts it; None where nothing fits;
        - ``smallest_gib``: the GPU memory (or budget) with which the leanest would fit, where nothing does, else None.

    Raises:
        ConfigError: numbers out of range; the size of the images is not known; ``parallel.processes`` asks for another
            world.

    Cost: seconds to a minute; memory of Python and torch alone.
    """
    if gpus < 1:
        raise ConfigError(f"--gpus is {gpus}", "give the number of GPUs, 1 or more")
    if not gpu_memory_gib > 0:
        raise ConfigError(f"--gpu-memory-gib is {gpu_memory_gib:g}", "give the memory of one GPU in GiB, above 0")
    asked = config.parallel.processes
    if asked not in (None, gpus):
        raise ConfigError(f"parallel.processes is {asked}, but --gpus is {gpus}", f"set parallel.processes={gpus}")
    config, was_open = known_shape(config), bool(open_keys(config))
    inputs = known_inputs(config, image_size, channels)
    net = network_structure(config, inputs)
    # Strategies are what is compared here; the plan is asked for the rest.
    parallel = config.parallel.model_copy(update={"strategy": "auto", "offload": "auto"})
    plan = make_plan(config.model_copy(update={"parallel": parallel}), gpus, {})
    planner = MemoryPlanner(config, plan, net, method_of(config, net), inputs, on_gpu=True)
    share = USABLE if config.memory.budget_gib is None else 1
    usable = config.memory.budget_gib or share * gpu_memory_gib
    strategies = [s for s in STRATEGIES if (s.name == "single") == (gpus == 1) or (gpus == 1 and s.offload != "none")]
    if config.run.dtype != "float32":
        strategies = [s for s in strategies if s.stage is None]  # DeepSpeed reduces and updates in float32
    candidates = planner.candidates()
    means = [planner.choose(s, gpus, int(usable * 2**30)) or candidates[-1] for s in strategies]
    rows = [planner.need(s, m, gpus) for s, m in zip(strategies, means, strict=True)]
    fits = [row.total <= usable * 2**30 for row in rows]
    # Fewest bytes first, then what computes as a whole; the order of STRATEGIES decides between equals. ZeRO-0 is DDP's
    # arithmetic in DeepSpeed's hands: a check, not a means.
    fitting = [n for n, strategy in enumerate(strategies) if fits[n] and strategy.name != "zero0"]
    recommended = min(fitting, key=lambda n: (rows[n].sent, candidates.index(means[n]), n), default=None)
    command = smallest = None
    if recommended is None:
        smallest = min(planner.need(s, candidates[-1], gpus).total for s in strategies) / 2**30 / share
    else:
        command = launch_command(strategies[recommended], gpus, words)
    return {
        "gpus": gpus,
        "gpu_memory_gib": gpu_memory_gib,
        "usable_gib": usable,
        "episode": episode_in_words(config) + ("" if not was_open else f", {_SHAPE_FROM[is_here(config)]}"),
        "inputs": inputs.input_shape,
        "input_source": inputs.source,
        "warning": getattr(net.body, "border_warning", None),
        "num_parameters": sum(p.numel() for p in net.parameters()),
        "num_constants": sum(b.numel() for b in net.buffers()),
        "episodes_per_rank": max(plan.episodes_by_rank),
        "rows": [
            {**asdict(row), "total": row.total, "fits": fit, "by": in_words(by)}
            for row, fit, by in zip(rows, fits, means, strict=True)
        ],
        "means": [{key: getattr(by, key) for key in MEANS} for by in means],
        "recommended": recommended,
        "command": command,
        "smallest_gib": smallest,
    }


def launch_command(strategy: Strategy, gpus: int, words: Sequence[str]) -> str:
    """What starts ``cml-dist train WORDS`` under a strategy on the GPUs of one machine."""
    ours = [f"parallel.strategy={strategy.name}"]
    if strategy.stage in (2, 3):
        ours.append(f"parallel.offload={strategy.offload}")
    theirs = [word for word in words if word.partition("=")[0] not in ("parallel.strategy", "parallel.offload")]
    launcher = "cml-dist" if gpus == 1 else f"torchrun --standalone --nproc_per_node {gpus} -m cml_dist"
    return f"{launcher} train {shlex.join([*theirs, *ours])}"


def network_structure(config: RunConfig, inputs: KnownInputs) -> CmlNet:
    """The network without values: pre-trained weights change no size, and are neither read nor fetched."""
    with torch.device("meta"):
        net = make_network(config, inputs.input_shape, inputs.output_dim, structure_only=True)
    return net.to(getattr(torch, config.run.dtype))


def known_inputs(config: RunConfig, image_size: int | None = None, channels: int | None = None) -> KnownInputs:
    """What a run reads, as far as it is known without its data.

    Args:
        image_size, channels: of the images; None: those of the packed set, or the usual ones of the named set.

    Raises:
        ConfigError: the size of the images is not known.
    """
    domain = config.domain
    if is_code(domain.name) or domain.name == "graph_nodes":
        made = build_domain(domain, train_seed=config.run.seed, eval_seed=config.eval.seed)
        source = made.describe().get("graph", "the domain's")
        return KnownInputs(made.input_shape, made.output_dim, made.loss, made.score, source, made.largest_episode)
    if not has_classes(config):
        from cml_dist.data.sinusoid import SinusoidDomain as Domain

        return KnownInputs(Domain.input_shape, Domain.output_dim, Domain.loss, Domain.score, "the domain's")
    from cml_dist.data.images import ImageDomain as Domain

    known, source = DOMAINS[domain.name].usual_inputs, f"usual for {domain.name}"
    if is_here(config):
        from cml_dist.data.shards import ShardSet

        shards = ShardSet.open(domain.root)
        known, source = (shards.channels, *shards.image_size), f"of the set in {domain.root}"
    if image_size is not None or channels is not None:
        source = f"as given, else {source}" if known else "as given"
    usual_channels, height, width = known or (None, None, None)
    shape = (channels or usual_channels, image_size or height, image_size or width)
    if None in shape:
        raise ConfigError(
            f"the size of the images is not known: domain.name is {domain.name}, and domain.root {domain.root} is no "
            "folder here",
            "give --image-size PIXELS and --channels 1 or 3, or a domain.root that is here",
        )
    return KnownInputs(shape, known_shape(config).domain.ways, Domain.loss, Domain.score, source)
