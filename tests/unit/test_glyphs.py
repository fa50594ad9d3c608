"""Glyphs: what the embedded set holds, that it is the same each time, and that its cache can be trusted."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from cml_dist.config.schema import GlyphsConfig, ImagesConfig
from cml_dist.data import glyph_fonts, glyphs
from cml_dist.data.build import build_domain
from cml_dist.data.glyph_fonts import SCRIPTS, TEX_FACES, Character, font_file
from cml_dist.data.shards import ShardSet
from cml_dist.errors import DataError
from cml_dist.registry import DOMAINS

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, list[tuple[int, int, str]]]:
    """The whole set, rendered once, and the progress that was reported."""
    reports: list[tuple[int, int, str]] = []
    folder = glyphs.ensure_glyphs(str(tmp_path_factory.mktemp("glyphs")), lambda *report: reports.append(report))
    return folder, reports


@pytest.fixture(scope="module")
def whole(built) -> ShardSet:
    return ShardSet.open(built[0])


def images_of(shards: ShardSet, split: str) -> np.ndarray:
    """uint8 ``[classes, 20, 28, 28]``."""
    first = shards.first_image(split)
    pixels = np.stack([shards.decode(first + i)[0] for i in range(shards.num_images(split))])
    return pixels.reshape(-1, 20, 28, 28)


@pytest.fixture(scope="module")
def pixels(whole) -> dict[str, np.ndarray]:
    return {split: images_of(whole, split) for split in whole.splits}


def codepoints(shards: ShardSet, split: str) -> list[int]:
    first = shards.first_image(split)
    return [int(shards.key(first + i)[1:6], 16) for i in range(0, shards.num_images(split), 20)]


# ---------------------------------------------------------------------- content


def test_counts(whole):
    infos = [whole.split_info(split) for split in ("train", "val", "test")]
    assert sum(len(info.classes) for info in infos) >= 500
    assert all(len(info.classes) >= 60 for info in infos)
    assert all(set(info.images) == {20} for info in infos)
    assert (whole.image_size, whole.channels) == ((28, 28), 1)


def test_splits_are_by_script(whole):
    seen: dict[str, set[str]] = {}
    for split in whole.splits:
        names = whole.split_info(split).classes
        assert len(set(names)) == len(names)
        seen[split] = {name.split("/")[0] for name in names}
        assert {SCRIPTS[script] for script in seen[split]} == {split}
        assert len(seen[split]) >= 3
    assert not seen["train"] & seen["test"] and not seen["train"] & seen["val"] and not seen["val"] & seen["test"]


def test_class_names_are_those_of_unicode(whole):
    import unicodedata

    for split in whole.splits:
        for name, code in zip(whole.split_info(split).classes, codepoints(whole, split), strict=True):
            assert unicodedata.name(chr(code)) == name.replace("/", " ", 1)
            assert unicodedata.category(chr(code)).startswith("L")
            assert unicodedata.normalize("NFD", chr(code)) == chr(code)
    assert "GREEK/SMALL LETTER OMEGA" in whole.split_info("train").classes


def test_each_face_really_has_the_character(whole):
    """By FreeType's own table: no box for a missing character is drawn."""
    from matplotlib.ft2font import FT2Font

    tables = {face: FT2Font(str(font_file(face))).get_charmap() for face in glyph_fonts.UNICODE_FACES}
    for number in range(len(whole)):
        code, _, face = whole.key(number).split("-", 2)
        if face not in TEX_FACES:
            assert int(code[1:], 16) in tables[face], whole.key(number)


def test_images_are_white_on_black_centred_and_whole(pixels):
    for images in pixels.values():
        ink = images.reshape(-1, 28, 28)
        assert ink.max(axis=(1, 2)).min() >= 120  # something bright in each
        assert np.median(ink.mean(axis=(1, 2))) < 64  # mostly black
        rim = np.concatenate([ink[:, 0], ink[:, -1], ink[:, :, 0], ink[:, :, -1]], axis=1)
        assert rim.max() == 0  # nothing is cut off
        grey = (ink > 0) & (ink < 255)
        assert grey.mean() > 0.02  # antialiased
        rows, columns = ink.max(axis=2) > 0, ink.max(axis=1) > 0
        for occupied in (rows, columns):
            middle = (occupied.argmax(axis=1) + 27 - occupied[:, ::-1].argmax(axis=1)) / 2
            assert np.abs(middle - 13.5).max() <= 3.5  # shifts of up to 2 pixels, and outline boxes rounded up


def test_letters_stand_upright(whole, pixels):
    """L has its foot at the bottom and T its bar at the top."""
    names = whole.split_info("train").classes
    foot = pixels["train"][names.index("LATIN/CAPITAL LETTER L")].astype(float).mean(axis=0)
    bar = pixels["train"][names.index("LATIN/CAPITAL LETTER T")].astype(float).mean(axis=0)
    assert foot[14:].sum() > 1.3 * foot[:14].sum()
    assert foot[:, :14].sum() > foot[:, 14:].sum()
    assert bar[:14].sum() > 1.3 * bar[14:].sum()


def test_examples_of_a_class_differ(pixels):
    for images in pixels.values():
        for examples in images:
            assert len({example.tobytes() for example in examples}) == 20


def test_no_image_lies_in_two_classes(pixels):
    flat = [image.tobytes() for images in pixels.values() for image in images.reshape(-1, 28, 28)]
    assert len(set(flat)) == len(flat)


def test_letters_that_look_the_same_are_one_class(whole):
    names = {name for split in whole.splits for name in whole.split_info(split).classes}
    for group in (
        ["LATIN/CAPITAL LETTER A", "GREEK/CAPITAL LETTER ALPHA", "CYRILLIC/CAPITAL LETTER A"],
        [
            "LATIN/CAPITAL LETTER O",
            "LATIN/SMALL LETTER O",
            "GREEK/CAPITAL LETTER OMICRON",
            "ARMENIAN/CAPITAL LETTER OH",
        ],
        ["LATIN/CAPITAL LETTER S", "LATIN/SMALL LETTER S", "ARMENIAN/CAPITAL LETTER TIWN"],
        ["LATIN/SMALL LETTER H", "ARMENIAN/SMALL LETTER HO"],
    ):
        assert len(names & set(group)) == 1, group


def pillow_rendering(face: str, code: int) -> np.ndarray:
    """The character by another renderer, its longer side 32 pixels, as a unit vector."""
    font = ImageFont.truetype(str(font_file(face)), 64)
    large = Image.new("L", (256, 256))
    ImageDraw.Draw(large).text((64, 64), chr(code), font=font, fill=255)
    ink = large.crop(large.getbbox())
    scale = 32 / max(ink.size)
    small = ink.resize([max(1, round(side * scale)) for side in ink.size], Image.Resampling.BOX)
    square = Image.new("L", (32, 32))
    square.paste(small, ((32 - small.width) // 2, (32 - small.height) // 2))
    vector = np.asarray(square, dtype=np.float64).ravel()
    return vector / np.linalg.norm(vector)


@pytest.mark.parametrize("face", ["DejaVuSans", "DejaVuSerif-Bold"])
def test_no_shape_lies_in_two_splits(whole, face):
    """Seen by Pillow's renderer, which the choice of classes does not use."""
    from fontTools.ttLib import TTFont

    known = TTFont(font_file(face)).getBestCmap()
    shapes = {
        split: np.stack([pillow_rendering(face, code) for code in codepoints(whole, split) if code in known])
        for split in whole.splits
    }
    for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
        assert (shapes[first] @ shapes[second].T).max() < 0.95
    alike = shapes["train"] @ shapes["train"].T
    np.fill_diagonal(alike, 0)
    assert alike.max() < 0.99


def test_neither_trivial_nor_impossible(pixels):
    """5-way 1-shot by the nearest neighbour of raw pixels on test classes: well above 20 %, well below 100 %."""
    rng = np.random.Generator(np.random.PCG64(0))
    images = pixels["test"].reshape(len(pixels["test"]), 20, -1).astype(np.float64)
    hits = []
    for _ in range(200):
        episode = images[rng.choice(len(images), 5, replace=False)][:, rng.permutation(20)]
        support, query = episode[:, 0], episode[:, 1:16]
        distances = ((query[:, :, None] - support[None, None]) ** 2).sum(axis=-1)
        hits.append((distances.argmin(axis=-1) == np.arange(5)[:, None]).mean())
    assert 0.45 < np.mean(hits) < 0.70


# ---------------------------------------------------------------------- the same each time


@pytest.mark.slow
def test_another_process_renders_the_same_bytes(whole):
    """Classes chosen and every eighth of them rendered anew, with other hash seeds and threads."""
    script = """
        import hashlib, sys
        from cml_dist.data.glyph_fonts import choose_characters
        from cml_dist.data.glyph_images import Canvas, examples
        from cml_dist.data.pixels import as_png
        characters, canvas = choose_characters(), Canvas(28)
        print(len(characters))
        for c in characters[::8]:
            data = b"".join(as_png(i[None]).data for _, i in examples(c.outlines, c.codepoint, canvas))
            print(f"{c.codepoint:05x}", hashlib.sha256(data).hexdigest(), c.split, c.name, sep="|")
    """
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    printed = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, text=True, check=True
    ).stdout.splitlines()
    assert printed[0] == str(len(whole) // 20)
    stored = {}
    for split in whole.splits:
        first = whole.first_image(split)
        for number, (code, name) in enumerate(
            zip(codepoints(whole, split), whole.split_info(split).classes, strict=True)
        ):
            data = b"".join(whole.read(first + number * 20 + i) for i in range(20))
            stored[f"{code:05x}"] = [hashlib.sha256(data).hexdigest(), split, name]
    assert len(printed) > 100
    for line in printed[1:]:
        code, *rest = line.split("|")
        assert stored[code] == rest


def test_progress_is_reported_to_the_end(built):
    reports = built[1]
    for what in ("reading fonts", "rendering glyphs"):
        done = [report[0] for report in reports if report[2] == what]
        assert done == sorted(done)
        assert done[-1] == [report[1] for report in reports if report[2] == what][-1]
    assert len(reports) > 50


# ---------------------------------------------------------------------- the cache


def tiny_characters(progress=None) -> list[Character]:
    """Three classes of Computer Modern: the cache is tested without rendering all."""
    outlines = dict(glyph_fonts._letters_of("cmr10"))
    return [
        Character(ord(letter), f"LATIN/CAPITAL LETTER {letter}", split, {"cmr10": outlines[ord(letter)]})
        for letter, split in zip("ABC", ("train", "val", "test"), strict=True)
    ]


@pytest.fixture
def tiny(monkeypatch) -> list[int]:
    """Makes the set tiny; the list grows with each rendering."""
    renderings: list[int] = []

    def choose(progress=None):
        renderings.append(1)
        return tiny_characters()

    monkeypatch.setattr(glyphs, "choose_characters", choose)
    return renderings


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_cached_set_is_used_again_and_a_second_build_has_the_same_bytes(tiny, tmp_path):
    first = glyphs.ensure_glyphs(str(tmp_path / "a"))
    assert glyphs.ensure_glyphs(str(tmp_path / "a")) == first
    assert len(tiny) == 1
    second = glyphs.ensure_glyphs(str(tmp_path / "b"))
    assert len(tiny) == 2
    assert second.name == first.name
    assert contents(second) == contents(first)


def flip_a_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "file"),
    [
        (flip_a_byte, "test-000000.tar"),
        (flip_a_byte, "index.npz"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1000]), "train-000000.tar"),
        (lambda file: file.write_bytes(file.read_bytes()[:50]), "dataset.json"),
        (Path.unlink, "dataset.json"),
        (Path.unlink, "val-000000.tar"),
    ],
)
def test_a_damaged_cache_is_rendered_again_with_a_warning(tiny, tmp_path, damage, file):
    folder = glyphs.ensure_glyphs(str(tmp_path))
    before = contents(folder)
    damage(folder / file)
    with pytest.warns(RuntimeWarning, match="made again.*" + file.split(".")[0]):
        assert glyphs.ensure_glyphs(str(tmp_path)) == folder
    assert contents(folder) == before
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_dir()] == [folder.name]


def test_a_failed_rendering_leaves_no_set(monkeypatch, tmp_path):
    def fail(progress=None):
        raise DataError("matplotlib's font is missing")

    monkeypatch.setattr(glyphs, "choose_characters", fail)
    with pytest.raises(DataError, match="font is missing"):
        glyphs.ensure_glyphs(str(tmp_path))
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_dir()] == []


def test_a_recipe_has_its_own_folder(tiny, tmp_path, monkeypatch):
    first = glyphs.ensure_glyphs(str(tmp_path))
    monkeypatch.setattr(glyphs, "RECIPE", glyphs.RECIPE + 1)
    assert glyphs.ensure_glyphs(str(tmp_path)) != first


def test_the_users_cache_folder_is_the_default(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert glyphs.ensure_glyphs().parent == tmp_path / "cml_dist"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert glyphs.ensure_glyphs().parent == tmp_path / "home" / ".cache" / "cml_dist"


def test_a_root_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="domain.root") as caught:
        glyphs.ensure_glyphs(str(tmp_path / "file" / "below"))
    assert str(tmp_path / "file" / "below") in caught.value.what


def test_builders_at_once_share_one_rendering(tmp_path, monkeypatch):
    """Threads stand for processes: the lock is of the open file."""
    rendered = []

    def choose(progress=None):
        rendered.append(1)
        time.sleep(0.5)  # long enough that all three would render if nothing held them back
        return tiny_characters()

    monkeypatch.setattr(glyphs, "choose_characters", choose)
    with ThreadPoolExecutor(3) as pool:
        folders = set(pool.map(lambda _: glyphs.ensure_glyphs(str(tmp_path)), range(3)))
    assert len(rendered) == len(folders) == 1
    assert len(ShardSet.open(*folders)) == 60
    assert [entry for entry in tmp_path.iterdir() if entry.is_dir()] == list(folders)


def test_without_a_lock_the_first_to_publish_wins(tmp_path, monkeypatch):
    """As between machines whose shared file system has no locks."""

    def no_locks(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    first: list[dict[str, bytes]] = []

    def choose(progress=None):
        if not first:  # another builder comes and goes while this one renders
            first.append({})
            first[0] = contents(glyphs.ensure_glyphs(str(tmp_path)))
        return tiny_characters()

    monkeypatch.setattr(glyphs, "choose_characters", choose)
    folder = glyphs.ensure_glyphs(str(tmp_path))
    assert contents(folder) == first[0] != {}
    assert json.loads((folder / "dataset.json").read_text())["name"] == "glyphs"
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_dir()] == [folder.name]


# ---------------------------------------------------------------------- the domain


def test_build_domain_reads_glyphs(built):
    config = GlyphsConfig(name="glyphs", root=str(built[0].parent), ways=5, shots=5, queries=15)
    domain = build_domain(config, train_seed=0, eval_seed=0)
    episode = domain.episode("test", 0)
    assert episode.support.inputs.shape == (25, 1, 28, 28)
    assert episode.query.inputs.shape == (75, 1, 28, 28)
    assert (domain.input_shape, domain.output_dim, domain.chance) == ((1, 28, 28), 5, 0.2)


def test_build_domain_reads_a_packed_set_by_its_root(built):
    domain = build_domain(ImagesConfig(name="images", root=str(built[0])), train_seed=0, eval_seed=0)
    assert domain.episode("val", 0).support.inputs.shape == (5, 1, 28, 28)


def test_each_name_of_the_configuration_has_a_builder():
    names = {
        name for config in (GlyphsConfig, ImagesConfig) for name in get_args(config.model_fields["name"].annotation)
    }
    assert set(DOMAINS) == names | {"sinusoid", "graph_nodes"}
