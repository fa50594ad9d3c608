"""The command line: the only reader of argv. Imports torch only once a command needs it."""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from cml_dist import __version__
from cml_dist.distributed.env import launched_by_torchrun, launched_or_alone, set_torch_defaults
from cml_dist.distributed.exit import leave
from cml_dist.distributed.heartbeat import this_heartbeat
from cml_dist.errors import CmlError
from cml_dist.run.hooks import OnStep, nothing
from cml_dist.run.interrupts import STOPPED_BY_USER
from cml_dist.tools.slurm_options import add_slurm_options

if TYPE_CHECKING:
    from cml_dist.telemetry.console import Console

DESCRIPTION = "Distributed meta-training with Cooperative Meta-Learning (CML): exact meta-gradients on many devices."
CONFIG_HELP = "a YAML file, or the short name of a shipped recipe, e.g. glyphs or sinusoid"
INTERRUPTED = {
    "eval": "Interrupted; nothing was left half",
    "pack": "Interrupted; nothing was left half",
    "export": "Interrupted; run the same command again before the exported model is used",
}
SPEAKS_WITHIN_S = 30.0
"""A busy machine may bring its ranks to the same error this long after each other."""
OVERRIDE_HELP = "settings that replace the file's, e.g. train.steps=2000 run.dir=runs/a (all: cml-dist config --keys)"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cml-dist",
        description=DESCRIPTION,
        epilog="Several processes: accelerate launch --config_file launch/accelerate/ddp.yaml -m cml_dist train CONFIG",
    )
    parser.add_argument("--version", action="version", version=f"cml-dist {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="meta-train, or resume the run in run.dir; then test and export")
    train.add_argument("config", metavar="CONFIG", help=CONFIG_HELP)
    _overrides(train)

    config = commands.add_parser("config", help="check a configuration and print what would happen")
    config.add_argument("config", metavar="CONFIG", nargs="?", help=CONFIG_HELP)
    config.add_argument("--keys", action="store_true", help="list every setting with its meaning")
    config.add_argument(
        "--deepspeed", action="store_true", help="print the DeepSpeed dictionary (JSON) of a zero0 to zero3 strategy"
    )
    _overrides(config)

    plan = commands.add_parser("plan", help="memory and traffic of every strategy, before anything runs; no GPU needed")
    plan.add_argument("config", metavar="CONFIG", help=CONFIG_HELP)
    plan.add_argument("--gpus", type=int, required=True, metavar="N", help="GPUs of the run, on all machines together")
    plan.add_argument("--gpu-memory-gib", type=float, required=True, metavar="GIB", help="memory of one GPU, e.g. 80")
    plan.add_argument("--image-size", type=int, metavar="PIXELS", help="height and width (default: of the image set)")
    plan.add_argument("--channels", type=int, choices=[1, 3], help="1 for grey, 3 for RGB (default: of the image set)")
    plan.add_argument("--json", action="store_true", help="print everything as JSON, memory in bytes")
    _overrides(plan)

    evaluate = commands.add_parser("eval", help="test a run: CML and CML-dagger with 95 %% intervals")
    evaluate.add_argument("run_dir", metavar="RUN_DIR", help="the folder of a run (its run.dir)")
    _checkpoint(evaluate)
    _overrides(evaluate)

    status = commands.add_parser("status", help="how runs stand, from another terminal or machine; reads only")
    status.add_argument("run_dir", metavar="RUN_DIR", nargs="+", help="the folder of a run; several make a table")
    status.add_argument(
        "--watch",
        type=_interval,
        nargs="?",
        const=5.0,
        metavar="SECONDS",
        help="show it again every so many seconds (default 5), until all runs are finished or Ctrl-C",
    )
    shape = status.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="print everything as JSON (several runs: a list)")
    shape.add_argument(
        "--check",
        action="store_true",
        help="one line a run, and as exit code: 0 finished, 75 stopped and saved, 3 running or unknown, 1 failed or "
        "dead; of several the worst",
    )

    export = commands.add_parser("export", help="write body and head of a run as safetensors with a model card")
    export.add_argument("run_dir", metavar="RUN_DIR", help="the folder of a run (its run.dir)")
    export.add_argument("--to", metavar="DIR", help="where to write (default: RUN_DIR/export)")
    _checkpoint(export)
    _overrides(export)

    doctor = commands.add_parser(
        "doctor", help="look at this machine, or at all processes of a world, before a long run: ready, or what to mend"
    )
    doctor.add_argument("config", metavar="CONFIG", nargs="?", help=f"{CONFIG_HELP}: also check its backbone and data")
    doctor.add_argument("--run-dir", metavar="DIR", help="the folder to look at (default: run.dir)")
    doctor.add_argument("--json", action="store_true", help="print everything as JSON")
    _overrides(doctor)

    launch = commands.add_parser("launch", help="submit a run to a cluster")
    places = launch.add_subparsers(dest="launch_command", required=True, metavar="COMMAND")
    slurm = places.add_parser("slurm", help="check a run, fill in the shipped batch script and hand it to sbatch")
    slurm.add_argument("config", metavar="CONFIG", help=CONFIG_HELP)
    add_slurm_options(slurm)
    _overrides(slurm)

    data = commands.add_parser("data", help="pack image sets into WebDataset shards, and look at them")
    kinds = data.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    pack = kinds.add_parser("pack", help="pack a folder or zip of images into shards")
    pack.add_argument("source", metavar="SOURCE", help="a folder, zip or tar.gz of images")
    pack.add_argument("dest", metavar="DEST", help="the folder to make; it must not exist")
    pack.add_argument("--layout", choices=["folders", "ravi", "cifar100", "omniglot"], help="default: recognised")
    pack.add_argument(
        "--splits",
        metavar="WHICH",
        help="folder of train.txt, val.txt and test.txt with class paths; for cifar100: cifar_fs or fc100",
    )
    pack.add_argument("--image-size", type=int, metavar="PIXELS", help="height and width to store (default: as found)")
    pack.add_argument("--channels", type=int, choices=[1, 3], help="1 for grey, 3 for RGB (default: as found)")
    pack.add_argument("--name", help="name of the set (default: that of SOURCE)")
    inspect = kinds.add_parser("inspect", help="print a table of a packed set and draw a few of its episodes")
    inspect.add_argument("dir", metavar="DIR", help="folder or URL of a packed set, or 'glyphs'")
    inspect.add_argument(
        "--sheet", metavar="PNG", default="contact-sheet.png", help="the picture to write (default contact-sheet.png)"
    )
    inspect.add_argument("--episodes", type=int, default=1, metavar="N", help="episodes of each split (default 1)")
    inspect.add_argument("--ways", type=int, default=5, metavar="N", help="classes in an episode (default 5)")
    inspect.add_argument("--shots", type=int, default=1, metavar="K", help="support images a class (default 1)")
    inspect.add_argument("--verify", action="store_true", help="also read all shards and compare their checksums")
    return parser


def _overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help=OVERRIDE_HELP)


def _checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        default="best",
        metavar="WHICH",
        help="best (by validation), last, or a kept step (default best)",
    )


def _interval(word: str) -> float:
    try:
        seconds = float(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{word!r} is no number of seconds; RUN_DIR comes before --watch") from None
    if not 0.1 <= seconds <= 86400:
        raise argparse.ArgumentTypeError(f"{word} seconds; give 0.1 to 86400")
    return seconds


def main(argv: Sequence[str] | None = None, on_step: OnStep = nothing) -> int:
    """Run one command; returns the exit code.

    Args:
        on_step: a hook of ``train``, see :mod:`cml_dist.run.hooks`.
    """
    args = _parsed(argv)
    set_torch_defaults()
    args.on_step = on_step
    rank = launched_or_alone().rank
    from cml_dist.telemetry.console import Console

    console = Console(quiet=rank > 0)
    try:
        return leave(_command(args.command)(args, console) or 0)
    except CmlError as error:
        _say(error)
        return leave(error.exit_code, str(error), everywhere=error.everywhere)
    except KeyboardInterrupt:
        console.warn(INTERRUPTED.get(getattr(args, "data_command", args.command), "Interrupted"))
        return leave(STOPPED_BY_USER, "it was interrupted", everywhere=True)
    except OSError as error:
        what = f"{error.filename or 'a file'}: {error.strerror or error}"
        Console().error(what, "mend it, then run the same command")
        return leave(1, what)
    except Exception as error:
        this_heartbeat().blame(error)
        import traceback

        traceback.print_exc()
        return leave(1, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")


def _say(error: CmlError) -> None:
    """Put an error on the screen: once, where every rank raises it; by every machine, as long as they have not met."""
    from cml_dist.telemetry.console import Console

    here, met = launched_or_alone(), this_heartbeat().met
    if error.everywhere and (here.rank if met else here.local_rank) > 0:
        if met:
            return
        if launched_by_torchrun():
            # The launcher ends all processes of this machine when the first one leaves: let that be the one who speaks.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(SPEAKS_WITHIN_S)
    Console().error(error.what if here.rank == 0 else f"rank {here.rank}: {error.what}", error.remedy)


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with overrides also after options (argparse takes them in one place alone)."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    strays = [word for word in rest if word.startswith("-") or "=" not in word]
    if strays or (rest and not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(strays or rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


COMMANDS = {
    "train": "train.train",
    "config": "config.config",
    "plan": "plan.plan",
    "doctor": "doctor.doctor",
    "eval": "finished.evaluate",
    "export": "finished.export",
    "status": "status.status",
    "launch": "launch.launch",
    "data": "data.data",
}
"""Where in ``cml_dist.commands`` each command is."""


def _command(name: str) -> Callable[[argparse.Namespace, Console], int | None]:
    module, _, function = COMMANDS[name].partition(".")
    return getattr(importlib.import_module(f"cml_dist.commands.{module}"), function)


if __name__ == "__main__":
    sys.exit(main())
