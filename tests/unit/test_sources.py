"""Sources as people have them: every file is accounted for, each layout of the field is read, and none can do harm."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tarfile
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest
from image_sets import pixels, png, write_folder, write_zip
from PIL import Image

from cml_dist.cli import main
from cml_dist.errors import DataError
from cml_dist.tools.pack import PackReport, pack
from cml_dist.tools.sources.tree import Limits

NAMES = {"train": ("a", "b", "c"), "val": ("d", "e"), "test": ("f", "g")}
PICTURES = {
    f"{split}/{name}/{number}.png": png(pixels(ord(name) * 10 + number))
    for split, names in NAMES.items()
    for name in names
    for number in range(2)
}
"""A set with a folder for each split, as every outfit below must be read."""


def without_splits(files: dict[str, bytes] = PICTURES) -> dict[str, bytes]:
    return {name.partition("/")[2]: data for name, data in files.items()}


def read_back(report: PackReport) -> dict[str, dict[str, list[bytes]]]:
    """The pixels of all images by split and class."""
    shards = report.shards
    found: dict[str, dict[str, list[bytes]]] = {}
    for split in shards.splits:
        at = shards.first_image(split)
        info = shards.split_info(split)
        for name, count in zip(info.classes, info.images, strict=True):
            found.setdefault(split, {})[name] = [shards.decode(at + image).tobytes() for image in range(count)]
            at += count
    return found


EXPECTED = {
    split: {name: [pixels(ord(name) * 10 + number).tobytes() for number in range(2)] for name in names}
    for split, names in NAMES.items()
}


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def renamed(old: str, new: str):
    def outfit(tmp_path: Path) -> Path:
        files = {f"/{name}".replace(old, new)[1:]: data for name, data in PICTURES.items()}
        return write_folder(tmp_path / "src", files)

    return outfit


def as_kind(suffix: str, kind: str, **options):
    """Half of the pictures saved as another kind, without loss."""

    def outfit(tmp_path: Path) -> Path:
        files = dict(PICTURES)
        for name in [name for name in files if name.endswith("1.png")]:
            buffer = io.BytesIO()
            Image.open(io.BytesIO(files.pop(name))).save(buffer, kind, **options)
            files[name.replace(".png", suffix)] = buffer.getvalue()
        return write_folder(tmp_path / "src", files)

    return outfit


def linked(tmp_path: Path) -> Path:
    files = {name: data for name, data in PICTURES.items() if name.startswith("test")}
    source, others = write_folder(tmp_path / "src", files), write_folder(tmp_path / "others", PICTURES)
    (source / "val").symlink_to(others / "val")
    (source / "train").mkdir()
    for name in NAMES["train"]:
        (source / "train" / name).symlink_to(others / "train" / name)
    (source / "train" / "again").symlink_to(source)
    return source


def tar_with_links(tmp_path: Path) -> Path:
    path = write_tar(tmp_path / "src.tar", {f"./{name}": data for name, data in PICTURES.items() if "/f/" not in name})
    with tarfile.open(path, "a") as archive:
        kinds = (tarfile.LNKTYPE, "store/0.bin"), (tarfile.SYMTYPE, "../../store/1.bin")
        for number, (kind, target) in enumerate(kinds):
            data = PICTURES[f"test/f/{number}.png"]
            member = tarfile.TarInfo(f"store/{number}.bin")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
            link = tarfile.TarInfo(f"test/f/{number}.png")
            link.type, link.linkname = kind, target
            archive.addfile(link)
    return path


OUTFITS = {
    "valid": renamed("/val/", "/valid/"),
    "validation": renamed("/val/", "/Validation/"),
    "dev": renamed("/val/", "/dev/"),
    "training and testing": lambda tmp_path: renamed("/train/", "/training/")(tmp_path),
    "upper case": renamed(".png", ".PNG"),
    "jfif": as_kind(".jfif", "PNG"),
    "no suffix": as_kind("", "PNG"),
    "unknown suffix": as_kind(".png!large", "PNG"),
    "ppm": as_kind(".ppm", "PPM"),
    "webp": as_kind(".webp", "WEBP", lossless=True),
    "tga": as_kind(".tga", "TGA"),
    "links": linked,
    "tar": lambda tmp_path: write_tar(tmp_path / "src.tar", {f"./{name}": one for name, one in PICTURES.items()}),
    "tar.gz": lambda tmp_path: write_tar(tmp_path / "src.tar.gz", PICTURES, "w:gz"),
    "tar.xz": lambda tmp_path: write_tar(tmp_path / "src.tar.xz", PICTURES, "w:xz"),
    "tar with links": tar_with_links,
    "zip of Windows": lambda tmp_path: write_zip(
        tmp_path / "src.zip", {f"set\\{name}".replace("/", "\\"): one for name, one in PICTURES.items()}
    ),
}


@pytest.mark.parametrize("outfit", OUTFITS)
def test_the_same_set_in_another_outfit_is_the_same_set(tmp_path, outfit):
    report = pack(OUTFITS[outfit](tmp_path), tmp_path / "set", strict=True)
    assert read_back(report) == EXPECTED
    assert report.accounts[0][:2] == ("packed", 14)


def test_classes_whose_names_begin_with_a_dot_are_classes(tmp_path):
    files = {name.replace("/a/", "/.net/").replace("/b/", "/.b.c/"): data for name, data in PICTURES.items()}
    report = pack(write_folder(tmp_path / "src", files), tmp_path / "set", strict=True)
    assert read_back(report)["train"].keys() == {".net", ".b.c", "c"}


def test_every_file_has_one_answer_and_the_answers_add_up(tmp_path):
    files = {
        **PICTURES,
        "train/small/0.png": png(pixels(1)),
        "train/b/damaged.jpg": b"no image",
        "top.png": png(pixels(2)),
        "README.md": b"text",
        "more.tar.gz": b"x",
        "train/a/phone.HEIC": b"x",
        "train/a/Thumbs.db": b"x",
        "__MACOSX/train/a/._0.png": b"x",
        "train/a/.ipynb_checkpoints/0-checkpoint.png": png(pixels(3)),
    }
    source = write_folder(tmp_path / "src", files)
    (source / "gone").symlink_to("nowhere")
    os.mkfifo(source / "val" / "pipe.png")
    report = pack(source, tmp_path / "set")
    assert {account.what: (account.files, account.example) for account in report.accounts} == {
        "packed": (14, "test/f/0.png"),
        "left out: of the system or of a tool": (3, "train/a/Thumbs.db"),
        "left out: its class has fewer than 2 images (--min-images)": (1, "train/small/0.png"),
        "left out: cannot be decoded": (1, "train/b/damaged.jpg"),
        "left out: of no class that is packed": (1, "top.png"),
        "left out: an archive in the source (unpack it)": (1, "more.tar.gz"),
        "left out: a kind of picture that is not read (convert it)": (1, "train/a/phone.HEIC"),
        "left out: no picture": (1, "README.md"),
        "left out: a link that leads nowhere": (1, "gone"),
        "left out: no regular file": (1, "val/pipe.png"),
    }
    assert sum(account.files for account in report.accounts) == len(files) + 2
    assert any("1 classes of fewer than 2 images are left out: small" in warning for warning in report.warnings)
    with pytest.raises(DataError, match="pictures would be left out: .*1 of no class that is packed, e.g. top.png"):
        pack(source, tmp_path / "strict", strict=True)


def test_the_command_ends_with_the_account_and_the_next_command(tmp_path, capsys):
    source = write_folder(tmp_path / "src", {**PICTURES, "train/d/0.png": PICTURES["val/d/0.png"], "notes.txt": b"x"})
    arguments = ["data", "pack", str(source), str(tmp_path / "set"), "--splits", "64,16,20", "--split-seed", "3"]
    assert main(arguments) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert [" ".join(line) for line in lines[-5:-2]] == [
        "15 packed test/f/0.png", "1 left out: no picture notes.txt", "16 met in all"
    ]  # fmt: skip
    next_command = f"Train on it: cml-dist train my_images domain.root={tmp_path}/set run.dir=runs/set"
    assert " ".join(lines[-1]) == next_command


# --------------------------------------------------------------------------- what is decided from all of it


def test_a_set_is_grey_only_where_all_of_it_is(tmp_path):
    grey = {name: png(pixels(at, channels=1)) for at, name in enumerate(PICTURES)}
    assert pack(write_folder(tmp_path / "grey", grey), tmp_path / "a").shards.channels == 1
    mixed = {**grey, "train/c/1.png": PICTURES["train/c/1.png"]}
    assert pack(write_folder(tmp_path / "mixed", mixed), tmp_path / "b").shards.channels == 3


def test_where_no_class_is_large_enough_the_advice_can_be_followed(tmp_path):
    source = write_folder(tmp_path / "src", {name: data for name, data in PICTURES.items() if name.endswith("0.png")})
    with pytest.raises(DataError, match="no class has 2 images, but at most 1; .* pack with --min-images 1"):
        pack(source, tmp_path / "set")
    assert len(pack(source, tmp_path / "set", min_images=1).shards) == 7


def test_a_class_that_damage_leaves_too_small_is_left_out_alone(tmp_path):
    damaged = PICTURES["train/b/1.png"][:-30]  # its header can be read
    report = pack(write_folder(tmp_path / "src", {**PICTURES, "train/b/1.png": damaged}), tmp_path / "set")
    assert read_back(report) == {**EXPECTED, "train": {name: EXPECTED["train"][name] for name in "ac"}}
    assert set(report.accounts) == {
        ("packed", 12, "test/f/0.png"),
        ("left out: cannot be decoded", 1, "train/b/1.png"),
        ("left out: its class has fewer than 2 images (--min-images)", 1, "train/b/0.png"),
    }


def test_the_same_picture_in_two_splits_is_named(tmp_path):
    bmp = io.BytesIO()
    Image.open(io.BytesIO(PICTURES["train/a/0.png"])).save(bmp, "BMP")
    files = {**PICTURES, "test/g/copy.bmp": bmp.getvalue(), "train/b/same_split.png": PICTURES["train/a/0.png"]}
    warning, = pack(write_folder(tmp_path / "src", files), tmp_path / "set").warnings
    assert warning.startswith("the same pixels")
    assert warning.endswith("train/a/0.png (train) and test/g/copy.bmp (test)")


# --------------------------------------------------------------------------- splits


def test_classes_without_splits_are_drawn_whole_by_shares_and_seed(tmp_path):
    source = write_folder(tmp_path / "src", {f"top/{name}": data for name, data in without_splits().items()})
    drawn = [
        {split: set(classes) for split, classes in read_back(pack(source, tmp_path / f"{at}", **how)).items()}
        for at, how in enumerate(({"splits": "3,2,2"}, {"splits": "3,2,2"}, {"splits": "3,2,2", "split_seed": 1}))
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert [len(drawn[0][split]) for split in NAMES] == [3, 2, 2]
    assert set.union(*drawn[0].values()) == set("abcdefg")
    for wrong, message in (("1,2", "no shares of train, val, test"), ("98,1,1", "leave none for val")):
        with pytest.raises(DataError, match=message):
            pack(source, tmp_path / "set", splits=wrong)


def test_lists_match_folders_whatever_their_slashes_or_unicode_form(tmp_path):
    folder = "Gr\u00fcn"
    files = {f"pool/{folder}/{name}": data for name, data in without_splits().items()}
    for split, names in NAMES.items():
        lines = [f".\\{unicodedata.normalize('NFD', folder)}/{name}/" for name in names]
        files[f"{split}.txt"] = "\r\n".join(lines).encode()
    found = read_back(pack(write_folder(tmp_path / "src", files), tmp_path / "set", strict=True))
    assert {split: [name[-1] for name in classes] for split, classes in found.items()} == {
        split: list(names) for split, names in NAMES.items()
    }


# --------------------------------------------------------------------------- the layouts of the field


def csv_set(line: str, header: str = "", suffix: str = ".csv", separator: str = "\n") -> dict[str, bytes]:
    """A list for each split, with a line for each picture (class c, number n), beside images ``c_n.png``."""
    files = {f"images/{name.split('/')[1]}_{name.split('/')[2]}": data for name, data in PICTURES.items()}
    for split, names in NAMES.items():
        rows = [line.format(c=name, n=number) for name in names for number in range(2)]
        files[f"{split}{suffix}"] = separator.join([header, *rows] if header else rows).encode()
    return files


@pytest.mark.parametrize(
    "files",
    [
        csv_set("{c}_{n}.png, {c}", "filename, label"),
        csv_set("{c},{c}_{n}.png", "class_name,image_name"),
        csv_set("{c}_{n}.png,{c}"),
        csv_set("{c}\t{c}_{n}.PNG"),
        csv_set("0;./images\\{c}_{n}.png;{c}", "n;Path;Class", separator="\r\n"),
        csv_set("{c}_{n},{c}", "id,breed"),
        csv_set("{c},{c}_{n}.png", "what,where"),
    ],
    ids=["space", "easyfsl", "no header", "tabs", "paths", "no suffix", "other names"],
)
def test_lists_of_images_and_labels(tmp_path, files):
    assert read_back(pack(write_folder(tmp_path / "src", files), tmp_path / "set", strict=True)) == EXPECTED


def test_one_list_with_a_column_for_the_split_or_with_shares(tmp_path):
    rows = ["image,label,split", *(f"{name},{name.split('/')[1]},{name.split('/')[0]}" for name in PICTURES)]
    pool = {name.replace("val/", "x/"): data for name, data in PICTURES.items()}
    files = {**pool, "all.csv": "\n".join(rows).replace("val/", "x/").replace(",val", ",valid").encode()}
    source = write_folder(tmp_path / "src", files)
    assert read_back(pack(source, tmp_path / "set", layout="csv", strict=True)) == EXPECTED
    assert len(pack(source, tmp_path / "drawn", layout="csv", splits="3,2,2").shards) == 14


def test_the_json_of_easy_few_shot_learning(tmp_path):
    files = {f"CUB/images/{name}": data for name, data in without_splits().items()}
    for split, names in NAMES.items():
        roots = [f"./data/CUB/images/{name}" for name in names]
        files[f"CUB/{split}.json"] = json.dumps({"class_names": names, "class_roots": roots}).encode()
    assert read_back(pack(write_folder(tmp_path / "src", files), tmp_path / "set", strict=True)) == EXPECTED
    files["CUB/val.json"] = b'{"label_names": [], "image_names": []}'
    with pytest.raises(DataError, match="val.json in .* no class_names and class_roots .*found: label_names, image_n"):
        pack(write_folder(tmp_path / "src", files), tmp_path / "x")


def arrays_of(split: str) -> tuple[np.ndarray, list[int]]:
    """Pictures uint8 [N, H, W, C] of a split, and their labels."""
    pictures = [pixels(ord(name) * 10 + number) for name in NAMES[split] for number in range(2)]
    return np.stack(pictures).transpose(0, 2, 3, 1), [at for at in range(len(NAMES[split])) for _ in range(2)]


def array_set(kind: str) -> dict[str, bytes]:
    files = {}
    for split, names in NAMES.items():
        images, labels = arrays_of(split)
        npz = io.BytesIO()
        np.savez_compressed(npz, images=images)
        encoded = [np.frombuffer(png(image.transpose(2, 0, 1)), np.uint8)[:, None] for image in images]
        about = {"label_specific": np.array(labels), "label_specific_str": list(names), "label_general_str": ["x"]}
        numbers = {name: [at for at, label in enumerate(labels) if names[label] == name] for name in names}
        cache = {"image_data": images, "class_dict": numbers}
        of_bytes = {b"image_data": images, b"class_dict": {name.encode(): at for name, at in numbers.items()}}
        made = {
            "cache": {f"mini-imagenet-cache-{split}.pkl": cache},
            "cache of python 2": {f"mini-imagenet-cache-{split}.pkl": of_bytes},
            "tiered npz": {f"{split}_labels.pkl": about},
            "tiered png": {f"{split}_images_png.pkl": encoded, f"{split}_labels.pkl": about},
        }[kind]
        files |= {name: pickle.dumps(content, 2 if "2" in kind else 5) for name, content in made.items()}
        if kind == "tiered npz":
            files[f"{split}_images.npz"] = npz.getvalue()
    return files


def test_a_label_below_0_names_no_class(tmp_path):
    files = array_set("tiered npz")
    about = pickle.loads(files["val_labels.pkl"])
    about["label_specific"][0] = -1  # as sets mark what has no label; of a list of names it would be the last
    files["val_labels.pkl"] = pickle.dumps(about)
    with pytest.raises(DataError, match="have the label -1, which names no class"):
        pack(write_folder(tmp_path / "src", files), tmp_path / "set")


@pytest.mark.parametrize("name", ["", "/", "__MACOSX"])
def test_a_class_in_an_array_set_needs_a_name(tmp_path, name):
    """Or one that is left out wherever it stands."""
    files = array_set("cache")
    cache = pickle.loads(files["mini-imagenet-cache-val.pkl"])
    numbers = list(cache["class_dict"].values())
    cache["class_dict"] = dict(zip([name, "other"], numbers, strict=True))
    files["mini-imagenet-cache-val.pkl"] = pickle.dumps(cache)
    with pytest.raises(DataError, match="without a name" if name != "__MACOSX" else "__MACOSX"):
        pack(write_folder(tmp_path / "src", files), tmp_path / "set")


@pytest.mark.parametrize("kind", ["cache", "cache of python 2", "tiered npz", "tiered png"])
def test_sets_kept_as_arrays(tmp_path, kind):
    files = array_set(kind)
    report = pack(write_zip(tmp_path / "src.zip", files), tmp_path / "set", strict=True)
    assert report.layout == "arrays" and read_back(report) == EXPECTED
    assert [account[:2] for account in report.accounts] == [("packed", 14), ("read as lists or arrays", len(files))]


def test_labels_that_are_mere_numbers_are_classes_of_their_split(tmp_path):
    files = {}
    for split in NAMES:
        images, labels = arrays_of(split)
        files[f"CIFAR_FS_{split}.pickle"] = pickle.dumps({"data": images, "labels": labels}, 2)
    found = read_back(pack(write_folder(tmp_path / "src", files), tmp_path / "set"))
    assert {split: list(classes) for split, classes in found.items()} == {
        split: [f"{split}{number}" for number in range(len(names))] for split, names in NAMES.items()
    }


@pytest.mark.parametrize("named", [True, False])
def test_parquet_of_images_with_labels(tmp_path, named):
    pyarrow = pytest.importorskip("pyarrow", reason="the extra cml-dist[parquet] is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    for split, names in NAMES.items():
        images = [{"bytes": PICTURES[f"{split}/{name}/{n}.png"], "path": None} for name in names for n in range(2)]
        labels = [at if named else name for at, name in enumerate(names) for _ in range(2)]
        table = pyarrow.table({"image": images, "label": labels})
        features = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)} if named else None)
        (tmp_path / "src" / "data").mkdir(parents=True, exist_ok=True)
        parquet.write_table(table, tmp_path / "src" / "data" / f"{split}-00000-of-00001.parquet")
    assert read_back(pack(tmp_path / "src", tmp_path / "set", strict=True)) == EXPECTED


# --------------------------------------------------------------------------- what is made to hurt


def test_limits_are_refused_with_the_option_that_raises_them(tmp_path):
    source = write_folder(tmp_path / "src", PICTURES)
    for limits, option in (
        (Limits(member_mib=1e-4), "train/a/0.png in .* unpacks to more than 0.0001 MiB; .*--max-member-mib 1"),
        (Limits(pixels=63), "has more than 63 pixels; .*--max-pixels"),
        (Limits(pixels=30), "has more than 30 pixels; .*--max-pixels"),
        (Limits(files=13), "holds more than 13 files and folders; .*--max-files 130"),
    ):
        with pytest.raises(DataError, match=option):
            pack(source, tmp_path / "set", limits=limits)
        assert not (tmp_path / "set").exists()
    assert Image.MAX_IMAGE_PIXELS == 89_478_485


def test_a_program_under_the_name_of_a_picture_is_not_run(tmp_path):
    eps = io.BytesIO()
    Image.open(io.BytesIO(PICTURES["train/a/0.png"])).save(eps, "EPS")
    source = write_folder(tmp_path / "src", {**PICTURES, "train/a/2.png": eps.getvalue()})
    (warning,) = pack(source, tmp_path / "set").warnings
    assert "train/a/2.png of class 'a' cannot be decoded (it is not an image)" in warning


def test_a_tar_whose_header_claims_a_member_of_its_own_size_is_refused(tmp_path):
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, 2**33
    (tmp_path / "src.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(DataError, match="src.tar is damaged or truncated"):
        pack(tmp_path / "src.tar", tmp_path / "set")


def test_names_that_lead_out_of_an_archive_stay_inside_the_set(tmp_path):
    source = write_zip(tmp_path / "src.zip", {f"../../{name}": data for name, data in PICTURES.items()})
    shards = pack(source, tmp_path / "set").shards
    assert not any(".." in shards.key(at) or shards.key(at).startswith("/") for at in range(len(shards)))


CACHE = pickle.dumps({"image_data": np.zeros((6, 8, 8, 3), np.uint8), "class_dict": {"a": list(range(6))}}, 2)
SHAPE, DTYPE = b"(K\x06K\x08K\x08K\x03t", b"X\x02\x00\x00\x00u1"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (CACHE.replace(SHAPE, b"(J\xff\xff\xff\x7fK\x08K\x08K\x03t"), "array uint8 of shape .2147483647, 8"),
        (CACHE.replace(SHAPE, b"(J\xfa\xff\xff\xffJ\xf8\xff\xff\xffK\x08K\x03t"), "array uint8 of shape .-6, -8, 8"),
        (CACHE.replace(DTYPE, DTYPE.replace(b"u1", b"O8")), "array of dtype O8"),
        (CACHE.replace(b"class_dict", b"klass_dict"), "neither class_dict nor labels, but klass_dict"),
        (CACHE.replace(b"K\x05e", b"K\x06e"), "name image 6 of 6"),
        (b"\x80\x02]r\xff\xff\xff\x7f.", "neither class_dict nor labels"),  # 16 GiB in the unpickler in C
        (b"\x80\x05\x96" + struct.pack("<Q", 2**45) + b"x.", "cannot be read"),
        (b"\x80\x02})" + b"\x85" * 300_000 + b"K\x01s.", "unhashable"),  # a key of tuples, one inside another
        (b"\x80\x02cos\nmkdir\n(X\x04\x00\x00\x00eviltR.", "refers to os.mkdir"),
        (b"\x80\x02cnumpy\ndtype\nX\x02\x00\x00\x00u1\x85R(K\x03tb.", "cannot be read"),
    ],
)
def test_a_pickle_that_was_made_to_hurt_is_one_line(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    source = write_folder(tmp_path / "src", {"mini-imagenet-cache-train.pkl": content})
    with pytest.raises(DataError, match=f"mini-imagenet-cache-train.pkl in .*{message}") as caught:
        pack(source, tmp_path / "set")
    assert "\n" not in str(caught.value) and not (tmp_path / "evil").exists()


@pytest.mark.parametrize("shape", [(2**40, 8, 8, 3), (2**62, 0, 8, 3), (-1, 8, 8, 3)])
def test_an_npz_whose_header_claims_more_than_it_holds_is_one_line(tmp_path, shape):
    npy, files = io.BytesIO(), array_set("tiered npz")
    np.lib.format.write_array_header_1_0(npy, {"descr": "|u1", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("images.npy", npy.getvalue())
    files["train_images.npz"] = (tmp_path / "x.npz").read_bytes()
    with pytest.raises(DataError, match="train_images.npz in .* cannot be read|the files of train have 0 images"):
        pack(write_folder(tmp_path / "src", files), tmp_path / "set")
