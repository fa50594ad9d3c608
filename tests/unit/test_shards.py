"""Shard sets: true WebDataset, deterministic, whole or absent, checked before they are used, remote ones cached."""

from __future__ import annotations

import gc
import hashlib
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import fsspec
import numpy as np
import pytest
import webdataset
from image_sets import CLASSES, pixels, png, seed_of, write_set
from PIL import Image

from cml_dist.data import publish
from cml_dist.data.pixels import Picture, as_png
from cml_dist.data.shard_writer import ShardSetWriter, new_shard_set
from cml_dist.data.shards import ShardSet
from cml_dist.errors import CmlError, DataError

SMALL_SHARD = 20 / 1024  # MiB: several shards a split


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return write_set(tmp_path_factory.mktemp("sets") / "small", shard_size_mib=SMALL_SHARD)


@pytest.fixture
def copy(small, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(small, tmp_path / "copy"))


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def read_by_webdataset(files: list[str], stages=lambda dataset: dataset) -> list[dict]:
    """All samples, read by the library itself; it leaves its files to the garbage collector."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        samples = list(stages(webdataset.WebDataset(files, shardshuffle=False)))
        gc.collect()
    return samples


# --------------------------------------------------------------------------- what is written is what is read


def test_every_image_is_read_back_with_its_class(small):
    shards = ShardSet.open(small)
    assert (shards.name, shards.image_size, shards.channels, shards.splits) == ("small", (8, 8), 3, tuple(CLASSES))
    for split, count in CLASSES.items():
        info = shards.split_info(split)
        assert info.classes == tuple(f"{split}-{number}" for number in range(count))
        assert info.images == (7,) * count
        for number in range(count):
            for image in range(7):
                at = shards.first_image(split) + 7 * number + image
                expected = pixels(seed_of(split, number, image))
                assert shards.key(at) == f"{split}-{number}/{image}"
                assert shards.read(at) == png(expected)
                assert np.array_equal(shards.decode(at), expected)
    assert len(shards) == 7 * sum(CLASSES.values())


def test_images_added_out_of_order_are_indexed_by_class(tmp_path):
    with new_shard_set(tmp_path / "set", name="n", image_size=(8, 8), channels=1) as writer:
        for image in range(4):
            for name in ("a", "b"):
                writer.add("train", name, f"{name}{image}", as_png(pixels(ord(name) + image, 8, 1)))
    shards = ShardSet.open(tmp_path / "set")
    assert [shards.key(at) for at in range(8)] == ["a0", "a1", "a2", "a3", "b0", "b1", "b2", "b3"]
    assert np.array_equal(shards.decode(5), pixels(ord("b") + 1, 8, 1))


def test_webdataset_reads_the_same_images_and_labels(small):
    shards = ShardSet.open(small)
    for split in CLASSES:
        files = [str(small / shard.name) for shard in shards.info.shards if shard.split == split]
        assert len(files) > 1
        samples = read_by_webdataset(files, lambda dataset: dataset.decode("pil"))
        found = {s["__key__"]: (np.asarray(s["png"]).transpose(2, 0, 1), s["cls"]) for s in samples}
        assert len(found) == shards.num_images(split)
        labels = np.repeat(np.arange(CLASSES[split]), 7)
        for offset, label in enumerate(labels):
            at = shards.first_image(split) + offset
            image, found_label = found[shards.key(at)]
            assert found_label == label
            assert np.array_equal(image, shards.decode(at))


def test_mean_and_std_are_those_of_the_training_pixels(small):
    shards = ShardSet.open(small)
    values = np.stack([shards.decode(at) for at in range(shards.num_images("train"))]) / 255
    np.testing.assert_allclose(shards.info.mean, values.mean((0, 2, 3)), atol=1e-8)
    np.testing.assert_allclose(shards.info.std, values.std((0, 2, 3)), atol=1e-8)


def test_the_same_input_gives_the_same_bytes(small, tmp_path):
    time.sleep(1.1)  # tar counts time in seconds
    assert hashes(write_set(tmp_path / "again", shard_size_mib=SMALL_SHARD)) == hashes(small)


def test_jpegs_keep_their_bytes(tmp_path):
    path = tmp_path / "i.jpg"
    Image.fromarray(pixels(0).transpose(1, 2, 0).copy()).save(path)
    with new_shard_set(tmp_path / "set", name="n", image_size=(8, 8), channels=3) as writer:
        writer.add("train", "a", "k", Picture(path.read_bytes(), "jpg", pixels(0)))
    assert ShardSet.open(tmp_path / "set").read(0) == path.read_bytes()


@pytest.mark.parametrize(
    "keys",
    [["a.b.c", "a.b.d"], ["ä", "ö"], ["same", "same"], ["x" * 300, "x" * 299 + "y"], ["a b/c?.d", ""], ["d.e/f.g"]],
)
def test_any_key_becomes_one_that_webdataset_reads(tmp_path, keys):
    with new_shard_set(tmp_path / "set", name="n", image_size=(8, 8), channels=1) as writer:
        for number, key in enumerate(keys):
            writer.add("train", f"class {number}", key, as_png(pixels(number, 8, 1)))
    shards = ShardSet.open(tmp_path / "set")
    found = read_by_webdataset([str(tmp_path / "set" / "train-000000.tar")])
    assert [sample["__key__"] for sample in found] == [shards.key(at) for at in range(len(keys))]
    assert [int(sample["cls"]) for sample in found] == list(range(len(keys)))
    assert [sample["png"] for sample in found] == [shards.read(at) for at in range(len(keys))]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_reads_from_threads_forks_and_pickles_are_right(small):
    shards = ShardSet.open(small)
    expected = [shards.read(at) for at in range(len(shards))]
    order = np.random.default_rng(0).permutation(len(shards)).tolist() * 5
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(shards.read, order)) == [expected[at] for at in order]
    copied = pickle.loads(pickle.dumps(shards))
    assert [copied.read(at) for at in range(len(shards))] == expected
    read_fd, write_fd = os.pipe()
    child = os.fork()
    if child == 0:
        same = all(shards.read(at) == expected[at] for at in order)
        os.write(write_fd, b"1" if same else b"0")
        os._exit(0)
    assert all(shards.read(at) == expected[at] for at in order)  # at the same time as the child
    os.waitpid(child, 0)
    assert os.read(read_fd, 1) == b"1"
    os.close(read_fd)
    os.close(write_fd)


def test_with_very_many_shards_files_are_not_kept_open(small, monkeypatch):
    monkeypatch.setattr("cml_dist.data.shards.MAX_OPEN_SHARDS", 2)
    shards = ShardSet.open(small)
    before = len(os.listdir("/proc/self/fd"))
    assert np.array_equal(shards.decode(0), pixels(seed_of("train", 0, 0)))
    assert [len(shards.read(at)) > 0 for at in range(len(shards))] == [True] * len(shards)
    assert len(os.listdir("/proc/self/fd")) == before + 2


# --------------------------------------------------------------------------- whole or absent


def _writer(dest: Path, *, name: str = "n", **options) -> AbstractContextManager[ShardSetWriter]:
    return new_shard_set(dest, name=name, image_size=(8, 8), channels=1, **options)


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), _writer(tmp_path / "s") as writer:
        writer.add("train", "a", "k", as_png(pixels(0, 8, 1)))
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


def test_no_image_is_an_error_and_leaves_nothing(tmp_path):
    with pytest.raises(DataError, match="no image"), _writer(tmp_path / "s"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_existing_destination_is_refused_and_untouched(small, copy):
    before = hashes(copy)
    with pytest.raises(DataError, match=f"{copy} exists already"):
        write_set(copy)
    assert hashes(copy) == before
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


def test_two_writers_of_one_destination_one_publishes(tmp_path):
    """As of machines without a common lock: the second leaves the first's folder alone."""
    with pytest.raises(DataError, match="exists already"), _writer(tmp_path / "s", name="second") as second:
        second.add("train", "a", "k", as_png(pixels(0, 8, 1)))
        with _writer(tmp_path / "s", name="first") as first:
            first.add("train", "a", "k", as_png(pixels(0, 8, 1)))
    assert ShardSet.open(tmp_path / "s").name == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_killed_writer_leaves_nothing_under_the_name_and_one_of_the_next_day_cleans_up(tmp_path):
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from image_sets import pixels
from cml_dist.data.pixels import as_png
from cml_dist.data.shard_writer import new_shard_set
open_set = new_shard_set({str(tmp_path / "s")!r}, name="n", image_size=(8, 8), channels=1)
open_set.__enter__().add("train", "a", "k", as_png(pixels(0, 8, 1)))
os.kill(os.getpid(), signal.SIGKILL)
"""
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    killed = subprocess.run([sys.executable, "-c", script], env=environment, timeout=600, check=False)
    assert killed.returncode == -signal.SIGKILL
    leftover = list(tmp_path.iterdir())
    assert len(leftover) == 1 and leftover[0].name.startswith(".s.partial-")
    yesterday = time.time() - 25 * 3600  # younger ones may be another writer's
    os.utime(leftover[0], (yesterday, yesterday))
    write_set(tmp_path / "s")
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    ShardSet.open(tmp_path / "s").verify()


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(28, "No space left on device")

    with pytest.raises(CmlError, match="No space left on device.*free space"):
        with _writer(tmp_path / "s", shard_size_mib=0.001) as writer:
            writer.add("train", "a", "k", as_png(pixels(0, 8, 1)))
            monkeypatch.setattr(Path, "write_bytes", full)
            writer.add("train", "a", "l", as_png(pixels(1, 8, 1)))
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------- damage is found before training


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-512])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: shutil.rmtree(root), "no packed image set at .*copy .no such folder.*data pack"),
        (lambda root: (root / "dataset.json").unlink(), "no packed image set at .*copy .dataset.json is missing"),
        (lambda root: (root / "dataset.json").write_text("{"), "dataset.json is damaged"),
        (lambda root: (root / "dataset.json").write_text("[1]"), "dataset.json is damaged"),
        (lambda root: (root / "index.npz").unlink(), "index.npz is missing; copy the set again whole"),
        (lambda root: _truncate(root / "index.npz"), "index.npz is truncated or damaged"),
        (lambda root: (root / "val-000001.tar").unlink(), "val-000001.tar is missing"),
        (lambda root: _truncate(root / "test-000000.tar"), r"test-000000.tar is truncated or damaged: \d+ bytes, not "),
    ],
)
def test_a_damaged_set_is_refused_by_name_when_opened(copy, damage, message):
    damage(copy)
    with pytest.raises(DataError, match=message):
        ShardSet.open(copy)


def test_a_file_instead_of_a_folder_is_named(tmp_path):
    (tmp_path / "f.tar").write_bytes(b"")
    with pytest.raises(DataError, match="f.tar .no such folder"):
        ShardSet.open(tmp_path / "f.tar")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format_version", 99, "another version .format_version.*update cml_dist"),
        ("format", "something", "another version .format:"),
        ("shards", [{"name": "../evil.tar", "size": 1, "sha256": ""}], "damaged, .*shards.0.name"),
        ("channels", 2, "damaged, .*channels"),
        ("splits", {"train": {"classes": ["a"], "images": [3]}}, "index.npz is damaged .it does not belong to"),
    ],
)
def test_a_description_that_cannot_be_true_is_refused(copy, key, value, message):
    content = json.loads((copy / "dataset.json").read_text())
    (copy / "dataset.json").write_text(json.dumps({**content, key: value}))
    with pytest.raises(DataError, match=message):
        ShardSet.open(copy)


def test_a_changed_byte_is_found_by_verify_and_in_the_index_at_once(copy, small):
    ShardSet.open(copy).verify()
    shard = copy / "train-000001.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DataError, match="train-000001.tar is damaged"):
        ShardSet.open(copy).verify()
    index = bytearray((copy / "index.npz").read_bytes())
    index[100] ^= 1
    (copy / "index.npz").write_bytes(index)
    with pytest.raises(DataError, match="index.npz is damaged"):
        ShardSet.open(copy)


def test_an_undecodable_image_is_named_with_its_shard(copy):
    shards = ShardSet.open(copy)
    at = shards.first_image("val") + 10
    data = shards.read(at)
    for path in copy.glob("val-*.tar"):
        path.write_bytes(path.read_bytes().replace(data, bytes(len(data))))
    with pytest.raises(DataError, match=r"image 'val-1/3' in shard .*/val-00000\d.tar cannot be decoded"):
        ShardSet.open(copy).decode(at)


def test_a_shard_cut_or_removed_while_open_is_named(copy):
    shards = ShardSet.open(copy)
    last = shards.first_image("test") - 1
    name = next(s.name for s in reversed(shards.info.shards) if s.split == "val")
    os.truncate(copy / name, 512)
    with pytest.raises(DataError, match=f"{name} is cut off"):
        shards.read(last)
    (copy / "train-000000.tar").unlink()
    with pytest.raises(DataError, match="train-000000.tar cannot be read"):
        shards.read(0)


def test_an_unknown_split_is_refused_with_those_that_are_there(tmp_path):
    with new_shard_set(tmp_path / "s", name="n", image_size=(8, 8), channels=1) as writer:
        writer.add("test", "a", "k", as_png(pixels(0, 8, 1)))
    shards = ShardSet.open(tmp_path / "s")
    assert shards.info.mean is None and shards.info.std is None
    with pytest.raises(DataError, match="no split 'train' .it has test"):
        shards.split_info("train")


# --------------------------------------------------------------------------- remote sets


@pytest.fixture
def in_memory(small, monkeypatch):
    """The set in fsspec's own memory file system, as a stand-in for an object store: each who opens has a file of his.

    By itself it gives all threads one file, with one position.
    """
    store = fsspec.filesystem("memory")
    opened = type(store)._open

    def open_own(self, path, mode="rb", **kwargs):
        return io.BytesIO(self.cat_file(path)) if mode == "rb" else opened(self, path, mode, **kwargs)

    monkeypatch.setattr(type(store), "_open", open_own)
    store.put(f"{small}/", "/bucket/set/", recursive=True)
    yield "memory://bucket/set", store
    store.rm("/bucket", recursive=True)


def test_a_remote_set_is_downloaded_once_and_is_the_same(in_memory, small, tmp_path):
    url, store = in_memory
    reports = []
    shards = ShardSet.open(url, cache=tmp_path, progress=lambda *report: reports.append(report))
    assert {path.name for path in shards.folder.iterdir()} == {path.name for path in small.iterdir()}
    assert hashes(shards.folder) == hashes(small)
    assert reports[-1][0] == reports[-1][1] == sum(f.size for f in (shards.info.index, *shards.info.shards))
    store.rm("/bucket/set/train-000000.tar")  # what is cached is not asked for again
    again = ShardSet.open(url, cache=tmp_path)
    assert again.read(0) == shards.read(0)


def test_a_cached_copy_that_is_damaged_is_named_and_fetched_again_once_removed(in_memory, tmp_path):
    url, _ = in_memory
    folder = ShardSet.open(url, cache=tmp_path).folder
    _truncate(folder / "train-000000.tar")
    with pytest.raises(DataError, match="train-000000.tar is truncated.*remove a cached copy, and it is fetched anew"):
        ShardSet.open(url, cache=tmp_path)
    shutil.rmtree(folder)
    ShardSet.open(url, cache=tmp_path).verify()


def test_a_set_that_changed_at_its_source_is_fetched_into_another_folder(in_memory, tmp_path):
    url, store = in_memory
    old = ShardSet.open(url, cache=tmp_path / "cache")
    new = write_set(tmp_path / "new", images=3)
    store.rm("/bucket/set", recursive=True)
    store.put(f"{new}/", "/bucket/set/", recursive=True)
    fetched = ShardSet.open(url, cache=tmp_path / "cache")
    assert fetched.folder != old.folder
    assert fetched.num_images("train") == 18 and old.num_images("train") == 42
    old.verify()


def test_what_arrives_damaged_is_refused_and_not_kept(in_memory, tmp_path):
    url, store = in_memory
    data = bytearray(store.cat("/bucket/set/val-000000.tar"))
    data[600] ^= 1
    store.pipe("/bucket/set/val-000000.tar", bytes(data))
    with pytest.raises(DataError, match="val-000000.tar arrived damaged or truncated .its checksum differs"):
        ShardSet.open(url, cache=tmp_path)
    assert not list(tmp_path.rglob("*.tar")) and not list(tmp_path.rglob(".*partial*"))
    store.pipe("/bucket/set/val-000000.tar", bytes(data[:512]))
    with pytest.raises(DataError, match="arrived damaged or truncated .512 bytes"):
        ShardSet.open(url, cache=tmp_path)


def test_a_remote_file_that_is_missing_is_named(in_memory, tmp_path):
    url, store = in_memory
    store.rm("/bucket/set/index.npz")
    with pytest.raises(DataError, match="memory://bucket/set/index.npz does not exist"):
        ShardSet.open(url, cache=tmp_path)
    with pytest.raises(DataError, match="memory://nowhere/dataset.json does not exist"):
        ShardSet.open("memory://nowhere", cache=tmp_path)


def test_a_protocol_whose_package_is_missing_says_which(tmp_path, monkeypatch):
    def missing(*_, **__):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(DataError, match="cannot be fetched .*Install s3fs to access S3.*pip install"):
        ShardSet.open("s3://bucket/set", cache=tmp_path)


def test_a_file_url_is_read_in_place(small, tmp_path):
    shards = ShardSet.open(f"file://{small}", cache=tmp_path)
    assert shards.folder == small
    assert list(tmp_path.iterdir()) == []


def test_the_default_cache_is_in_the_users_cache_folder(in_memory, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert ShardSet.open(in_memory[0]).folder.parent == tmp_path / "xdg" / "cml_dist" / "shards"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert publish.user_cache("shards") == tmp_path / "home" / ".cache" / "cml_dist" / "shards"


@pytest.mark.filterwarnings("ignore:the cached .* is made again. it has no dataset.json:RuntimeWarning")
def test_openers_at_once_share_one_copy_also_where_an_earlier_version_left_half_of_one(
    in_memory, small, tmp_path, monkeypatch
):
    url, store = in_memory
    folder = ShardSet.open(url, cache=tmp_path / "first").folder
    half = tmp_path / "cache" / folder.name / "train-000000.tar"
    half.parent.mkdir(parents=True)
    half.write_bytes(b"half")
    asked, get_file = [], type(store).get_file
    monkeypatch.setattr(
        type(store), "get_file", lambda self, source, *a, **k: (asked.append(source), get_file(self, source, *a, **k))
    )
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: ShardSet.open(url, cache=tmp_path / "cache").folder, range(4)))
    assert found == [tmp_path / "cache" / folder.name] * 4
    assert hashes(found[0]) == hashes(small)
    shards = [path for path in asked if "dataset.json" not in path]  # which is asked for to know what the set is
    assert len(shards) == len(set(shards)) == len(hashes(small)) - 1
