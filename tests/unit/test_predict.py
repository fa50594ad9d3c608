"""Predict: any number of classes, answers that are each picture's own, a classifier in a file, and the command."""

from __future__ import annotations

import copy
import csv
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from image_sets import write_set, write_zip
from PIL import Image

import cml_dist
from cml_dist.cli import main
from cml_dist.config.load import merge, parse_config
from cml_dist.errors import CheckpointError, ConfigError, DataError
from cml_dist.run.adapted import METADATA
from cml_dist.run.interval import share_interval
from cml_dist.run.leave_one_out import leave_one_out
from cml_dist.run.safetensors_stream import StreamReader, save_tensors
from cml_dist.run.trainer import train
from cml_dist.telemetry.console import Console

WAYS, CLASSES, SHOTS = 3, 8, 4
SETTINGS = {
    "domain": {"name": "images", "ways": WAYS, "shots": 1, "queries": 2},
    "model": {"backbone": "conv4", "filters": 8},
    "method": {"inner_lr": 0.1, "inner_steps": 5},
    "train": {"steps": 1, "episodes_per_step": 1},
    "eval": {"every": 0, "val_episodes": 2, "episodes": 2, "untrained": False},
    "parallel": {"threads": 1},
}
RUNS = {
    "cml": [],
    "meta_sgd": ["method.name=meta_sgd"],
    "prototype": ["model.head=prototype"],
    "boil": ["method.name=boil"],
    "unlabelled": ["domain.queries=1", "domain.unlabelled=1", "method.unlabelled=soft_labels", "train.steps=2"],
}
NAMES = [f"<b>{number} & co" for number in range(CLASSES)]


def picture(number: int, seed: int) -> np.ndarray:
    """A class is a pattern of coloured squares; its pictures differ by noise."""
    pattern = np.random.default_rng(number).integers(0, 256, (4, 4, 3)).repeat(8, 0).repeat(8, 1)
    noise = np.random.default_rng(1000 * number + seed).normal(0, 25, pattern.shape)
    return (pattern + noise).clip(0, 255).astype(np.uint8)


EXAMPLES = [picture(number, seed) for number in range(CLASSES) for seed in range(SHOTS)]
LABELS = [name for name in NAMES for _ in range(SHOTS)]
NEW = [picture(number, 100 + seed) for number in range(CLASSES) for seed in range(3)]
TRUTH = [name for name in NAMES for _ in range(3)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of one meta-step by its kind, made when it is asked for."""
    root, made = tmp_path_factory.mktemp("runs"), {}
    packed = write_set(root / "set", images=3, size=32)

    def run(kind: str = "cml") -> Path:
        if kind not in made:
            overrides = [f"domain.root={packed}", f"run.dir={root / kind}", *RUNS[kind]]
            train(parse_config(merge(SETTINGS, overrides)), Console(quiet=True))
            made[kind] = root / kind
        return made[kind]

    return run


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Examples in class folders, and new pictures of which one cannot be read."""
    root = tmp_path_factory.mktemp("pictures")
    for name, image in zip(LABELS, EXAMPLES, strict=True):
        (root / "examples" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / "examples" / name / f"{len(list(root.rglob('*.png')))}.png")
    (root / "new").mkdir()
    for number, image in enumerate(NEW):
        Image.fromarray(image).save(root / "new" / f"{number}.png")
    (root / "new" / "5b.png").write_bytes(b"no picture")
    return root


def predict(*words: object) -> int:
    return main(["predict", *map(str, words), "--device", "cpu"])


# --------------------------------------------------------------------------- in Python


@pytest.mark.parametrize("kind", ["cml", "meta_sgd", "prototype"])
def test_more_classes_than_outputs_are_told_apart_and_a_file_answers_to_the_bit(kind, runs, tmp_path):
    adapted = cml_dist.load(runs(kind)).adapt(EXAMPLES, LABELS)
    assert adapted.classes == NAMES
    right = np.mean([p == t for p, t in zip(adapted.predict(NEW), TRUTH, strict=True)])
    assert right > 0.5, "chance is 0.125"
    before = adapted.probabilities(NEW)
    adapted.save(tmp_path / "adapted.safetensors")
    read = cml_dist.load(tmp_path / "adapted.safetensors")
    for other in (read, copy.deepcopy(read), pickle.loads(pickle.dumps(adapted)), adapted.to("cpu")):
        assert other.classes == NAMES and np.array_equal(other.probabilities(NEW), before)


def test_a_saved_classifier_holds_no_pictures_and_no_paths(runs, tmp_path):
    adapted = cml_dist.load(runs()).adapt(EXAMPLES, LABELS)
    adapted.save(tmp_path / "a")
    reader = StreamReader(tmp_path / "a")
    assert all(EXAMPLES[0].size * len(EXAMPLES) not in shape for _, shape in reader.layout.values())
    assert {name.split("/")[0] for name in reader.layout} == {"network", "norms"}
    assert str(runs().parent) not in reader.metadata[METADATA]


def test_alone_or_among_many_a_picture_has_the_same_answer(runs):
    adapted = cml_dist.load(runs()).adapt(EXAMPLES, LABELS)
    among = adapted.probabilities([*NEW, *([NEW[0] // 2] * 60)])[: len(NEW)]
    alone = np.concatenate([adapted.probabilities([image]) for image in NEW])
    assert np.allclose(alone, among, atol=1e-6) and alone.std(0).max() > 0.02


def test_classes_beyond_the_outputs_are_refused_where_the_head_does_not_adapt(runs):
    learner = cml_dist.load(runs("boil"))
    assert learner.adapt(EXAMPLES[: WAYS * SHOTS], LABELS[: WAYS * SHOTS]).classes == NAMES[:WAYS]
    with pytest.raises(DataError, match=f"{CLASSES} classes were given, and the head's 3 outputs do not adapt"):
        learner.adapt(EXAMPLES, LABELS)


def test_files_of_another_version_or_damaged_ones_are_one_error(runs, tmp_path):
    adapted = cml_dist.load(runs()).adapt(EXAMPLES, LABELS)
    with pytest.raises(ConfigError, match=r"label \(1, 2\) cannot be written"):
        cml_dist.load(runs()).adapt(EXAMPLES[:2], [(1, 2), 3]).save(tmp_path / "no")
    file = tmp_path / "a"
    adapted.save(file)
    reader = StreamReader(file)
    tensors, said = {n: reader.read(n) for n in reader.layout}, json.loads(reader.metadata[METADATA])
    save_tensors(tmp_path / "newer", tensors, {METADATA: json.dumps({"format": 2, "what": "else"})})
    with pytest.raises(CheckpointError, match="newer has format 2 .* this version reads 1; update cml_dist"):
        cml_dist.load(tmp_path / "newer")
    said["classes"].append("one more")
    save_tensors(tmp_path / "more", tensors, {METADATA: json.dumps(said)})
    with pytest.raises(CheckpointError, match="more makes no classifier .*8 outputs for 9 classes"):
        cml_dist.load(tmp_path / "more")
    for name, data in {"cut": file.read_bytes()[:900], "text": b"hello"}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(CheckpointError, match=f"{name} holds no adapted classifier .*; give a run folder"):
            cml_dist.load(tmp_path / name)


def test_one_example_of_each_class_is_left_out_in_turn(runs):
    learner, told = cml_dist.load(runs()), []
    right = leave_one_out(learner, EXAMPLES, LABELS, progress=lambda done, total: told.append((done, total)))
    assert told == [(part, SHOTS) for part in range(1, SHOTS + 1)]
    assert right == leave_one_out(learner, EXAMPLES, LABELS) > len(EXAMPLES) / 2
    many = [picture(number, seed) for number in range(2) for seed in range(2 + 30 * number)]
    told.clear()
    leave_one_out(learner, many, [0] * 2 + [1] * 32, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (20, 20), "no more than 20 times"
    with pytest.raises(DataError, match="class b has one example"):
        leave_one_out(learner, EXAMPLES[:3], ["a", "a", "b"])


def test_the_interval_of_a_share_has_a_width_at_its_ends():
    low, high = share_interval(10, 10)
    assert high == 1 and low == pytest.approx(0.7225, abs=1e-4)  # Wilson's, by hand
    assert share_interval(0, 10) == pytest.approx((0, 1 - low))


# --------------------------------------------------------------------------- the command


def test_table_records_and_sheet_hold_the_same_answers(runs, folders, tmp_path, capfd):
    file, new = tmp_path / "adapted.safetensors", folders / "new"
    table, records, sheet = (tmp_path / f"out.{kind}" for kind in ("csv", "jsonl", "html"))
    support = ("--support", folders / "examples")
    assert predict(runs(), *support, "--images", new, "--out", table, "--save", file, "--leave-one-out") == 0
    said = capfd.readouterr()
    assert f"1 of {len(NEW) + 1} pictures could not be read, e.g. {new}/5b.png cannot be decoded" in said.err
    right = leave_one_out(cml_dist.load(runs()), EXAMPLES, LABELS)
    assert f"are right ({right} of {len(EXAMPLES)}; 95 % interval" in said.out
    rows = list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))
    assert list(rows[0]) == ["image", "prediction", "probability", "error", *NAMES]
    names = [Path(row["image"]).name for row in rows]
    assert names == sorted(names, key=lambda name: (int(name[:-4].rstrip("b")), name)), "natural order"
    (broken,) = (row for row in rows if row["error"])
    assert Path(broken["image"]).name == "5b.png" and broken["prediction"] == broken[NAMES[0]] == ""
    good = [row for row in rows if not row["error"]]
    assert np.mean([row["prediction"] == truth for row, truth in zip(good, TRUTH, strict=True)]) > 0.5

    assert predict(file, "--images", new, "--out", records) == 0
    found = [json.loads(line) for line in records.read_text(encoding="utf-8").splitlines()]
    assert [str(one["probability"] or "") for one in found] == [row["probability"] for row in rows]
    assert [str(one["probabilities"][NAMES[3]]) for one in found if not one["error"]] == [r[NAMES[3]] for r in good]

    least = float(np.median([float(row["probability"]) for row in good])) + 1e-5
    assert predict(file, "--images", new, "--out", sheet, "--min-probability", least) == 0
    page = sheet.read_text(encoding="utf-8")
    assert page.count('<img src="data:image/jpeg;base64,') == len(NEW) and "not readable" in page
    assert "&lt;b&gt;" in page and " &amp; co" in page and "<b><b>" not in page and "http" not in page
    unsure = sum(float(row["probability"]) < least for row in good)
    assert 0 < unsure < len(good)
    assert page.count("<b>unknown</b>") == unsure
    shown = [float(part.partition(" %")[0]) for part in page.split("<small>")[1 : len(NEW) + 1]]
    assert shown == sorted(shown, reverse=True)
    assert not list(tmp_path.glob(".*"))


def test_single_pictures_patterns_and_the_screen(runs, folders, capfd):
    words = ("--support", folders / "examples", "--images", folders / "new" / "7.png", f"{folders}/new/1*.png")
    assert predict(runs(), *words) == 0
    out = capfd.readouterr().out
    assert "7.png" in out and "19.png" in out and "12 pictures" in out and " 2.png" not in out


def test_what_cannot_be_is_one_line_before_any_work(runs, folders, tmp_path, capfd):
    examples, new, there = folders / "examples", folders / "new", tmp_path / "there.csv"
    there.touch()
    (tmp_path / "one" / "cat").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    Image.fromarray(NEW[0]).save(tmp_path / "one" / "cat" / "a.png")
    (tmp_path / "bad" / "cat").mkdir(parents=True)
    (tmp_path / "bad" / "dog").mkdir()
    Image.fromarray(NEW[0]).convert("L").save(tmp_path / "bad" / "cat" / "grey.png")
    (tmp_path / "bad" / "dog" / "b.png").write_bytes(b"no picture")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    both = ("--support", examples, "--images", new)
    cases = {
        (runs(), *both, "--out", there): f"--out {there} exists; give another name, or remove it",
        (runs(), *both, "--save", there): f"--save {there} exists; give another name, or remove it",
        (runs(), *both, "--out", tmp_path / "a.txt"): "is of no kind that is written; end it in .csv, .jsonl, .html",
        (runs(), *both, "--min-probability", "50"): "--min-probability is 50; give a number from 0 to 1",
        (runs(), "--images", new): "give a folder with a folder of pictures for each class: --support EXAMPLES",
        (runs(), "--support", examples): "there is nothing to do; name the pictures",
        (runs(), *both, "domain.cache=no"): "domain.cache=no",  # a setting, and no picture
        (there, *both): "is adapted already; leave --support",
        (runs(), *both, "--unlabelled", tmp_path / "nowhere"): "error: --unlabelled ",
        (runs(), *both, "--unlabelled", new): "was trained without unlabelled examples; leave --unlabelled out",
        (runs(), "--support", tmp_path / "empty", "--images", new): "holds no pictures",
        (runs(), "--support", tmp_path / "one", "--images", new): "holds one class alone, cat",
        (runs(), "--support", new, "--images", new): "lies in no class folder",
        (runs(), "--support", tmp_path / "bad", "--images", new): "dog/b.png cannot be decoded",
        (runs(), "--support", examples, "--images", tmp_path / "nowhere*"): "is no file or folder, and no pattern",
        (runs(), "--support", examples, "--images", tmp_path / "empty"): "holds no pictures",
        (tmp_path / "run", *both): f"no exported model; write it: cml-dist export {tmp_path / 'run'}",
    }
    for words, said in cases.items():
        assert predict(*words) in (1, 2), said
        err = capfd.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and said in err, (said, err)


def test_pictures_without_labels_are_learned_from(runs, folders, tmp_path, capfd):
    words = ("--support", folders / "examples", "--images", folders / "new" / "1*.png", "--leave-one-out")
    pool = ("--unlabelled", folders / "new" / "2*.png", folders / "new" / "5b.png")
    assert predict(runs("unlabelled"), *words, *pool, "--out", tmp_path / "with.csv") == 0
    out, err = capfd.readouterr()
    assert "Adapted on 32 examples of 8 classes, and on 5 unlabelled" in out
    assert "Of 6 pictures of --unlabelled 1 could not be read, e.g." in err
    assert predict(runs("unlabelled"), *words, "--out", tmp_path / "without.csv") == 0
    kept = {name: (tmp_path / f"{name}.csv").read_text().splitlines() for name in ("with", "without")}
    rows = {name: list(csv.DictReader(lines)) for name, lines in kept.items()}
    files = sorted((folders / "examples").rglob("*.png"))
    further = sorted((folders / "new").glob("2*.png"))
    card = (runs("unlabelled") / "export" / "README.md").read_text()
    assert "the figures are with 5 further step(s) on 1 unlabelled examples a class" in card
    asked = cml_dist.load(runs("unlabelled")).adapt(files, [file.parent.name for file in files], unlabelled=further)
    new = sorted((folders / "new").glob("1*.png"), key=lambda file: int(file.stem))
    expected = asked.probabilities(new).max(1).tolist()
    assert [float(row["probability"]) for row in rows["with"]] == pytest.approx(expected, abs=1e-5)
    assert [row["probability"] for row in rows["without"]] != [row["probability"] for row in rows["with"]]


def test_examples_may_be_an_archive_of_one_folder(runs, folders, tmp_path, capfd):
    files = {f"top/{path.relative_to(folders)}": path.read_bytes() for path in (folders / "examples").rglob("*.png")}
    archive = write_zip(tmp_path / "examples.zip", files)
    for number, source in enumerate((folders / "examples", archive)):
        out = tmp_path / f"{number}.csv"
        assert predict(runs(), "--support", source, "--images", folders / "new", "--out", out) == 0
    assert (tmp_path / "0.csv").read_text() == (tmp_path / "1.csv").read_text()


def test_regression_is_not_for_pictures(tmp_path, folders, capfd):
    recorded = Path(__file__).parents[1] / "golden" / "run-d81044a" / "export"
    assert predict(recorded, "--support", folders / "examples", "--images", folders / "new") == 2
    assert "reads no pictures, and predict is for pictures" in capfd.readouterr().err
