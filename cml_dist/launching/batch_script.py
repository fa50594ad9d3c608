"""A shipped batch script with other settings: what stands at its top is replaced, the rest stays as it is."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from functools import partial

END = "# ---- end of settings ----\n"


def fill_in(
    script: str, directives: Mapping[str, str | None], variables: Mapping[str, str | int | Sequence[str]]
) -> str:
    """``script`` with these settings.

    Args:
        script: text of a file in ``launch/slurm``.
        directives: sbatch's options without dashes -> value; "" for an option without one; None takes the option out.
            Those that the script does not have are added.
        variables: shell variables -> value, or values of an array. The script must have each of them.
    """
    top, end, rest = script.partition(END)
    assert end, "the batch script has no end of settings"
    for name, value in directives.items():
        line = "" if value is None else f"#SBATCH --{name}{'=' if value else ''}{shlex.quote(value) if value else ''}\n"
        top, found = re.subn(rf"^#SBATCH --{name}(=.*)?\n", lambda _, line=line: line, top, count=1, flags=re.M)
        if not found and line:
            last = list(re.finditer(r"^#SBATCH .*\n", top, re.M))[-1].end()
            top = top[:last] + line + top[last:]
    for name, value in variables.items():
        if isinstance(value, (str, int)):
            pattern, text = rf"^export {name}=\S*", f"export {name}={shlex.quote(str(value))}"
        else:
            pattern, text = rf"^{name}=\(.*?\)(?=\s|$)", f"{name}=({shlex.join(value)})"
        line = partial(_with_comment, text)
        top, found = re.subn(rf"{pattern}(?P<comment> +#.*)?$", line, top, count=1, flags=re.M)
        assert found, f"the batch script has no setting {name}"
    return top + end + rest


def _with_comment(text: str, old: re.Match[str]) -> str:
    """``text``, and the comment of the line that it replaces, where the comments stand."""
    return f"{text:<39} {old['comment'].lstrip()}" if old["comment"] else text
