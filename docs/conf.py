"""The documentation as a site: ``make docs``. Pages are what a viewer of the repository shows, at the same places.

Added here alone: the side bar (from the list in docs/README.md), and what would be written twice: all settings,
from their schema, and the reference of Python, from docstrings.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from cml_dist import __all__ as public
from cml_dist import __version__
from cml_dist.config import schema
from cml_dist.config.keys import all_settings
from cml_dist.registry import DOMAINS, OWN_DOMAIN

ROOT = Path(__file__).resolve().parents[1]

project, version, release, author = "cml_dist", __version__, __version__, ""
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/README"
include_patterns = ["docs/**.md", "README.md", "CHANGELOG.md", "benchmarks/*.md"]
exclude_patterns = [path.name for path in ROOT.iterdir() if path.is_dir() and path.name not in ("docs", "benchmarks")]
myst_heading_anchors = 4
autodoc_typehints, autodoc_typehints_description_target = "description", "documented_params"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
html_theme = "furo"
html_title = f"cml_dist {version}"
html_copy_source = html_show_sourcelink = html_show_copyright = False

CLASSES = {
    "Learners": ["cml_dist.run.predict.Learner", "cml_dist.run.adapted.AdaptedLearner"],
    "To extend": [
        *("cml_dist.meta.rule.InnerRule", "cml_dist.meta.rule.Term", "cml_dist.data.base.Domain"),
        *("cml_dist.types.Episode", "cml_dist.types.Batch", "cml_dist.types.Features"),
    ],
}
"""What functions return, and what code of a user's own builds upon (docs/how-to/extending.md)."""


def side_bar(page: str) -> str:
    """The list of docs/README.md as hidden tables of contents, a part each, and the records behind them."""
    parts = re.findall(r"^\*\*(.+?)\*\*.*\n\n((?:- .+\n|\n)+)", page, re.M)
    lists = [(name, re.findall(r"\]\(([\w/.-]+)\.md\)", links)) for name, links in parts]
    records = sorted((f"../benchmarks/{path.stem}" for path in (ROOT / "benchmarks").glob("*.md")), reverse=True)
    lists.append(("Records", ["../README", "../CHANGELOG", *records]))
    return "".join(
        f"\n```{{toctree}}\n:hidden:\n:caption: {name}\n\n" + "\n".join(pages) + "\n```\n" for name, pages in lists
    )


def settings(page: str) -> str:
    """Every setting: default, choices or range and unit, and meaning; a part a section, of ``domain`` one a kind."""
    kinds = {entry.settings: name for name, entry in reversed({**DOMAINS, schema.OWN: OWN_DOMAIN}.items())}
    parts = {f"domain, {kind}": (kind, "domain") for kind in reversed(kinds.values())}
    parts |= {section: (None, section) for section in schema.RunConfig.model_fields if section != "domain"}
    lines, seen = ["", "## All settings"], set()
    for title, (kind, section) in parts.items():
        lines += ["", f"### {title}", ""]
        for setting in all_settings(kind).values():
            if setting.key.startswith(f"{section}."):
                values = ", ".join(dict.fromkeys(filter(None, (setting.kind, setting.takes))))
                anchor = [":no-index:"] if setting.key in seen else []  # shots of images and of curves
                default = f"default `{setting.default}`".replace("default `required`", "required")
                lines += [f"```{{confval}} {setting.key}", *anchor, "", f"`{values}`; {default}", ""]
                lines += [re.sub(r"([*<\\])", r"\\\1", setting.help), "```"]
                seen.add(setting.key)
    return "\n".join(lines) + "\n"


def python(page: str) -> str:
    """The docstrings of what is public."""
    lines = ["", "## Functions", "", "```{eval-rst}"]
    lines += [f".. autofunction:: cml_dist.{name}" for name in public if not name.startswith("_")] + ["```"]
    for title, classes in CLASSES.items():
        lines += ["", f"## {title}", "", "```{eval-rst}"]
        lines += [f".. autoclass:: {name}\n   :members:\n" for name in classes] + ["```"]
    lines += ["", "## Errors", "", "```{eval-rst}", ".. automodule:: cml_dist.errors", "   :members:", "```", ""]
    return "\n".join(lines)


ADDED = {"docs/README": side_bar, "docs/reference/configuration": settings, "docs/reference/python": python}


def add(app: Any, name: str, source: list[str]) -> None:
    """To a page what is not written in it."""
    if name in ADDED:
        source[0] += ADDED[name](source[0])


def start_page(app: Any, error: Exception | None) -> None:
    """Where a server and a reader look first."""
    (app.outdir / "index.html").write_text('<meta http-equiv="refresh" content="0; url=docs/README.html">\n')


def setup(app: Any) -> None:
    app.connect("source-read", add)
    app.connect("build-finished", start_page)
