"""Use a trained learner: ``cml_dist.load(path).adapt(images, labels).predict(images)``."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cml_dist.config.schema import ModelConfig
from cml_dist.data.own import own_class
from cml_dist.data.pixels import read_pixels
from cml_dist.errors import CheckpointError, CmlError, ConfigError, DataError
from cml_dist.meta.inner import adapt
from cml_dist.meta.problem import Problem
from cml_dist.meta.rule import Method
from cml_dist.methods.build import described_rule
from cml_dist.nets.build import build_net
from cml_dist.registry import TIMM, backbone_entry
from cml_dist.run.export import DESCRIPTION, read_description, read_weights
from cml_dist.types import Batch, Episode, Params
from cml_dist.user_code import is_code, sealed, unsealed

CODE = {"method.name": ("rule", "kind"), "model.backbone": ("model", "backbone"), "domain.name": ("trained_on", "name")}
"""Settings that may name code, and where an export keeps them."""


def load(path: str | Path, device: str | torch.device = "cpu", code: Sequence[str] = ()) -> Learner:
    """The learner in an export folder, or in a run folder that holds one.

    Args:
        path: the folder that ``cml-dist export`` or the end of training wrote, or its run folder.
        device: where to compute, e.g. ``"cuda"``.
        code: of a model that needs code which is not the package's, the settings that name it, e.g.
            ``["method.name=my_rules.py:MyRule"]``. Nothing else is imported, whatever the folder says.

    Raises:
        CheckpointError: no exported model is there, or it is damaged, or ``code`` is not what it was trained with.
        ConfigError: it needs code that is not named.
    """
    folder = Path(path)
    if (folder / "export" / DESCRIPTION).is_file():
        folder = folder / "export"
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
    given = dict(setting.split("=", 1) for setting in code)
    for key, (section, name) in CODE.items():
        recorded = (description.get(section) or {}).get(name)
        if not is_code(recorded):
            continue
        if key not in given:
            raise ConfigError(
                f"{folder} needs code that it may not import by itself: {key} is {unsealed(recorded)}",
                f"if you trust that code, name it: cml_dist.load(path, code=['{key}={unsealed(recorded)}'])",
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
        ways: the largest number of classes it can tell apart (outputs of its head); None: any number.
        description: what the export says of it.
    """

    def __init__(self, description: dict[str, Any], tensors: Params, device: torch.device) -> None:
        self.description, self.device = description, device
        domain = description.get("trained_on") or {}
        own = own_class(domain["name"]) if is_code(domain.get("name")) else None
        self.regression: bool = description["score"] == "mse" if own is None else not domain["ways"]
        model = ModelConfig.model_validate(description["model"])
        if backbone_entry(model.backbone).reads == "nodes":
            raise ConfigError(
                f"model.backbone {model.backbone} reads nodes of a graph, which are no examples by themselves",
                "test it on a graph: cml-dist eval RUN_DIR domain.root=FILE",
            )
        self.ways: int | None = description["output_dim"] if model.head == "linear" else None
        shapes = {"input_shape": tuple(description["input_shape"]), "output_dim": description["output_dim"]}
        if backbone_entry(model.backbone) is not TIMM and not is_code(model.backbone):
            # Of what a description may make as large as it likes: measured first, without memory.
            with torch.device("meta"):
                size = sum(p.numel() for p in build_net(model, **shapes, seed=0, colearner=False).parameters())
            if size > 2**20 + 2 * sum(value.numel() for value in tensors.values()):
                raise ValueError(f"{size:,} parameters are described")
        net = build_net(model, **shapes, seed=0, colearner=False, structure_only=True)
        rule = description.get("rule")
        if rule is None:  # format 1; the oldest do not say what adapts: all of body and head
            adapts = description.get("adapts", [n for n, _ in net.named_parameters()])
            rule = {"kind": "InnerRule", "adapts": adapts, **{k: description[k] for k in ("body_lr", "head_lr")}}
        self._rule = described_rule(rule)
        net.add_rule(self._rule.init(net.adaptable()), self._rule.replaces)
        for name, value in net.named_parameters():
            if tensors[name].shape != value.shape:
                raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}, not {tuple(value.shape)}")
        self._params = {n: tensors[n].to(device) for n, _ in net.named_parameters()}
        buffers = {n: tensors.get(n, b).to(device) for n, b in net.named_buffers()}
        usual = torch.nn.functional.mse_loss if self.regression else torch.nn.functional.cross_entropy
        loss = usual if own is None else own.loss
        self.problem = Problem(net, loss, lambda outputs, targets: outputs.new_zeros(()), buffers)

    def adapt(self, images: Any, labels: Sequence[Hashable], inner_steps: int | None = None) -> AdaptedLearner:
        """Learn a task from a few labelled examples (paper, eq. 8); this learner itself stays as it is.

        Args:
            images: a sequence of file paths, PIL images or uint8 arrays ([H, W], [H, W, C] or [C, H, W]), which are
                read as packing reads them (:func:`cml_dist.data.pixels.read_pixels`); for regression inputs ``[N, D]``.
            labels: one label each, of any hashable kind, or a tensor or array of them, which count by their values; for
                regression targets ``[N, 1]`` or ``[N]``.
            inner_steps: gradient steps; None: as it was tested. Where steps have learned rates and norms of their own,
                more steps than there are go on with the last ones.

        Raises:
            DataError: no examples, as many labels as images do not exist, or more classes than the head has outputs.
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
            if self.ways is not None and len(classes) > self.ways:
                raise DataError(
                    f"{len(classes)} classes were given, the head has {self.ways} outputs",
                    f"adapt to at most {self.ways} classes, or meta-train with more domain.ways",
                )
            targets = torch.tensor([classes.index(label) for label in labels])
        support = Batch(inputs, targets.to(self.device))
        steps = self.description["inner_steps"] if inner_steps is None else inner_steps
        episode = Episode(support, support, "test", 0, ways=self.ways or len(classes))
        adapted = adapt(self._params, episode, self.problem, Method(steps, self._rule))
        return AdaptedLearner(self, adapted, classes, episode)

    def inputs(self, images: Any) -> Tensor:
        """Examples as the network reads them: ``[N, *input_shape]`` float32, normalised as in training."""
        shape = tuple(self.description["input_shape"])
        if len(shape) != 3 or "mean" not in self.description["preprocessing"]:
            return torch.as_tensor(np.asarray(images), dtype=torch.float32, device=self.device).reshape(-1, *shape)
        if isinstance(images, (str, Path)):
            raise DataError(f"images is one path ({images})", "give a sequence of images, e.g. [path]")
        read = [_pixels(image, f"image {number}", shape) for number, image in enumerate(images)]
        pixels = np.stack(read) if read else np.zeros((0, *shape))
        tensor = torch.from_numpy(pixels).to(self.device, torch.float32) / 255
        mean, std = (torch.tensor(self.description["preprocessing"][k], device=self.device) for k in ("mean", "std"))
        return (tensor - mean[:, None, None]) / std[:, None, None]


class AdaptedLearner:
    """A learner that has seen a task's support set. Made by :meth:`Learner.adapt`."""

    def __init__(self, learner: Learner, params: Params, classes: list[Hashable], episode: Episode) -> None:
        self._learner, self._params, self._episode = learner, params, episode
        self.classes = classes

    def probabilities(self, images: Any) -> np.ndarray:
        """Probability of each class, ``[N, len(classes)]`` float32, in the order of ``classes``.

        Each image's answer is its own, whatever else is asked with it: norms by batch statistics take those of the
        examples that the learner was adapted on.
        """
        return self._outputs(images)[:, : len(self.classes)].softmax(1).cpu().numpy()

    def predict(self, images: Any) -> list[Hashable] | np.ndarray:
        """The most probable label of each image; for regression the values ``[N, output_dim]``."""
        if self._learner.regression:
            return self._outputs(images).cpu().numpy()
        return [self.classes[i] for i in self.probabilities(images).argmax(1)]

    def _outputs(self, images: Any) -> Tensor:
        inputs = self._learner.inputs(images)
        asked = replace(self._episode, query=Batch(inputs, inputs))
        return self._learner.problem.answers(self._params, asked, ("meta",), "support")[0]


def _pixels(image: Any, what: str, shape: tuple[int, ...]) -> np.ndarray:
    """One image as uint8 ``[C, H, W]`` in the network's size and channels, read as packing reads it."""
    channels, *image_size = shape
    if isinstance(image, (str, Path)):
        what = str(image)
        try:
            image = Path(image).read_bytes()
        except OSError as error:
            raise DataError(f"{what} cannot be read ({error.strerror})", "check the path") from error
    elif not isinstance(image, (bytes, Image.Image)):
        try:
            array = np.asarray(image)
        except (TypeError, ValueError) as error:
            raise DataError(f"{what} cannot be read: {error}", "give paths, PIL images or uint8 arrays") from error
        if array.dtype != np.uint8:
            raise DataError(f"{what} has dtype {array.dtype}", "give uint8 pixels, 0 to 255")
        if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3):
            array = array.transpose(1, 2, 0)
        try:
            image = Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)
        except (TypeError, ValueError) as error:
            raise DataError(f"{what} has shape {array.shape}", "give [H, W], [H, W, C] or [C, H, W]") from error
    return read_pixels(image, what, channels, tuple(image_size))


def _plain(label: Any) -> Hashable:
    """A label by its value in Python: a tensor is equal to no other one, whatever it holds."""
    try:
        label = label.item() if callable(getattr(label, "item", None)) else label
        hash(label)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"label {label!r} cannot name a class ({error})", "give a number or a name") from error
    return label
