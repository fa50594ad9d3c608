"""The image sets of the field: each is known by its layout and divided as published; what differs is said."""

from __future__ import annotations

import io
import struct
import tarfile
import urllib.error
import zlib
from pathlib import Path

import numpy as np
import pytest
from image_sets import png, tree_files, write_folder, write_zip

from cml_dist.cli import main
from cml_dist.data.base import SPLITS
from cml_dist.data.shards import ShardSet
from cml_dist.errors import DataError
from cml_dist.registry import DOMAINS
from cml_dist.tools.pack import PackReport, pack
from cml_dist.tools.sources.known_splits import known_sets


def names_of(known: str) -> list[str]:
    """The names of all classes; of Omniglot one character of each alphabet."""
    entries = [entry for split in SPLITS for entry in known_sets()[known].splits[split]]
    return [f"{entry}character01" if entry.endswith("/") else entry.partition("|")[0] for entry in entries]


def picture(number: int, size: int = 2) -> bytes:
    return png(np.full((3, size, size), [[[number % 256]], [[number // 256]], [[0]]], np.uint8))


def in_folders(known: str, path: str, names: list[str] | None = None) -> dict[str, bytes]:
    """Two pictures of each class, at ``path`` with ``{name}`` and ``{image}``."""
    names = names_of(known) if names is None else names
    numbers = ((number, name, image) for number, name in enumerate(names) for image in range(2))
    return {path.format(name=name, image=image): picture(2 * number + image) for number, name, image in numbers}


def aircraft(folder: str = "fgvc-aircraft-2013b/data") -> dict[str, bytes]:
    names = names_of("aircraft")
    files = {f"{folder}/images/{number:07d}.jpg": picture(number) for number in range(2 * len(names))}
    for place, part in enumerate(("train", "test")):
        lines = [f"{2 * number + place:07d} {name}" for number, name in enumerate(names)]
        files[f"{folder}/images_variant_{part}.txt"] = "\n".join(lines).encode()
    return files


def element(kind: int, data: bytes) -> bytes:
    """An element of a MATLAB 5 file, in the small form where that is usual."""
    if 0 < len(data) <= 4:
        return struct.pack("<HH", kind, len(data)) + data.ljust(4, b"\0")
    return struct.pack("<II", kind, len(data)) + data + bytes(-len(data) % 8)


def matrix(value: np.ndarray | str | list | dict[str, list], name: str = "") -> bytes:
    """Numbers of uint8 or float64, text, a cell, or a struct array with a list for each field."""
    if isinstance(value, dict):
        fields = b"".join(field.encode().ljust(32, b"\0") for field in value)
        rows = b"".join(matrix(one) for row in zip(*value.values(), strict=True) for one in row)
        number, length, content = 2, len(next(iter(value.values()))), element(5, struct.pack("<i", 32))
        content += element(1, fields) + rows
    elif isinstance(value, list):
        number, length, content = 1, len(value), b"".join(map(matrix, value))
    elif isinstance(value, str):
        number, length, content = 4, len(value), element(4, value.encode("utf-16-le"))
    else:
        number, kind = (9, 2) if value.dtype == np.uint8 else (6, 9)
        length, content = value.size, element(kind, value.tobytes())
    head = element(6, struct.pack("<II", number, 0)) + element(5, struct.pack("<ii", 1, length))
    return element(14, head + element(1, name.encode()) + content)


def mat(deflated: bool = True, **variables) -> bytes:
    """A MATLAB 5 file."""
    parts = [matrix(value, name) for name, value in variables.items()]
    if deflated:
        parts = [struct.pack("<II", 15, len(packed)) + packed for packed in map(zlib.compress, parts)]
    return b"MATLAB 5.0 MAT-file".ljust(124) + b"\0\1IM" + b"".join(parts)


def flowers(**how) -> dict[str, bytes]:
    labels = np.repeat(np.arange(1, 103), 2)
    files = {f"jpg/image_{number:05d}.jpg": picture(number) for number in range(1, 205)}
    return {**files, "imagelabels.mat": mat(labels=labels.astype(np.uint8), **how)}


CARS = [name.replace("/", "-") for name in names_of("cars")]  # as Kaggle writes them
SOURCES = {
    "mini_imagenet": lambda: in_folders("mini_imagenet", "images/{name}/{name}_{image}.JPEG"),
    "tiered_imagenet": lambda: in_folders("tiered_imagenet", "ILSVRC/train/{name}/{image}.JPEG"),
    "cifar_fs": lambda: in_folders("cifar_fs", "cifar100/{name}/{image}.png"),
    "fc100": lambda: in_folders("fc100", "cifar100/{name}/{image}.png"),
    "omniglot": lambda: in_folders("omniglot", "all/{name}/{image}.png"),
    "cub": lambda: {**in_folders("cub", "CUB_200_2011/images/{name}/{image}.jpg"), "CUB_200_2011/images.txt": b"1 a"},
    "cars": lambda: {
        **in_folders("cars", "car_data/train/{name}/0{image}.jpg", CARS),
        **in_folders("cars", "car_data/test/{name}/1{image}.jpg", CARS),
    },
    "aircraft": aircraft,
    "vgg_flower": flowers,
}


def num_classes(report: PackReport) -> list[int]:
    return [len(report.shards.split_info(split).classes) for split in report.shards.splits]


@pytest.mark.parametrize("known", SOURCES)
def test_a_set_is_known_by_its_layout_and_divided_as_published(tmp_path, known):
    source = write_zip(tmp_path / "src.zip", SOURCES[known]())
    either = known in ("cifar_fs", "fc100")  # two splits of the same classes
    report = pack(source, tmp_path / "set", splits=known if either else None, strict=True)
    about, shards = known_sets()[known], report.shards
    assert (report.known, shards.name) == (known, known)
    published = [len(about.splits[split]) for split in SPLITS]
    assert num_classes(report) == published
    assert set().union(*(shards.split_info(split).classes for split in SPLITS)) == set(names_of(known))
    if known != "omniglot":
        assert shards.split_info("val").classes == tuple(name.partition("|")[0] for name in about.splits["val"])
        assert list(about.classes) == published
    warning = next(one for one in report.warnings if "here are" in one)
    classes = "/".join(map(str, about.classes)), "/".join(map(str, published))
    assert warning == (
        f"{known} as published has {about.images:,} images and {classes[0]} classes; "
        f"here are {len(shards):,} images and {classes[1]} classes"
    )


def test_the_lists_are_whole_disjoint_and_say_where_they_are_from():
    assert set(known_sets()) == set(SOURCES) <= set(DOMAINS)
    for known, about in known_sets().items():
        names = [name for split in SPLITS for entry in about.splits[split] for name in entry.split("|")]
        assert len(set(names)) == len(names), known
        assert about.title and about.source and about.licence and about.files
    numbers = {split: {int(name[:3]) for name in known_sets()["cub"].splits[split]} for split in SPLITS}
    every = range(1, 201)
    assert numbers["train"] == {number for number in every if number % 2 == 1}
    assert (numbers["val"], numbers["test"]) == tuple({n for n in every if n % 4 == rest} for rest in (2, 0))
    assert sum(about.classes[0] for about in known_sets().values()) == 64 + 351 + 64 + 60 + 1028 + 100 + 98 + 70 + 71


def test_a_part_of_a_set_is_one_line_and_can_be_drawn_instead(tmp_path):
    files = in_folders("cub", "images/{name}/{image}.jpg", names_of("cub")[:-40])
    source = write_zip(tmp_path / "src.zip", files)
    message = "src.zip is a part of cub: 40 of 200 names are absent: 044.Frigatebird, .*CUB_200_2011.tgz"
    for how in ({}, {"splits": "cub"}):
        with pytest.raises(DataError, match=message):
            pack(source, tmp_path / "set", **how)
    assert pack(source, tmp_path / "set", splits="100,30,30").known is None


def test_the_split_of_the_source_itself_counts_and_is_compared(tmp_path):
    about = known_sets()["mini_imagenet"]
    files = in_folders("mini_imagenet", "images/{name}/{image}.jpg")
    own = {f"{split}.txt": "\n".join(about.splits[split]).encode() for split in SPLITS}
    report = pack(write_zip(tmp_path / "same.zip", {**files, **own}), tmp_path / "same")
    assert (report.known, report.shards.name) == ("mini_imagenet", "same")
    assert any("has 60,000 images and 64/16/20 classes; here are 200 " in one for one in report.warnings)
    own["val.txt"], own["test.txt"] = own["test.txt"], own["val.txt"]
    report = pack(write_zip(tmp_path / "other.zip", {**files, **own}), tmp_path / "other")
    assert (report.known, num_classes(report)) == (None, [64, 20, 16])
    assert pack(write_zip(tmp_path / "mine.zip", tree_files()), tmp_path / "mine").known is None


def test_images_of_several_sizes_get_the_size_that_is_usual_for_the_set(tmp_path):
    files = {**flowers(), "jpg/image_00001.jpg": picture(1, size=3)}
    assert pack(write_zip(tmp_path / "src.zip", files), tmp_path / "set").shards.image_size == (32, 32)


def test_folders_of_mere_numbers_are_flowers_only_where_that_is_said(tmp_path):
    files = in_folders("vgg_flower", "train/{name}/{image}.jpg", [str(number) for number in range(1, 103)])
    source = write_zip(tmp_path / "src.zip", files)
    assert pack(source, tmp_path / "mine").known is None
    assert num_classes(pack(source, tmp_path / "set", splits="vgg_flower")) == [71, 15, 16]


def test_masks_in_folders_of_the_same_names_are_not_mixed_in(tmp_path):
    files = {**SOURCES["cub"](), **in_folders("cub", "segmentations/{name}/{image}.png")}
    with pytest.raises(DataError, match="'001.Black_footed_Albatross' is found in several folders: .*segmentations"):
        pack(write_zip(tmp_path / "src.zip", files), tmp_path / "set")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"imagelabels.mat": mat(labelz=np.arange(1.0, 103))}, "imagelabels.mat in .* be read .*no matrix lab"),
        ({"imagelabels.mat": b"x" * 100}, "imagelabels.mat in .* cannot be read"),
        ({"jpg/image_00007.jpg": None}, "jpg/image_00007.jpg of imagelabels.mat is absent from .*102flowers.tgz"),
    ],
)
def test_flowers_with_parts_damaged_or_missing_are_one_line(tmp_path, files, message):
    files = {name: data for name, data in {**flowers(), **files}.items() if data is not None}
    with pytest.raises(DataError, match=message):
        pack(write_zip(tmp_path / "src.zip", files), tmp_path / "set")


def test_labels_of_flowers_may_lie_in_the_file_as_they_are(tmp_path):
    report = pack(write_zip(tmp_path / "src.zip", flowers(deflated=False)), tmp_path / "set")
    assert num_classes(report) == [71, 15, 16]


# --------------------------------------------------------------------------- Stanford Cars as published

CARS_IN_ORDER = [  # of the devkit: every second class is of train, of the rest every second of val
    known_sets()["cars"].splits[("train", "val", "train", "test")[place % 4]][place // (4 if place % 2 else 2)]
    for place in range(196)
]
DEVKIT, LABELS = "devkit/cars_train_annos.mat", "cars_test_annos_withlabels.mat"


def annotations(field: str, files: list[str], numbers: list[int], **how) -> bytes:
    """A struct array with the fields of the devkit that count and one that does not."""
    rows = {"bbox_x1": [np.array([7.0])] * len(files), "class": [np.array([one], np.uint8) for one in numbers]}
    names = {"class_names": CARS_IN_ORDER} if field == "relative_im_path" else {}
    return mat(annotations={**rows, field: files}, **names, **how)


def cars_parts(**how) -> dict[str, bytes]:
    """One picture of each class in ``cars_train/`` and in ``cars_test/``, where the same names mean other classes."""
    numbers, files = list(range(1, 197)), [f"{number:05d}.jpg" for number in range(1, 197)]
    return {
        **{f"cars_train/{file}": picture(number) for number, file in enumerate(files)},
        **{f"cars_test/{file}": picture(1000 + number) for number, file in enumerate(files)},
        "devkit/cars_meta.mat": mat(class_names=CARS_IN_ORDER, **how),
        DEVKIT: annotations("fname", files, numbers, **how),
        LABELS: annotations("fname", files, numbers[::-1], **how),
    }


def cars_whole() -> dict[str, bytes]:
    files = [f"car_ims/{number:06d}.jpg" for number in range(1, 393)]
    annos = annotations("relative_im_path", files, [number // 2 + 1 for number in range(392)])
    return {**{file: picture(number) for number, file in enumerate(files)}, "cars_annos.mat": annos}


def first_bytes(shards: ShardSet, class_name: str) -> list[int]:
    """What tells the pictures of a class apart: the value of each, as ``picture`` numbers them."""
    split = next(one for one in shards.splits if class_name in shards.split_info(one).classes)
    first = shards.first_image(split) + 2 * shards.split_info(split).classes.index(class_name)
    pixels = [shards.decode(image) for image in (first, first + 1)]
    return [int(one[0, 0, 0]) + 256 * int(one[1, 0, 0]) for one in pixels]


def test_cars_as_published_are_train_and_test_together(tmp_path):
    report = pack(write_zip(tmp_path / "src.zip", cars_parts()), tmp_path / "set", strict=True)
    assert (report.layout, report.known, num_classes(report)) == ("cars", "cars", [98, 49, 49])
    for place in (0, 3, 174, 195):
        assert first_bytes(report.shards, CARS_IN_ORDER[place]) == [place, 1195 - place]
    assert [(one.what, one.files) for one in report.accounts] == [("packed", 392), ("read as lists or arrays", 3)]


def test_the_older_archive_of_cars_and_lists_that_are_not_compressed(tmp_path):
    report = pack(write_zip(tmp_path / "old.zip", cars_whole()), tmp_path / "old", strict=True)
    assert (report.layout, num_classes(report)) == ("cars", [98, 49, 49])
    assert first_bytes(report.shards, CARS_IN_ORDER[100]) == [200, 201]
    source = write_zip(tmp_path / "flat.zip", cars_parts(deflated=False))
    assert num_classes(pack(source, tmp_path / "flat", strict=True)) == [98, 49, 49]


def test_folders_for_the_classes_of_cars_are_read_as_such_beside_a_devkit(tmp_path):
    files = {**SOURCES["cars"](), DEVKIT: b"", "devkit/cars_meta.mat": b""}
    report = pack(write_zip(tmp_path / "src.zip", files), tmp_path / "set")
    assert (report.layout, report.known) == ("folders", "cars")


def test_archives_of_cars_are_read_as_they_are(tmp_path):
    files = cars_parts()
    with tarfile.open(tmp_path / "cars_train.tgz", "w:gz") as tar:
        for name in [name for name in files if name.startswith("cars_train/")]:
            member, data = tarfile.TarInfo(name), files.pop(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    write_folder(tmp_path / "src", files)
    (tmp_path / "cars_train.tgz").rename(tmp_path / "src" / "cars_train.tgz")
    assert num_classes(pack(tmp_path / "src", tmp_path / "set", strict=True)) == [98, 49, 49]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({LABELS: None}, f"no {LABELS}, which gives the classes of the pictures in cars_test; add that file"),
        ({"devkit/cars_meta.mat": None}, "has no cars_meta.mat, which gives the names of the classes; add that file"),
        ({"cars_test/00007.jpg": None}, f"cars_test/00007.jpg of {LABELS} is absent from .*; give .* of cars_test"),
        ({"a/cars_test/00007.jpg": b"\xff\xd8\xff"}, f"cars_test/00007.jpg of {LABELS} is found several times in"),
        ({LABELS: lambda data: data[:900]}, f"{LABELS} in .*src.zip cannot be read .*; replace the source"),
        ({LABELS: lambda data: data[:100]}, f"{LABELS} in .* cannot be read .*it is no MATLAB 5 file"),
        ({LABELS: lambda _: mat(other=np.zeros(1))}, f"{LABELS} in .* cannot be read .*no matrix annotations"),
        ({LABELS: lambda _: mat(annotations=np.zeros(1))}, f"{LABELS} in .* cannot be read"),
        ({LABELS: lambda _: mat(annotations={"fname": ["1.jpg"]})}, f"{LABELS} in .* cannot be read .*class"),
        ({LABELS: lambda _: mat(annotations=np.zeros(2**23))}, "cannot be read .*it unpacks to more than 64 MiB"),
        (
            {DEVKIT: lambda _: annotations("fname", ["00001.jpg", "00002.jpg"], [1, 197])},
            f"cars_train/00002.jpg of {DEVKIT} in .* has class 197, but devkit/cars_meta.mat names 1 to 196; give",
        ),
    ],
)
def test_cars_with_parts_damaged_or_missing_are_one_line(tmp_path, changed, message):
    files = cars_parts()
    for name, change in changed.items():
        files[name] = change(files[name]) if callable(change) else change
    files = {name: data for name, data in files.items() if data is not None}
    with pytest.raises(DataError, match=message) as caught:
        pack(write_zip(tmp_path / "src.zip", files), tmp_path / "set")
    assert "\n" not in str(caught.value) and not (tmp_path / "set").exists()


# --------------------------------------------------------------------------- download


def test_archives_are_downloaded_and_packed_as_they_are(tmp_path, monkeypatch):
    files = flowers()
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name, data in files.items():
            if name.startswith("jpg"):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    served = {"102flowers.tgz": archive.getvalue(), "imagelabels.mat": files["imagelabels.mat"]}

    def download_url(url: str, root: str, filename: str, md5: str) -> None:
        assert url.endswith(f"/flowers/102/{filename}") and len(md5) == 32
        write_folder(Path(root), {filename: served[filename]})

    monkeypatch.setattr("torchvision.datasets.utils.download_url", download_url)
    words = ["data", "pack", str(tmp_path / "got"), str(tmp_path / "set"), "--download", "vgg_flower", "--strict"]
    assert main(words) == 0
    shards = ShardSet.open(tmp_path / "set")
    assert [len(shards.split_info(split).classes) for split in SPLITS] == [71, 15, 16]


@pytest.mark.parametrize(
    ("known", "message"),
    [
        ("fc100", "FC100 cannot be downloaded: http.*no route>; put cifar-100-python.tar.gz into .*got, then .*fc100 "),
        ("cars", "Stanford Cars cannot be downloaded; put cars_train.tgz and .* into .*got, then .*--splits cars"),
        ("birds", "download is 'birds'; use one of mini_imagenet,"),
    ],
)
def test_what_cannot_be_downloaded_is_one_line_that_says_what_to_put_where(tmp_path, monkeypatch, known, message):
    def download_url(*_) -> None:
        raise urllib.error.URLError("no route")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", download_url)
    with pytest.raises(DataError, match=message) as caught:
        pack(tmp_path / "got", tmp_path / "set", download=known)
    assert "\n" not in str(caught.value) and not (tmp_path / "set").exists()
