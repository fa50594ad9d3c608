"""What launchers and their files ask of a run: honoured, or refused by name and all at once, before anything starts."""

from __future__ import annotations

import json

import pytest
import yaml

from cml_dist.cli import main
from cml_dist.config.launcher import launcher_variables
from cml_dist.config.load import parse_config
from cml_dist.config.plan import make_plan
from cml_dist.errors import ConfigError
from cml_dist.tools.launch_files import launch_folder

BY_ACCELERATE = {"TORCHELASTIC_RUN_ID": "none", "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}

TEMPLATE = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1},
    "bf16": {"enabled": "auto"},
    "amp": {"enabled": False, "opt_level": "O1"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
    "zero_optimization": {
        "stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True}, "overlap_comm": True, "sub_group_size": 1e9,
        "reduce_bucket_size": "auto", "stage3_max_live_parameters": 1e9,
    },
    "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "steps_per_print": 2000,
    "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "wall_clock_breakdown": False,
}  # fmt: skip
"""As of the documentation of transformers."""


def config(**sections):
    return parse_config({"domain": {"name": "sinusoid"}, "model": {"backbone": "mlp"}, **sections})


def refusal(environment, **sections) -> str:
    with pytest.raises(ConfigError) as caught:
        make_plan(config(**sections), 2, environment)
    return str(caught.value)


def accelerate_file(tmp_path, **settings) -> str:
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump({"compute_environment": "LOCAL_MACHINE", **settings}))
    return str(path)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "asks for FSDP (ACCELERATE_USE_FSDP), which does not"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true", "MEGATRON_LM_TP_DEGREE": "2"}, "asks for MEGATRON_LM"),
        ({"ACCELERATE_USE_SAGEMAKER": "true"}, "asks for SAGEMAKER"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "bf16, but run.precision is fp32; set run.precision=bf16"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "sets mixed_precision to fp8"),
        ({"MIXED_PRECISION": "fp16", "NPROC": "2", "ACCELERATE_MIXED_PRECISION": None}, "mixed_precision to fp16"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "sets dynamo_backend to INDUCTOR"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"}, "tp_size to 2"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "auto"}, "sets zero_stage to auto"),
        ({"ACCELERATE_GRADIENT_CLIPPING": "lots"}, "sets gradient_clipping to lots"),
    ],
)
def test_a_setting_of_the_launcher_that_does_not_exist_here_is_refused_by_name(variables, words):
    environment = {name: word for name, word in (BY_ACCELERATE | variables).items() if word is not None}
    assert words in refusal(environment)


@pytest.mark.parametrize(
    ("variables", "precision"),
    [
        ({}, "fp32"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "bf16"),
        ({"ACCELERATE_USE_FSDP": "false", "FSDP_OFFLOAD_PARAMS": "true"}, "fp32"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1", "ACCELERATE_GRADIENT_CLIPPING": "auto"}, "fp32"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "1"}, "fp32"),
        ({"ACCELERATE_DYNAMO_MODE": "max-autotune", "ACCELERATE_DYNAMO_USE_FULLGRAPH": "True"}, "fp32"),
    ],
)
def test_what_the_run_does_as_asked_or_what_is_switched_off_passes(variables, precision):
    plan = make_plan(config(run={"precision": precision}), 2, BY_ACCELERATE | variables)
    assert plan.strategy == "ddp"


def test_all_that_launcher_file_and_run_contradict_each_other_in_is_said_at_once(tmp_path):
    file = tmp_path / "hf.json"
    file.write_text(json.dumps(TEMPLATE))
    said = refusal(
        BY_ACCELERATE | {
            "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file),
            "ACCELERATE_MIXED_PRECISION": "fp16", "ACCELERATE_DYNAMO_BACKEND": "EAGER",
        },
        parallel={"strategy": "zero2"},
    )  # fmt: skip
    for words in ("mixed_precision to fp16", "EAGER", "strategy is zero2", "sets optimizer to", "sets scheduler to"):
        assert said.count(words) == 1, said
    assert said.startswith("5 settings contradict the run: (1) "), said


def test_offloading_that_does_not_exist_hides_nothing_else(tmp_path):
    file, wrong = tmp_path / "own.json", {f"unknown_{n}": n for n in range(12)}
    zero = {"stage": 3, "offload_param": {"device": "nvme"}, "offload_optimizer": {"device": "nvme"}}
    file.write_text(json.dumps({"zero_optimization": zero, **wrong}))
    said = refusal({}, parallel={"deepspeed": str(file)})
    assert said.startswith("14 settings") and all(name in said for name in wrong) and said.count("nvme") == 2


def test_a_template_without_what_the_run_decides_is_taken_over(tmp_path):
    file = tmp_path / "hf.json"
    file.write_text(json.dumps({k: v for k, v in TEMPLATE.items() if k not in ("optimizer", "scheduler")}))
    plan = make_plan(config(parallel={"deepspeed": str(file)}), 2, {})
    assert (plan.strategy, plan.offload) == ("zero3", "all")


def test_bf16_of_a_deepspeed_file_is_that_of_the_run_and_fp16_is_nobodys(tmp_path):
    file = tmp_path / "own.json"
    file.write_text(json.dumps({"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}))
    own = {"deepspeed": str(file)}
    assert make_plan(config(parallel=own, run={"precision": "bf16"}), 2, {}).strategy == "zero2"
    assert "sets bf16.enabled to True" in refusal({}, parallel=own)
    file.write_text(json.dumps({"fp16": {"enabled": True, "loss_scale": 0}, "zero_optimization": {"stage": 2}}))
    said = refusal({}, parallel=own, run={"precision": "bf16"})
    assert "sets fp16.enabled to True" in said and "sets fp16.loss_scale to 0" in said


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"distributed_type": "MEGATRON_LM", "megatron_lm_config": {"megatron_lm_tp_degree": 2}}, ["MEGATRON_LM"]),
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2}}, ["asks for FSDP"]),
        ({"distributed_type": "TPU", "tpu_name": "mine"}, ["asks for XLA"]),
        ({"distributed_type": "MULTI_CPU", "use_cpu": True}, ["asks for MULTI_CPU"]),
        ({"distributed_type": "MULTI_GPU", "mixed_precision": "fp16", "dynamo_config": {"dynamo_backend": "EAGER"}},
         ["mixed_precision to fp16", "EAGER"]),
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 2, "gradient_clipping": 1.0}},
         ["gradient_clipping to 1.0"]),
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": "ds.json"}, ["its deepspeed_config is no section"]),
    ],
)  # fmt: skip
def test_an_accelerate_file_is_judged_before_it_launches_anything(tmp_path, capfd, settings, words):
    path = accelerate_file(tmp_path, **settings)
    command = ["launch", "local", "--processes=2", f"--config={path}", "--", "train", "sinusoid"]
    assert main(command) == 2
    (said,) = capfd.readouterr().err.splitlines()
    assert said.startswith("error: ") and all(word in said for word in (path, *words)), said


def test_what_accelerate_launch_does_not_hand_on_is_read_in_its_file(tmp_path):
    path = accelerate_file(tmp_path, distributed_type="DEEPSPEED", dynamo_config={"dynamo_backend": "EAGER"})
    said = refusal({"ACCELERATE_USE_DEEPSPEED": "true", "CML_DIST_LAUNCH_FILE": path})
    assert said.startswith(f"the launcher's Accelerate file {path} sets dynamo_backend to EAGER")


def test_an_accelerate_file_with_settings_that_are_switched_off_passes(tmp_path):
    path = accelerate_file(
        tmp_path, distributed_type="MULTI_GPU", mixed_precision="no", downcast_bf16="no", tpu_use_cluster=False,
        fsdp_config={"fsdp_version": 2}, megatron_lm_config={}, dynamo_config={"dynamo_backend": "NO"}, use_cpu=False,
    )  # fmt: skip
    assert make_plan(config(), 2, launcher_variables(path)).strategy == "ddp"


@pytest.mark.parametrize("path", sorted((launch_folder() / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_each_file_that_is_shipped_brings_up_its_strategy(path):
    stage, _, offload = path.stem.partition("-")
    plan = make_plan(config(), 2, launcher_variables(path))
    assert plan.strategy == stage.replace("cpu", "ddp")
    assert plan.offload == {"": "none", "zero2": "optimizer", "zero3": "all"}[stage if offload else ""]


@pytest.mark.parametrize("content", ["- a list", "num_processes: 2", ": :", "{"])
def test_what_is_no_accelerate_file_is_one_line(tmp_path, content):
    path = tmp_path / "own.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match="own.yaml cannot be used: it is no mapping with a distributed_type"):
        launcher_variables(path)
