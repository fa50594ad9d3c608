"""What will happen here: the configuration resolved against a world of processes. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cml_dist.config.deepspeed import generated, merge
from cml_dist.config.launcher import deepspeed_request, launcher_findings, refuse
from cml_dist.config.methods import (
    colearner_kind,
    has_classes,
    has_upper_ascent,
    is_classifier,
    last_row_note,
    method_title,
    sub_networks_in_words,
    unlabelled_steps,
)
from cml_dist.config.schema import AUTO, RunConfig
from cml_dist.errors import ConfigError


@dataclass(frozen=True)
class RunPlan:
    """The decisions that a configuration and a world imply; printed and saved with the run.

    Attributes:
        processes: the world size N.
        episodes_by_rank: episodes of a meta-step that each rank runs.
        engine: how the meta-gradient is computed.
        micro_batch: most examples that pass through the network at once; None: all of a set.
        trajectory_device, trajectory: where ``adjoint`` keeps adapted parameters (``device`` or ``cpu``), and which:
            ``all``, or about every ``sqrt``-th.
        memory: what was found out about memory, and what was chosen for it, in words; empty without a budget.
        strategy: ``single``, ``ddp``, or ``zero0`` to ``zero3``.
        offload: what lies on the CPU: ``none``, ``optimizer`` or ``all``.
        inner_steps, test_inner_steps: gradient steps on a support set, in training and at test.
    """

    processes: int
    strategy: str
    engine: str
    episodes_by_rank: tuple[int, ...]
    inner_steps: int
    test_inner_steps: int
    micro_batch: int | None = None
    trajectory_device: str = "device"
    trajectory: str = "all"
    offload: str = "none"
    memory: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def share(total: int, rank: int, world: int) -> range:
    """The slice of ``range(total)`` that a rank takes: contiguous, sizes differ by at most one."""
    base, extra = divmod(total, world)
    first = rank * base + min(rank, extra)
    return range(first, first + base + (rank < extra))


def make_plan(config: RunConfig, processes: int, environment: Mapping[str, str]) -> RunPlan:
    """Resolve ``config`` for a world of ``processes``.

    Args:
        environment: variables that the launcher set, e.g. ``os.environ``; ``{}``: there is no launcher.

    Raises:
        ConfigError: a strategy that this world cannot carry.
    """
    strategy, offload = resolve_strategy(config, processes, environment)
    asked, on_cpu, sqrt = config.engine, config.engine.trajectory_device == "cpu", config.engine.trajectory == "sqrt"
    engine, micro_batch = asked.name, asked.micro_batch if isinstance(asked.micro_batch, int) else None
    if engine == "auto":
        # The memory budget decides; until it has, the fastest that could be (see memory/choose.py).
        engine = "adjoint" if micro_batch is not None or sqrt or on_cpu else "graph"
    second_order, adjoint = config.method.order == 2, engine == "adjoint"
    batch, test_steps = config.train.episodes_per_step, config.eval.inner_steps
    return RunPlan(
        processes=processes,
        strategy=strategy,
        engine=engine if second_order else "first_order",
        episodes_by_rank=tuple(len(share(batch, rank, processes)) for rank in range(processes)),
        inner_steps=config.method.inner_steps,
        test_inner_steps=config.method.inner_steps if test_steps is None else test_steps,
        offload=offload,
        micro_batch=micro_batch,
        trajectory_device="cpu" if on_cpu and adjoint and second_order else "device",
        trajectory="sqrt" if sqrt and adjoint else "all",
    )


def resolve_strategy(config: RunConfig, processes: int, environment: Mapping[str, str]) -> tuple[str, str]:
    """(strategy, offload) of a world of ``processes``: what was asked for, and what the launcher set up.

    Raises:
        ConfigError: with all that contradicts the run, also in a user's DeepSpeed file, or that DeepSpeed cannot do.
    """
    found = list(launcher_findings(config, environment))
    strategy, offload = config.parallel.strategy, config.parallel.offload
    theirs, kept, differs, request = "ddp" if processes > 1 else "single", "none", False, None
    try:
        if (request := deepspeed_request(config, environment)) is not None:
            theirs, kept = f"zero{request.stage}", request.offload
            for key, ours, launched in (("strategy", strategy, theirs), ("offload", offload, kept)):
                if ours not in ("auto", launched):
                    differs = True
                    what = f"but {request.source} sets up DeepSpeed's {theirs}, offload {kept}"
                    remedy = f"set parallel.{key}=auto or {launched}, or use another file"
                    found.append((f"parallel.{key} is {ours}, {what}", remedy))
            found += request.findings
            found += merge(generated(config, request.stage, kept, processes), request, config)
    except ConfigError as error:
        found.append((error.what, error.remedy))
        differs, kept = True, "none"  # what the launcher set up is not known
    # Where the two differ, the rest is judged by what the launcher set up.
    strategy = theirs if strategy == "auto" or differs else strategy
    offload = kept if offload == "auto" or differs else offload
    if strategy == "single" and processes > 1:
        what = f"parallel.strategy is single, but {processes} processes run"
        found.append((what, "set parallel.strategy=ddp, or launch one process"))
    able = {"optimizer": ("zero2", "zero3"), "all": ("zero3",)}.get(offload)
    if able is not None and strategy not in able:
        what = f"parallel.offload is {offload}, which {strategy} does not have"
        remedy = f"set parallel.strategy={' or '.join(able)}, or parallel.offload=none"
        if request is not None:
            what = f"{request.source} offloads ({offload}), which {strategy} does not have"
            remedy = f"drop that there, or use stage {' or '.join(name.removeprefix('zero') for name in able)}"
        found.append((what, remedy))
    if strategy.startswith("zero") and config.run.dtype != "float32":
        what = f"run.precision is fp64, but DeepSpeed reduces and updates in float32 ({strategy})"
        found.append((what, "set run.precision=fp32, or parallel.strategy=ddp"))
    refuse(found)
    return strategy, offload


def episode_in_words(config: RunConfig) -> str:
    """What an episode holds, e.g. ``5-way 1-shot, 15 queries a class``."""
    domain = config.domain
    if has_classes(config):
        queries = "1 query" if domain.queries == 1 else f"{domain.queries} queries"
        words = f"{domain.ways}-way {domain.shots}-shot, {queries} a class"
        if each := getattr(domain, "unlabelled", 0):
            words += f", {each} unlabelled" + f" (of {domain.distractors} other classes too)" * bool(domain.distractors)
        return words
    return f"{domain.shots} support and {domain.queries} query points"


def plan_rows(config: RunConfig, plan: RunPlan) -> dict[str, str]:
    """The plan in words, for people."""
    model, method, domain, train, test = config.model, config.method, config.domain, config.train, config.eval
    optim = config.optim
    on_cpu = {"none": "", "optimizer": "optimizer on the CPU", "all": "optimizer and parameters on the CPU"}
    rate = method.inner_lr if method.inner_lr == AUTO else f"{method.inner_lr:g}"
    each = " or ".join(map(str, sorted(set(plan.episodes_by_rank), reverse=True)))
    return {
        "run": f"{config.run.dir} (seed {config.run.seed})",
        "domain": _listed(
            domain.name,
            is_classifier(config) and f"batches of {domain.batch} images in training; in tests",
            episode_in_words(config),
        ),
        "model": _listed(
            f"{model.backbone}, {model.head} head",
            method.colearner and f"{colearner_kind(config)} co-learner of depth {model.colearner.depth}",
            model.trained != ("body", "head") and f"trained: {', '.join(model.trained)}",
        ),
        "method": _listed(
            f"{method_title(config)}, order {method.order}, {_steps(plan.inner_steps)} of {rate}"
            if not is_classifier(config)
            else "classifier of the training classes",
            (more := unlabelled_steps(config)) and f"{_steps(more)} on unlabelled examples too",
            method.adapts and f"adapts: {', '.join(method.adapts)}",
            method.colearner and f"gamma {method.gamma:g}",
            method.sharp and f"ascents of {method.radius:g} ({method.sharp})",
            has_upper_ascent(config) and "each episode twice",
            method.augment and f"{sub_networks_in_words(method)} besides",
            method.warp and f"{'residual ' * method.warp_residual}{method.warp} warp layers",
            method.multi_step_loss and f"multi-step loss for {method.multi_step_loss:,} meta-steps",
            method.first_order_steps and f"first order for {method.first_order_steps:,} meta-steps",
        ),
        "engine": _listed(
            plan.engine,
            {"off": "", "on": "compiled", "auto": "compiled if that pays"}[config.engine.compile],
            plan.micro_batch and f"micro-batches of {plan.micro_batch}",
            plan.trajectory_device == "cpu" and "copies on the CPU",
            plan.trajectory == "sqrt" and "every sqrt(K)-th point kept",
            config.run.precision == "bf16" and "bfloat16 inside the network",
            config.run.precision == "tf32" and "TF32 in matrix products and convolutions",
        ),
        **({"memory": plan.memory} if plan.memory else {}),
        "world": f"{plan.processes} process{'es' * (plan.processes != 1)} "
        f"({_listed(plan.strategy, on_cpu[plan.offload])}), "
        f"{train.episodes_per_step} episodes a meta-step: {each} a process",
        "training": _listed(
            f"{train.steps:,} meta-steps of {optim.name} at {optim.lr:g}",
            optim.body_lr_scale != 1 and f"the body at {optim.body_lr_scale:g} of it",
            optim.schedule != "constant" and optim.schedule,
            optim.clip_value and f"elements clamped at {optim.clip_value:g}",
            f"{train.steps * train.episodes_per_step:,} episodes",
            train.patience and f"until {train.patience} validation{'s' * (train.patience > 1)} bring no gain",
        ),
        "validation": f"{config.num_validations} x {test.val_episodes} episodes; "
        f"a checkpoint every {config.checkpoint.every:,} meta-steps",
        "test": _listed(
            f"{test.episodes} episodes of {test.split}, {_steps(plan.test_inner_steps)}",
            last_row_note(config),
            test.norm == "support" and "statistics of the support set",
            test.ensemble > 1 and f"an ensemble of the best {test.ensemble} validations besides",
            test.permutations > 1 and f"{test.permutations} label orders each",
        ),
    }


def _steps(number: int) -> str:
    return f"{number} inner step" + "s" * (number != 1)


def _listed(*parts: Any) -> str:
    return ", ".join(filter(None, parts))
