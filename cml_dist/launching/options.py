"""Options of ``cml-dist launch slurm``; their names are those of :class:`cml_dist.launching.slurm.SlurmRequest`."""

from __future__ import annotations

import argparse


def add_slurm_options(parser: argparse.ArgumentParser) -> None:
    """What a job may be asked for, with defaults."""
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="machines (default 1)")
    parser.add_argument(
        "--gpus-per-node", type=int, default=0, metavar="M", help="GPUs of each, a process for each; 0 (default): CPUs"
    )
    parser.add_argument(
        "--processes-per-node",
        type=int,
        metavar="P",
        help="processes of each node, on CPUs (default: one for each GPU)",
    )
    parser.add_argument(
        "--time", required=True, metavar="LIMIT", help="of one job, e.g. 04:00:00; a longer run goes on in the next one"
    )
    parser.add_argument(
        "--cpus-per-task", type=int, metavar="N", help="CPUs of each node (default: 4 for each GPU, else one a process)"
    )
    parser.add_argument(
        "--strategy",
        metavar="FILE",
        help="a file of launch/accelerate: ddp (default with GPUs), cpu (default without), zero1, zero2, zero3, ...",
    )
    sweep = parser.add_argument_group("a sweep: a job array with a run for each seed and backbone, below run.dir")
    sweep.add_argument("--seeds", type=_numbers, default=(), metavar="0,1,2", help="values of run.seed")
    sweep.add_argument("--backbones", type=_words, default=(), metavar="A,B", help="values of model.backbone")
    sweep.add_argument("--array-limit", type=int, metavar="N", help="runs at once (default: all)")
    end = parser.add_argument_group("how a job ends")
    end.add_argument(
        "--signal", default="USR1", choices=["USR1", "USR2", "TERM"], help="what SLURM warns with (default USR1)"
    )
    end.add_argument(
        "--signal-lead-s",
        type=int,
        default=300,
        metavar="S",
        help="seconds before the limit of that warning: more than a meta-step and a save take (default 300)",
    )
    end.add_argument(
        "--max-restarts", type=int, default=1, metavar="N", help="restarts in place after a failed process (default 1)"
    )
    end.add_argument(
        "--no-requeue",
        dest="requeue",
        action="store_false",
        help="do not put a stopped run back into the queue: the job ends with code 75",
    )
    site = parser.add_argument_group("the cluster")
    site.add_argument("--job-name", default="cml-dist", metavar="NAME")
    for name in ("partition", "account", "qos", "constraint"):
        site.add_argument(f"--{name}", metavar="NAME", help="as of sbatch")
    site.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="--OPTION=VALUE",
        help="another option of sbatch; may be repeated",
    )
    site.add_argument(
        "--container", metavar="IMAGE", help="run inside this image (pyxis), with the Python that is there"
    )
    site.add_argument("--container-mounts", metavar="A:B,...", help="folders for the container besides this one")
    site.add_argument("--python", metavar="PATH", help="the Python of the nodes (default: this one)")
    parser.add_argument("--dry-run", action="store_true", help="print the batch script and submit nothing")


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
