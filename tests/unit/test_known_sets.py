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


def matrix(labels: np.ndarray, name: bytes = b"labels", deflated: bool = True) -> bytes:
    """A MATLAB 5 file with one row of uint8."""

    def element(kind: int, data: bytes) -> bytes:
        return struct.pack("<II", kind, len(data)) + data + bytes(-len(data) % 8)

    body = element(6, struct.pack("<II", 9, 0)) + element(5, struct.pack("<ii", 1, len(labels)))
    body = element(14, body + element(1, name) + element(2, labels.astype(np.uint8).tobytes()))
    packed = zlib.compress(body)
    start = b"MATLAB 5.0 MAT-file".ljust(124) + b"\0\1IM"
    return start + (struct.pack("<II", 15, len(packed)) + packed if deflated else body)


def flowers(**how) -> dict[str, bytes]:
    labels = np.repeat(np.arange(1, 103), 2)
    files = {f"jpg/image_{number:05d}.jpg": picture(number) for number in range(1, 205)}
    return {**files, "imagelabels.mat": matrix(labels, **how)}


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
    with pytest.raises(DataError, match="no layout that is known"):
        pack(source, tmp_path / "set")
    assert num_classes(pack(source, tmp_path / "set", splits="vgg_flower")) == [71, 15, 16]


def test_masks_in_folders_of_the_same_names_are_not_mixed_in(tmp_path):
    files = {**SOURCES["cub"](), **in_folders("cub", "segmentations/{name}/{image}.png")}
    with pytest.raises(DataError, match="'001.Black_footed_Albatross' is found in several folders: .*segmentations"):
        pack(write_zip(tmp_path / "src.zip", files), tmp_path / "set")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"imagelabels.mat": matrix(np.arange(1, 103), b"labelz")}, "imagelabels.mat in .* be read .*no matrix lab"),
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
        ("cars", "Stanford Cars cannot be downloaded; put a folder .* into .*got, then pack it with --splits cars"),
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
