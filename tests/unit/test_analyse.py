"""``cml-dist analyse`` and the trail of checkpoints that it reads."""

from __future__ import annotations

import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from test_resnet12 import resnet12_narrow

from cml_dist.cli import main
from cml_dist.config.load import load_config
from cml_dist.distributed.world import World
from cml_dist.experiments.analyse import features, layers_of
from cml_dist.meta.gradient import meta_gradient
from cml_dist.meta.problem import Problem
from cml_dist.nets.build import make_network
from cml_dist.run import checkpoint as checkpoints
from cml_dist.run.assemble import assemble
from cml_dist.run.folder import run_config
from cml_dist.telemetry.console import Console
from cml_dist.types import Batch

SHORT = (
    *("sinusoid", "domain.shots=5", "model.hidden=[8,8]", "train.steps=5", "train.episodes_per_step=2"),
    *("method.inner_steps=2", "eval.every=2", "eval.val_episodes=4", "eval.episodes=6", "checkpoint.every=1"),
    *("checkpoint.keep_last=1", "checkpoint.keep_every=2", "engine.name=graph", "parallel.threads=1"),
)
ALONE = World(accelerator=None, rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))


def train(folder, *words):
    assert main(["train", *SHORT, f"run.dir={folder}", *words]) == 0
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """MAML, noise, and two seeds of CML."""
    root = tmp_path_factory.mktemp("runs")
    for name, seed in (("maml", 0), ("noise", 0), ("cml", 0), ("cml", 1)):
        train(root / f"{name}-{seed}", f"method.name={name}", f"run.seed={seed}")
    return root


@pytest.fixture(scope="module")
def analysed(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    assert main(["analyse", str(runs), "--episodes", "4", "--out", str(out)]) == 0
    return out


def found(out, run):
    """What is said of a run, with its checkpoints by step."""
    (one,) = [one for one in json.loads((out / "analysis.json").read_text())["runs"] if one["run"].endswith(run)]
    return one | {"checkpoints": {each["step"]: each for each in one["checkpoints"]}}


def test_the_trail_has_parameters_alone_and_is_never_pruned(runs):
    folder = runs / "cml-0" / "checkpoints"
    trail = folder / "trail"
    assert checkpoints.steps_in(trail) == [0, 2, 4, 5]
    last, same = (checkpoints.load(checkpoints.path_of(place, 5)) for place in (folder, trail))
    assert all(name.startswith("param/") for name in same.layout) and len(same.layout) < len(last.layout)
    assert all(torch.equal(last.params()[name], value) for name, value in same.params().items())
    assert main(["eval", str(runs / "cml-0"), "--checkpoint", "2", "eval.episodes=2"]) == 0


def test_a_resumed_run_passes_over_the_trail_and_continues_it(runs, tmp_path):
    whole, cut = runs / "cml-0" / "checkpoints", tmp_path / "run"
    train(cut, "method.name=cml", "train.steps=3")
    checkpoints.path_of(cut / "checkpoints/trail", 3).rename(checkpoints.path_of(cut / "checkpoints/trail", 4))
    train(cut, "method.name=cml")
    ours, theirs = (checkpoints.load(checkpoints.path_of(place / "trail", 4)) for place in (cut / "checkpoints", whole))
    assert all(torch.equal(ours.params()[name], value) for name, value in theirs.params().items())


def test_norms_and_cosines_are_those_of_the_meta_gradients_of_meta_steps(runs, analysed):
    config = run_config(runs / "cml-0", ())
    parts = assemble(config, ALONE, Console(quiet=True))
    step = checkpoints.load(checkpoints.path_of(runs / "cml-0/checkpoints/trail", 4)).params()
    untrained = step | {n: p.detach() for n, p in parts.net.named_parameters() if n.startswith("colearner.")}

    def vectors(params, gamma, layer):
        """Of two meta-steps of two episodes, in one layer."""
        method = parts.model.method.__class__(**{**vars(parts.model.method), "gamma": gamma})
        each = []
        for index in range(4):
            episode = parts.domain.prepare(parts.domain.episode("train", index), ALONE.device, parts.dtype)
            grads = meta_gradient(params, episode, parts.model.problem, method, "graph").grads
            each.append(torch.cat([g.flatten() for n, g in grads.items() if n.startswith(f"body.{layer}.")]).double())
        return [(each[0] + each[1]) / 2, (each[2] + each[3]) / 2]

    shown = found(analysed, "cml-0")["checkpoints"][4]
    for place, layer in enumerate(("layers.0", "layers.1")):
        meta, both = vectors(step, 0.0, layer), {"co": vectors(step, 1.0, layer)}
        both["untrained"] = vectors(untrained, 1.0, layer)
        assert shown["norm"]["meta"][place] == pytest.approx(np.mean([g.norm().item() for g in meta]), rel=1e-5)
        for learner, sums in both.items():
            others = [total - g for total, g in zip(sums, meta, strict=True)]
            cosines = [torch.cosine_similarity(g, other, 0).item() for g, other in zip(meta, others, strict=True)]
            assert shown["cosine"][learner][place] == pytest.approx(np.mean(cosines), abs=1e-4)


def test_scores_after_the_runs_own_inner_steps_are_those_of_its_test(runs, analysed):
    for run in ("maml-0", "cml-1"):
        one, tested = found(analysed, run), json.loads((runs / run / "eval.json").read_text())
        shown, scores = one["checkpoints"][one["best"]], np.load(runs / run / "eval_scores.npz")["meta"]
        assert one["best"] == tested["step"] and len(shown["scores"]) == 7
        assert shown["scores"][2] == pytest.approx(scores[:4].mean(), rel=1e-6)


def test_what_there_is_of_each_method_is_drawn_with_labels(runs, analysed):
    at = {run: found(analysed, run)["checkpoints"][0] for run in ("maml-0", "noise-0", "cml-0")}
    have = {run: [who for who in ("co", "untrained") if one["cosine"][who] is not None] for run, one in at.items()}
    assert have == {"maml-0": [], "noise-0": ["untrained"], "cml-0": ["co", "untrained"]}
    # Before the first step a trained co-learner is the untrained one.
    assert at["cml-0"]["cosine"]["co"] == pytest.approx(at["cml-0"]["cosine"]["untrained"])
    assert all(0 < value <= 1 for one in at.values() for value in one["cka"])
    pictures = ("gradient-cosine", "gradient-norm-meta", "gradient-norm-co", "cka", "inner-steps")
    assert all((analysed / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in pictures)
    drawn = (analysed / "gradient-cosine.svg").read_text()
    assert all(said in drawn for said in ("layers.1", "(2 seeds), its co-learner", "2 meta-steps", "untrained"))
    for name in ("gradient-norm-meta", "gradient-norm-co", "cka"):
        _, _, axis = (analysed / f"{name}.svg").read_text().partition('id="matplotlib.axis_2"')
        assert len(re.findall(r">[\d.]+</text>", axis.partition('<g id="patch')[0])) >= 2, name
    assert "method.name=maml" not in drawn and "method.name=maml" in (analysed / "cka.svg").read_text()


def test_what_is_computed_is_kept(runs, analysed, tmp_path):
    out = shutil.copytree(analysed, tmp_path / "out")
    kept = {path: path.stat().st_mtime_ns for path in (out / "numbers").iterdir()}
    before = (out / "analysis.json").read_bytes()
    os.remove(gone := next(iter(kept)))
    assert main(["analyse", str(runs), "--episodes", "4", "--out", str(out)]) == 0
    changed = [path for path in (out / "numbers").iterdir() if path.stat().st_mtime_ns != kept.get(path)]
    assert changed == [gone] and (out / "analysis.json").read_bytes() == before


def test_of_the_best_checkpoints_alone_layers_stand_beside_each_other(runs, tmp_path):
    words = ["parallel.threads=1", "--checkpoints", "best", "--episodes", "2", "--out", str(tmp_path)]
    assert main(["analyse", str(runs / "cml-0"), str(runs / "cml-1"), *words]) == 0
    best = {found(tmp_path, run)["best"] for run in ("cml-0", "cml-1")}
    drawn = (tmp_path / "gradient-norm-co.svg").read_text()
    assert all(said in drawn for said in (f"step {', '.join(map(str, sorted(best)))}", ">layer<", "(2 seeds)"))


def test_unfinished_runs_without_a_trail_are_drawn_at_what_they_kept(runs, tmp_path, capfd):
    shutil.copytree(runs / "cml-0", tmp_path / "run")
    status = tmp_path / "run/status.json"
    status.write_text(status.read_text().replace('"finished"', '"stopped"'))
    shutil.rmtree(tmp_path / "run/checkpoints/trail")
    assert main(["analyse", str(tmp_path / "run"), "--episodes", "2", "--out", str(tmp_path / "out")]) == 0
    said = capfd.readouterr().out
    assert "has no trail (checkpoint.keep_every): its checkpoints of steps" in said
    assert "is not finished (stopped, step 5 of 5): what it has is used" in said
    assert 5 in found(tmp_path / "out", "run")["checkpoints"]


@pytest.mark.parametrize(
    ("change", "words", "said"),
    [
        ((), ("--checkpoints", "some"), "--checkpoints is some; give all, best, or a number"),
        (("hidden: [8, 8]", "hidden: [16, 8]"), (), "another network"),
        ((), ("run.seed=7",), "run.seed=7: runs are looked at as they were trained; leave it out; run.device, "),
        (None, (), "is no run folder"),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_name(change, words, said, runs, tmp_path, capfd):
    other = shutil.copytree(runs / "cml-1", tmp_path / "other")
    if change is None:
        (other / "config.yaml").unlink()
    elif change:
        text = (other / "config.yaml").read_text()
        changed = text.replace("- 8\n  - 8", "- 16\n  - 8")
        assert changed != text
        (other / "config.yaml").write_text(changed)
    where = ["--out", str(tmp_path / "out")]
    assert main(["analyse", str(runs / "cml-0"), str(other), *words, *where]) != 0
    assert said in capfd.readouterr().err


def test_with_unlabelled_examples_the_steps_on_the_support_set_are_drawn(tmp_path):
    words = ["domain.ways=2", "domain.queries=2", "domain.unlabelled=2", "model.filters=4", "train.steps=1"]
    few = ["train.episodes_per_step=1", "eval.val_episodes=1", "eval.episodes=2", "eval.untrained=false"]
    assert main(["train", "glyphs", f"run.dir={tmp_path / 'run'}", "method.name=cml", *words, *few]) == 0
    out = tmp_path / "out"
    assert main(["analyse", str(tmp_path / "run"), "--episodes", "2", "--checkpoints", "best", "--out", str(out)]) == 0
    with np.load(out / "analysis.npz") as numbers:
        assert {numbers[name].shape for name in numbers if name.endswith("/scores")} == {(2, 4)}


def test_networks_that_differ_by_warp_layers_share_pictures(tmp_path, capfd):
    words = ["domain.ways=2", "domain.queries=2", f"model.backbone={resnet12_narrow.__name__}", "train.steps=1"]
    words += ["train.episodes_per_step=1", "method.inner_steps=1"]
    few = ["eval.val_episodes=1", "eval.episodes=2", "eval.untrained=false"]
    for name in ("tnet", "maml"):
        assert main(["train", "glyphs", f"run.dir={tmp_path / name}", f"method.name={name}", *words, *few]) == 0
    for order in (("tnet", "maml"), ("maml", "tnet")):
        out = tmp_path / "-".join(order)
        looked = ["--episodes=2", "--checkpoints=best", f"--out={out}"]
        assert main(["analyse", *(str(tmp_path / name) for name in order), *looked]) == 0
        assert ">warp<" in (out / "gradient-norm-meta.svg").read_text()
    kept = next((out / "numbers").iterdir())
    kept.write_bytes(kept.read_bytes()[:-100])
    assert main(["analyse", str(tmp_path / "tnet"), str(tmp_path / "maml"), *looked]) == 1
    assert "is damaged (File is not a zip file); delete it" in capfd.readouterr().err


NETS = {
    "conv4": [f"block{k}" for k in (1, 2, 3, 4)],
    "resnet12": [f"model.layer{k}.0" for k in (1, 2, 3, 4)],
}


@pytest.mark.parametrize("name", NETS)
def test_layers_are_the_bodys_blocks_and_their_features_what_they_give(name):
    names, config = NETS[name], load_config("glyphs", ["method.name=maml", f"model.backbone={name}"])
    net = make_network(config, (1, 32, 32), 5)
    problem = Problem(net, torch.nn.functional.cross_entropy, torch.nn.functional.cross_entropy, {})
    assert layers_of(problem) == names
    params, batch = {n: p.detach() for n, p in net.named_parameters()}, Batch(torch.randn(6, 1, 32, 32), torch.zeros(6))
    last = features(problem, params, batch, names)[names[-1]]
    (pooled,) = problem.values(params, batch, ("pooled",))
    by_hand = last if name == "conv4" else torch.nn.functional.max_pool2d(last, 2).mean((2, 3))
    assert torch.allclose(by_hand.flatten(1), pooled, atol=1e-5)
