"""What ``cml-dist launch slurm`` may be asked for: a field is an option of the command line. Imports nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

SWEEP = "a sweep: a job array with a run for each seed and backbone, below run.dir"
END = "how a job ends"
SITE = "the cluster"


def _option(help: str, default: Any = None, *, group: str = "", least: int | None = None, **more: Any) -> Any:
    """A field; ``more`` is as of ``argparse``, ``least`` the smallest number allowed."""
    return field(default=default, metadata={"help": help, "group": group, "least": least, **more})


def _words(text: str) -> tuple[str, ...]:
    words = tuple(word.strip() for word in text.split(","))
    if not all(words) or len(set(words)) < len(words):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of different values, like A,B")
    return words


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in _words(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers, like 0,1,2") from None


@dataclass(frozen=True)
class SlurmRequest:
    """What the command line asked for; ``config`` and ``overrides`` are as of ``cml-dist train``."""

    config: str
    overrides: tuple[str, ...]
    time: str = _option("of one job, e.g. 04:00:00; a longer run goes on in the next one", MISSING, metavar="LIMIT")
    nodes: int = _option("machines (default 1)", 1, least=1, type=int, metavar="N")
    gpus_per_node: int = _option(
        "GPUs of each, a process for each; 0 (default): CPUs", 0, least=0, type=int, metavar="M"
    )
    processes_per_node: int | None = _option(
        "processes of each node, on CPUs (default: one for each GPU)", least=1, type=int, metavar="P"
    )
    cpus_per_task: int | None = _option(
        "CPUs of each node (default: 4 for each GPU, else one a process)", least=1, type=int, metavar="N"
    )
    strategy: str | None = _option(
        "a file of launch/accelerate: ddp (default with GPUs), cpu (default without), zero1, zero2, zero3, ...",
        metavar="FILE",
    )
    seeds: tuple[int, ...] = _option("values of run.seed", (), group=SWEEP, type=_numbers, metavar="0,1,2")
    backbones: tuple[str, ...] = _option("values of model.backbone", (), group=SWEEP, type=_words, metavar="A,B")
    array_limit: int | None = _option("runs at once (default: all)", group=SWEEP, least=1, type=int, metavar="N")
    signal: str = _option(
        "what SLURM warns with (default USR1)", "USR1", group=END, choices=["USR1", "USR2", "TERM"]
    )
    signal_lead_s: int = _option(
        "seconds before the limit of that warning: more than a meta-step and a save take (default 300)",
        300, group=END, least=1, type=int, metavar="S",
    )  # fmt: skip
    max_restarts: int = _option(
        "restarts in place after a failed process (default 1)", 1, group=END, least=1, type=int, metavar="N"
    )
    requeue: bool = _option(
        "do not put a stopped run back into the queue: the job ends with code 75",
        True, group=END, flag="--no-requeue", action="store_false",
    )  # fmt: skip
    job_name: str = _option("of the job and its log (default cml-dist)", "cml-dist", group=SITE, metavar="NAME")
    partition: str | None = _option("as of sbatch", group=SITE, metavar="NAME")
    account: str | None = _option("as of sbatch", group=SITE, metavar="NAME")
    qos: str | None = _option("as of sbatch", group=SITE, metavar="NAME")
    constraint: str | None = _option("as of sbatch", group=SITE, metavar="NAME")
    sbatch: tuple[str, ...] = _option(
        "another option of sbatch; may be repeated", (), group=SITE, action="append", metavar="--OPTION=VALUE"
    )
    container: str | None = _option(
        "run inside this image (pyxis), with the Python that is there", group=SITE, metavar="IMAGE"
    )
    container_mounts: str | None = _option(
        "folders for the container besides this one", group=SITE, metavar="A:B,..."
    )
    python: str | None = _option("the Python of the nodes (default: this one)", group=SITE, metavar="PATH")

    @property
    def is_sweep(self) -> bool:
        return bool(self.seeds or self.backbones)

    @property
    def processes(self) -> int:
        """On each node."""
        return self.processes_per_node or self.gpus_per_node

    @property
    def launch_file(self) -> str:
        """The Accelerate file, without its ending."""
        return self.strategy or ("ddp" if self.gpus_per_node else "cpu")


def add_slurm_options(parser: argparse.ArgumentParser) -> None:
    """An option for each field, and ``--dry-run``."""
    groups = {"": parser} | {title: parser.add_argument_group(title) for title in (SWEEP, END, SITE)}
    for item in fields(SlurmRequest):
        if item.metadata:
            more = {key: value for key, value in item.metadata.items() if key not in ("group", "least", "flag")}
            if item.default is MISSING:
                more["required"] = True
            else:  # argparse appends to a list
                more["default"] = list(item.default) if more.get("action") == "append" else item.default
            flag = item.metadata.get("flag", f"--{item.name.replace('_', '-')}")
            groups[item.metadata["group"]].add_argument(flag, dest=item.name, **more)
    parser.add_argument("--dry-run", action="store_true", help="print the batch script and submit nothing")


def request_of(options: Mapping[str, Any]) -> SlurmRequest:
    """The request in parsed options."""
    values = {item.name: options[item.name] for item in fields(SlurmRequest)}
    return SlurmRequest(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
