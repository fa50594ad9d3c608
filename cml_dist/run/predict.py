"""Use a trained learner: ``cml_dist.load(path).adapt(images, labels).predict(images)``."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cml_dist.data.own import own_class
from cml_dist.errors import CheckpointError, CmlError, ConfigError, DataError
from cml_dist.meta.inner import adapt
from cml_dist.meta.problem import Problem
from cml_dist.meta.rule import Method, network_part, part_of
from cml_dist.meta.unlabelled import Unlabelled
from cml_dist.methods.build import described_rule
from cml_dist.run.adapted import AdaptedLearner, read_adapted, read_header
from cml_dist.run.described import described_net
from cml_dist.run.export import read_description, read_weights
from cml_dist.run.folder import DESCRIPTION
from cml_dist.run.reading import network_inputs
from cml_dist.types import HEAD, Batch, Episode, Params
from cml_dist.user_code import is_code, sealed, unsealed

CODE = {"method.name": ("rule", "kind"), "model.backbone": ("model", "backbone"), "domain.name": ("trained_on", "name")}
"""Settings that may name code, and where an export keeps them."""


def load(path: str | Path, device: str | torch.device = "cpu", code: Sequence[str] = ()) -> Learner | AdaptedLearner:
    """The learner in an export folder, or in a run folder that holds one; or the adapted learner in a file.

    Args:
        path: the folder that ``cml-dist export`` or the end of training wrote, or its run folder; or the file that
            :meth:`AdaptedLearner.save` wrote.
        device: where to compute, e.g. ``"cuda"``.
        code: of a model that needs code which is not the package's, the settings that name it, e.g.
            ``["method.name=my_rules.py:MyRule"]``. Nothing else is imported, whatever the folder says.

    Raises:
        CheckpointError: no exported model is there, or it is damaged, or ``code`` is not what it was trained with.
        ConfigError: it needs code that is not named.
    """
    folder = Path(path)
    if folder.is_file():
        reader, said = read_header(folder)
        said["description"] = _with_code(said["description"], code, folder)
        return read_adapted(folder, reader, said, device)
    if (folder / "export" / DESCRIPTION).is_file():
        folder = folder / "export"
    elif (folder / "checkpoints").is_dir():
        raise CheckpointError(f"run {folder} has no exported model", f"write it: cml-dist export {folder}")
    description, weights = read_description(folder), read_weights(folder)
    try:
        return Learner(_with_code(description, code, folder), weights, torch.device(device))
    except CmlError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        what = f"{folder / DESCRIPTION} and the weights beside it make no learner ({type(error).__name__}: {error})"
        raise CheckpointError(what[:500], "export the run again") from error


def _with_code(description: dict[str, Any], code: Sequence[str], folder: Path) -> dict[str, Any]:
    """The description, in which the code that it names stands where the user has it; see :func:`load`."""
    for setting in code:
        if setting.partition("=")[0] not in CODE:
            raise ConfigError(f"{setting} names no code of a model", f"give {', '.join(CODE)}, or leave it out")
    given = dict(setting.split("=", 1) for setting in code)
    for key, (section, name) in CODE.items():
        recorded = (description.get(section) or {}).get(name)
        if not is_code(recorded):
            continue
        if key not in given:
            word = f"{key}={unsealed(recorded)}"
            raise ConfigError(
                f"{folder} needs code that it may not import by itself: {key} is {unsealed(recorded)}",
                f"if you trust that code, name it: {word} (in Python: code=['{word}'])",
            )
        now = sealed(given[key])
        if now.partition("@")[2] != recorded.partition("@")[2]:
            raise CheckpointError(
                f"{folder} was trained with {recorded}, but {key} is given as {now}", "give the source of that checksum"
            )
        description[section][name] = now
    return description


class Learner:
    """A meta-trained learner, ready to adapt. Made by :func:`load`.

    Attributes:
        ways: the classes that its head was trained for (its outputs); None: any number.
        description: what the export says of it.
        unlabelled: how it adapts on unlabelled examples; None: it was not meta-trained with any.
        params, rule, problem: what its description and its weights are in the terms of ``cml_dist.meta``.
    """

    def __init__(self, description: dict[str, Any], tensors: Params, device: torch.device) -> None:
        self.description, self.device = description, device
        domain = description.get("trained_on") or {}
        own = own_class(domain["name"]) if is_code(domain.get("name")) else None
        self.regression: bool = description["score"] == "mse" if own is None else not domain["ways"]
        net = described_net(description, tensors)
        self.ways: int | None = None if net.starts_head or net.compared else description["output_dim"]
        rule = description.get("rule")
        if rule is None:  # format 1; the oldest do not say what adapts: all of body and head
            adapts = description.get("adapts", [n for n, _ in net.named_parameters()])
            rule = {"kind": "InnerRule", "adapts": adapts, **{k: description[k] for k in ("body_lr", "head_lr")}}
        self.rule = described_rule(rule)
        self.unlabelled = Unlabelled(**how) if (how := description.get("unlabelled")) else None
        adaptable = net.adaptable()
        self._adaptable = list(adaptable)
        net.add_rule(self.rule.init(adaptable), self.rule.replaces)
        for name, value in net.named_parameters():
            if tensors[name].shape != value.shape:
                raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}, not {tuple(value.shape)}")
        self.params = {n: tensors[n].to(device) for n, _ in net.named_parameters()}
        buffers = {n: tensors.get(n, b).to(device) for n, b in net.named_buffers()}
        usual = torch.nn.functional.mse_loss if self.regression else torch.nn.functional.cross_entropy
        loss = usual if own is None else own.loss
        self.problem = Problem(net, loss, lambda outputs, targets: outputs.new_zeros(()), buffers)

    def adapt(
        self, images: Any, labels: Sequence[Hashable], inner_steps: int | None = None, unlabelled: Any = ()
    ) -> AdaptedLearner:
        """Learn a task from a few labelled examples (paper, eq. 8); this learner itself stays as it is.

        There may be any number of classes. Up to ``ways`` they start as the head's trained rows, and where there are
        more, all start as the mean of these rows.

        Args:
            images: a sequence of file paths, PIL images or uint8 arrays ([H, W], [H, W, C] or [C, H, W]), which are
                read as packing reads them (:func:`cml_dist.data.pixels.read_pixels`); for regression inputs ``[N, D]``.
            labels: one label each, of any hashable kind, or a tensor or array of them, which count by their values; for
                regression targets ``[N, 1]`` or ``[N]``.
            inner_steps: gradient steps; None: as it was tested. Where steps have learned rates and norms of their own,
                more steps than there are go on with the last ones.
            unlabelled: further examples, as ``images``, that have no labels; the last inner steps are then on both, as
                in meta-training (``method.unlabelled``).

        Raises:
            DataError: no examples, as many labels as images do not exist, more classes than the head has outputs where
                it does not adapt, or unlabelled examples for a learner that was trained without.
        """
        inputs = self.inputs(images)
        if len(inputs) == 0 or len(inputs) != len(labels):
            raise DataError(f"{len(inputs)} examples came with {len(labels)} labels", "give one label for each example")
        if self.regression:
            targets = torch.as_tensor(np.asarray(labels), dtype=torch.float32).reshape(len(inputs), -1)
            classes: list[Hashable] = []
        else:
            labels = [_plain(label) for label in labels]
            classes = list(dict.fromkeys(labels))
            targets = torch.tensor([classes.index(label) for label in labels])
        support = Batch(inputs, targets.to(self.device))
        params, ways = self.params, self.ways or len(classes)
        if len(classes) > ways:
            params, ways = self._widened(len(classes)), len(classes)
        steps = self.description["inner_steps"] if inner_steps is None else inner_steps
        pool = None
        if len(unlabelled):
            if self.unlabelled is None:
                remedy = "leave them out, or train with domain.unlabelled"
                raise DataError("unlabelled examples were given to a learner that was trained without", remedy)
            further = self.inputs(unlabelled)
            pool = Batch(further, torch.full((len(further),), -1, device=self.device))
        episode = Episode(support, support, "test", 0, ways=ways, unlabelled=pool)
        adapted = adapt(params, episode, self.problem, Method(steps, self.rule, unlabelled=self.unlabelled))
        network = network_part({**self.problem.buffers, **adapted})
        seen = self.problem.seen_of(network, episode, ("meta",), "support")
        return AdaptedLearner(self.description, network, seen, classes, self.problem)

    def _widened(self, classes: int) -> Params:
        """The meta-parameters for more classes than the head has outputs.

        Each class starts from the mean of the trained rows, as with ``model.head=shared``; so does what the rule has
        learned a row, e.g. step sizes.
        """

        def wide(rows: Tensor) -> Tensor:
            return rows.mean(0, keepdim=True).repeat(classes, *[1] * (rows.ndim - 1))

        head = {n: wide(value) for n, value in self.params.items() if part_of(n) == HEAD}
        if not self.rule.rates(head) or any(part_of(n) == HEAD for n in self.problem.buffers):
            raise DataError(
                f"{classes} classes were given, and the head's {self.ways} outputs do not adapt by this method",
                f"adapt to at most {self.ways} classes, or meta-train with more domain.ways or another model.head",
            )
        params = {**self.params, **head}
        every = {**self.problem.buffers, **params}  # a rule may have put its own in the place of some
        learned = self.rule.init({n: every[n] for n in self._adaptable})
        return params | {n: wide(params[n]) for n, value in learned.items() if value.shape != params[n].shape}

    def inputs(self, images: Any) -> Tensor:
        """Examples as the network reads them: ``[N, *input_shape]`` float32, normalised as in training."""
        return network_inputs(self.description, images, self.device)


def _plain(label: Any) -> Hashable:
    """A label by its value in Python: a tensor is equal to no other one, whatever it holds."""
    try:
        label = label.item() if callable(getattr(label, "item", None)) else label
        hash(label)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"label {label!r} cannot name a class ({error})", "give a number or a name") from error
    return label
