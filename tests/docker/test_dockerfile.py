"""What can be said of the Dockerfile without building it: lint, pins and context."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import deepspeed_ops
import pytest
from container import ROOT, Builder, missing, remove
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CONTEXT_MIB = 2.0
HAS_GXX = shutil.which("g++") is not None and os.uname().machine == "x86_64"


def test_hadolint_finds_nothing():
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed (make test installs it where PyPI has a build)")
    done = subprocess.run([hadolint, "--no-color", ROOT / "Dockerfile"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_every_requirement_is_pinned_to_a_version_that_it_admits():
    pins = dict(re.findall(r"^([A-Za-z0-9_.-]+)==([0-9a-z.]+)$", (ROOT / "constraints.txt").read_text(), re.M))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    text = (ROOT / "setup.py").read_text(encoding="utf-8").partition("ONNX_REQUIREMENTS")[0]
    required = [Requirement(line) for line in re.findall(r'^    "([a-z0-9-]+>=.+)",$', text, re.M)]
    assert len(required) > 10
    for requirement in required:
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin is not None, f"constraints.txt lacks {requirement.name}; run scripts/pins.sh"
        assert requirement.specifier.contains(pin), f"constraints.txt has {requirement.name} {pin}; run scripts/pins.sh"


def test_the_context_is_small_and_holds_what_is_needed(tmp_path):
    if (reason := missing()) is not None:
        pytest.skip(reason)
    copy = tmp_path / "checkout"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    if tracked.returncode != 0:
        pytest.skip("this is no git checkout")
    names = [name for name in tracked.stdout.splitlines() if (ROOT / name).is_file()]
    for name in names:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    for stray in (".venv/bin/python", "runs/demo/checkpoints/big", "data/x.tar", "cml_dist/__pycache__/x.pyc", ".env"):
        (copy / stray).parent.mkdir(parents=True, exist_ok=True)
        (copy / stray).write_text("not for the image")
    (copy / "Dockerfile").write_text("FROM scratch\nCOPY . /\n")
    store = tmp_path / "builder"
    store.mkdir()
    builder = Builder(store)
    try:
        builder("build", "--tag", "context", copy)
        root = Path(builder("mount", builder("from", "context")))
        sent = {str(path.relative_to(root)): path.stat().st_size for path in root.rglob("*") if path.is_file()}
    finally:
        remove(store)
    alone = {"LICENSE", "Makefile", "constraints.txt", "pyproject.toml", "setup.py"}
    alone |= {"scripts/deepspeed_ops.py", "scripts/venv.sh"}
    assert set(sent) == alone | {name for name in names if name.startswith(("cml_dist/", "configs/", "launch/"))}
    assert sum(sent.values()) < CONTEXT_MIB * 2**20


def test_operators_are_compiled_in_a_stage_of_their_own_for_a_cpu_that_is_named():
    first, operators, last = re.split(r"^FROM ", (ROOT / "Dockerfile").read_text(), flags=re.M)[1:]
    assert first.startswith("${BASE} AS environment\n") and "g++" not in first + last
    assert operators.startswith("environment AS operators\n") and last.startswith("environment\n")
    arguments = dict(re.findall(r"^ARG (\w+)=(.*)$", operators, re.M))
    defaults = {"DEEPSPEED_OPS": "", "CPU_ARCH": "x86-64-v3", "TORCH_CUDA_ARCH_LIST": "", "PIP_ARGS": ""}
    assert arguments == defaults
    manual = (ROOT / "docs/how-to/containers.md").read_text()
    assert all(f"| `{name}` |" in manual for name in arguments)


@pytest.mark.skipif(not HAS_GXX, reason="needs g++ on x86-64")
@pytest.mark.parametrize(
    ("arch", "width"), [("x86-64", "SCALAR"), ("x86-64-v3", "AVX256"), ("haswell", "AVX256"), ("x86-64-v4", "AVX512")]
)
def test_operators_have_the_vectors_of_the_cpu_that_is_named(arch, width):
    assert deepspeed_ops.cpu_flags(arch) == (f"-march={arch}", f"-D__{width}__")


@pytest.mark.skipif(not HAS_GXX, reason="needs g++ on x86-64")
def test_targets_that_do_not_exist_are_refused_in_a_line():
    with pytest.raises(SystemExit, match=r"^error: CPU_ARCH: g\+\+ knows no -march=i4004 on x86_64; give .+$"):
        deepspeed_ops.cpu_flags("i4004")
    with pytest.raises(SystemExit, match=r"^error: TORCH_CUDA_ARCH_LIST: sm_90 is no compute capability; give .+$"):
        deepspeed_ops.compute_capabilities("8.0;sm_90")
    assert deepspeed_ops.compute_capabilities(" ") == []


def test_operators_that_deepspeed_does_not_have_are_refused_in_a_line():
    deepspeed = importlib.util.find_spec("deepspeed")
    if deepspeed is None:
        pytest.skip("deepspeed is not installed")
    folders = os.pathsep.join([str(ROOT / "scripts"), str(Path(deepspeed.origin).parent / "ops")])
    ask = [sys.executable, "-c", "import deepspeed_ops; deepspeed_ops.request(['cpu_adam', 'cpu_adm'])"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": folders}
    done = subprocess.run(ask, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 1, done.stdout + done.stderr
    said = "error: DEEPSPEED_OPS: DeepSpeed has no cpu_adm for cpu; it has aio, "
    assert done.stderr.splitlines()[-1].startswith(said) and "cpu_adam, " in done.stderr, done.stderr
