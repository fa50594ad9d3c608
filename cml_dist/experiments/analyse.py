"""What ``cml-dist analyse`` measures at checkpoints of runs: meta-gradients by layer, CKA, scores over inner steps."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor, nn

from cml_dist.atomic import write_bytes
from cml_dist.config.keys import flatten
from cml_dist.config.methods import has_classes, is_classifier, method_title
from cml_dist.config.schema import ImageSettings, RunConfig
from cml_dist.distributed.world import World
from cml_dist.errors import CheckpointError, ConfigError
from cml_dist.experiments.cka import LEAST, terms
from cml_dist.experiments.compare import by_variant, open_run, unlike, variant_names, variant_settings
from cml_dist.experiments.report_figures import BACKBONE
from cml_dist.meta.gradient import learners_gradients
from cml_dist.meta.inner import accumulate, adapting
from cml_dist.meta.problem import Problem
from cml_dist.meta.rule import part_of
from cml_dist.run.assemble import Parts, assemble
from cml_dist.run.checkpoint import TRAIL, Checkpoint, check_same_run, find, newest_state, on_all_ranks
from cml_dist.run.folder import NEUTRAL_KEYS, run_config, same_everywhere, steps_in
from cml_dist.run.status import read_status
from cml_dist.run.stream import episode_stream
from cml_dist.telemetry.console import Console
from cml_dist.types import BODY, COLEARNER, Batch, Params
from cml_dist.user_code import named_code

FORMAT = 1
"""Of what is kept of a checkpoint: raised where what is measured changes, so that it is measured again."""

FACTOR = 3
"""Inner steps are tested up to so many times those of the run's own test."""

LEARNERS = ("meta", "co", "untrained")
"""Whose meta-gradients: the meta-learner's, the trained co-learner's, and a co-learner's with its initial values."""


@dataclass(frozen=True)
class Measured:
    """What was found at one checkpoint. NaN where there is nothing, such as a gradient of what is frozen.

    Attributes:
        layers: of the body, L of them.
        products: ``[meta-steps, L, 3, 3]``, inner products of the learners' meta-gradients in a layer, in the order of
            ``LEARNERS``; each meta-step has as many training episodes as one of the run.
        alike: ``[episodes, L, 3]``, the terms of CKA between features before and after adaptation, on query sets.
        scores: ``[episodes, inner steps + 1]`` on test episodes, of the meta-learner (eq. 8).
    """

    layers: tuple[str, ...]
    products: np.ndarray
    alike: np.ndarray
    scores: np.ndarray

    def norm(self, learner: str) -> np.ndarray:
        """``[meta-steps, L]``, the norm of a learner's meta-gradient in each layer."""
        one = LEARNERS.index(learner)
        return np.sqrt(self.products[:, :, one, one])

    def cosine(self, learner: str) -> np.ndarray:
        """``[meta-steps, L]``, between the meta-gradients of a co-learner and of the meta-learner."""
        dot, norms = self.products[:, :, 0, LEARNERS.index(learner)], self.norm("meta") * self.norm(learner)
        return np.divide(dot, norms, out=np.full_like(dot, np.nan), where=norms > 0)

    def over(self, layers: Sequence[str]) -> Measured:
        """The same of these layers; NaN in one that the body has not."""
        at = [self.layers.index(layer) if layer in self.layers else -1 for layer in layers]
        products, alike = self.products[:, at], self.alike[:, at]
        products[:, [place < 0 for place in at]] = alike[:, [place < 0 for place in at]] = np.nan
        return replace(self, layers=tuple(layers), products=products, alike=alike)


@dataclass(frozen=True)
class Analysed:
    """A run, and which of its checkpoints are looked at.

    Attributes:
        settings: flat, those that make a variant.
        steps: over training.
        best: the step of the best validation, else the newest: of the scores over inner steps.
        notes: what is to be said of it.
    """

    folder: str
    config: RunConfig
    settings: dict[str, Any]
    steps: tuple[int, ...]
    best: int
    notes: tuple[str, ...]

    @property
    def seed(self) -> int:
        return self.config.run.seed


# --------------------------------------------------------------------------- which runs and checkpoints


def choose_runs(
    folders: Sequence[str], which: str, overrides: Sequence[str] = (), code: Collection[str] = ()
) -> tuple[list[tuple[Analysed, ...]], list[str], list[str]]:
    """Runs by variant and seed, the variants' names, and what is to be said.

    Args:
        which: ``all`` of the trail, or where there is none the best and the newest checkpoint; ``best``; or a number:
            so many of them, evenly.
        overrides: ``key=value`` above the runs' settings, which may change no value that is computed.
        code: of a user's own, which the runs may name.

    Raises:
        CheckpointError: a folder is no run, or has no checkpoint. ConfigError: the networks are not of one kind, or an
            override would change what is found.
    """
    free = tuple(key for key in NEUTRAL_KEYS if key != "run.dir")
    if wrong := next((word for word in overrides if not word.startswith(free)), None):
        remedy = "leave it out; run.device, domain.root, parallel.* and the like may be given"
        raise ConfigError(f"{wrong}: runs are looked at as they were trained", remedy)
    if which not in ("all", "best") and not (which.isdecimal() and int(which) > 0):
        raise ConfigError(f"--checkpoints is {which}", "give all, best, or a number of 1 or more")
    if not folders:
        raise CheckpointError("no run folder is named", "name the run.dir of training runs, or a folder above them")
    runs = [_open(folder, which, overrides, code) for folder in folders]
    for run in runs:
        _check_same_network(runs[0], run)
    variants, notes = by_variant(runs)
    notes += [note for group in variants for run in group for note in run.notes]
    variants.sort(key=lambda group: {False: 0, "untrained": 1}.get(group[0].config.method.colearner, 2))
    names = variant_names([group[0].settings for group in variants], method_title(variants[0][0].config))
    return variants, names, notes


def _open(path: str, which: str, overrides: Sequence[str], code: Collection[str]) -> Analysed:
    folder, _ = open_run(path)
    config = run_config(path, [*overrides, *named_code(folder.read_config(), code)])
    if is_classifier(config):
        raise ConfigError(f"{path} is a run of cml-dist pretrain, in which nothing adapts", "name meta-trained runs")
    kept, trail = steps_in(folder.checkpoints), steps_in(folder.checkpoints / TRAIL)
    if not kept and not trail:
        raise CheckpointError(f"{path} holds no checkpoint yet", "train it first, or leave it out")
    best = (newest_state(folder.checkpoints).get("best") or {}).get("step", -1)
    best = best if best in kept else max(kept or trail)
    steps, notes = trail or sorted({best, kept[-1]}), []
    if which == "best":
        steps = [best]
    elif not trail:
        notes.append(f"{path} has no trail (checkpoint.keep_every): its checkpoints of steps {steps} are used")
    if which.isdecimal() and int(which) < len(steps):
        # The last one first: of one alone it says most.
        steps = [steps[round(place)] for place in np.linspace(len(steps) - 1, 0, int(which))][::-1]
    status = read_status(folder.status_file)
    if status is None or status.state != "finished":
        state = f"{status.state}, step {status.step} of {status.steps}" if status else "no status.json"
        notes.append(f"{path} is not finished ({state}): what it has is used")
    if config.method.colearner is False:
        notes.append(f"{path} has no co-learner: its norms, CKA and scores are drawn, and no cosine")
    return Analysed(path, config, variant_settings(folder, config), tuple(steps), best, tuple(notes))


def _check_same_network(first: Analysed, run: Analysed) -> None:
    def facts(of: Analysed) -> dict[str, Any]:
        flat = flatten(of.config.model_dump(mode="json"))
        return {"classes": has_classes(of.config), **{k: v for k, v in flat.items() if k.startswith(BACKBONE)}}

    if differs := unlike(facts(first), facts(run)):
        raise ConfigError(
            f"{run.folder} has another network than {first.folder}, so that their layers share no picture: "
            + "; ".join(differs),
            "analyse them apart",
        )


# --------------------------------------------------------------------------- what is kept


def measure_run(run: Analysed, episodes: int, out: Path, world: World, console: Console) -> dict[int, Measured]:
    """What was found at each of a run's checkpoints, by step; computed unless ``out`` has it. Collective: all ranks."""
    parts, found = None, {}
    folder = Path(run.folder, "checkpoints")
    for step in sorted({*run.steps, run.best}):
        checkpoint, _ = on_all_ranks(world, lambda warn, step=step: find(folder, str(step), warn), console.warn)
        file = out / "numbers" / f"{_key(run.config, checkpoint, episodes)}.npz"
        known = world.gather(world.run_on_all_ranks(partial(_kept, file) if world.is_main else lambda: None))[0]
        if known is None:
            if parts is None:
                parts = _assembled(run.config, world, console)
            belongs = partial(check_same_run, checkpoint, parts.net, parts.domain.fingerprint())
            world.run_on_all_ranks(belongs)
            known = measure(run.config, parts, checkpoint, episodes, world, console)
            world.run_on_main(partial(_keep, file, known))
        found[step] = known
    return found


def _key(config: RunConfig, checkpoint: Checkpoint, episodes: int) -> str:
    """What the numbers follow from."""
    settings = {k: v for k, v in same_everywhere(config).items() if not k.startswith(NEUTRAL_KEYS)}
    whole = json.dumps([FORMAT, episodes, checkpoint.sha256, settings], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()[:16]


def _keep(file: Path, measured: Measured) -> None:
    made = io.BytesIO()
    np.savez(made, **vars(measured))
    write_bytes(file, made.getvalue())


def _kept(file: Path) -> Measured | None:
    try:
        with open(file, "rb") as opened, np.load(opened) as found:
            layers = tuple(str(name) for name in found["layers"])
            return Measured(layers, found["products"], found["alike"], found["scores"])
    except FileNotFoundError:
        return None
    except (OSError, EOFError, LookupError, TypeError, ValueError, BadZipFile) as error:
        raise CheckpointError(f"{file} is damaged ({error})", "delete it; it is computed again") from error


def _assembled(config: RunConfig, world: World, console: Console) -> Parts:
    if isinstance(config.domain, ImageSettings):  # layers are looked into, also those of a frozen body
        domain = config.domain.model_copy(update={"features": "compute"})
        config = config.model_copy(update={"domain": domain})
    parts = assemble(config, world, console, dict.fromkeys(("train", config.eval.split)))
    parts.model.to(world.device)
    return parts


# --------------------------------------------------------------------------- measuring


def measure(
    config: RunConfig, parts: Parts, checkpoint: Checkpoint, episodes: int, world: World, console: Console
) -> Measured:
    """What is found at a checkpoint, on ``episodes`` training and as many test episodes.

    Each meta-step, and each test episode, is computed by one rank as by any other: the numbers are the same for any
    world size, to the bit where processes have as many threads. Collective: all ranks.
    """
    params = {n: p.to(world.device, parts.dtype) for n, p in world.run_on_all_ranks(checkpoint.params).items()}
    size = min(config.train.episodes_per_step, episodes)
    layers = layers_of(parts.model.problem)
    work, done = 2 * (episodes // size * size) // world.size, 0
    with console.progress(f"{config.run.dir}, step {checkpoint.step}", work) as view:

        def tick() -> None:
            nonlocal done
            done += 1
            view.update(min(done, work))
            world.heartbeat.beat(f"step {checkpoint.step}, episode {done} of {work}")

        where = (parts, world, params, layers, tick)
        products = gradient_products(config, checkpoint.step, episodes // size, size, *where)
        alike, scores = before_and_after(config, episodes, *where)
    names = tuple(name.removeprefix("model.") for name in layers)
    return Measured(names, *(world.sum(table).numpy() for table in (products, alike, scores)))


def layer_of(name: str) -> str:
    """The layer of the body that a tensor belongs to: its name up to the first number, else the first word.

    ``body.block1.conv.weight`` is of ``block1``, ``body.layers.0.bias`` of ``layers.0``, and
    ``body.model.blocks.3.attn.qkv.weight`` of ``model.blocks.3``.
    """
    words = name.removeprefix(f"{BODY}.").split(".")
    inside = words[0] == "model" and len(words) > 1  # timm's
    number = next((place for place, word in enumerate(words[:-1]) if word.isdecimal()), int(inside))
    return ".".join(words[: number + 1])


def layers_of(problem: Problem) -> list[str]:
    """All layers of the body, in the network's own order."""
    body = problem.structure.body
    return list(dict.fromkeys(layer_of(n) for n, _ in (*body.named_parameters(), *body.named_buffers())))


def gradient_products(
    config: RunConfig, meta_step: int, count: int, size: int, parts: Parts, world: World, params: Params,
    layers: Sequence[str], tick: Callable[[], None],
) -> Tensor:  # fmt: skip
    """This rank's rows of :attr:`Measured.products`, and zeros in the place of the others'."""
    problem, method, engine = parts.model.problem, parts.model.method, parts.model.engine
    products = torch.zeros(count, len(layers), len(LEARNERS), len(LEARNERS), dtype=torch.float64)
    initial = {n: p.detach() for n, p in parts.net.named_parameters() if n.startswith(f"{COLEARNER}.")}
    fresh = {**params, **{n: p.to(world.device, parts.dtype) for n, p in initial.items()}}
    own = "co" if initial else "untrained"  # which is constant where the method trains none
    mine = range(world.rank, count, world.size)
    indices = [index for number in mine for index in range(number * size, (number + 1) * size)]
    how = {"device": world.device, "dtype": parts.dtype, "workers": config.domain.workers}
    stream = episode_stream(parts.domain, "train", indices, **how)
    for number in mine:
        total: dict[str, Params] = {learner: {} for learner in LEARNERS}
        for episode in islice(stream, size):
            of = (episode, problem, method, engine)
            for learner, grads in learners_gradients(params, *of, problem.learners, meta_step=meta_step).items():
                accumulate(total["meta" if learner == "meta" else own], grads)
            if initial:
                accumulate(total["untrained"], learners_gradients(fresh, *of, ["co"], meta_step=meta_step)["co"])
            tick()
        for place, layer in enumerate(layers):
            products[number, place] = _gram([total[one] for one in LEARNERS], layer) / size**2
    return products


def _gram(each: Sequence[Params], layer: str) -> Tensor:
    """Inner products of gradients in a layer, of all pairs; NaN where there is none."""
    inside = [[g.flatten() for n, g in one.items() if part_of(n) == BODY and layer_of(n) == layer] for one in each]
    vectors = [torch.cat(found).double() if found else None for found in inside]
    rows = [[torch.nan if None in (a, b) else (a @ b).item() for b in vectors] for a in vectors]
    return torch.tensor(rows, dtype=torch.float64)


def before_and_after(
    config: RunConfig, episodes: int, parts: Parts, world: World, params: Params, layers: Sequence[str],
    tick: Callable[[], None],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """This rank's rows of :attr:`Measured.alike` and :attr:`Measured.scores`, and zeros in the place of the others'."""
    problem, steps = parts.model.problem, parts.plan.test_inner_steps
    # Of its own support set alone: with unlabelled examples their steps come after those that are counted here.
    method = replace(parts.model.method, inner_steps=FACTOR * steps, unlabelled=None)
    alike = torch.zeros(episodes, len(layers), 3, dtype=torch.float64)
    scores = torch.zeros(episodes, FACTOR * steps + 1, dtype=torch.float64)
    mine = range(world.rank, episodes, world.size)
    how = {"device": world.device, "dtype": parts.dtype, "workers": config.domain.workers}
    for episode in episode_stream(parts.domain, config.eval.split, mine, **how):
        row, query, seen = episode.index, episode.query, {}
        alike[row], scores[row] = torch.nan, torch.nan
        for k, adapted in enumerate(adapting(params, episode, problem, method)):
            (outputs,) = problem.answers(adapted, episode, ("meta",), config.eval.norm)
            scores[row, k] = problem.score(outputs, query.targets).item()
            if k in (0, steps):
                seen[k] = features(problem, adapted, query, layers)
        for place, layer in enumerate(layers):
            before, after = (seen.get(k, {}).get(layer) for k in (0, steps))
            if before is not None and after is not None and len(before) >= LEAST:
                alike[row, place] = terms(before, after)
        tick()
    return alike, scores


def features(problem: Problem, params: Params, batch: Batch, layers: Sequence[str]) -> dict[str, Tensor]:
    """What the last module inside each layer gives for a batch, ``[N, ...]``; not of layers without a module."""
    seen: dict[str, Tensor] = {}

    def record(layer: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            seen[layer] = output.detach()

    modules = dict(problem.structure.body.named_modules())
    inside = [(layer, module) for layer in layers if layer in modules for module in modules[layer].modules()]
    hooks = [module.register_forward_hook(partial(record, layer)) for layer, module in inside]
    parts = []
    try:
        for part, _ in problem.micro_batches(batch):
            with torch.no_grad():
                problem.outputs(params, part, ("meta",))
            parts.append(dict(seen))
    finally:
        for hook in hooks:
            hook.remove()
    return {layer: torch.cat([part[layer] for part in parts]) for layer in seen}
