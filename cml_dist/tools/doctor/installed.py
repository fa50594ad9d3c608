"""What is installed: versions against the bounds of the package's own metadata, and DeepSpeed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Iterator

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from cml_dist.tools.doctor.findings import Case, Finding

PACKAGE = "cml-dist"
NAMED = ("python", "torch", "accelerate", "deepspeed", "timm", "webdataset")
"""Shown in lines of their own; the other requirements share one."""

ALIKE = "install the same on every machine: results differ in their last bits, or ranks do not understand each other"


def check_versions(case: Case) -> Iterator[Finding]:
    """Python, and every package that the metadata require, with those of the DeepSpeed extra."""
    try:
        metadata = importlib.metadata.metadata(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        value = "not installed, only found on the path: what it requires is not known"
        yield Finding(PACKAGE, "warning", value, "pip install . and ask again, or go on if all it needs is there")
        return
    yield Finding(PACKAGE, "ok", str(metadata["Version"]), alike=ALIKE)
    yield _judged("python", platform.python_version(), SpecifierSet(metadata["Requires-Python"] or ""))
    required = [Requirement(line) for line in importlib.metadata.requires(PACKAGE) or ()]
    for one in sorted(required, key=lambda one: (one.name not in NAMED, one.name)):
        if one.marker is None or one.marker.evaluate({"extra": "deepspeed"}):
            yield _judged(one.name, _version(one.name), one.specifier, optional=one.marker is not None)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _judged(name: str, version: str, bound: SpecifierSet, optional: bool = False) -> Finding:
    """A version against its bound; ``2.6.0+cpu`` counts as 2.6.0, and a pre-release by its number."""
    data = {"version": version}
    if version and bound.contains(version, prereleases=True):
        brief = name not in NAMED
        value = version if brief else f"{version} (needs {bound})"
        return Finding(name, "ok", value, alike=ALIKE, brief=brief, data=data)
    if optional and not version:
        remedy = f"for DeepSpeed's strategies: pip install '{PACKAGE}[deepspeed]'"
        return Finding(name, "note", "not installed", remedy, alike=ALIKE)
    value = f"{version}, but {bound} is needed" if version else "not installed"
    remedy = f"use Python {bound}" if name == "python" else f"pip install '{name}{bound}'"
    return Finding(name, "fault", value, remedy, alike=ALIKE, data=data)


def check_deepspeed(case: Case) -> Iterator[Finding]:
    """Whether DeepSpeed can be imported; and its C++ operators that were built ahead, for code of the user's own."""
    if importlib.util.find_spec("deepspeed") is None:
        return  # check_versions says it
    import torch

    from cml_dist.distributed.deepspeed import import_deepspeed

    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import_deepspeed()
    from deepspeed.accelerator import get_accelerator
    from deepspeed.git_version_info import accelerator_name, installed_ops

    ahead = ", ".join(sorted(name for name, built in installed_ops.items() if built))
    operators = f"built ahead for {accelerator_name}: {ahead}" if ahead else "none built ahead"
    value = f"computes on {get_accelerator().device_name()}; C++ operators (a run uses none): {operators}"
    yield Finding("DeepSpeed", "ok", value, alike=ALIKE)
