"""The rooms of the package: each imports from those before it in the list or from itself, and never in a circle."""

from __future__ import annotations

import ast
import re
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import cml_dist

PACKAGE = Path(cml_dist.__file__).parent
ROOMS = (
    "types", "errors", "atomic", "user_code", "registry", "config", "telemetry", "meta", "methods", "nets", "data",
    "distributed", "memory", "run", "tools", "experiments", "commands", "cli",
)  # fmt: skip
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def imports(name: str) -> set[str]:
    """Modules of the package that a module names in any import, also lazy ones and those for type checkers."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cml_dist"):
            base = node.module.removeprefix("cml_dist").strip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".strip(".")
                found.add(inner if inner in MODULES else base)
    return {module for module in found if module in MODULES and module not in ("__init__", name)}


GRAPH = {name: imports(name) for name in MODULES if name not in ("__init__", "__main__")}


def test_no_import_goes_to_a_higher_room():
    rank = {room: number for number, room in enumerate(ROOMS)}
    upwards = [
        f"{name} imports {other}"
        for name, others in sorted(GRAPH.items())
        for other in sorted(others)
        if rank[other.partition(".")[0]] > rank[name.partition(".")[0]]
    ]
    assert not upwards, upwards


def test_no_imports_go_in_circles():
    tuple(TopologicalSorter(GRAPH).static_order())


def test_the_core_needs_torch_alone():
    """Of the package itself only what all share."""
    for name, path in MODULES.items():
        if name.startswith("meta."):
            text = path.read_text()
            tops = {m.partition(".")[0] for m in re.findall(r"^\s*(?:from|import) ([\w.]+)", text, re.MULTILINE)}
            assert tops <= {"torch", "cml_dist", *sys.stdlib_module_names}, name
            assert {other.partition(".")[0] for other in GRAPH[name]} <= {"meta", "types", "errors"}, name
