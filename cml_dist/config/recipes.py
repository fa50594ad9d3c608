"""Where recipes are: the files in ``configs/recipes`` of a checkout, or the copies that an installation carries."""

from __future__ import annotations

import difflib
from pathlib import Path

from cml_dist.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parents[1]
_PLACES = (_PACKAGE / "recipes", _PACKAGE.parent / "configs" / "recipes")
"""Installed (setup.py puts the recipes there), or in a checkout, also an editable one."""


def recipes() -> dict[str, Path]:
    """Every recipe by its short name, e.g. ``glyphs``, in order of name."""
    for place in _PLACES:
        found = {path.stem: path for path in sorted(place.glob("*.yaml"))}
        if found:
            return found
    return {}


def find_recipe(name_or_path: str) -> Path:
    """The file of a recipe.

    Args:
        name_or_path: the path of a YAML file, or the short name of a recipe (``glyphs``, also ``glyphs.yaml``).
            A file in the way of a short name wins.

    Raises:
        ConfigError: neither a file nor a recipe; the nearest names are said.
    """
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    known = recipes()
    # Also the path that it has in a checkout, for who runs elsewhere.
    short = path.name.removesuffix(".yaml")
    if str(path.parent) in (".", "configs/recipes") and short in known:
        return known[short]
    what = f"{name_or_path} is a folder" if path.is_dir() else f"{name_or_path} is neither a file nor a recipe"
    near = difflib.get_close_matches(short, known, n=3, cutoff=0.5)
    remedy = (
        f"did you mean {' or '.join(near)}?" if near else f"give the path of a YAML file, or one of {', '.join(known)}"
    )
    raise ConfigError(f"configuration {what}", remedy)
