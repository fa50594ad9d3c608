"""A learner that has seen a task: it answers, and is a file of its own (safetensors, with its description as JSON)."""

from __future__ import annotations

import json
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cml_dist import __version__
from cml_dist.errors import CheckpointError, CmlError, ConfigError
from cml_dist.meta.problem import Problem, Seen
from cml_dist.nets.network import CmlNet
from cml_dist.run.described import described_net
from cml_dist.run.export import check_description
from cml_dist.run.onnx_file import write_onnx
from cml_dist.run.reading import network_inputs
from cml_dist.run.safetensors_stream import StreamReader, save_tensors
from cml_dist.types import Batch, Params

FORMAT = 1
METADATA = "cml_dist.adapted"
"""The file's metadata: JSON of ``format``, ``classes`` and ``description``."""

NETWORK, MEANS, NORMS = "network/", "means/", "norms/"
"""Prefixes of its tensors: the adapted network, the classes' mean embeddings, statistics of norms; no pictures."""

LEFT_OUT = ("rule", "trained_on", "eval")
"""Of the export's description: how it was adapted and tested, and where the training data lay."""

LABELS = (str, int, float, bool)
"""Kinds of labels that JSON gives back as they are."""

AT_ONCE = 64
"""Examples that pass through the network at once."""


class AdaptedLearner:
    """A learner that has seen a task's support set. Made by :meth:`cml_dist.run.predict.Learner.adapt`.

    Pickle and copy work; the network's structure is built again from the description.

    Attributes:
        classes: the labels, in the order of :meth:`probabilities`; empty for regression.
        description: what the export says of the learner.
    """

    def __init__(
        self,
        description: dict[str, Any],
        network: Params,
        seen: Seen,
        classes: list[Hashable],
        problem: Problem | None = None,
    ) -> None:
        self.description, self.classes = description, classes
        self._network, self._seen = network, seen
        self._problem = problem or Problem(described_net(description, network), cross_entropy, cross_entropy, {})

    def __reduce__(self) -> tuple:
        return type(self), (self.description, self._network, self._seen, self.classes)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(iter(self._network.values())).device

    def to(self, device: str | torch.device) -> AdaptedLearner:
        """The same learner on another device."""
        network = {n: value.to(device) for n, value in self._network.items()}
        seen = self._seen.map(lambda value: value.to(device))
        return AdaptedLearner(self.description, network, seen, self.classes, self._problem)

    def probabilities(self, images: Any) -> np.ndarray:
        """Probability of each class, ``[N, len(classes)]`` float32, in the order of ``classes``.

        Each image's answer is its own, up to rounding, whatever else is asked with it: norms by batch statistics take
        those of the examples that the learner was adapted on.
        """
        return self._outputs(images)[:, : len(self.classes)].softmax(1).cpu().numpy()

    def predict(self, images: Any) -> list[Hashable] | np.ndarray:
        """The most probable label of each image; for regression the values ``[N, output_dim]``."""
        if not self.classes:
            return self._outputs(images).cpu().numpy()
        return [self.classes[i] for i in self.probabilities(images).argmax(1)]

    def save(self, path: str | Path) -> None:
        """Write it to a file, which :func:`cml_dist.load` reads and gives the same answers; no code, no pictures.

        Raises:
            ConfigError: a label is neither text nor a number. CmlError: the file cannot be written.
        """
        kept = {key: value for key, value in self.description.items() if key not in LEFT_OUT}
        said = {"format": FORMAT, "cml_dist": __version__, "classes": self._written_classes(), "description": kept}
        parts = {NETWORK: self._network, MEANS: self._seen.means, NORMS: self._seen.norms}
        tensors = {f"{prefix}{n}": value for prefix, part in parts.items() for n, value in part.items()}
        save_tensors(Path(path), tensors, {METADATA: json.dumps(said)})

    def _written_classes(self) -> list[Hashable]:
        for label in self.classes:
            if type(label) not in LABELS:
                raise ConfigError(
                    f"label {label!r} cannot be written to a file", "adapt with text or numbers as labels"
                )
        return self.classes

    def to_onnx(self, path: str | Path) -> None:
        """Write it as an ONNX file, which answers as this does, without this package, any number of pictures at once.

        Its outputs are ``logits`` and ``probabilities`` ``[N, len(classes)]``, or for regression ``values``; its
        metadata name the classes.

        Raises:
            ConfigError: as :meth:`save`. ConfigError, ModelError: as :func:`cml_dist.run.onnx_file.write_onnx`.
        """
        means, count = self._seen.means.get("meta"), len(self.classes)

        def answer(net: CmlNet, inputs: Tensor) -> tuple[Tensor, ...]:
            (outputs,) = net(inputs)
            if means is not None:
                outputs = self._problem.against_prototypes(outputs, means.cpu())
            return (outputs[:, :count], outputs[:, :count].softmax(1)) if count else (outputs,)

        each = "[N, classes] float32, of each class"
        outputs = {"logits": each, "probabilities": each} if count else {"values": "[N, D] float32"}
        values = {**self._network, **self._seen.norms}
        write_onnx(Path(path), self.description, values, answer, outputs, classes=self._written_classes())

    def _outputs(self, images: Any) -> Tensor:
        inputs = network_inputs(self.description, images, self.device)
        asked = [Batch(part, part) for part in inputs.split(AT_ONCE)]
        return torch.cat([self._problem.answers_by(self._seen, self._network, one, ("meta",))[0] for one in asked])

    def check(self) -> None:
        """Raise what the network raises on an input, or ValueError: without computing or allocating anything."""
        there = self.to("meta")
        inputs = torch.empty(1, *self.description["input_shape"], device="meta")
        (outputs,) = there._problem.answers_by(there._seen, there._network, Batch(inputs, inputs), ("meta",))
        if outputs.shape[1] < len(self.classes):
            raise ValueError(f"{outputs.shape[1]} outputs for {len(self.classes)} classes")


def read_header(path: Path) -> tuple[StreamReader, dict[str, Any]]:
    """The file of an adapted learner, opened, and what it says: ``classes`` and ``description``.

    Raises:
        CheckpointError: it is no such file, or of a newer version.
    """
    try:
        reader = StreamReader(path)
        said = json.loads(reader.metadata[METADATA])
        newer = said["format"] != FORMAT
        description, classes = (None, []) if newer else (said["description"], said["classes"])
        if type(classes) is not list or not all(type(label) in LABELS for label in classes):
            raise ValueError("its classes are no labels")
    except (AttributeError, LookupError, OSError, RecursionError, TypeError, ValueError) as error:
        what = f"{path} holds no adapted classifier ({type(error).__name__}: {error})"
        raise CheckpointError(what[:500], "give a run folder, an export folder, or what --save wrote") from error
    if newer:
        what = f"{path} has format {said['format']} of adapted classifiers, this version reads {FORMAT}"
        raise CheckpointError(what, "update cml_dist")
    check_description(description, path)
    return reader, said


def read_adapted(path: Path, reader: StreamReader, said: dict[str, Any], device: str | torch.device) -> AdaptedLearner:
    """The adapted learner in a file that :func:`read_header` opened.

    Raises:
        CheckpointError: the file is damaged.
    """
    parts: dict[str, Params] = {NETWORK: {}, MEANS: {}, NORMS: {}}
    try:
        for name in reader.layout:
            prefix, _, rest = name.partition("/")
            parts[f"{prefix}/"][rest] = reader.read(name)
        seen = Seen(parts[MEANS], parts[NORMS])
        adapted = AdaptedLearner(said["description"], parts[NETWORK], seen, said["classes"])
        adapted.check()
        return adapted.to(device)
    except CmlError:
        raise
    except (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        what = f"{path} makes no classifier ({type(error).__name__}: {error})"
        raise CheckpointError(what[:500], "save it again") from error
