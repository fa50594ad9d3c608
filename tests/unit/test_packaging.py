"""What an installation holds, and that --help needs no torch."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import cml_dist

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "timm", "accelerate", "webdataset", "matplotlib", "numpy")


def python(code: str) -> str:
    """What ``code`` prints in a fresh interpreter."""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_light_commands_import_nothing_heavy():
    lines = ["--help", "train --help", "config glyphs", "launch slurm glyphs --dry-run --gpus-per-node=2 --time=60"]
    shown = python(
        f"""import sys
from cml_dist.cli import main
for line in {lines}:
    try:
        assert main(line.split()) == 0
    except SystemExit as end:
        assert not end.code, end.code
    helps = ("pydantic", "yaml") if "--help" in line else ()
    print("HEAVY", line, [name for name in (*{HEAVY}, *helps) if name in sys.modules])
"""
    )
    heavy = [line for line in shown.splitlines() if line.startswith("HEAVY")]
    assert heavy == [f"HEAVY {line} []" for line in lines]


def test_the_package_has_no_attribute_that_it_does_not_name():
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        _ = cml_dist.laod


def test_load_is_the_one_of_predict():
    from cml_dist.run.predict import load

    assert cml_dist.load is load


def test_module_and_command_are_the_same_program():
    shown = [
        subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
        for command in ([sys.executable, "-m", "cml_dist", "--version"], [_installed_command(), "--version"])
    ]
    assert [run.stdout for run in shown] == [f"cml-dist {cml_dist.__version__}\n"] * 2


def _installed_command() -> str:
    command = Path(sys.executable).parent / "cml-dist"
    if not command.exists():
        pytest.skip("cml-dist is not installed in this environment (make test installs it)")
    return str(command)


def test_a_wheel_carries_the_recipes_the_launch_files_and_every_module(tmp_path):
    # From a copy: building leaves a build folder behind.
    copy = tmp_path / "copy"
    for part in (
        "cml_dist/**/*.py",
        "cml_dist/py.typed",
        "cml_dist/templates/*.html",
        "cml_dist/tools/sources/*.json",
        "configs/*/*.yaml",
        "launch/*/*",
        "setup.py",
        "pyproject.toml",
        "LICENSE",
    ):
        for file in ROOT.glob(part):
            target = copy / file.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    code = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    build = [sys.executable, "-c", code, tmp_path]
    run = subprocess.run(build, cwd=copy, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    (wheel,) = tmp_path.glob("cml_dist-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        names = set(archive.namelist())
    modules = {str(path.relative_to(copy)) for path in (copy / "cml_dist").rglob("*.py")}
    assert len(modules) > 20 and modules <= names and "cml_dist/py.typed" in names
    assert {"cml_dist/tools/sources/class_splits.json", "cml_dist/templates/contact_sheet.html"} <= names
    assert not any(name.startswith(("tests", "configs", "benchmarks")) for name in names)
    said = next(tmp_path.glob("site/*.dist-info/METADATA")).read_text(encoding="utf-8")
    for package in ("deepspeed", "transformers"):
        assert re.search(rf"^Requires-Dist: {package}>=[0-9.]+; sys_platform == .linux.$", said, re.M), said
    assert "Provides-Extra: deepspeed\n" in said, "older commands name it"
    # What launches is looked for where the installation is, too.
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import cml_dist.config.load as r, cml_dist.tools.slurm as s;"
        "import cml_dist.config.repro as t;"
        "print(r.__file__, *r.recipes(), r.find_recipe('glyphs'), s.launch_folder(), t.tables()['gamma'])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "site"], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert found.stdout.split() == [
        str(tmp_path / "site/cml_dist/config/load.py"),
        *("amazon_computers", "cifar_fs", "citeseer", "cora_full", "glyphs", "mini_imagenet", "my_images"),
        "my_images_pretrained",
        *("omniglot", "pretrain", "protonet", "r2d2", "sinusoid", "vgg_flower"),
        str(tmp_path / "site/cml_dist/recipes/glyphs.yaml"),
        str(tmp_path / "site/cml_dist/launch"),
        str(tmp_path / "site/cml_dist/repro/gamma.yaml"),
    ], found.stderr
    for kind in ("accelerate", "slurm"):
        names = {path.name for path in (ROOT / "launch" / kind).iterdir()}
        assert {path.name for path in (tmp_path / "site/cml_dist/launch" / kind).iterdir()} == names


def test_every_import_is_declared():
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    found = re.findall(r"""^    ["']([a-z0-9-]+>=[0-9.]+)[;"']""", text, re.M)
    declared = {re.split("[>=]", name)[0] for name in found}
    declared |= set(re.findall(r'^        "(?:http|graphs|parquet)": \["([a-z_]+)', text, re.M))  # extras
    distributions = {"PIL": "pillow", "fontTools": "fonttools", "huggingface_hub": "huggingface-hub", "yaml": "pyyaml"}
    distributions["rich_argparse"] = "rich-argparse"
    imported = set()
    for path in (ROOT / "cml_dist").rglob("*.py"):
        imported |= set(re.findall(r"^\s*(?:import|from) (\w+)", path.read_text(encoding="utf-8"), re.M))
    third_party = imported - set(sys.stdlib_module_names) - {"cml_dist"}
    assert {distributions.get(name, name) for name in third_party} <= declared


@pytest.mark.parametrize(
    ("name", "stage", "optimizer", "parameters"),
    [
        ("zero1", 1, "none", "none"),
        ("zero2", 2, "none", "none"),
        ("zero2-offload", 2, "cpu", "none"),
        ("zero3", 3, "none", "none"),
        ("zero3-offload", 3, "cpu", "cpu"),
    ],
)
def test_deepspeed_launch_files_are_read_by_accelerate(name, stage, optimizer, parameters):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(ROOT / "launch" / "accelerate" / f"{name}.yaml"))
    assert (config.distributed_type, config.main_process_port) == ("DEEPSPEED", 0)
    asked = config.deepspeed_config
    assert (asked["zero_stage"], asked["offload_optimizer_device"], asked["offload_param_device"]) == (
        stage,
        optimizer,
        parameters,
    )


@pytest.mark.parametrize("name", ["cpu", "ddp"])
def test_launch_files_are_read_by_accelerate(name):
    from accelerate.commands.config.config_args import load_config_from_file

    path = ROOT / "launch" / "accelerate" / f"{name}.yaml"
    config = load_config_from_file(str(path))
    # The only type of Accelerate's that starts one world through torchrun, with and without GPUs.
    assert config.distributed_type == "MULTI_GPU"
    assert config.main_process_port == 0, "two runs on one machine must not meet on a port"
    assert yaml.safe_load(path.read_text(encoding="utf-8")).get("num_processes") == {"cpu": 2, "ddp": None}[name]
