"""What ``cml-dist launch slurm`` may be asked for: its options of the command line. Imports nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def add_slurm_options(parser: argparse.ArgumentParser, is_needed: bool = True) -> None:
    """The options that :func:`cml_dist.tools.slurm.prepare` takes, and ``--dry-run``.

    Args:
        is_needed: SLURM is what the command is about.
    """
    count = at_least(1)
    add = parser.add_argument if is_needed else parser.add_argument_group("with --slurm").add_argument
    limit = "of one job, e.g. 04:00:00; a longer run goes on in the next one"
    add("--time", required=is_needed, metavar="LIMIT", help=limit)
    add("--nodes", type=count, default=1, metavar="N", help="machines (default 1)")
    gpus = "GPUs of each, a process for each; 0 (default): CPUs"
    add("--gpus-per-node", type=at_least(0), default=0, metavar="M", help=gpus)
    processes = "processes of each node, on CPUs (default: one for each GPU)"
    add("--processes-per-node", type=count, metavar="P", help=processes)
    cpus = "CPUs of each node (default: 4 for each GPU, else one a process)"
    add("--cpus-per-task", type=count, metavar="N", help=cpus)
    file = "ddp (default with GPUs), cpu (default without), zero1, zero2, zero3, ..."
    add("--strategy", metavar="FILE", help=file)
    add("--dry-run", action="store_true", help="print the batch script and submit nothing")

    add = parser.add_argument_group("how a job ends").add_argument
    add("--signal", choices=["USR1", "USR2", "TERM"], default="USR1", help="what SLURM warns with (default USR1)")
    lead = "seconds before the limit of that warning: more than a meta-step and a save take (default 300)"
    add("--signal-lead-s", type=count, default=300, metavar="S", help=lead)
    restarts = "restarts in place after a failed process (default 1)"
    add("--max-restarts", type=count, default=1, metavar="N", help=restarts)
    no_requeue = "do not put a stopped run back into the queue: the job ends with code 75"
    add("--no-requeue", dest="requeue", action="store_false", help=no_requeue)

    add = parser.add_argument_group("the cluster").add_argument
    add("--job-name", default="cml-dist", metavar="NAME", help="of the job and its log (default cml-dist)")
    for name in ("partition", "account", "qos", "constraint"):
        add(f"--{name}", metavar="NAME", help="as of sbatch")
    other = "another option of sbatch; may be repeated"
    add("--sbatch", action="append", default=[], metavar="--OPTION=VALUE", help=other)
    add("--container", metavar="IMAGE", help="run inside this image (pyxis), with the Python that is there")
    add("--container-mounts", metavar="A:B,...", help="folders for the container besides this one")
    add("--python", metavar="PATH", help="the Python of the nodes (default: this one)")


def at_least(least: int) -> Callable[[str], int]:
    """A type of argparse's: a whole number, of at least so much."""

    def number(word: str) -> int:
        if int(word) < least:
            raise argparse.ArgumentTypeError(f"it is {word}; give {least} or more")
        return int(word)

    return number
