"""Glyphs: the embedded image set, rendered once from matplotlib's fonts and kept in the user's cache folder.

A class is a character, its 20 examples are font faces and small seeded changes, its split is its script's
(``glyph_fonts.SCRIPTS``): 28x28 grey, white (255) on black (0).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from cml_dist.domains.glyph_fonts import FACES, choose_characters, font_file
from cml_dist.domains.glyph_images import IMAGE_SIZE, Canvas, examples
from cml_dist.domains.shard_cache import user_cache
from cml_dist.domains.shard_format import Progress
from cml_dist.errors import DataError

RECIPE = 1
"""To be raised with any change of the images or classes, so that cached sets of the old recipe are not used."""

_PACKAGES = ("matplotlib", "fonttools", "numpy", "pillow", "webdataset")
_REPORT_EVERY = 10  # classes between two progress reports


def ensure_glyphs(root: str | None = None, progress: Progress | None = None) -> Path:
    """The folder of the packed Glyphs set, rendered first where it is missing or damaged.

    Safe to call from several processes at once: one renders, the others wait and use its work.

    Args:
        root: folder in which the set's own folder ``glyphs-<hash>`` is kept; None: the user's cache folder.
        progress: called as ``progress(done, total, what)`` while fonts are read and classes rendered.

    Returns:
        a folder that ``ShardSet.open`` reads; its checksums have just been compared.

    Raises:
        DataError: if the folder cannot be written (set ``domain.root``), or matplotlib lacks its fonts.

    *Collective*: none. *Cost*: a fraction of a second where the set is cached, else about 20 s on one core.
    """
    base = Path(root).expanduser() if root is not None else user_cache()
    folder = base / f"glyphs-{_fingerprint()}"
    if _fault(folder) is None:
        return folder
    try:
        base.mkdir(parents=True, exist_ok=True)
        with _building(folder, progress):
            fault = _fault(folder)  # another process may have rendered the set while this one waited
            if fault is None:
                return folder
            if folder.exists():
                warnings.warn(f"the cached Glyphs set is rendered again: {fault}", RuntimeWarning, stacklevel=2)
                _remove(folder)
            _publish(folder, progress)
    except OSError as error:
        raise DataError(
            f"cannot keep the Glyphs set in {base} ({error.strerror or error})",
            "set domain.root to a folder that can be written",
        ) from error
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
    from cml_dist.domains.shards import ShardSet

    try:
        shards = ShardSet.open(folder)
        shards.verify()
    except DataError as error:
        return error.what
    except OSError as error:  # e.g. removed by another process while it is read
        return f"{folder} cannot be read ({error.strerror or error})"
    return None


@contextmanager
def _building(folder: Path, progress: Progress | None) -> Iterator[None]:
    """Held by the one process that renders; the others wait. Released by the system if the process dies."""
    handle = os.open(folder.with_name(f".{folder.name}.lock"), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _lock(handle, progress)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, progress: Progress | None) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if progress is not None:
            progress(0, 1, "waiting for the process that renders glyphs")
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:
        pass  # a file system without locks: each process renders, and the first to publish wins


def _publish(folder: Path, progress: Progress | None) -> None:
    """Renders the set, unless another process that no lock held back publishes it first: then that one is used."""
    try:
        _render(folder, progress)
    except DataError:
        if _fault(folder) is not None:
            raise


def _render(folder: Path, progress: Progress | None) -> None:
    from PIL import Image

    from cml_dist.domains.pixels import encode_png
    from cml_dist.domains.shards import ShardSetWriter

    characters = choose_characters(progress)
    canvas = Canvas(IMAGE_SIZE)
    source = f"fonts of matplotlib {version('matplotlib')}, recipe {RECIPE}"
    with ShardSetWriter(folder, name="glyphs", image_size=IMAGE_SIZE, channels=1, source=source) as writer:
        for done, character in enumerate(characters):
            if progress is not None and done % _REPORT_EVERY == 0:
                progress(done, len(characters), "rendering glyphs")
            for number, (face, image) in enumerate(examples(character.outlines, character.codepoint, canvas)):
                key = f"u{character.codepoint:05x}-{number:02d}-{face}"
                data = encode_png(Image.fromarray(image))
                writer.add(character.split, character.name, key, data, "png", pixels=image[None])
    if progress is not None:
        progress(len(characters), len(characters), "rendering glyphs")


def _remove(folder: Path) -> None:
    """Takes the name away first, so that no one opens a folder that is half removed."""
    aside = folder.with_name(f".{folder.name}.damaged-{os.getpid()}")
    os.rename(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)
