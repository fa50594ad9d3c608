"""``cml-dist report``: a page of runs that holds the tables' figures, warnings and sample episodes."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import numpy as np
import pytest
from image_sets import write_set
from test_compare import broken, write_run

from cml_dist.cli import main
from cml_dist.experiments.compare import compare, find_runs, read_run
from cml_dist.experiments.compare_tables import tables

CURVES = ("validation", "score", "loss", "gradient-cosine")


def write_curves(folder: Path, rise: float = -0.01, steps: int = 40) -> Path:
    """Metrics of so many meta-steps in a run's folder."""
    lines = [
        {"step": n, "loss": 1.5 + rise * n, "accuracy": 0.2 + n / 100, "gradient_cosine": n / 50, "seconds": 0.5}
        for n in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    validated = [{"step": n, "mean": 0.3 + n / 100, "ci95": 0.02} for n in range(10, steps + 1, 10)]
    (folder / "validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in validated))
    return folder


def report(*places: object, out: Path, words: tuple[str, ...] = ("--episodes", "0")) -> str:
    assert main(["report", *map(str, places), "--out", str(out), *words]) == 0
    return out.read_text(encoding="utf-8")


def cells(page: str) -> list[str]:
    """Of all tables, as a reader sees them."""
    found = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", page, re.DOTALL)
    return [html.unescape(re.sub(r"<.*?>", "", cell)).strip() for cell in found]


def warnings_of(page: str) -> list[str]:
    return [html.unescape(line) for line in re.findall(r"<li>(.*?)</li>", page.split("</section>")[0])]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two seeds of MAML, one of CML, and one of BOIL that is under way."""
    root = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        run = write_run(root / f"maml-{seed}", [0.1, 0.5, 0.3 + seed / 10], f"run.seed={seed}", "method.name=maml")
        write_curves(run)
    write_curves(write_run(root / "cml", [0.3, 0.5, 0.6], "method.name=cml"), rise=0.05)
    write_curves(write_run(root / "boil", [0.1, 0.1, 0.1], "method.name=boil", state="running"), steps=12)
    return root


def test_the_page_holds_the_tables_the_figures_and_the_warnings(runs, tmp_path):
    out = tmp_path / "new" / "page.html"
    page = report(runs, out=out)
    found = compare([read_run(run) for run in find_runs([str(runs)]) if "boil" not in run])
    seen, at = cells(page), 16
    for _, columns, rows in tables(found):
        at = seen.index(columns[1], at)
        assert seen[at - 1 : at + len(columns) - 1] == columns
        for number, row in enumerate(rows, start=1):
            at = seen.index(f"{number} {row[0]}", at)
            assert seen[at + 1 : at + len(row)] == row[1:]
    assert seen[:16] == [
        *("variant", "method.name", "seeds", "state"), *("1 MAML", "maml", "0 1", "2 finished"),
        *("2 CML", "cml", "0", "1 finished"), *("3 BOIL", "boil", "0", "1 running"),
    ]  # fmt: skip
    said = warnings_of(page)
    assert f"Not in the tables: {runs}/boil is not finished (running), step 2 of 2" in said
    assert any(line.startswith(f"{runs}/cml has diverged: its loss rose from 1.6") for line in said)
    assert any("One seed only, and so no interval over seeds: variants 2, 3 (" in line for line in said)
    assert "Alike in all: domain.name=glyphs, domain.ways=5, domain.shots=1" in page
    names = {path.name for path in (out.parent / "page_figures").iterdir()}
    assert names == {f"{name}.{kind}" for name in (*CURVES, "costs") for kind in ("svg", "png")}
    for name in CURVES:
        for number in (1, 2, 3):
            assert f'id="curve-{name.replace("-", "_")}-{number}"' in page
        assert b"3  method.name=boil" in (out.parent / f"page_figures/{name}.svg").read_bytes()


def test_the_page_needs_nothing_else(runs, tmp_path):
    page = report(runs, out=tmp_path / "page.html")
    places = re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?([^\"')\s>]+)", page)
    assert places and all(place.startswith(("#", "data:", "url(#")) for place in places), places
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert {name for *_, name in re.findall(r'((?:xlink:)?href="#|url\(#)([^")]+)', page)} <= {*ids}


def test_a_variant_and_seed_that_is_there_twice_counts_once(runs, tmp_path):
    write_curves(write_run(tmp_path / "again", [0.9, 0.9, 0.9], "run.seed=0", "method.name=maml", "run.device=cpu"))
    page = report(runs, tmp_path / "again", out=tmp_path / "page.html")
    said = [line for line in warnings_of(page) if "is left out: the variant and seed of" in line]
    assert len(said) == 1 and "again" in said[0]
    assert "0 1" in cells(page) and "0 0 1" not in cells(page)


def test_runs_of_other_tests_have_a_table_each_and_are_drawn_over_shots(tmp_path):
    for name in ("maml", "cml"):
        for shots in (1, 5):
            words = (f"method.name={name}", f"domain.shots={shots}")
            write_run(tmp_path / f"runs/{name}-{shots}", [0.2, 0.1 * shots], *words)
    page = report(tmp_path / "runs", out=tmp_path / "page.html", words=("--episodes=0", "--baseline=method.name=cml"))
    assert "Test with shots=1</h3>" in page and "Test with shots=5</h3>" in page
    assert "compared within a test alone" in page and page.count("Paired difference to method.name=cml") == 4
    drawn = (tmp_path / "page_figures/shots.svg").read_text()
    assert all(f">{what}</text>" in drawn for what in ("method.name=maml", "method.name=cml", "shots", "5"))


def test_runs_are_drawn_over_the_size_of_their_backbone(tmp_path):
    for filters in (8, 64):
        run = write_run(tmp_path / f"runs/{filters}", [0.2, 0.3], f"model.filters={filters}")
        parameters = {"body": 100 * filters, "head": 10, "colearner": 99}
        (run / "sessions.jsonl").write_text(json.dumps({"parameters": parameters}) + "\n")
    page = report(tmp_path / "runs", out=tmp_path / "page.html")
    assert "Accuracy over parameters" in page
    assert ">6,410</text>" in (tmp_path / "page_figures/backbone.svg").read_text()


def test_names_are_text_whatever_they_hold(tmp_path):
    evil = "<img src=x onerror=alert(1)>&$x^$\u202e"
    for name, adapts in ((evil, "[head]"), ("b", f"[head, '{evil}']")):
        for shots in (1, 5):
            words = (f"method.adapts={adapts}", f"domain.shots={shots}")
            write_curves(write_run(tmp_path / "runs" / f"{name}{shots}", [0.2, 0.3], *words))
    page = report(tmp_path / "runs", out=tmp_path / "page.html")
    assert page.count("&lt;img src=x onerror=alert(1)&gt;&amp;$x^$") > 8
    assert "<img" not in page and "\u202e" not in page
    assert "&lt;img src=x" in (tmp_path / "page_figures/shots.svg").read_text()


@pytest.mark.parametrize(
    ("kind", "said"),
    [("torn", "Not in the tables: "), ("untested", "Not in the tables: "), ("config", "Left out: ")],
)
def test_a_broken_folder_is_named_and_the_others_shown(runs, tmp_path, capfd, kind, said):
    run = write_run(tmp_path / "broken", [0.1, 0.2, 0.3], "method.name=anil")
    broken(run, kind)
    page = report(runs, run, out=tmp_path / "page.html")
    (line,) = (line for line in warnings_of(page) if str(run) in line)
    assert line.startswith(said) and ("method.name=anil" in page) is (kind != "config")
    assert f"warning: {said}" in capfd.readouterr().err


def test_runs_without_a_test_have_curves_alone(tmp_path):
    write_curves(write_run(tmp_path / "a", [0.1, 0.2], state="failed"))
    page = report(tmp_path / "a", out=tmp_path / "page.html", words=())
    assert "Comparison" not in page and "curve-loss-1" in page and "None: no run is finished and tested" in page


def test_numbers_that_cannot_be_drawn_are_left_out_and_told(tmp_path):
    """Of a diverged run, and of files that somebody else wrote."""
    run = write_curves(write_run(tmp_path / "a", [0.1, 0.2]))
    np.savez(run / "eval_scores.npz", meta=np.array([0.1, np.nan]))
    test = json.loads((run / "eval.json").read_text())
    (run / "eval.json").write_text(json.dumps({**test, "meta": {"mean": None, "episodes": 2}}))
    lines = [{"step": 41, "loss": 10**400, "skipped": True}, {"step": 10**400, "loss": 1.0}, {"step": 42, "loss": "x"}]
    with open(run / "metrics.jsonl", "a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines).replace('"x"', "1e999"))
    said = warnings_of(report(tmp_path, out=tmp_path / "page.html"))
    assert f"{run} has diverged: test scores are not finite" in said
    assert f"{run} skipped meta-steps for NaN or infinity in the meta-gradient: 1" in said


def test_what_cannot_be_written_or_read_is_refused(runs, tmp_path, capfd):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.html").mkdir()
    bad = {"page.txt": "ends in .html", "folder.html": "ends in .html", "file/page.html": "no folder"}
    for place, told in bad.items():
        assert main(["report", str(runs), "--out", str(tmp_path / place)]) == 2
        err = capfd.readouterr().err
        assert err.startswith("error: --out is ") and told in err and err.count("\n") == 1
    assert main(["report", str(tmp_path / "nothing"), "--out", str(tmp_path / "page.html")]) == 2
    assert "there is no run to report; " in capfd.readouterr().err
    assert main(["report", str(runs), "--baseline=x", "--out", str(tmp_path / "page.html")]) == 2
    assert "'x' is none of the variants" in capfd.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder.html"}


def test_an_earlier_report_is_replaced(runs, tmp_path):
    (out := tmp_path / "page.html").write_text("old")
    report(runs, out=out)
    page = report(runs / "maml-0", out=out)
    assert "CML" not in page and "All runs are of one variant" in page


@pytest.mark.parametrize("kind", ["pictures", "curves"])
def test_sample_episodes_are_those_of_the_test(tmp_path, kind):
    words = ["eval.every=0", "train.steps=1", "eval.val_episodes=1", "eval.episodes=2", "train.episodes_per_step=1"]
    if kind == "pictures":
        data = write_set(tmp_path / "set", size=16)
        words += ["my_images", f"domain.root={data}", "domain.ways=2", "domain.queries=2", "model.filters=4"]
    else:
        words += ["sinusoid", "model.hidden=[8,8]"]
    recipe = words.pop(5)
    for method in ("maml", "cml"):
        assert main(["train", recipe, *words, f"run.dir={tmp_path / 'runs' / method}", f"method.name={method}"]) == 0
    page = report(tmp_path / "runs", out=tmp_path / "page.html", words=())
    scores = {name: np.load(tmp_path / f"runs/{name}/eval_scores.npz")["meta"] for name in ("maml", "cml")}
    if kind == "curves":
        drawn = (tmp_path / "page_figures/fits.svg").read_text()
        assert all(f">{what}" in drawn for what in ("true curve<", "episode 1<", "1  method.name=maml,"))
        assert "page_figures" in page and "Sample episodes" in page
        return
    shown = [float(share) for share in re.findall(r"([\d.]+) % right", page)]
    best = max(scores, key=lambda name: scores[name].mean())
    names = ["maml"] if best == "maml" or scores["maml"].mean() == scores["cml"].mean() else ["maml", "cml"]
    assert shown == [round(100 * scores[name][index], 1) for index in (0, 1) for name in names]
    verdicts = re.findall(r'class="(right|wrong)">\d: (\w) (.)', page)
    assert len(verdicts) == 2 * 2 * 2 * len(names)
    assert {(verdict, mark) for verdict, _, mark in verdicts} <= {("right", "✓"), ("wrong", "✗")}
    right = sum(verdict == "right" for verdict, *_ in verdicts)
    assert right == sum(round(4 * scores[name][index]) for index in (0, 1) for name in names)
    write_curves(tmp_path / "runs/cml")
    (tmp_path / "runs/maml/export/model.json").unlink()
    page = report(tmp_path / "runs", out=tmp_path / "page.html", words=())
    assert re.search("None: .* has no exported model", page)
