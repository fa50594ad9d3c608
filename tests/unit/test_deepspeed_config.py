"""DeepSpeed's dictionary, and whose word counts: the run's, the launcher's, or a user's own file's."""

from __future__ import annotations

import json
import os

import pytest

from cml_dist.cli import main
from cml_dist.config.load import parse_config
from cml_dist.config.plan import make_plan, plan_rows
from cml_dist.distributed.deepspeed import deepspeed_config
from cml_dist.errors import ConfigError

LAUNCHED = "ACCELERATE_USE_DEEPSPEED"
DEEPSPEED = "ACCELERATE_DEEPSPEED_"


def config(optim=None, run=None, **parallel):
    data = {"domain": {"name": "sinusoid"}, "optim": optim or {}, "run": run or {}, "parallel": parallel}
    return parse_config(data)


def dictionary(processes=2, **settings):
    made = config(**settings)
    return deepspeed_config(made, make_plan(made, processes, os.environ), os.environ)


@pytest.fixture
def file(tmp_path):
    """Writes a DeepSpeed file and returns its path."""

    def write(**settings):
        path = tmp_path / "own.json"
        path.write_text(json.dumps(settings))
        return str(path)

    return write


def zero(**settings):
    return {"zero_optimization": {"stage": 2, **settings}}


@pytest.mark.parametrize("stage", range(4))
def test_the_dictionary_says_what_the_run_does(stage):
    made = dictionary(strategy=f"zero{stage}", optim={"clip_norm": 2.0})
    assert made["zero_optimization"]["stage"] == stage
    assert (made["train_batch_size"], made["gradient_accumulation_steps"], made["gradient_clipping"]) == (2, 1, 2.0)
    assert not made["fp16"]["enabled"] and not made["bf16"]["enabled"]
    assert made["zero_force_ds_cpu_optimizer"] is False, "Accelerate would put DeepSpeed's Adam in its place"
    assert "optimizer" not in made and "scheduler" not in made
    assert "offload_optimizer" not in made["zero_optimization"]
    json.dumps(made)


def test_offload():
    made = dictionary(strategy="zero3", offload="all")["zero_optimization"]
    assert made["offload_optimizer"]["device"] == made["offload_param"]["device"] == "cpu"
    made = dictionary(strategy="zero2", offload="optimizer")["zero_optimization"]
    assert made["offload_optimizer"]["device"] == "cpu" and "offload_param" not in made


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"strategy": "zero2", "offload": "all"}, "which zero2 does not have; set parallel.strategy=zero3"),
        ({"strategy": "zero1", "offload": "optimizer"}, "which zero1 does not have"),
        ({"strategy": "ddp", "offload": "optimizer"}, "which ddp does not have"),
        ({"strategy": "zero3", "run": {"precision": "fp64"}}, "run.precision is fp64.*set run.precision=fp32"),
        ({"strategy": "ddp"}, "the strategy is ddp, which does without DeepSpeed"),
    ],
)
def test_what_cannot_be_is_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        dictionary(**settings)


def test_auto_takes_what_the_launcher_set_up(monkeypatch):
    monkeypatch.setenv(LAUNCHED, "true")
    monkeypatch.setenv(DEEPSPEED + "ZERO_STAGE", "3")
    monkeypatch.setenv(DEEPSPEED + "OFFLOAD_OPTIMIZER_DEVICE", "cpu")
    monkeypatch.setenv(DEEPSPEED + "OFFLOAD_PARAM_DEVICE", "none")
    plan = make_plan(config(), 2, os.environ)
    assert (plan.strategy, plan.offload) == ("zero3", "optimizer")
    assert "2 processes (zero3, optimizer on the CPU)" in plan_rows(config(), plan)["world"]
    assert make_plan(config(strategy="zero3", offload="optimizer"), 2, os.environ) == plan


@pytest.mark.parametrize(
    ("variables", "settings", "words"),
    [
        ({"ZERO_STAGE": "2"}, {"strategy": "zero3"}, "parallel.strategy is zero3, but the launcher's .* zero2"),
        ({"ZERO_STAGE": "2"}, {"strategy": "ddp"}, "parallel.strategy is ddp, but the launcher's"),
        ({"ZERO_STAGE": "2"}, {"offload": "optimizer"}, "parallel.offload is optimizer, but the launcher's"),
        ({"ZERO_STAGE": "1", "OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, {}, "which zero1 does not have; drop that there, or"),
        ({"OFFLOAD_OPTIMIZER_DEVICE": "nvme"}, {}, "offload_optimizer to nvme, which is not supported"),
        ({"OFFLOAD_PARAM_DEVICE": "cpu", "ZERO_STAGE": "3"}, {}, "offloads the parameters without the optimizer"),
        ({"gradient_clipping": "0.5"}, {}, "gradient_clipping to 0.5, but the run has 0.0; .*optim.clip_norm"),
        ({"gradient_accumulation_steps": "4"}, {}, "gradient_accumulation_steps to 4"),
        ({"mixed_precision": "fp16"}, {}, "mixed_precision to fp16"),
        ({"CONFIG_FILE": "/nowhere.json"}, {}, "nowhere.json cannot be read"),
    ],
)
def test_a_launcher_that_contradicts_the_run_is_refused(monkeypatch, variables, settings, words):
    monkeypatch.setenv(LAUNCHED, "true")
    for name, value in variables.items():
        monkeypatch.setenv((DEEPSPEED if name.isupper() else "ACCELERATE_") + name.upper(), value)
    with pytest.raises(ConfigError, match=words):
        make_plan(config(**settings), 2, os.environ)


def test_without_a_launcher_of_deepspeed_its_variables_say_nothing(monkeypatch):
    monkeypatch.setenv(DEEPSPEED + "ZERO_STAGE", "3")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert make_plan(config(), 2, os.environ).strategy == "ddp"


def test_an_own_file_chooses_the_stage_and_its_tuning_is_taken_over(file):
    path = file(
        train_batch_size="auto",
        gradient_clipping="auto",
        fp16={"enabled": False},
        steps_per_print=100,
        zero_optimization={
            "stage": 3,
            "overlap_comm": True,
            "reduce_bucket_size": 1000,
            "stage3_prefetch_bucket_size": "auto",
            "offload_optimizer": {"device": "cpu", "pin_memory": False},
            "offload_param": {"device": "none"},
        },
    )
    made = dictionary(deepspeed=path)
    zero_part = made["zero_optimization"]
    assert (zero_part["stage"], zero_part["overlap_comm"], zero_part["reduce_bucket_size"]) == (3, True, 1000)
    assert zero_part["offload_optimizer"] == {"device": "cpu", "pin_memory": False}
    assert "offload_param" not in zero_part and "stage3_prefetch_bucket_size" not in zero_part
    assert made["steps_per_print"] == 100 and made["train_batch_size"] == 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({**zero(), "fp16": {"enabled": True}}, "sets fp16.enabled to True, which contradicts the run"),
        ({**zero(), "optimizer": {"type": "Adam"}}, "sets optimizer to .*not taken over here; .*section optim decides"),
        ({**zero(), "scheduler": {"type": "WarmupLR"}}, "sets scheduler .*optim.schedule"),
        ({**zero(), "gradient_clipping": 1.0}, "sets gradient_clipping to 1.0, .*optim.clip_norm"),
        ({**zero(), "train_batch_size": 64}, "sets train_batch_size to 64, .*train.episodes_per_step"),
        ({**zero(), "gradient_accumulation_steps": 2}, "sets gradient_accumulation_steps to 2"),
        ({**zero(), "zero_force_ds_cpu_optimizer": True}, "contradicts the run .it has False.; .*optim.name"),
        ({**zero(), "compression_training": {"a": 1}}, "sets compression_training to .*not taken over here"),
        ({**zero(quantized_weights=True)}, "zero_optimization.quantized_weights to True, .*not taken over here"),
        (zero(offload_optimizer={"device": "nvme"}), "offload_optimizer to nvme"),
        (zero(offload_optimizer="cpu"), "sets offload_optimizer to 'cpu', which is not supported here"),
        ({"train_batch_size": 4}, "has no zero_optimization.stage"),
        ({"zero_optimization": 3}, "has no zero_optimization.stage"),
        (zero(stage=2.0), "has no zero_optimization.stage of 0, 1, 2 or 3 .it is 2.0"),
    ],
)
def test_an_own_file_that_contradicts_the_run_is_refused_by_name(file, settings, words):
    with pytest.raises(ConfigError, match=words):
        dictionary(deepspeed=file(**settings))


def test_an_own_file_of_another_stage_is_refused(file):
    with pytest.raises(ConfigError, match="parallel.strategy is zero3, but .*own.json sets up DeepSpeed's zero2"):
        make_plan(config(strategy="zero3", deepspeed=file(**zero())), 2, os.environ)


def test_two_files_that_differ_are_refused(file, monkeypatch):
    monkeypatch.setenv(LAUNCHED, "true")
    monkeypatch.setenv(DEEPSPEED + "CONFIG_FILE", "other.json")
    with pytest.raises(ConfigError, match="name one of the two"):
        make_plan(config(deepspeed=file(**zero())), 2, os.environ)


def test_the_command_line_prints_the_dictionary(capsys):
    assert main(["config", "sinusoid", "--deepspeed", "parallel.strategy=zero2", "parallel.processes=4"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["train_batch_size"] == 4 and made["zero_optimization"]["stage"] == 2
