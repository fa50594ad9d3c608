"""Know before you run: a configuration's memory and traffic under every strategy, without data, weights or a GPU."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cml_dist.config import schema
from cml_dist.config.methods import has_classes, is_classifier
from cml_dist.config.plan import RunPlan, episode_in_words, make_plan
from cml_dist.config.schema import RunConfig
from cml_dist.config.shape import open_keys
from cml_dist.data.as_trained import size_read, trained_on
from cml_dist.data.build import build_domain
from cml_dist.data.set_shape import is_here, known_shape
from cml_dist.errors import ConfigError
from cml_dist.memory.choose import MEANS, USABLE, KnownInputs, MemoryPlanner, in_words
from cml_dist.memory.strategies import STRATEGIES, RankBudget, Strategy
from cml_dist.nets.build import make_network, method_of
from cml_dist.nets.network import CmlNet
from cml_dist.registry import DOMAINS
from cml_dist.types import Episode
from cml_dist.user_code import is_code

ASSUMED_IMAGES = (3, 84, 84)
"""Channels, height and width of a set that is not packed yet: those of miniImageNet."""

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
    """Every strategy's budget for ``config`` on at most ``gpus`` GPUs, and the fastest one that fits.

    Args:
        image_size, channels: see :func:`known_inputs`.
        words: configuration and overrides as they were typed, for the command.

    Returns:
        What ``cml-dist plan --json`` prints, memory of rows in bytes:

        - ``gpus``, ``gpu_memory_gib``, and ``usable_gib`` of each: ``memory.budget_gib``, or nine tenths;
        - ``gpus_used``: at most one for each episode of a meta-step, unless ``parallel.processes`` asks for more;
          ``without_episode``: how many of ``gpus`` have none;
        - ``episode``: its shape in words;
        - ``inputs``: the shape of one, and ``input_source``: how it is known, or that it is assumed;
        - ``warning``: which border of the images the backbone never sees; None: it sees all;
        - ``num_parameters``, ``num_constants``: elements that are meta-trained, and that are not;
        - ``episodes_per_rank``: of a meta-step, on the busiest rank;
        - ``rows``: of each strategy a :class:`RankBudget` with ``total``, ``fits``, and ``by``: the fastest means that
          fit it in words, else the leanest; ``means``: the same as settings;
        - ``recommended``, ``command``: number of the row to use, and what starts it; None where nothing fits;
        - ``smallest``: ``gpus``, ``strategy``, ``offload`` and ``by`` with the fewest GPUs (1, 2, 4, ...) that fit;
        - ``smallest_gib``: the GPU memory (or budget) with which the leanest would fit, where nothing does, else None;
        - ``changes``: what would make it fit, a line each, where nothing does.

    Raises:
        ConfigError: numbers out of range; ``parallel.processes`` asks for another world; a graph of unknown size.

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
    share = USABLE if config.memory.budget_gib is None else 1
    usable = config.memory.budget_gib or share * gpu_memory_gib
    compared = partial(_compare, _Planners(config, net, inputs), usable=int(usable * 2**30))
    # More would compute nothing, nor would they make room: offloading takes as much off a GPU as any number of them.
    found = compared(asked or min(gpus, config.train.episodes_per_step))
    smallest, command, smallest_gib, changes = None, None, None, []
    if found.recommended is None:
        smallest_gib = found.leanest() / 2**30 / share
        changes = [f"GPUs of {smallest_gib:.3g} GiB or more", *_changes(config, net, inputs, found)]
    else:
        command = launch_command(found.strategies[found.recommended], found.gpus, words, config.parallel)
        fewer = (compared(2**n) for n in range(found.gpus.bit_length()) if 2**n < found.gpus)
        small = next((fit for fit in fewer if fit.recommended is not None), found)
        row, by = small.rows[small.recommended], small.means[small.recommended]
        smallest = {"gpus": small.gpus, "strategy": row.strategy, "offload": row.offload, "by": in_words(by)}
    return {
        "gpus": gpus,
        "gpus_used": found.gpus,
        "without_episode": max(0, gpus - config.train.episodes_per_step),
        "gpu_memory_gib": gpu_memory_gib,
        "usable_gib": usable,
        "episode": episode_in_words(config) + ("" if not was_open else f", {_SHAPE_FROM[is_here(config)]}"),
        "inputs": inputs.input_shape,
        "input_source": inputs.source,
        "warning": getattr(net.body, "border_warning", None),
        "num_parameters": sum(p.numel() for p in net.parameters()),
        "num_constants": sum(b.numel() for b in net.buffers()),
        "episodes_per_rank": -(-config.train.episodes_per_step // found.gpus),
        "rows": [
            {**asdict(row), "total": row.total, "fits": row.total <= found.usable, "by": in_words(by)}
            for row, by in zip(found.rows, found.means, strict=True)
        ],
        "means": [{key: getattr(by, key) for key in MEANS} for by in found.means],
        "recommended": found.recommended,
        "command": command,
        "smallest": smallest,
        "smallest_gib": smallest_gib,
        "changes": changes,
    }


class _Planners:
    """The planner of a world; footprints are shared by worlds that differ in nothing that they depend on."""

    def __init__(self, config: RunConfig, net: CmlNet, inputs: KnownInputs) -> None:
        # Strategies are what is compared here; the plan is asked for the rest.
        parallel = config.parallel.model_copy(update={"strategy": "auto", "offload": "auto", "processes": None})
        self._config = config.model_copy(update={"parallel": parallel})
        self._make = partial(MemoryPlanner, net=net, method=method_of(config, net), domain=inputs, on_gpu=True)
        self._made: dict[int, MemoryPlanner] = {}

    def of(self, gpus: int) -> MemoryPlanner:
        plan = make_plan(self._config, gpus, {})
        episodes = min(max(plan.episodes_by_rank), 2)  # two stand for more, see meta_step_footprint
        if episodes not in self._made:
            self._made[episodes] = self._make(self._config, plan)
        return self._made[episodes]


@dataclass(frozen=True)
class _Comparison:
    """Every strategy on ``gpus`` GPUs with ``usable`` bytes each: the means that fit it best, and what it needs."""

    gpus: int
    usable: int
    planner: MemoryPlanner
    strategies: list[Strategy]
    means: list[RunPlan]
    rows: list[RankBudget]
    recommended: int | None

    def leanest(self) -> int:
        """Bytes of the leanest means under the leanest strategy."""
        means = self.planner.candidates()[-1]
        return min(self.planner.need(strategy, means, self.gpus).total for strategy in self.strategies)


def _compare(planners: _Planners, gpus: int, usable: int) -> _Comparison:
    planner = planners.of(gpus)
    strategies = [s for s in STRATEGIES if (s.name == "single") == (gpus == 1) or (gpus == 1 and s.offload != "none")]
    if planner.config.run.dtype != "float32":
        strategies = [s for s in strategies if s.stage is None]  # DeepSpeed reduces and updates in float32
    candidates = planner.candidates()
    means = [planner.choose(s, gpus, usable) or candidates[-1] for s in strategies]
    rows = [planner.need(s, m, gpus) for s, m in zip(strategies, means, strict=True)]
    # Fewest bytes first, then what computes as a whole; the order of STRATEGIES decides between equals. ZeRO-0 is DDP's
    # arithmetic in DeepSpeed's hands: a check, not a means.
    fitting = [n for n, strategy in enumerate(strategies) if rows[n].total <= usable and strategy.name != "zero0"]
    recommended = min(fitting, key=lambda n: (rows[n].sent, candidates.index(means[n]), n), default=None)
    return _Comparison(gpus, usable, planner, strategies, means, rows, recommended)


def _changes(config: RunConfig, net: CmlNet, inputs: KnownInputs, found: _Comparison) -> Iterator[str]:
    """What else would fit, as far as it can be said without trying out what would be another network."""
    freed = schema.EngineConfig(compile=config.engine.compile, compile_mode=config.engine.compile_mode)
    if found.planner.config.engine != freed:
        free = _compare(_Planners(config.model_copy(update={"engine": freed}), net, inputs), found.gpus, found.usable)
        if free.recommended is not None:
            by = in_words(free.means[free.recommended])
            yield f"engine.name, micro_batch, trajectory and trajectory_device at auto: then it fits, by {by}"
    if found.planner.coupled:
        yield "micro-batches, with a network whose norms couple no examples (LayerNorm, or model.norm=frozen)"
    yield "fewer parameters that are trained or adapt (model.trained, method.adapts), smaller images, or method.order=1"


def launch_command(strategy: Strategy, gpus: int, words: Sequence[str], asked: schema.ParallelConfig) -> str:
    """What starts ``cml-dist train WORDS`` under a strategy on the GPUs of one machine.

    Args:
        asked: what the words come to, which may ask for another one.
    """
    ours = {"parallel.strategy": strategy.name}
    if strategy.stage in (2, 3) or asked.offload != "auto":
        ours["parallel.offload"] = strategy.offload
    if asked.deepspeed is not None:  # a file may set up another stage
        ours["parallel.deepspeed"] = "null"
    theirs = [word for word in words if word.partition("=")[0] not in ours]
    launcher = "cml-dist" if gpus == 1 else f"torchrun --standalone --nproc_per_node {gpus} -m cml_dist"
    return f"{launcher} train {shlex.join([*theirs, *(f'{key}={value}' for key, value in ours.items())])}"


def network_structure(config: RunConfig, inputs: KnownInputs) -> CmlNet:
    """The network without values: pre-trained weights change no size, and are neither read nor fetched."""
    with torch.device("meta"):
        net = make_network(config, inputs.input_shape, inputs.output_dim, structure_only=True)
    return net.to(getattr(torch, config.run.dtype))


def known_inputs(config: RunConfig, image_size: int | None = None, channels: int | None = None) -> KnownInputs:
    """What a run reads, as far as it is known without its data.

    Args:
        image_size, channels: of the images; None: those of the packed set, or the usual ones of the named set, else
            ``ASSUMED_IMAGES``.

    Raises:
        ConfigError: a graph that is not here, and is none of the published ones.
    """
    domain = config.domain
    if domain.name == "graph_nodes" and not Path(domain.root).exists():
        return _usual_graph(domain)
    if is_code(domain.name) or domain.name == "graph_nodes":
        made = build_domain(domain, train_seed=config.run.seed, eval_seed=config.eval.seed)
        source = made.describe().get("graph", "the domain's")
        return KnownInputs(made.input_shape, made.output_dim, made.loss, made.score, source, made.largest_episode)
    if not has_classes(config):
        from cml_dist.data.sinusoid import SinusoidDomain as Domain

        return KnownInputs(Domain.input_shape, Domain.output_dim, Domain.loss, Domain.score, "the domain's")
    from cml_dist.data.images import ImageDomain as Domain

    known, source = DOMAINS[domain.name].usual_inputs, f"usual for {domain.name}"
    if known is None:
        known, source = ASSUMED_IMAGES, f"assumed: {domain.root} is not here, and --image-size not given"
    if is_here(config):
        from cml_dist.data.shards import ShardSet

        shards = ShardSet.open(domain.root)
        known, source = (shards.channels, *shards.image_size), f"of the set in {domain.root}"
    if image_size is not None or channels is not None:
        source = "as given" if image_size and channels else f"as given, else {source}"
    usual_channels, height, width = known
    shape = (channels or usual_channels, image_size or height, image_size or width)
    theirs = trained_on(config, shape[0])
    if (size := size_read(domain.size, shape[1:], theirs and theirs.size)) != shape[1:]:
        source += f"; scaled from {'x'.join(map(str, shape[:0:-1]))} by domain.size"
    shape = (shape[0], *size)
    classes = known_shape(config).domain.ways
    if is_classifier(config) and is_here(config):
        classes = len(shards.split_info("train").classes)
    return KnownInputs(shape, classes, Domain.loss, Domain.score, source)


def _usual_graph(domain: Any) -> KnownInputs:
    """Of a graph that is not here, as published, as if each node saw all that its settings allow."""
    from cml_dist.data.graph_nodes import PUBLISHED, GraphNodesDomain, episode_that_sees

    if (stem := Path(domain.root).stem) not in PUBLISHED:
        known = ", ".join(PUBLISHED)
        raise ConfigError(f"there is no graph at {domain.root}", f"give domain.root a graph that is here, or {known}")
    count, features = PUBLISHED[stem]
    most = count if domain.base == "gcn" else min(count, domain.cap or count)

    def largest(dtype: torch.dtype) -> Episode:
        return episode_that_sees(domain, lambda nodes: count if domain.base == "gcn" else nodes * most, features, dtype)

    source = f"assumed: {domain.root} is not here; {stem} as published has {count:,} nodes, of which all are seen"
    return KnownInputs((features,), domain.ways, GraphNodesDomain.loss, GraphNodesDomain.score, source, largest)
