"""Glyphs: the embedded image set, rendered once from matplotlib's fonts and kept in the user's cache folder.

A class is a character, its 20 examples are font faces and small seeded changes, its split is its script's
(``glyph_fonts.SCRIPTS``): 28x28 grey, white (255) on black (0).
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from cml_dist.config.schema import GlyphsConfig
from cml_dist.data.base import Progress
from cml_dist.data.glyph_fonts import FACES, choose_characters, font_file
from cml_dist.data.glyph_images import IMAGE_SIZE, Canvas, examples
from cml_dist.data.images import ImageDomain
from cml_dist.data.pixels import as_png
from cml_dist.data.publish import make_once, user_cache
from cml_dist.data.shard_writer import new_shard_set
from cml_dist.data.shards import ShardSet
from cml_dist.errors import DataError

RECIPE = 1
"""To be raised with any change of the images or classes, so that cached sets of the old recipe are not used."""

_PACKAGES = ("matplotlib", "fonttools", "numpy", "pillow", "webdataset")


class GlyphsDomain(ImageDomain):
    """Episodes over the Glyphs set."""

    def __init__(
        self, settings: GlyphsConfig, seeds: Mapping[str, int], processes: int = 1, progress: Progress | None = None
    ) -> None:
        rendered = settings.model_copy(update={"root": str(ensure_glyphs(settings.root, progress))})
        super().__init__(rendered, seeds, processes, progress)


def ensure_glyphs(root: str | None = None, progress: Progress | None = None) -> Path:
    """The folder of the packed Glyphs set, whose checksums are right: rendered first where it is missing or damaged.

    Safe to call from several processes at once, see :func:`cml_dist.data.publish.make_once`.

    Args:
        root: folder in which the set's own folder ``glyphs-<hash>`` is kept; None: the user's cache folder.
        progress: called while fonts are read and classes rendered.

    Raises:
        DataError: if the folder cannot be written (set ``domain.root``), or matplotlib lacks its fonts.

    *Collective*: none. *Cost*: a fraction of a second where the set is cached, else about 20 s on one core.
    """
    folder = (user_cache() if root is None else Path(root).expanduser()) / f"glyphs-{_fingerprint()}"
    make_once(folder, "domain.root", lambda: _fault(folder), lambda: _render(folder, progress))
    return folder


def _fingerprint() -> str:
    """Names all that the bytes of the set depend on."""
    digest = hashlib.sha256(f"recipe {RECIPE}, unicode {unicodedata.unidata_version}".encode())
    for package in _PACKAGES:
        digest.update(f", {package} {version(package)}".encode())
    for face in FACES:
        digest.update(hashlib.sha256(font_file(face).read_bytes()).digest())
    return digest.hexdigest()[:16]


def _fault(folder: Path) -> str | None:
    """What is wrong with a cached set, None if its checksums are right."""
    try:
        ShardSet.open(folder).verify()
    except DataError as error:
        return error.what
    except OSError as error:  # e.g. removed by another process while it is read
        return f"{folder} cannot be read ({error.strerror or error})"
    return None


def _render(folder: Path, progress: Progress | None) -> None:
    characters = choose_characters(progress)
    canvas = Canvas(IMAGE_SIZE)
    source = f"fonts of matplotlib {version('matplotlib')}, recipe {RECIPE}"
    size = (IMAGE_SIZE, IMAGE_SIZE)
    with new_shard_set(folder, name="glyphs", image_size=size, channels=1, source=source) as writer:
        for done, character in enumerate(characters, start=1):
            for number, (face, image) in enumerate(examples(character.outlines, character.codepoint, canvas)):
                key = f"u{character.codepoint:05x}-{number:02d}-{face}"
                writer.add(character.split, character.name, key, as_png(image[None]))
            if progress is not None and (done % 10 == 0 or done == len(characters)):
                progress(done, len(characters), "rendering glyphs")
