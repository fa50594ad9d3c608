"""``cml-dist plan``: the arithmetic of each strategy, what is recommended, and bad input."""

from __future__ import annotations

import json
import re
import resource
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from image_sets import write_set

from cml_dist.cli import main
from cml_dist.config.deepspeed import BUCKET_ELEMENTS
from cml_dist.config.load import load_config
from cml_dist.config.plan import make_plan
from cml_dist.distributed.deepspeed import deepspeed_config
from cml_dist.memory import strategies
from cml_dist.memory.footprint import Footprint
from cml_dist.memory.forecast import launch_command
from cml_dist.memory.strategies import STRATEGIES, ModelSize, Strategy, rank_budget

P, WORLD, BUCKET = 8_000, 4, 1_200
PART = P // WORLD
ADAM = ModelSize(parameters=P, largest=500, constants=70, moments_per_parameter=2)
STEP = Footprint(episode=11, gradients=P, adapted=3 * P, activations=100_000)


@pytest.fixture(autouse=True)
def _small_buckets(monkeypatch):
    monkeypatch.setattr(strategies, "BUCKET_BYTES", BUCKET)


def budget(name: str, offload: str = "none", model: ModelSize = ADAM, step: Footprint = STEP, world: int = WORLD):
    return rank_budget(Strategy(name, offload), model, step, world)


# --------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(
    ("name", "offload", "parameters", "gradients", "moments", "buckets", "host"),
    [
        ("single", "none", P, P, 2 * P, 0, 0),
        ("ddp", "none", P, P + P, 2 * P, 0, 0),  # the value, and DDP's buckets
        ("zero0", "none", P, P, 2 * P, 0, 0),
        ("zero1", "none", P, P, 2 * PART + PART, 0, 0),  # the part's master copy
        ("zero2", "none", P, P, 2 * PART + PART, 0, 0),
        ("zero2", "optimizer", P, P, 0, 0, 2 * PART + 3 * PART + 500),
        ("zero3", "none", P + PART, P + PART, 2 * PART, BUCKET, 0),
        ("zero3", "optimizer", P + PART, P, 0, BUCKET, 2 * PART + 3 * PART),
        ("zero3", "all", P, P, 0, BUCKET, 2 * PART + 4 * PART),
    ],
)
def test_memory_in_the_inner_loop(name, offload, parameters, gradients, moments, buckets, host):
    found = budget(name, offload, world=1 if name == "single" else WORLD)
    assert found.moment == "inner loop"
    assert (found.parameters, found.gradients, found.moments) == (parameters, gradients, moments)
    assert (found.adapted, found.activations) == (3 * P, 100_011)
    assert (found.buffers, found.host) == (70 + buckets, host)
    assert found.total == parameters + gradients + moments + 3 * P + 100_011 + 70 + buckets


def test_memory_where_the_reduction_is_the_largest_moment():
    """What benchmarks/zero_memory.py counts of DeepSpeed itself, or a bit more: it frees the value bucket by bucket."""
    tiny = Footprint(episode=0, gradients=P, adapted=0, activations=0)
    zero0 = budget("zero0", step=tiny, world=2)
    assert (zero0.moment, zero0.total - 70) == ("reduction", 5 * P)  # ZeRO-0 has a bucket size of its own
    zero2 = budget("zero2", step=tiny, world=2)
    # Parameters, 3 halves of optimizer state, the value; the bucket at its configured size; the own half copied out.
    assert (zero2.moment, zero2.total - 70) == ("reduction", P + 3 * P // 2 + P + BUCKET + P // 2)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_bytes_that_a_rank_sends(strategy):
    assert budget(strategy.name, strategy.offload, world=1).sent == 0
    assert budget(strategy.name, strategy.offload).sent == 2 * P * 3 // 4
    assert budget(strategy.name, strategy.offload, replace(ADAM, reductions=3)).sent == 3 * 2 * P * 3 // 4


def test_deepspeed_is_configured_as_the_arithmetic_says():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    config = load_config("omniglot", [])
    for stage in (1, 2, 3):
        plan = replace(make_plan(config, 1, {}), strategy=f"zero{stage}", processes=2)
        zero = deepspeed_config(config, plan, {})["zero_optimization"]
        made = DeepSpeedZeroConfig(**zero)
        assert made.reduce_bucket_size == BUCKET_ELEMENTS and not made.overlap_comm
        assert made.contiguous_gradients and made.reduce_scatter
        assert stage == 3 or not made.use_multi_rank_bucket_allreduce


def test_without_momentum_sgd_has_no_moments():
    sgd = ModelSize(P, 500, 70, moments_per_parameter=0)
    assert budget("ddp", model=sgd).moments == 0
    assert budget("zero1", model=sgd).moments == PART


# --------------------------------------------------------------------------- the command


@pytest.fixture
def plan(capfd):
    """Runs ``cml-dist plan``; returns (exit code, standard output, standard error)."""

    def go(*words: str) -> tuple[int, str, str]:
        code = main(["plan", *words])
        return code, *capfd.readouterr()

    return go


def forecast(plan, *words: str) -> dict:
    code, out, err = plan(*words, "--json")
    assert code == 0, err
    return json.loads(out)


def test_the_table_has_every_strategy_and_ends_in_a_command_that_trains_it(plan):
    code, out, err = plan("omniglot", "--gpus", "4", "--gpu-memory-gib", "24", "train.steps=7")
    assert (code, err) == (0, "")
    for words in ("ddp", "zero0", "zero1", "zero2", "zero3", "zero2 offload", "zero3 offload", "zero3 offload all"):
        assert re.search(rf"^ *{words} +\d", out, re.MULTILINE), words
    assert "28x28 px, 1 channel (usual for omniglot)" in out
    assert out.splitlines()[-1] == (
        "torchrun --standalone --nproc_per_node 4 -m cml_dist train omniglot train.steps=7 parallel.strategy=ddp"
    )


def test_an_upper_ascent_costs_a_copy_and_each_reduction_inside_a_meta_step_an_all_reduce(plan):
    sharp = ("sinusoid", "--gpus", "2", "--gpu-memory-gib", "24", "method.name=sharp_maml", "method.inner_steps=1")

    def ddp(*words: str) -> dict:
        found = forecast(plan, *sharp, *words)
        return next(row for row in found["rows"] if row["strategy"] == "ddp")

    lower, both, clamped = ddp("method.sharp=lower"), ddp(), ddp("optim.clip_value=10")
    assert both["gradients"] - lower["gradients"] == lower["parameters"]
    assert both["activations"] == pytest.approx(lower["activations"], rel=0.01)
    assert both["sent"] == 2 * lower["sent"] and clamped["sent"] == 3 * lower["sent"]
    assert ", each twice" in plan(*sharp)[1]


def test_one_gpu_is_no_world(plan):
    found = forecast(plan, "sinusoid", "--gpus", "1", "--gpu-memory-gib", "1")
    assert [row["strategy"] for row in found["rows"]][0] == "single"
    assert found["command"] == "cml-dist train sinusoid parallel.strategy=single"
    assert all(row["sent"] == 0 for row in found["rows"])


def test_recommends_the_fewest_bytes_sent_among_what_fits(plan):
    words = ["cifar_fs", "--gpus", "8", "model.filters=512", "model.colearner.depth=0", "engine.name=graph"]
    found = forecast(plan, *words, "--gpu-memory-gib", "80")
    totals = {(row["strategy"], row["offload"]): row["total"] for row in found["rows"]}
    assert found["rows"][found["recommended"]]["strategy"] == "ddp"
    # Between what ZeRO-2 needs and what DDP needs.
    assert totals["zero2", "none"] < totals["ddp", "none"]
    between = (totals["zero2", "none"] + totals["ddp", "none"]) / 2 / 2**30
    found = forecast(plan, *words, "--gpu-memory-gib", "80", f"memory.budget_gib={between:.6f}")
    assert found["rows"][found["recommended"]]["strategy"] in ("zero1", "zero2")
    assert "parallel.strategy=zero" in found["command"]
    assert all(row["fits"] == (row["total"] <= between * 2**30 + 1e3) for row in found["rows"])


def test_deepspeed_does_not_compute_in_double_precision(plan):
    found = forecast(plan, "sinusoid", "--gpus", "8", "--gpu-memory-gib", "80", "run.precision=fp64")
    assert [row["strategy"] for row in found["rows"]] == ["ddp"]


@pytest.mark.parametrize("asked", ["strategy=ddp", "offload=all", "deepspeed=stage2.json"])
@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_every_command_starts_what_it_says(strategy, asked, tmp_path, monkeypatch):
    """The configuration of the command resolves to the strategy, in a world of its size."""
    monkeypatch.chdir(tmp_path)
    Path("stage2.json").write_text('{"zero_optimization": {"stage": 2, "offload_optimizer": null}}')
    Path("asked.yaml").write_text(f"domain: {{name: glyphs}}\nparallel: {{{asked.replace('=', ': ')}}}\n")
    typed = ["asked.yaml", "train.steps=7", "parallel.strategy=ddp"]
    processes = 1 if strategy.name == "single" else 2
    words = shlex.split(launch_command(strategy, processes, typed, load_config("asked.yaml", []).parallel))
    recipe, *overrides = words[words.index("train") + 1 :]
    config = load_config(recipe, overrides)
    plan = make_plan(config, processes, {})
    assert (plan.strategy, plan.offload, config.train.steps) == (strategy.name, strategy.offload, 7)
    assert processes == 1 or words[:5] == ["torchrun", "--standalone", "--nproc_per_node", "2", "-m"]


def test_where_nothing_fits_the_smallest_memory_that_would_is_said(plan):
    words = ["sinusoid", "--gpus", "2", "engine.name=graph"]
    found = forecast(plan, *words, "--gpu-memory-gib", "0.00001")
    assert found["recommended"] is None and found["command"] is None
    code, out, _ = plan(*words, "--gpu-memory-gib", "0.00001")
    assert code == 0 and "Nothing fits" in out and f"{found['smallest_gib']:.3g} GiB" in out
    assert forecast(plan, *words, "--gpu-memory-gib", str(found["smallest_gib"] * 1.001))["recommended"] is not None


def test_the_packed_set_says_the_size_of_its_images(plan, tmp_path):
    root = write_set(tmp_path / "packed", images=4, size=40)
    words = ["omniglot", "--gpus", "2", "--gpu-memory-gib", "8", f"domain.root={root}"]
    found = forecast(plan, *words)
    assert found["inputs"][1:] == [40, 40] and str(root) in found["input_source"]
    assert forecast(plan, *words, "--image-size", "64", "--channels", "3")["inputs"] == [3, 64, 64]


@pytest.mark.parametrize(
    ("words", "inputs"),
    [
        (["my_images", "domain.root=nowhere"], [3, 84, 84]),
        (["citeseer", "domain.root=nowhere/citeseer.npz"], [3703]),
        (["cora_full", "domain.root=nowhere/cora_full.npz", "domain.base=g_meta", "domain.cap=20"], [8710]),
    ],
)
def test_what_is_assumed_of_data_that_are_not_here_is_said(plan, words, inputs):
    found = forecast(plan, *words, "--gpus", "1", "--gpu-memory-gib", "80")
    assert found["inputs"] == inputs and found["input_source"].startswith("assumed: nowhere")
    assert found["command"] is not None


def test_a_graph_that_is_not_here_takes_at_least_what_it_takes_where_it_is(plan):
    root = Path("/work/shared/data/graphs/amazon_computers.npz")
    if not root.is_file():
        pytest.skip(f"there is no {root}")
    words = ["amazon_computers", "--gpus", "1", "--gpu-memory-gib", "80"]
    there, absent = (forecast(plan, *words, f"domain.root={at}") for at in (root, f"nowhere/{root.name}"))
    assert there["rows"][0]["total"] <= absent["rows"][0]["total"]
    assert there["num_parameters"] == absent["num_parameters"]


def test_gpus_without_an_episode_are_told_of_and_not_taken(plan):
    words = ["sinusoid", "--gpu-memory-gib", "80", "train.episodes_per_step=4", "--gpus"]
    code, out, err = plan(*words, "8")
    assert code == 0 and "--nproc_per_node 4 " in out.splitlines()[-1]
    assert "4 of 8 GPUs would have nothing to do; train.episodes_per_step=8 would use them all" in err
    assert plan(*words, "4")[2] == ""
    found = forecast(plan, *words, "8", "parallel.processes=8")
    assert (found["gpus_used"], found["without_episode"], found["episodes_per_rank"]) == (8, 4, 1)
    assert "4 of 8 GPUs only hold their part of the state" in plan(*words, "8", "parallel.processes=8")[2]


def test_the_smallest_configuration_that_fits_is_named(plan):
    found = forecast(plan, "sinusoid", "--gpus", "4", "--gpu-memory-gib", "80")
    assert found["smallest"] == {"gpus": 1, "strategy": "single", "offload": "none", "by": "graph whole"}
    out = plan("sinusoid", "--gpus", "4", "--gpu-memory-gib", "80")[1]
    assert "Smallest that fits: single on 1 GPU, graph whole" in out and "Recommended: ddp on 4 GPUs" in out
    assert "Recommended: single on 1 GPU, graph whole, the smallest that fits" in plan(
        "sinusoid", "--gpus", "1", "--gpu-memory-gib", "80"
    )[1]


def test_where_nothing_fits_a_setting_that_was_chosen_too_dear_is_named(plan):
    words = ["sinusoid", "--gpus", "1", "--gpu-memory-gib", "80", "method.inner_steps=5", "domain.shots=200"]
    graph, lean = (forecast(plan, *words, f"engine.name={name}")["rows"][0]["total"] for name in ("graph", "adjoint"))
    assert lean < graph
    found = forecast(plan, *words, "engine.name=graph", f"memory.budget_gib={(graph + lean) / 2 / 2**30:.9f}")
    assert found["recommended"] is None
    assert any("at auto: then it fits, by adjoint" in change for change in found["changes"])


def test_no_cell_is_nought_but_what_is_nothing(plan):
    for words in (["sinusoid"], ["mini_imagenet", "model.filters=1024", "domain.queries=30"]):
        out = plan(*words, "--gpus", "2", "--gpu-memory-gib", "80")[1]
        assert not re.search(r" 0\.0+ ", out)
        assert ("GiB of each GPU" if words[0] == "mini_imagenet" else "MiB of each GPU") in out
        assert re.search(r"^ddp +0\.0131 ", out, re.M) or words[0] != "sinusoid", out


def test_vit_base_is_answered_without_weights(plan):
    """86 million parameters at 224 px: neither their values (0.33 GiB) nor an activation are ever in memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    words = ["mini_imagenet", "--image-size", "224", "model.backbone=vit_base_patch16_224", "method.inner_steps=5"]
    words += ["engine.name=adjoint", "model.pretrained=true", "train.episodes_per_step=1"]
    found = forecast(plan, *words, "--gpus", "1", "--gpu-memory-gib", "80")
    assert found["num_parameters"] == pytest.approx(86e6, rel=0.01)
    ddp = found["rows"][0]
    assert ddp["parameters"] == 4 * found["num_parameters"]
    assert ddp["adapted"] == pytest.approx(5 * ddp["parameters"], rel=0.01)
    assert 5 * 2**30 < ddp["activations"] < 50 * 2**30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 0.3 * 2**20


@pytest.mark.parametrize(
    ("words", "what", "remedy"),
    [
        (["citeseer", "domain.root=nowhere.npz"], "there is no graph at nowhere.npz", "citeseer"),
        (["mini_imagenet", "model.backbone=vit_huge_nothing"], "neither conv4, mlp, gcn nor", "nearest"),
        (["mini_imagenet", "--image-size", "8"], "too small for the four poolings", "16"),
        (["mini_imagenet", "parallel.processes=3"], "parallel.processes is 3, but --gpus is 2", "=2"),
        (["mini_imagenet", "modle.backbone=conv4"], "modle is not a setting", "did you mean"),
    ],
)
def test_bad_input_is_one_line(plan, words, what, remedy):
    code, out, err = plan(*words, "--gpus", "2", "--gpu-memory-gib", "8")
    assert code != 0 and out == ""
    assert len(err.splitlines()) == 1 and what in err and remedy in err


@pytest.mark.parametrize(("option", "value"), [("--gpus", "0"), ("--gpu-memory-gib", "0"), ("--gpu-memory-gib", "nan")])
def test_numbers_out_of_range_are_refused(plan, option, value):
    given = {"--gpus": "2", "--gpu-memory-gib": "8", option: value}
    code, _, err = plan("omniglot", *(word for pair in given.items() for word in pair))
    assert code == 2 and option in err
