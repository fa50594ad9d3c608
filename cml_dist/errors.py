"""Errors a user can act on: each is one line that names the thing, the value and the remedy.

The command line prints ``error: <what>; <remedy>`` and exits with ``exit_code``; a traceback is kept for
faults of ours. Raise the nearest subclass; never print and exit from the inside.
"""

from __future__ import annotations


class CmlError(Exception):
    """A fault with a known remedy.

    Args:
        what: the thing and its value, e.g. ``"domain.ways is 50, but split 'val' has 16 classes"``.
        remedy: what to do, as an imperative, e.g. ``"lower domain.ways to at most 16"``.
    """

    exit_code = 1
    most = 1500
    """Characters of what is wrong, and of the remedy."""

    everywhere = False
    """Whether every rank raises it alike, so that rank 0 alone needs to speak."""

    def __init__(self, what: str, remedy: str = "") -> None:
        self.what, self.remedy = _line(what, self.most), _line(remedy, self.most)
        super().__init__(f"{self.what}; {self.remedy}" if self.remedy else self.what)

    def __reduce__(self) -> tuple:
        return type(self), (self.what, self.remedy)


def _line(text: object, most: int) -> str:
    """On one line, and of a length that is read: a value from a damaged file may have any."""
    line = " ".join(str(text).split())
    return line if len(line) <= most else f"{line[: most // 2]} ... {line[-most // 2 :]}"


class ConfigError(CmlError):
    """The configuration or the command line cannot be used."""

    exit_code = 2
    everywhere = True


class SettingsError(ConfigError):
    """Several settings that contradict each other, each with its remedy."""

    most = 10_000


class DataError(CmlError):
    """Shards, images or classes are missing, damaged or too few."""


class ModelError(CmlError):
    """The network is unknown, does not fit the data, or cannot be differentiated twice."""


class CheckpointError(CmlError):
    """A checkpoint or run folder is damaged, belongs to another run, or cannot be written."""


class WorldError(CmlError):
    """The processes that run are not those that were asked for."""

    everywhere = True


class NetworkError(WorldError):
    """This machine has no way to the others, which only it can say."""

    everywhere = False


class TrainingError(CmlError):
    """Training cannot go on, e.g. too many non-finite meta-gradients in a row."""

    everywhere = True


class DeviceMemoryError(CmlError):
    """A GPU's memory ran out."""
