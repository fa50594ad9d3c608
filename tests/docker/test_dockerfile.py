"""What can be said of the Dockerfile without building it: lint, pins and context."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from container import ROOT, Builder, missing, remove
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CONTEXT_MIB = 2.0


def test_hadolint_finds_nothing():
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed (make test installs it where PyPI has a build)")
    done = subprocess.run([hadolint, "--no-color", ROOT / "Dockerfile"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_every_requirement_is_pinned_to_a_version_that_it_admits():
    pins = dict(re.findall(r"^([A-Za-z0-9_.-]+)==([0-9a-z.]+)$", (ROOT / "constraints.txt").read_text(), re.M))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    text = (ROOT / "setup.py").read_text(encoding="utf-8").partition("TEST_REQUIREMENTS")[0]
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
    alone = {"LICENSE", "Makefile", "constraints.txt", "pyproject.toml", "scripts/venv.sh", "setup.py"}
    assert set(sent) == alone | {name for name in names if name.startswith(("cml_dist/", "configs/", "launch/"))}
    assert sum(sent.values()) < CONTEXT_MIB * 2**20
