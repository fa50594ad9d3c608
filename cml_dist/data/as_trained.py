"""Images as pre-trained weights saw them: whose mean, std, size and interpolation a run takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from cml_dist.config.schema import ImageSettings, RunConfig
from cml_dist.data.base import Domain, ModelInputs
from cml_dist.registry import TIMM, backbone_entry

if TYPE_CHECKING:
    from cml_dist.nets.timm_backbone import TrainedOn


def trained_on(config: RunConfig, channels: int) -> TrainedOn | None:
    """The images that the pre-trained weights of a run were trained on; None: it has none, or nobody says."""
    domain, model = config.domain, config.model
    if not model.pretrained or backbone_entry(model.backbone) is not TIMM or not isinstance(domain, ImageSettings):
        return None
    if domain.size == "set" and (domain.statistics == "set" or domain.mean or domain.std):
        return None
    from cml_dist.nets.timm_backbone import trained_with  # takes a second, and no other backbone needs it

    return trained_with(model.backbone, model.pretrained, channels)


def size_read(size: int | str | None, packed: tuple[int, int], theirs: tuple[int, int] | None) -> tuple[int, int]:
    """Height and width of the images that the network reads, by ``domain.size``.

    Args:
        packed: those of the set; ``theirs``: those of pre-trained weights, where there are any.
    """
    if isinstance(size, int):
        return size, size
    return packed if size == "set" or theirs is None else theirs


def read_as_trained(config: RunConfig, domain: Domain, tell: Callable[[str], None]) -> None:
    """Give pre-trained weights images as ``domain.statistics`` and ``domain.size`` say, and say what they get."""
    settings, channels = config.domain, int(domain.input_shape[0])
    if (found := trained_on(config, channels)) is None:
        return
    packed = domain.packed_size
    size = size_read(settings.size, packed, found.size)
    by_theirs = settings.statistics != "set" and not (settings.mean or settings.std)
    mean, std = (found.mean, found.std) if by_theirs else (None, None)
    inputs = {"input_shape": (channels, *size), "packed_size": packed, "interpolation": found.interpolation}
    domain.adopt(ModelInputs(**inputs, output_dim=None, mean=mean, std=std))
    ours, theirs, now = ("x".join(map(str, shape[::-1])) for shape in (packed, found.size, size))
    said = f"read at {ours} px" if size == packed else f"scaled from {ours} to {now} px ({found.interpolation})"
    said += ", as the weights' own" if now == theirs else f", where the weights' own have {theirs} (domain.size)"
    said += ", and normalised like those" if by_theirs else ""
    sharper = f"; packed at that size they would be sharper (data pack --image-size {size[0]})"
    tell(f"Images are {said}{sharper if min(size) > min(packed) and size[0] == size[1] else ''}")
