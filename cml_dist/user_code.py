"""Code of a user's own, which a setting names as ``FILE.py:NAME`` or ``MODULE:NAME``. No torch.

A setting keeps such a name *sealed*: with ``@`` and the checksum of its source, so that a run knows what it was trained
by. Only a name that was given on the command line (or to Python) is ever imported: a configuration file, a run folder
and an export ask for it.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from cml_dist.errors import CmlError, ConfigError

SETTINGS = ("method.name", "model.backbone", "domain.name")
"""Those that may name code."""

_CODE = re.compile(
    r"(?P<place>[^:@]+\.py|[A-Za-z_]\w*(?:\.\w+)*):(?P<name>[A-Za-z_]\w*)(?:@(?P<checksum>[0-9a-f]{16}))?"
)


def is_code(value: object) -> bool:
    """Whether the value of a setting names code of a user's own, and none of the package's names."""
    return isinstance(value, str) and _CODE.fullmatch(value) is not None


def name_in(value: str) -> str:
    """The class or function that a name of code means, without its file."""
    return _CODE.fullmatch(value)["name"]


def unsealed(value: str) -> str:
    """A name of code as one would write it, without the checksum."""
    return value.partition("@")[0]


def without_folder(value: Any) -> Any:
    """A sealed name with the file's own name alone: a file may move, and its checksum says what it is."""
    return value.rpartition("/")[2] if is_code(value) else value


def sealed(value: str) -> str:
    """A name with the checksum of its source as it is now; one that has a checksum, or names no code, as it is.

    Raises:
        ConfigError: there is no such source.
    """
    if not is_code(value) or "@" in value:
        return value
    return f"{value}@{_checksum(_CODE.fullmatch(value)['place'])}"


def check_named(settings: Mapping[str, Any], named: Collection[str]) -> None:
    """Refuse code that stands in a file alone.

    Args:
        settings: all, by ``section.key``.
        named: those that were given on the command line.
    """
    for key in SETTINGS:
        value = settings.get(key)
        if is_code(value) and key not in named:
            raise ConfigError(
                f"{key} is {unsealed(value)}, which is code, and no configuration file or run folder imports any",
                f"if you trust that code, name it on the command line: {key}={unsealed(value)}",
            )


def named_code(config: Any, named: Collection[str]) -> list[str]:
    """The overrides by which a run's code is imported, with its checksum: of that in ``named``, wherever it lies."""
    found = []
    for key in SETTINGS:
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        seal = value.removeprefix(unsealed(value))
        same = (one for one in named if without_folder(unsealed(value)) == without_folder(unsealed(one)))
        found += [f"{key}={unsealed(one)}{seal}" for one in same if is_code(value)]
    return found


def load(value: str) -> Any:
    """What a name of code means; its module is executed once.

    Raises:
        ConfigError: the source is not there, is another than the sealed one, cannot be imported (with file and line),
            or has no such name.
    """
    place, name, checksum = _CODE.fullmatch(value).group("place", "name", "checksum")
    now = _checksum(place)
    if checksum not in (None, now):
        raise ConfigError(
            f"the source of {place}:{name} has checksum {now}, but {checksum} was asked for", "bring that source back"
        )
    with blamed(value, "cannot be imported"):
        module = _from_file(place, now) if place.endswith(".py") else importlib.import_module(place)
    if not hasattr(module, name):
        near = difflib.get_close_matches(name, vars(module), n=3)
        raise ConfigError(f"{place} has no {name}", f"did you mean {' or '.join(near)}?" if near else "define it there")
    return getattr(module, name)


@contextmanager
def blamed(value: str, what: str) -> Iterator[None]:
    """Inside, a fault of the code that ``value`` names becomes one line with its file and line number."""
    try:
        yield
    except CmlError:
        raise
    except (Exception, SystemExit) as error:
        if not is_code(value):
            raise
        files = {str(file) for file in _sources(_CODE.fullmatch(value)["place"])}
        places = [(error.filename, error.lineno)] if isinstance(error, SyntaxError) else []
        places += [(frame.filename, frame.lineno) for frame in reversed(traceback.extract_tb(error.__traceback__))]
        where = next((f" ({file}, line {line})" for file, line in places if file in files), "")
        reason = error.msg if isinstance(error, SyntaxError) else error
        raise ConfigError(
            f"{unsealed(value)} {what}: {type(error).__name__}: {reason}{where}", "mend it there"
        ) from error


def _from_file(place: str, checksum: str) -> ModuleType:
    path = Path(place).expanduser()
    called = f"{path.stem}_{checksum}"
    if called not in sys.modules:
        module = ModuleType(called)
        module.__file__ = str(path)
        sys.modules[called] = module  # dataclasses look their module up there
        try:
            # Not by importlib, whose cache of bytecode may be of an earlier second.
            exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
        except BaseException:
            del sys.modules[called]
            raise
    return sys.modules[called]


def _checksum(place: str) -> str:
    """16 digits of the SHA-256 of a file, or of all of a package's."""
    files = _sources(place)
    if not files:
        what = "there is no such file" if place.endswith(".py") else "no such module with Python source can be found"
        raise ConfigError(f"{place} is named as code, but {what}", "give FILE.py:NAME or MODULE:NAME")
    digest = hashlib.sha256()
    for file in files:
        if len(files) > 1:
            digest.update(file.name.encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _sources(place: str) -> list[Path]:
    """The files that a place means, found without importing any of them."""
    if place.endswith(".py"):
        path = Path(place).expanduser()
        return [path] if path.is_file() else []
    try:
        spec = importlib.util.find_spec(place.partition(".")[0])
    except (ImportError, ValueError):
        return []
    if spec is None:
        return []
    if spec.submodule_search_locations:
        return sorted(file for folder in spec.submodule_search_locations for file in Path(folder).rglob("*.py"))
    return [Path(spec.origin)] if spec.origin and Path(spec.origin).is_file() else []
