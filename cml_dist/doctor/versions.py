"""Versions of what is installed, against the bounds that the package's own metadata give."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from cml_dist.doctor.check import Case
from cml_dist.doctor.findings import Finding

PACKAGE = "cml-dist"
NAMED = ("torch", "accelerate", "deepspeed", "timm", "webdataset")
"""Shown in lines of their own; the rest of the requirements in one, while all is well."""

OPTIONAL = ("deepspeed",)
"""Extras that a run may use."""

ALIKE = "install the same version on every machine: results differ in their last bits, or ranks do not understand"

ALIKE_OPS = "use the same image on every machine, if code of your own uses them"


def check_versions(case: Case) -> Iterator[Finding]:
    """Python, and every package that setup.py names."""
    try:
        metadata = importlib.metadata.metadata(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        yield Finding(
            PACKAGE,
            "warning",
            "not installed, only found on the path: what it needs is unknown",
            "pip install . and ask again, or go on if all it needs is there",
        )
        return
    yield Finding(PACKAGE, "ok", str(metadata["Version"]), alike=ALIKE)
    yield _judged("python", platform.python_version(), SpecifierSet(metadata["Requires-Python"] or ""))
    for requirement in sorted(requirements(), key=lambda one: (_place(one.name), one.name)):
        yield _package(requirement)


def requirements(extras: tuple[str, ...] = OPTIONAL) -> list[Requirement]:
    """What the installed package needs, with the extras that a run may use."""
    declared = [Requirement(line) for line in importlib.metadata.requires(PACKAGE) or ()]
    environments = [{"extra": extra} for extra in ("", *extras)]
    return [one for one in declared if one.marker is None or any(one.marker.evaluate(env) for env in environments)]


def check_torch(case: Case) -> Iterator[Finding]:
    """How torch was built: for which CUDA and NCCL, and whether gloo is in it."""
    import torch

    distributed = torch.distributed.is_available()
    backends = [
        name
        for name, there in (
            ("gloo", distributed and torch.distributed.is_gloo_available()),
            ("NCCL", distributed and torch.distributed.is_nccl_available()),
        )
        if there
    ]
    if torch.version.cuda and torch.cuda.is_available() and "NCCL" in backends:
        backends[-1] = "NCCL " + ".".join(map(str, torch.cuda.nccl.version()))
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else torch.version.hip or "the CPU alone"
    value = f"for {built}, with {' and '.join(backends) or 'no way to talk to other processes'}"
    if not backends:
        yield Finding("torch build", "fault", value, "install a build of torch with torch.distributed")
    else:
        yield Finding("torch build", "ok", value, alike="install the same build of torch on every machine")


def check_deepspeed(case: Case) -> Iterator[Finding]:
    """Whether DeepSpeed can be imported, and on what it would compute."""
    import importlib.util
    import os

    from cml_dist.config.plan import resolve_strategy

    strategy, _ = resolve_strategy(case.config, case.place.size, os.environ)
    wanted = strategy.startswith("zero")
    missing = [name for name in ("deepspeed", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        value = f"cannot run: {' and '.join(missing)} not installed"
        remedy = "pip install 'cml-dist[deepspeed]'"
        if wanted:
            yield Finding("DeepSpeed", "fault", value, f"{remedy}, or set parallel.strategy=ddp")
        else:
            yield Finding("DeepSpeed", "note", value, f"for parallel.strategy=zero0 to zero3: {remedy}")
        return
    import torch

    from cml_dist.parallel.world import import_deepspeed

    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import_deepspeed()
    from deepspeed.accelerator import get_accelerator

    used = f"{strategy} is asked for" if wanted else "not asked for here"
    yield Finding(
        "DeepSpeed",
        "ok",
        f"imports, computes on {get_accelerator().device_name()}, {used}",
        alike="install the same on every machine",
    )
    from deepspeed.git_version_info import accelerator_name, installed_ops, torch_info

    ahead = [name for name, built in installed_ops.items() if built]
    here = (get_accelerator().device_name(), ".".join(torch.__version__.split(".")[:2]))
    yield operators(ahead, (accelerator_name, torch_info["version"]), here)


def operators(ahead: list[str], target: tuple[str, str], here: tuple[str, str]) -> Finding:
    """DeepSpeed's C++ operators that were built ahead: for code of the user's own, since a run uses none.

    Args:
        ahead: their names.
        target, here: DeepSpeed's accelerator and torch's version, as in ``("cpu", "2.14")``: those that they were built
            for, and those of this process.
    """
    if not ahead:
        return Finding("DeepSpeed ops", "ok", "a run uses none; none built ahead", alike=ALIKE_OPS)
    value = f"a run uses none; built ahead for {target[0]}: {', '.join(sorted(ahead))}"
    if target == here:
        return Finding("DeepSpeed ops", "ok", value, alike=ALIKE_OPS)
    if target[0] != here[0]:
        value += f", but DeepSpeed is on {here[0]} here, and would compile its own"
    else:
        value += f", under torch {target[1]}, and refused by DeepSpeed under {here[1]}"
    remedy = "if code of your own uses them, build them anew, for this machine (docs/containers.md)"
    return Finding("DeepSpeed ops", "note", value, remedy, alike=ALIKE_OPS)


def check_trackers(case: Case) -> Iterator[Finding]:
    """Whether the trackers that rank 0 is to feed are installed: a run without them is refused."""
    names = case.config.run.trackers
    if names:
        from cml_dist.telemetry.trackers import check_installed

        check_installed(case.config)
        yield Finding("trackers", "ok", f"{' and '.join(names)} installed", brief=True)


def _package(requirement: Requirement) -> Finding:
    name = requirement.name
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        if requirement.marker is not None:  # of an extra
            remedy = f"for DeepSpeed's strategies: pip install '{PACKAGE}[deepspeed]'"
            return Finding(name, "note", "not installed", remedy, alike=ALIKE)
        return Finding(name, "fault", "not installed", f"pip install '{name}{requirement.specifier}'", alike=ALIKE)
    return _judged(name, version, requirement.specifier, brief=name not in NAMED)


def _judged(name: str, version: str, bound: SpecifierSet, brief: bool = False) -> Finding:
    """A version against its bound; ``2.6.0+cpu`` counts as 2.6.0, and a pre-release by its number."""
    if bound.contains(version, prereleases=True):
        needs = f"(needs {bound})" if str(bound) and not brief else ""
        return Finding(name, "ok", version, beside=needs, alike=ALIKE, brief=brief, data={"version": version})
    remedy = f"use Python {bound}" if name == "python" else f"pip install '{name}{bound}'"
    return Finding(name, "fault", f"{version}, but {bound} is needed", remedy, alike=ALIKE)


def _place(name: str) -> int:
    return NAMED.index(name) if name in NAMED else len(NAMED)
