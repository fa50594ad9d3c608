"""Small image sets for the tests of data: made from a seed, so that each test can compare pixels."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

import cml_dist
from cml_dist.data.base import Domain
from cml_dist.data.pixels import as_png
from cml_dist.data.shard_writer import new_shard_set

CLASSES = {"train": 6, "val": 4, "test": 4}


def real_data(name: str) -> Path:
    """A file of the real data beside the repository; it may be absent."""
    return Path(__file__).resolve().parents[3] / "shared" / "data" / name


def pixels(seed: int, size: int = 8, channels: int = 3) -> np.ndarray:
    """uint8 [C, H, W]"""
    return np.random.default_rng(seed).integers(0, 256, (channels, size, size), dtype=np.uint8)


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array[0] if len(array) == 1 else array.transpose(1, 2, 0).copy()).save(buffer, "PNG")
    return buffer.getvalue()


def write_set(dest: Path, *, images: int = 7, size: int = 8, channels: int = 3, shard_size_mib: float = 64) -> Path:
    """A set of ``CLASSES`` classes; image i of class c of split s has the pixels of ``seed_of(s, c, i)``."""
    with new_shard_set(
        dest, name="small", image_size=(size, size), channels=channels, source="made", shard_size_mib=shard_size_mib
    ) as writer:
        for split, count in CLASSES.items():
            for number in range(count):
                for image in range(images):
                    picture = as_png(pixels(seed_of(split, number, image), size, channels))
                    writer.add(split, f"{split}-{number}", f"{split}-{number}/{image}", picture)
    return dest


def seed_of(split: str, number: int, image: int) -> int:
    return 10_000 * list(CLASSES).index(split) + 100 * number + image


def tree_files(images: int = 3, size: int = 8, channels: int = 3) -> dict[str, bytes]:
    """Class folders two deep with split lists, below a top folder."""
    files, lists = {}, {split: [] for split in CLASSES}
    for split, count in CLASSES.items():
        for number in range(count):
            name = f"family{number % 2}/{split}{number}"
            lists[split].append(name)
            for image in range(images):
                files[f"top/images/{name}/{image}.png"] = png(pixels(seed_of(split, number, image), size, channels))
    for split, names in lists.items():
        files[f"top/splits/{split}.txt"] = "".join(f"{name}\n" for name in names).encode()
    return files


def own_pictures(classes: int, sizes: list[tuple[int, int]] | None = None, images: int = 3) -> dict[str, bytes]:
    """A folder of pictures for each class, with widths and heights in turn."""
    sizes, files = sizes or [(8, 8)], {}
    for number in range(classes):
        for image in range(images):
            width, height = sizes[(number + image) % len(sizes)]
            noise = np.random.default_rng([number, image]).integers(0, 120, (height, width, 3), dtype=np.uint8)
            noise[..., number % 3] += np.uint8(15 * number % 130)  # a class has a colour
            files[f"class {number}/{image}.png"] = png(noise.transpose(2, 0, 1))
    return files


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def delivered(export: str | Path, domain: Domain, episodes: int) -> list[float]:
    """The accuracy of an export on a domain's test episodes, by the public API alone, on pixels as they are packed."""
    learner, found = cml_dist.load(export), []
    for index in range(episodes):
        episode = domain.episode("test", index)
        adapted = learner.adapt(list(episode.support.inputs.numpy()), episode.support.targets)
        hits = np.array(adapted.predict(list(episode.query.inputs.numpy()))) == episode.query.targets.numpy()
        found.append(hits.mean())
    return found
