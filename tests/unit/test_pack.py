"""Packing: each known layout becomes the same set; what contradicts itself is named, and nothing is left half."""

from __future__ import annotations

import io
import os
import pickle
import re
import signal
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from image_sets import CLASSES, own_pictures, pixels, png, real_data, seed_of, tree_files, write_folder, write_zip
from PIL import Image

from cml_dist.data.shards import ShardSet
from cml_dist.errors import DataError
from cml_dist.tools.fit_image import fit_image
from cml_dist.tools.inspect import draw_contact_sheet, split_rows
from cml_dist.tools.pack import PackReport, pack
from cml_dist.tools.sources.known_splits import divided, known_sets
from cml_dist.tools.sources.tree import natural_order

CIFAR100_SPLITS = {name: known_sets()[name].splits for name in ("cifar_fs", "fc100")}


def classes_of(root: Path) -> dict[str, tuple[str, ...]]:
    shards = ShardSet.open(root)
    return {split: shards.split_info(split).classes for split in shards.splits}


def num_classes(report: PackReport) -> dict[str, int]:
    return {split: len(info.classes) for split, info in report.shards.info.splits.items()}


def num_images(report: PackReport) -> dict[str, int]:
    return {split: report.shards.num_images(split) for split in report.shards.splits}


def image_bytes(root: Path) -> dict[str, bytes]:
    shards = ShardSet.open(root)
    return {shards.key(at): shards.read(at) for at in range(len(shards))}


def check_refused(message: str, source: Path, dest: Path, **arguments) -> None:
    """The error says so, and neither the set nor anything beside it is left."""
    before = {path.name for path in dest.parent.iterdir()}
    with pytest.raises(DataError, match=message):
        pack(source, dest, **arguments)
    assert {path.name for path in dest.parent.iterdir()} == before


# --------------------------------------------------------------------------- class folders with lists


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_class_folders_with_lists(tmp_path, kind):
    files = tree_files()
    source = write_folder(tmp_path / "src", files) if kind == "folder" else write_zip(tmp_path / "src.zip", files)
    reports = []
    report = pack(source, tmp_path / "set", progress=lambda *values: reports.append(values))
    assert (report.layout, report.shards.name, report.shards.image_size) == ("folders", "src", (8, 8))
    assert report.shards.channels == 3
    assert num_classes(report) == CLASSES
    assert num_images(report) == {split: 3 * count for split, count in CLASSES.items()}
    assert report.num_kept == 42
    assert classes_of(tmp_path / "set") == {
        split: tuple(f"family{number % 2}/{split}{number}" for number in range(count))
        for split, count in CLASSES.items()
    }
    images = {name.removeprefix("top/images/"): data for name, data in files.items() if name.endswith(".png")}
    kept = {name.removesuffix(".png"): data for name, data in images.items()}
    assert image_bytes(tmp_path / "set") == kept
    assert reports == [(done, 42, what) for what in ("looking at images", "packing images") for done in range(1, 43)]
    assert [account[:2] for account in report.accounts] == [("packed", 42), ("read as lists or arrays", 3)]
    assert not report.warnings


def test_folder_and_zip_give_the_same_bytes(tmp_path):
    files = tree_files()
    pack(write_folder(tmp_path / "src", files), tmp_path / "a", name="n")
    pack(write_zip(tmp_path / "src.zip", dict(reversed(files.items()))), tmp_path / "b", name="n")
    for path in (tmp_path / "a").glob("*.*"):
        if path.name == "dataset.json":  # holds the name of the source
            assert path.read_text() == (tmp_path / "b" / path.name).read_text().replace("src.zip", "src")
        else:
            assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_split_folders_need_no_lists(tmp_path):
    files = {
        f"data/{split}/kind/{split}{number}/{image}.png": png(pixels(seed_of(split, number, image)))
        for split, count in CLASSES.items()
        for number in range(count)
        for image in range(2)
    }
    report = pack(write_folder(tmp_path / "src", files), tmp_path / "set")
    assert report.layout == "folders" and num_classes(report) == CLASSES
    assert classes_of(tmp_path / "set")["val"] == ("kind/val0", "kind/val1", "kind/val2", "kind/val3")


def test_the_same_classes_in_two_split_folders_are_refused(tmp_path):
    files = {f"{split}/cat/{split}.png": png(pixels(n)) for n, split in enumerate(("train", "val"))}
    source = write_folder(tmp_path / "src", files)
    check_refused("class 'cat' lies in the splits 'train' and 'val'", source, tmp_path / "set")


def test_lists_can_be_given_as_a_mapping_a_folder_in_the_source_or_a_folder_on_disk(tmp_path):
    files = tree_files()
    for split in CLASSES:
        files[f"top/other/splits/{split}.txt"] = f"family0/{split}0\n".encode()
    source = write_folder(tmp_path / "src", files)
    expected = {split: (f"family0/{split}0",) for split in CLASSES}
    pack(source, tmp_path / "by_mapping", splits=expected)
    pack(source, tmp_path / "by_name", splits="other")
    pack(source, tmp_path / "by_path", splits="top/other/splits")
    pack(source, tmp_path / "on_disk", splits=tmp_path / "src" / "top" / "other" / "splits")
    for name in ("by_mapping", "by_name", "by_path", "on_disk"):
        assert classes_of(tmp_path / name) == expected
    check_refused("nothing is no folder of train.txt.*lists in the source", source, tmp_path / "x", splits="nothing")


def test_lists_of_windows_with_blank_lines_are_read(tmp_path):
    files = tree_files()
    files["top/splits/val.txt"] = "\ufefffamily0/val0/\r\n\r\nfamily1/val1  \r\n".encode()
    pack(write_folder(tmp_path / "src", files), tmp_path / "set")
    assert classes_of(tmp_path / "set")["val"] == ("family0/val0", "family1/val1")


def _list(split: str, text: str):
    return lambda files: files.__setitem__(f"top/splits/{split}.txt", text.encode())


def _second_images_root(files: dict[str, bytes]) -> None:
    files |= {name.replace("top/images", "top/more"): data for name, data in files.items() if "images" in name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_list("val", "family0/train0\n"), "class 'family0/train0' lies in the splits 'train' and 'val'"),
        (_list("val", "family0/val0\nfamily0/val0\n"), "family0/val0/0.png is used twice: for class 'family0/val0'"),
        (_list("test", "family0/test0\nfamily0/nobody\n"), "'family0/nobody' is listed in 'test', but is absent from"),
        (lambda files: files.__setitem__("top/splits/val.txt", b"\xff\xfe\x00"), "val.txt in .* is no UTF-8 text"),
        (lambda files: files.__setitem__("top/lists/train.txt", b"a\n"), "several folders: top/lists, top/splits"),
        (_second_images_root, "class '.*' is found in several folders: top/images/.*, top/more/"),
    ],
)
def test_a_source_that_contradicts_itself_is_named(tmp_path, change, message):
    files = tree_files()
    change(files)
    check_refused(message, write_folder(tmp_path / "src", files), tmp_path / "set")


def test_empty_lists_and_lists_of_strangers_are_named(tmp_path):
    source = write_folder(tmp_path / "src", tree_files())
    check_refused("has no class to pack", source, tmp_path / "set", splits={"train": []})
    check_refused("class 'a' is listed in 'train', but is absent", source, tmp_path / "set", splits={"train": ["a"]})
    check_refused("splits has a split 'dev'", source, tmp_path / "set", splits={"dev": ["a"]})


# --------------------------------------------------------------------------- Ravi & Larochelle


def ravi_files() -> dict[str, bytes]:
    files = {}
    for split, count in CLASSES.items():
        rows = ["filename,label"]
        for number in range(count):
            for image in range(3):
                name = f"{split}{number}-{image}.png"
                rows.append(f"{name},n{number}{split}")
                files[f"mini/images/{name}"] = png(pixels(seed_of(split, number, image)))
        files[f"mini/{split}.csv"] = "\n".join(rows).encode()
    return files


def test_ravi_layout(tmp_path):
    report = pack(write_zip(tmp_path / "mini.zip", ravi_files()), tmp_path / "set")
    assert report.layout == "csv" and num_classes(report) == CLASSES and report.num_kept == 42
    assert classes_of(tmp_path / "set")["test"] == ("n0test", "n1test", "n2test", "n3test")
    assert image_bytes(tmp_path / "set")["n2test/test2-1"] == png(pixels(seed_of("test", 2, 1)))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("val.csv", b"filename,label\nnobody.png,a\n", "image 'nobody.png' of mini/val.csv is absent"),
        ("val.csv", b"it,is,so\nval0-0.png,a,b\n", "val.csv in .* has the columns it, is, so, and no full columns"),
        ("val.csv", b"filename,label\nval0-0.png\n", "val.csv in .* has no full columns filename,label"),
        ("val.csv", b"filename,label\n", "val.csv in .* has no full columns filename,label"),
        ("val.csv", b"filename,label\nval0-0.png,n0train\n", "class 'n0train' lies in the splits 'train' and 'val'"),
        ("val.csv", b"filename,label\ntrain0-0.png,x\n", "train0-0.png is used twice: for class 'n0train'"),
    ],
)
def test_csv_files_that_contradict_the_images_are_named(tmp_path, file, content, message):
    files = {**ravi_files(), f"mini/{file}": content}
    check_refused(message, write_folder(tmp_path / "src", files), tmp_path / "set")


# --------------------------------------------------------------------------- CIFAR-100


def cifar_files(per_class: int = 3) -> dict[str, bytes]:
    """The original layout: python 2 pickles of bytes keys; pixels count up so that each image is known."""
    names = sorted(name for split in CIFAR100_SPLITS["cifar_fs"].values() for name in split)
    files = {"cifar-100-python/meta": {b"fine_label_names": [name.encode() for name in names]}}
    for part, first in (("train", 0), ("test", per_class - 1)):
        numbers = range(first, per_class if part == "test" else per_class - 1)
        rows = [(label, number) for number in numbers for label in range(100)]
        files[f"cifar-100-python/{part}"] = {
            b"fine_labels": [label for label, _ in rows],
            b"filenames": [f"{names[label]}_s_{number}.png".encode() for label, number in rows],
            b"data": np.stack([pixels(100 * label + number, 32).reshape(-1) for label, number in rows]),
        }
    return {name: pickle.dumps(content, protocol=2) for name, content in files.items()}


@pytest.mark.parametrize("kind", ["folder", "zip", "tar.gz"])
@pytest.mark.parametrize("splits", ["cifar_fs", "fc100"])
def test_original_cifar100(tmp_path, kind, splits):
    files = cifar_files()
    if kind == "folder":
        source = write_folder(tmp_path / "src", files)
    elif kind == "zip":
        source = write_zip(tmp_path / "src.zip", files)
    else:
        source = tmp_path / "cifar-100-python.tar.gz"
        with tarfile.open(source, "w:gz") as archive:
            for name, data in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    report = pack(source, tmp_path / "set", splits=splits)
    assert (report.layout, report.shards.name) == ("cifar100", splits)
    assert num_images(report) == {
        split: 3 * len(names) for split, names in CIFAR100_SPLITS[splits].items()
    }
    shards = ShardSet.open(tmp_path / "set")
    assert classes_of(tmp_path / "set") == {split: tuple(names) for split, names in CIFAR100_SPLITS[splits].items()}
    every = sorted(name for names in CIFAR100_SPLITS[splits].values() for name in names)
    for split in CLASSES:
        for number, name in enumerate(shards.split_info(split).classes):
            for image in range(3):
                at = shards.first_image(split) + 3 * number + image
                assert shards.key(at) == f"{name}/{name}_s_{image}"
                assert np.array_equal(shards.decode(at), pixels(100 * every.index(name) + image, 32))


def test_cifar100_needs_splits(tmp_path):
    source = write_folder(tmp_path / "src", cifar_files())
    check_refused("to which split; say which: --splits cifar_fs or --splits fc100", source, tmp_path / "set")
    check_refused("'dragon' is listed in 'val'", source, tmp_path / "set", splits={"val": ["dragon"]})


class _Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("meta", pickle.dumps({b"fine_label_names": _Evil()}), "meta in .* is no plain pickle .*mkdir"),
        ("train", b"\x80\x02}", "train in .* is no plain pickle"),
        ("train", pickle.dumps([1]), "train in .* is no plain pickle of CIFAR-100"),
        ("train", pickle.dumps({b"labels": [0]}, 2), "train in .* is no plain pickle of CIFAR-100 .*fine_labels"),
        (
            "train",
            pickle.dumps({b"fine_labels": [100], b"data": np.zeros((1, 3072), np.uint8), b"filenames": [b"x.png"]}, 2),
            "train in .* is no plain pickle of CIFAR-100 .IndexError",
        ),
    ],
)
def test_a_pickle_that_is_not_plain_data_is_refused(tmp_path, monkeypatch, file, content, message):
    monkeypatch.chdir(tmp_path)
    source = write_folder(tmp_path / "src", {**cifar_files(), f"cifar-100-python/{file}": content})
    check_refused(message, source, tmp_path / "set", splits="fc100")
    assert not (tmp_path / "evil").exists()


def test_published_splits_are_disjoint_and_whole():
    sizes = {name: {s: len(names) for s, names in lists.items()} for name, lists in CIFAR100_SPLITS.items()}
    assert sizes == {
        "cifar_fs": {"train": 64, "val": 16, "test": 20},
        "fc100": {"train": 60, "val": 20, "test": 20},
    }
    everything = [{name for names in lists.values() for name in names} for lists in CIFAR100_SPLITS.values()]
    assert everything[0] == everything[1] and len(everything[0]) == 100


# --------------------------------------------------------------------------- Omniglot as published


def omniglot_parts() -> dict[str, dict[str, bytes]]:
    """A few characters of each part as published: 105x105, black on white, one bit."""
    alphabets = {"images_background": ["Greek", "Bengali"], "images_evaluation": ["Tibetan", "Gurmukhi"]}
    parts: dict[str, dict[str, bytes]] = {}
    for part, names in alphabets.items():
        for alphabet in names:
            for character in (1, 42):
                for drawer in range(2):
                    array = np.random.default_rng([character, drawer]).random((105, 105)) < 0.9
                    buffer = io.BytesIO()
                    Image.fromarray(array).save(buffer, "PNG")
                    name = f"{part}/{alphabet}/character{character:02d}/{drawer:04d}.png"
                    parts.setdefault(part, {})[name] = buffer.getvalue()
    return parts


@pytest.mark.parametrize("kind", ["zips in a folder", "folders", "one zip"])
def test_original_omniglot(tmp_path, kind):
    parts = omniglot_parts()
    together = {f"omniglot/{name}": data for files in parts.values() for name, data in files.items()}
    if kind == "one zip":
        source = write_zip(tmp_path / "o.zip", together)
    elif kind == "folders":
        source = write_folder(tmp_path / "o", together)
    else:
        source = tmp_path / "o"
        source.mkdir()
        for part, files in parts.items():
            write_zip(source / f"{part}.zip", files)
    report = pack(source, tmp_path / "set")
    assert (report.layout, report.shards.image_size, report.shards.channels) == ("omniglot", (28, 28), 1)
    assert report.num_kept == 0
    assert classes_of(tmp_path / "set") == {
        "train": ("Greek/character01", "Greek/character42", "Gurmukhi/character01"),
        "val": ("Bengali/character01", "Bengali/character42"),
        "test": ("Gurmukhi/character42", "Tibetan/character01", "Tibetan/character42"),
    }
    source_pixels = np.random.default_rng([1, 0]).random((105, 105)) < 0.9
    smooth = Image.fromarray(source_pixels).convert("L").resize((28, 28), Image.Resampling.BICUBIC)
    assert np.array_equal(ShardSet.open(tmp_path / "set").decode(0)[0], np.asarray(smooth))


def test_original_omniglot_with_lists_or_incomplete(tmp_path):
    parts = omniglot_parts()
    write_folder(tmp_path / "o", {**parts["images_background"], **parts["images_evaluation"]})
    pack(tmp_path / "o", tmp_path / "set", splits={"train": ["Tibetan/character01"]}, image_size=20)
    assert classes_of(tmp_path / "set") == {"train": ("Tibetan/character01",)}
    assert ShardSet.open(tmp_path / "set").image_size == (20, 20)
    check_refused("'Klingon/x' is listed in 'val'", tmp_path / "o", tmp_path / "s", splits={"val": ["Klingon/x"]})
    write_folder(tmp_path / "half", parts["images_background"])
    check_refused("has no images below images_evaluation", tmp_path / "half", tmp_path / "s")


# --------------------------------------------------------------------------- what is recognised, what is refused


def test_a_source_that_fits_nothing_is_told_what_was_looked_for(tmp_path):
    source = write_folder(tmp_path / "src", {"train/1.png": png(pixels(0)), "train.txt": b"a\n"})
    message = (
        "no layout that is known. Found: 1 .png 1 folders deep, 1 .txt 0 folders deep. Nearest is folders, which lacks "
        "pictures in.*Looked for: folders: .*; csv: .*; json: .*; arrays: .*; parquet: .*; cifar100: .*; omniglot: .*a "
        "folder of pictures for each class is enough"
    )
    check_refused(message, source, tmp_path / "set")
    check_refused("has train.csv, val.csv, test.csv nowhere", source, tmp_path / "set", layout="csv")
    check_refused("no folder with train, test and meta", source, tmp_path / "set", layout="cifar100", splits="fc100")
    check_refused("has no images below images_background", source, tmp_path / "set", layout="omniglot")
    check_refused("layout is 'imagenet'; use one of folders, csv", source, tmp_path / "set", layout="imagenet")


def test_a_source_that_fits_two_layouts_asks_which(tmp_path):
    source = write_folder(tmp_path / "src", {**tree_files(), **ravi_files()})
    check_refused("fits several layouts: folders, csv; say which with --layout", source, tmp_path / "set")
    assert pack(source, tmp_path / "set", layout="ravi").layout == "csv"  # its earlier name


def test_sources_that_are_none(tmp_path):
    check_refused("there is no source .*nothing", tmp_path / "nothing", tmp_path / "set")
    (tmp_path / "a.txt").write_text("x")
    check_refused("a.txt is neither a folder nor an archive", tmp_path / "a.txt", tmp_path / "set")
    whole = write_zip(tmp_path / "w.zip", tree_files()).read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[: len(whole) // 2])
    check_refused("cut.zip is damaged or truncated", tmp_path / "cut.zip", tmp_path / "set")
    (tmp_path / "empty").mkdir()
    check_refused("no layout that is known", tmp_path / "empty", tmp_path / "set")


def _damaged_zip(path: Path, name: str) -> Path:
    with zipfile.ZipFile(write_zip(path, tree_files())) as archive:
        member = archive.getinfo(name)
    data = bytearray(path.read_bytes())
    data[member.header_offset + 30 + len(member.filename) + 20] ^= 1
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("damage", ["no image", "cut off", "checksum of the zip"])
def test_a_damaged_picture_is_left_out_and_named_or_refused_when_strict(tmp_path, damage):
    name = "top/images/family1/val1/2.png"
    if damage == "checksum of the zip":
        source, message = _damaged_zip(tmp_path / "src.zip", name), f"{name} in .*src.zip cannot be read .*CRC"
    else:
        content = b"no image" if damage == "no image" else png(pixels(0))[:150]
        source = write_folder(tmp_path / "src", {**tree_files(), name: content})
        message = f"image {name} of class 'family1/val1' cannot be decoded"
    check_refused(f"cannot be decoded.*{name}|{message}", source, tmp_path / "set", strict=True)
    report = pack(source, tmp_path / "set")
    assert num_images(report) == {"train": 18, "val": 11, "test": 12}
    assert ("left out: cannot be decoded", 1, name) in report.accounts
    assert len(report.warnings) == 1 and re.search(f"1 picture left out .*: {message}", report.warnings[0])


def test_an_existing_destination_is_refused_before_anything_is_read(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine.txt").write_text("keep")
    check_refused("set exists already; remove it, or choose another", tmp_path / "nothing", tmp_path / "set")
    assert (tmp_path / "set" / "mine.txt").read_text() == "keep"
    with pytest.raises(DataError, match="destination s3://b/x is remote"):
        pack(tmp_path, "s3://b/x")


def test_a_killed_pack_leaves_nothing_half(tmp_path):
    source = write_folder(tmp_path / "src", tree_files())
    script = f"""
import os, signal
from cml_dist.tools.pack import pack
def kill(done, total, what):
    if done == 10:
        os.kill(os.getpid(), signal.SIGKILL)
pack({str(source)!r}, {str(tmp_path / "set")!r}, progress=kill)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    killed = subprocess.run([sys.executable, "-c", script], env=environment, timeout=600, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "set").exists()
    pack(source, tmp_path / "set")
    ShardSet.open(tmp_path / "set").verify()


# --------------------------------------------------------------------------- size and mode


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


GRADIENT = np.arange(64, dtype=np.uint8).reshape(8, 8)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("channels", [1, 3])
def test_bytes_are_kept_where_size_and_mode_are_right(kind, channels):
    array = pixels(0, 8, channels)
    data = encode(Image.fromarray(array[0] if channels == 1 else array.transpose(1, 2, 0).copy()), kind)
    fitted = fit_image(data, "x", (8, 8), channels, resize=True)
    assert fitted.data is data and fitted.ext == {"PNG": "png", "JPEG": "jpg"}[kind]
    assert fitted.pixels.shape == (channels, 8, 8)


@pytest.mark.parametrize(
    ("data", "channels", "expected"),
    [
        (encode(Image.fromarray(GRADIENT)), 3, np.stack([GRADIENT] * 3)),
        (encode(Image.fromarray(GRADIENT), "BMP"), 1, GRADIENT[None]),
        (encode(Image.fromarray(GRADIENT.astype(np.uint16) * 257)), 1, GRADIENT[None]),
        (encode(Image.fromarray(GRADIENT > 31)), 1, np.where(GRADIENT > 31, 255, 0)[None]),
        (encode(Image.new("RGBA", (8, 8), (200, 0, 0, 0))), 3, np.full((3, 8, 8), 255)),
        (encode(Image.new("LA", (8, 8), (0, 255))), 1, np.zeros((1, 8, 8))),
        (encode(Image.new("P", (8, 8), 0), transparency=0), 3, np.full((3, 8, 8), 255)),
    ],
)
def test_other_modes_are_converted_and_stored_as_png(data, channels, expected):
    fitted = fit_image(data, "x", (8, 8), channels, resize=False)
    assert fitted.data is not data and fitted.ext == "png"
    assert np.array_equal(fitted.pixels, expected)
    stored = np.asarray(Image.open(io.BytesIO(fitted.data)))
    assert np.array_equal(stored.reshape(8, 8, -1).transpose(2, 0, 1), expected)


def test_a_wide_image_is_cut_at_the_centre_and_not_squeezed():
    wide = np.zeros((8, 24), dtype=np.uint8)
    wide[:, 8:16] = 200
    fitted = fit_image(encode(Image.fromarray(wide)), "x", (8, 8), 1, resize=True)
    assert np.array_equal(fitted.pixels, np.full((1, 8, 8), 200))


def test_an_image_that_lies_on_its_side_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(Image.fromarray(GRADIENT), "PNG", exif=exif)
    fitted = fit_image(data, "x", (8, 8), 1, resize=False)
    assert fitted.data is not data and np.array_equal(fitted.pixels[0], np.rot90(GRADIENT, -1))


def test_pixels_of_unknown_range_are_refused():
    data = encode(Image.fromarray(GRADIENT.astype(np.float32)), "TIFF")
    with pytest.raises(DataError, match="x has pixels of mode F"):
        fit_image(data, "x", (8, 8), 1, resize=False)


def test_size_and_channels_can_be_asked_for(tmp_path):
    source = write_folder(tmp_path / "src", tree_files())
    report = pack(source, tmp_path / "set", image_size=(4, 6), channels=1, name="tiny")
    assert (report.shards.name, report.shards.channels, report.num_kept) == ("tiny", 1, 0)
    assert ShardSet.open(tmp_path / "set").decode(0).shape == (1, 4, 6)
    check_refused("channels is 2", source, tmp_path / "s", channels=2)
    check_refused("image size is 0", source, tmp_path / "s", image_size=0)


def test_numbers_in_names_are_ordered_as_numbers():
    names = ["c10/a.png", "c2/b10.png", "c2/b9.png", "c2.png", "C1/a.png", "c2/b.png", "7.png", "10.png"]
    assert sorted(names, key=natural_order) == [
        "7.png", "10.png", "C1/a.png", "c2/b9.png", "c2/b10.png", "c2/b.png", "c2.png", "c10/a.png",
    ]  # fmt: skip


# --------------------------------------------------------------------------- what is chosen where nobody says it


@pytest.mark.parametrize(
    ("sizes", "side"),
    [
        ([(640, 480), (480, 640), (90, 60)], 84),  # width x height
        ([(50, 70), (70, 50), (40, 40)], 32),
        ([(20, 20), (24, 20)], 32),
        ([(300, 250)], 84),
        ([(200, 100)], (100, 200)),
        ([(8, 8)], 8),
    ],
)
def test_a_size_is_chosen_from_the_pictures(tmp_path, sizes, side):
    report = pack(write_folder(tmp_path / "src", own_pictures(6, sizes)), tmp_path / "set")
    assert report.shards.image_size == (side if isinstance(side, tuple) else (side, side))
    told = [line for line in report.chosen if "--image-size" in line]
    assert len(told) == (len(sizes) > 1 or sizes == [(300, 250)])
    assert not told or f"scaled to cover {side}x{side} px and cut at the centre, never squeezed" in told[0]


@pytest.mark.parametrize(("classes", "counts"), [(6, (2, 2, 2)), (9, (5, 2, 2)), (50, (32, 8, 10))])
def test_classes_are_drawn_where_nobody_divides_them(tmp_path, classes, counts):
    files = {**own_pictures(classes), "beside.png": png(pixels(0)), "beside2.png": png(pixels(1))}
    source = write_folder(tmp_path / "src", files)
    report = pack(source, tmp_path / "set")
    found = {name for names in classes_of(tmp_path / "set").values() for name in names}
    assert (tuple(num_classes(report).values()), len(found)) == (counts, classes)
    told, = report.chosen
    assert "{} to train, {} to val, {} to test".format(*counts) in told and "--split-seed" in told
    other = tmp_path / "other"
    pack(source, other, split_seed=1)
    assert classes_of(other) != classes_of(tmp_path / "set")
    assert not pack(source, tmp_path / "said", splits="1,1,1").chosen


def test_too_few_classes_to_divide_are_one_line_that_says_what_can_be_done(tmp_path):
    source = write_folder(tmp_path / "src", own_pictures(5))
    message = "src has 5 classes, but training needs 6: 2 each to train.*add classes; or .*cml-dist predict"
    check_refused(message, source, tmp_path / "set")


# --------------------------------------------------------------------------- inspect


def test_a_set_is_counted(tmp_path):
    files = tree_files(images=5)
    del files["top/images/family1/val1/4.png"]
    rows = split_rows(pack(write_folder(tmp_path / "src", files), tmp_path / "set").shards)
    assert [row[:-1] for row in rows] == [
        ("train", 6, 30, 5, 5.0, 5, 1), ("val", 4, 19, 4, 5.0, 5, 1), ("test", 4, 20, 5, 5.0, 5, 1),
    ]  # fmt: skip
    assert rows[0][-1] == round((tmp_path / "set" / "train-000000.tar").stat().st_size / 2**20, 1)


def test_the_sheet_shows_the_pixels_of_the_set_enlarged_without_smoothing(tmp_path):
    shards = pack(write_folder(tmp_path / "src", tree_files(images=5)), tmp_path / "set").shards
    shown = draw_contact_sheet(shards, tmp_path / "sheet.png", ways=3, shots=2, queries=2)
    assert shown == "3 ways, 2 shots (blue) and 2 queries (orange)"
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"))
    blue = np.all(sheet == (0x1F, 0x5F, 0xAE), axis=-1)
    rows, columns = np.nonzero(blue)
    top, left = int(rows[0]) + 2, int(columns[rows == rows[0]].min()) + 2
    tile = sheet[top : top + 72, left : left + 72]
    known = [np.kron(shards.decode(at).transpose(1, 2, 0), np.ones((9, 9, 1), np.uint8)) for at in range(len(shards))]
    assert any(np.array_equal(tile, image) for image in known)


def test_the_sheet_of_a_small_set_shows_smaller_episodes_and_says_so(tmp_path):
    shards = pack(write_folder(tmp_path / "src", tree_files(images=2)), tmp_path / "set").shards
    shown = draw_contact_sheet(shards, tmp_path / "sheet.png", ways=5, shots=1, queries=5)
    assert shown == "4 ways, 1 shots (blue) and 1 queries (orange)"
    with pytest.raises(DataError, match="cannot write .*set/dataset.json/x.png"):
        draw_contact_sheet(shards, tmp_path / "set" / "dataset.json" / "x.png")


# --------------------------------------------------------------------------- the real thing

REAL = {
    "omniglot.zip": ("folders", (28, 28), 1, {"train": 1028, "val": 172, "test": 423}, 32460),
    "cifar-fs.zip": ("folders", (32, 32), 3, {"train": 64, "val": 16, "test": 20}, 13840),
    "mini-imagenet.zip": ("csv", (84, 84), 3, {"train": 64, "val": 16, "test": 20}, 10640),
}


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("omniglot.zip", "mini-imagenet.zip")]


@pytest.mark.parametrize("name", ["cifar-fs.zip", *SLOW])
def test_real_sets_keep_every_byte(tmp_path, name):
    source = real_data(name)
    if not source.is_file():
        pytest.skip(f"{name} is not in ../shared/data")
    layout, size, channels, classes, images = REAL[name]
    report = pack(source, tmp_path / "set")
    assert (report.layout, report.shards.image_size, report.shards.channels) == (layout, size, channels)
    assert num_classes(report) == classes
    assert report.num_kept == len(report.shards) == images
    with zipfile.ZipFile(source) as archive:
        stored = {archive.read(member) for member in archive.namelist() if member.endswith(("png", "jpg"))}
    shards = ShardSet.open(tmp_path / "set")
    assert {shards.read(at) for at in range(len(shards))} == stored
    groups = [set(classes) for classes in classes_of(tmp_path / "set").values()]
    assert len(set.union(*groups)) == sum(map(len, groups))


def test_known_splits_are_those_of_the_real_lists():
    omniglot, cifar = real_data("omniglot.zip"), real_data("cifar-fs.zip")
    if not (omniglot.is_file() and cifar.is_file()):
        pytest.skip("omniglot.zip or cifar-fs.zip is not in ../shared/data")
    with zipfile.ZipFile(omniglot) as archive:
        for split in CLASSES:
            listed = archive.read(f"omniglot/splits/{split}.txt").decode().split()
            assert set(divided("omniglot", dict.fromkeys(listed), "", partial=True)[1][split]) == set(listed)
    with zipfile.ZipFile(cifar) as archive:
        for known, folder in (("cifar_fs", "splits"), ("fc100", "fc100/splits")):
            for split in CLASSES:
                listed = archive.read(f"cifar-fs/{folder}/{split}.txt").decode().split()
                assert sorted(listed) == list(CIFAR100_SPLITS[known][split])
