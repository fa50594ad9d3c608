"""Pictures in, answers out, in order and in flat memory: decoded by threads while the network computes."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

from cml_dist.data.base import Progress
from cml_dist.data.pixels import in_threads, open_image, read_pixels, to_image
from cml_dist.errors import DataError, ModelError
from cml_dist.run.adapted import AT_ONCE, AdaptedLearner
from cml_dist.run.reading import fitted_shape
from cml_dist.telemetry.text import line
from cml_dist.tools.pictures import PictureFile

UNKNOWN = "unknown"
"""The prediction of a picture of which the learner is less sure than asked for."""

_THUMBNAIL = 144  # pixels of the longer side


class Answer(NamedTuple):
    """What was found of one picture.

    Attributes:
        prediction: a class, or ``unknown``; None where the picture cannot be read, which ``error`` explains.
        probability: of the most probable class.
        probabilities: of all classes, in their order.
        thumbnail: JPEG, where it was asked for.
    """

    image: str
    prediction: object = None
    probability: float | None = None
    probabilities: list[float] | None = None
    error: str | None = None
    thumbnail: bytes = b""


class _Seen(NamedTuple):
    pixels: np.ndarray
    thumbnail: bytes


def pixels_of(picture: PictureFile, shape: Sequence[int]) -> np.ndarray:
    """A picture fitted to ``shape``, read as packing reads it: uint8 ``[C, H, W]``, or DataError."""
    return read_pixels(picture.read(), picture.name, shape[0], (shape[1], shape[2]))


def answers(
    adapted: AdaptedLearner,
    pictures: Sequence[PictureFile],
    *,
    min_probability: float = 0.0,
    thumbnails: bool = False,
    progress: Progress | None = None,
) -> Iterator[Answer]:
    """The answer to each picture; one that cannot be read has an error in its answer, and the others go on.

    Args:
        min_probability: below it the prediction is ``unknown``.
        thumbnails: whether answers have one.

    Raises:
        ModelError: an answer is not finite.
    """
    channels, height, width = fitted_shape(adapted.description)
    scale = _THUMBNAIL / max(height, width)
    thumbnail_size = (max(1, round(height * scale)), max(1, round(width * scale)))

    def see(picture: PictureFile) -> _Seen | DataError:
        try:
            if not thumbnails:
                return _Seen(pixels_of(picture, (channels, height, width)), b"")
            image = open_image(picture.read(), picture.name)
            small = io.BytesIO()
            to_image(read_pixels(image, picture.name, 3, thumbnail_size)).save(small, "JPEG", quality=80)
            return _Seen(read_pixels(image, picture.name, channels, (height, width)), small.getvalue())
        except DataError as error:
            return error

    both, done = zip(pictures, in_threads(see, pictures), strict=True), 0
    while batch := list(islice(both, AT_ONCE)):
        readable = [seen.pixels for _, seen in batch if isinstance(seen, _Seen)]
        rows = iter(adapted.probabilities(readable) if readable else ())
        for picture, seen in batch:
            name = line(picture.name)
            if isinstance(seen, DataError):
                yield Answer(name, error=line(seen.what))
                continue
            row = next(rows)
            if not np.isfinite(row).all():
                remedy = "the examples led it astray: adapt with another number of --inner-steps"
                raise ModelError(f"the network's answer to {name} is not finite", remedy)
            best = int(row.argmax())
            prediction = adapted.classes[best] if row[best] >= min_probability else UNKNOWN
            values = [round(float(value), 6) for value in row]
            yield Answer(name, prediction, values[best], values, None, seen.thumbnail)
        done += len(batch)
        if progress is not None:
            progress(done, len(pictures), "predicting")
