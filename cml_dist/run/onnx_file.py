"""A network as an ONNX file: pixels in, each picture answered by itself; compared with torch before it is written."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cml_dist import __version__
from cml_dist.atomic import write_bytes
from cml_dist.errors import ConfigError, ModelError
from cml_dist.nets.network import CmlNet
from cml_dist.run.described import described_net
from cml_dist.run.reading import reads_pictures
from cml_dist.types import Params

TOLERANCE = 1e-4
"""Of each output in ONNX Runtime against torch: of the largest value in it, or of 1 where that is smaller."""

MOST_BYTES = 2**31 - 2**20
"""A file of Protobuf holds 2 GiB."""

Answer = Callable[[CmlNet, Tensor], tuple[Tensor, ...]]
"""What the graph computes of normalised inputs ``[N, ...]``."""


class _Graph(nn.Module):
    """A described network at given values, all of them constants, on inputs as they come."""

    def __init__(self, description: dict[str, Any], values: Params, answer: Answer) -> None:
        super().__init__()
        self.net, self.answer = described_net(description, values), answer
        for name, value in values.items():
            path, _, own = name.rpartition(".")
            owner = self.net.get_submodule(path)
            owner._parameters.pop(own, None), owner._buffers.pop(own, None)
            owner.register_buffer(own, value.cpu().float() if value.is_floating_point() else value.cpu())
        self.pictures = reads_pictures(description)
        for key in ("mean", "std") if self.pictures else ():
            self.register_buffer(f"pixel_{key}", torch.tensor(description["preprocessing"][key])[:, None, None])

    def forward(self, inputs: Tensor) -> tuple[Tensor, ...]:
        if self.pictures:
            inputs = (inputs.float() / 255 - self.pixel_mean) / self.pixel_std
        return self.answer(self.net, inputs)


def check_installed() -> None:
    """Raise ConfigError where a package of the extra is missing."""
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401 - torch's exporter is made of it
    except ImportError as error:
        raise ConfigError(f"ONNX files need the package {error.name}", "pip install 'cml-dist[onnx]'") from error


def write_onnx(
    path: Path, description: dict[str, Any], values: Params, answer: Answer, outputs: Mapping[str, str], **said: Any
) -> None:
    """Write a network as an ONNX file, whose answers ONNX Runtime gives as torch does.

    Its input is ``pixels``, uint8 ``[N, C, H, W]``, normalised inside; or ``inputs``, float32 ``[N, ...]``.

    Args:
        description: what the export says of the learner.
        values: the whole network's by canonical name, also statistics of norms.
        outputs: name and meaning of what ``answer`` gives.
        said: further metadata of the file, as JSON.

    Raises:
        ConfigError: a package is missing. ModelError: torch cannot write this network, or it would answer otherwise.
    """
    check_installed()
    name, size = description["model"]["backbone"], sum(value.nbytes for value in values.values())
    if size > MOST_BYTES:
        raise ModelError(f"{name} has {size / 2**30:.1f} GiB of weights", "an ONNX file holds 2 GiB: use cml_dist.load")
    graph = _Graph(description, values, answer).eval()
    shape = tuple(description["input_shape"])
    generator, entry = torch.Generator().manual_seed(0), "pixels" if graph.pictures else "inputs"
    made_up = torch.randn(7, *shape, generator=generator)
    if graph.pictures:
        made_up = torch.randint(0, 256, (7, *shape), generator=generator, dtype=torch.uint8)
    said |= {"cml_dist": __version__, "input": _input(entry, description), "outputs": outputs}
    said |= description["preprocessing"]
    try:
        with torch.no_grad(), warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            batch = {0: torch.export.Dim("batch", min=1, max=2**16)}
            program = torch.onnx.export(
                graph, (made_up[:2],), dynamo=True, verbose=False, input_names=[entry], output_names=[*outputs],
                dynamic_shapes=(batch,),
            )  # fmt: skip
        program.model.metadata_props.update({k: v if isinstance(v, str) else json.dumps(v) for k, v in said.items()})
        data = program.model_proto.SerializeToString()
    except Exception as error:  # the exporter raises of every kind
        what = f"torch {torch.__version__} cannot write {name} as ONNX: {str(error).strip().splitlines()[0][:300]}"
        raise ModelError(what, "use a newer torch (beside an old one protobuf below 7), or cml_dist.load") from error
    _compare(graph, data, entry, made_up, outputs, name)
    write_bytes(path, data)


def _input(entry: str, description: dict[str, Any]) -> str:
    shape = ", ".join(map(str, description["input_shape"]))
    if entry == "inputs":
        return f"{entry}: float32 [N, {shape}]"
    colours = "RGB" if description["input_shape"][0] == 3 else "grey"
    said, fitted = description["preprocessing"], "this height and width"
    if "packed_size" in said:
        fitted = f"{' x '.join(map(str, said['packed_size']))}, then ({said['interpolation']}) {fitted}"
    return (
        f"{entry}: uint8 [N, {shape}], {colours}, 0 to 255; scaled (bicubic) to cover {fitted}, and cut at the centre; "
        "they are normalised inside, (x / 255 - mean) / std"
    )


def _compare(graph: _Graph, data: bytes, entry: str, inputs: Tensor, outputs: Mapping[str, str], name: str) -> None:
    """ModelError where ONNX Runtime answers otherwise than torch, of several inputs or of one."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of what older exporters leave over
    try:
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        found = [session.run([*outputs], {entry: inputs[:count].numpy()}) for count in (len(inputs), 1)]
    except Exception as error:  # of its own, and of no common base
        raise ModelError(f"ONNX Runtime cannot run {name}: {error}", "update onnxruntime and torch") from error
    for count, answers in zip((len(inputs), 1), found, strict=True):
        with torch.no_grad():
            expected = [out.numpy() for out in graph(inputs[:count])]
        for output, theirs, ours in zip(outputs, answers, expected, strict=True):
            by = np.abs(theirs - ours).max() if theirs.shape == ours.shape else np.inf
            if not by <= TOLERANCE * max(1.0, np.abs(ours).max()):
                raise ModelError(
                    f"of {name} ONNX Runtime and torch answer otherwise: {output} of {count} inputs by {by:.2g}",
                    "update torch, onnxscript and onnxruntime, or use cml_dist.load; nothing was written",
                )
