"""Scaling studies: the fit against a known truth, and a study from its cells to tables, pictures and a report."""

from __future__ import annotations

import json
import math
import os
import shutil

import numpy as np
import pytest

from cml_dist.cli import main
from cml_dist.experiments.scale_figures import draw_study
from cml_dist.experiments.scale_fit import Point, fit, middle, ring
from cml_dist.experiments.scale_results import Result, content

LATENCY_S, BYTES_PER_S = 2e-4, 1e9
COSTS = {"small": (0.01, 0.05, 1_000_000), "large": (0.02, 0.30, 40_000_000)}
"""Seconds a meta-step and an episode, and bytes of the meta-gradient."""


def truth(variant: str, world: int, episodes: int) -> tuple[float, float]:
    """Seconds of a rank's own, and of the reduction."""
    fixed, each, size = COSTS[variant]
    rounds, sent = ring(Point(variant, world, episodes, (0, 0), (0, 0), size), world)
    return fixed + each * episodes, (rounds * LATENCY_S + sent / BYTES_PER_S if world > 1 else 0.0)


def measured(rng: np.random.Generator, steps: int = 30) -> list[Point]:
    """Cells of noisy meta-steps: strong and weak, in worlds of 1 and 2."""
    points = []
    for variant, (*_, size) in COSTS.items():
        for world, episodes in ((1, 4), (2, 2), (2, 4)):
            local, reduction = (
                middle(value * (1 + 0.05 * rng.standard_normal(steps))) for value in truth(variant, world, episodes)
            )
            points.append(Point(variant, world, episodes, local, reduction, size))
    return points


def test_the_fit_finds_a_known_truth_and_its_error_bars_cover_it():
    rng, covered = np.random.default_rng(0), []
    for _ in range(400):
        points = measured(rng)
        found = fit(points)
        asked = [(found.reduction.of("latency"), LATENCY_S), (found.reduction.of("a byte"), 1 / BYTES_PER_S)]
        for variant, (fixed, each, _) in COSTS.items():
            asked += [(found.local[variant].of("an episode"), each), (found.local[variant].of("fixed"), fixed)]
            point = next(p for p in points if p.variant == variant)
            asked.append((found.predict(point, 16, 4), sum(truth(variant, 16, 4))))
        covered.append([abs(value - true) < 1.96 * error for (value, error), true in asked])
    share = np.mean(covered, axis=0)
    assert ((share > 0.90) & (share < 0.995)).all(), share


def test_what_cannot_be_told_apart_is_one_coefficient():
    point = Point("one", 2, 4, (1.0, 0.01), (0.1, 0.001), 1_000_000)
    found = fit([point])
    assert found.local["one"].of("fixed") == (0, 0) and found.local["one"].of("an episode")[0] == pytest.approx(0.25)
    assert found.reduction.of("latency") == (0, 0) and found.reduction.of("a byte")[0] == pytest.approx(1e-7)
    assert found.predict(point, 4, 2)[0] == pytest.approx(0.5 + 0.15), "a ring of 4 sends 3/2 of the bytes"
    assert found.predict(point, 4, 2, 1e6)[0] == pytest.approx(0.5 + 1.5), "over links of 1 MB/s"
    found = fit([point], [(2, (0.002, 1e-5))])
    assert found.reduction.of("latency")[0] == pytest.approx(0.001), "a sum of one number is two rounds of two ranks"
    assert found.reduction.of("a byte")[0] == pytest.approx(0.098e-6)
    assert fit([Point("one", 1, 4, (1.0, 0.01), (0.0, 0.0), 8)]).predict(point, 2, 4) is None


def result(backbone: str, world: int, episodes: int, kinds: tuple[str, ...], steps: int = 1) -> Result:
    """A cell without noise: 0.1 s an episode, a reduction of 0.02 s, and 0.01 s of waiting."""
    size, shared = 1_000_000 if backbone == "conv4" else 40_000_000, world > 1
    parts = {"compute": 0.1 * episodes / world * steps, "waiting": 0.01 * shared, "reduction": 0.02 * shared}
    parts = {**parts, "data": 0.0, "rest": 0.0}
    seconds = sum(parts.values())
    return {
        "variant": f"{backbone},inner_steps={steps}",
        "settings": {  # words beside numbers have no axis
            "model.backbone": backbone, "method.inner_steps": steps, "engine.micro_batch": 8 if steps == 1 else "auto",
        },
        "kinds": kinds,
        "world": world,
        "episodes": episodes,
        "each": episodes // world,
        "seconds": (seconds, 0.001),
        "parts": {part: (value, 0.001) for part, value in parts.items()},
        "local": (seconds - parts["reduction"], 0.001),
        "small": (0.0002 * shared, 1e-6),
        "memory": 3 * size,
        "planned_memory": 2 * size,
        "reduced_bytes": size,
        "reductions": 1,
        "parameters": size // 4,
    }  # fmt: skip


def test_speed_ups_are_those_of_the_hand_and_growth_is_drawn():
    both, cases = ("strong", "weak"), [("conv4", 1), ("conv4", 5), ("resnet18", 1)]
    results = [
        result(backbone, *cell, steps)
        for backbone, steps in cases
        for cell in ((1, 4, both), (2, 4, ("strong",)), (2, 8, ("weak",)))
    ]
    found = json.loads(json.dumps(content(results, [4, 8], 10.0, {})))
    strong, weak = (next(p for p in found["scaling"] if p["kind"] == kind and p["world"] == 2) for kind in both)
    assert strong["speedup"][0] == pytest.approx(0.4 / 0.23) and strong["efficiency"][0] == pytest.approx(0.2 / 0.23)
    assert weak["episodes"] == 8 and weak["efficiency"][0] == pytest.approx(0.4 / 0.43)
    ahead = {(p["kind"], p["world"], p["episodes"]) for p in found["projected"]}
    assert ahead == {("strong", 4, 4), ("weak", 4, 16), ("weak", 8, 32)}, "strong scaling ends at one episode each"
    figures = {figure.name: figure for figure in draw_study(found)}
    assert {*figures} == {"scaling", "split", "memory", "growth-parameters", "growth-inner_steps"}
    assert "conv4,inner_steps=5, projected" in figures["scaling"].inline


WORDS = ["scale", "sinusoid", "run.device=cpu", "train.episodes_per_step=2", "--steps=3", "--warm-up=1", "--cores=1"]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("a world of two needs two cores")
    out = tmp_path_factory.mktemp("scale") / "study"
    words = [*WORDS, "--worlds=1,2", "--scaling=strong", "--project=2,8", "--link=10", f"--out={out}"]
    assert main(words) == 0
    return out, words


def test_a_study_is_measured_fitted_and_drawn(study):
    out, _ = study
    found = json.loads((out / "scale.json").read_text())
    alone, two = found["cells"]
    assert (alone["world"], alone["each"], two["world"], two["each"]) == (1, 2, 2, 1)
    for cell in (alone, two):
        assert all(value >= 0 for value, _ in cell["parts"].values())
        assert sum(value for value, _ in cell["parts"].values()) == pytest.approx(cell["seconds"][0], rel=0.5)
        assert cell["memory"] > cell["parameters"] * 4
    assert found["fit"]["reduction_s"]["latency"][0] > 0 and alone["small"] == [0, 0]
    assert alone["sent"] == alone["planned_sent"] == 0
    assert two["sent"] >= two["planned_sent"] > 0, "the metrics and the heartbeat come on top"
    (ahead,) = found["projected"]
    assert ahead["world"] == 2 and math.isfinite(ahead["seconds"][0]), "of 8 processes 6 would have no episode"
    for name in ("scaling", "split", "memory"):
        assert (out / f"{name}.png").read_bytes()[:4] == b"\x89PNG" and b"<svg" in (out / f"{name}.svg").read_bytes()
    assert not [*out.glob("cells/*.run")] and not [*out.glob("cells/*.log")]


def test_a_report_has_a_section_of_the_study(study, tmp_path):
    out, _ = study
    assert main(["report", str(out), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "Scaling:" in page and "Projected, not measured" in page and "Seconds of a meta-step" in page
    assert (tmp_path / "page_figures" / "study-scaling.svg").exists()
    shutil.copytree(out, again := tmp_path / "again" / out.name)
    assert main(["report", str(out), str(again), "--out", str(tmp_path / "both.html")]) == 0
    assert all((tmp_path / "both_figures" / f"study-{number}-scaling.svg").exists() for number in (1, 2))


def test_the_same_command_goes_on_and_other_settings_are_refused(study, capsys, monkeypatch):
    out, words = study
    before = {path: path.stat().st_mtime_ns for path in out.glob("cells/*.json")}
    assert main(words) == 0 and "0 to measure" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.glob("cells/*.json")} == before
    assert main([*words, "method.inner_lr=0.02"]) != 0
    said = capsys.readouterr().err
    assert "holds another study: method.inner_lr was" in said and "is 0.02" in said
    monkeypatch.setattr("cml_dist.data.cores.usable_cores", lambda: 64)  # processes have as many as they had
    assert main(words) == 0 and "0 to measure" in capsys.readouterr().out


def test_a_broken_cell_is_named_and_left_out(study, capsys):
    out, words = study
    (cell,) = out.glob("cells/*-2p-*.json")
    whole = cell.read_text()
    cell.write_text(whole[: len(whole) // 2])
    assert main(words) == 1
    assert f"{cell} is damaged" in capsys.readouterr().err
    found = json.loads((out / "scale.json").read_text())
    assert [one["world"] for one in found["cells"]] == [1] and len(found["left_out"]) == 1
    cell.write_text(whole)
    assert main(words) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--worlds=1,x"], "--worlds is '1,x'"),
        (["--worlds=1", "--project=8"], "--project needs two measured worlds"),
        (["--worlds=1,2", "--link=10"], "--link is 10"),
        (["--worlds=1,2", "train.episodes_per_step=1"], "--worlds has 2, but train.episodes_per_step is 1"),
        (["--worlds=1", "--backbones=conv5"], "model.backbone"),
        (["--worlds=1", "--axes", "method.inner_steps"], "write KEY=V1,V2"),
        (["--worlds=1", "--axes", "method.inner_step=1,5"], "method.inner_steps"),
        (["--worlds=1", "--axes", "train.steps=1,5"], "train.steps cannot vary here"),
        (["--worlds=1", "--axes", "eval.episodes=10,20"], "eval.episodes cannot vary here"),
        (["--worlds=1", "--axes", "method.inner_steps=1,5", "run.seed=1"], "set it before --axes"),
        (["--worlds=1", "--axes", "method.augment_ratios=[0.1,0.2]"], "of which a value cannot be read"),
        (["--worlds=1,4096"], "needs 4096 cores"),
        (["--worlds=1", "--srun"], "none"),
    ],
)
def test_bad_input_is_refused_before_anything_is_measured(words, said, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert main([*WORDS, *words, f"--out={tmp_path / 'out'}"]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
