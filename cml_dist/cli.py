"""The command line: the only reader of argv. Imports torch only once a command needs it."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING

from cml_dist import __version__
from cml_dist.errors import CmlError, ConfigError
from cml_dist.launching.options import add_slurm_options
from cml_dist.parallel.launched import launched_or_alone
from cml_dist.parallel.leave import leave
from cml_dist.parallel.parent import launched_by_torchrun, signal_when_parent_ends
from cml_dist.parallel.watch import this_watch
from cml_dist.run.interrupts import STOPPED_BY_SCHEDULER, STOPPED_BY_USER, Interrupts, Stopped

if TYPE_CHECKING:
    from cml_dist.doctor.report import Report
    from cml_dist.planning.strategies import RankBudget
    from cml_dist.telemetry.console import Console
    from cml_dist.tools.run_status import RunView

DESCRIPTION = "Distributed meta-training with Cooperative Meta-Learning (CML): exact meta-gradients on many devices."
CONFIG_HELP = "a YAML file, or the short name of a shipped recipe (glyphs, omniglot, cifar_fs, mini_imagenet, sinusoid)"
INTERRUPTED = {
    "eval": "Interrupted; nothing was left half",
    "pack": "Interrupted; nothing was left half",
    "export": "Interrupted; run the same command again before the exported model is used",
}
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = _parsed(argv)
    rank = launched_or_alone().rank
    from cml_dist.telemetry.console import Console, console_for

    console = console_for(rank)
    try:
        return leave(COMMANDS[args.command](args, console) or 0)
    except CmlError as error:
        if rank == 0 or not error.everywhere:
            Console().error(error.what if rank == 0 else f"rank {rank}: {error.what}", error.remedy)
        return leave(error.exit_code, str(error), everywhere=error.everywhere)
    except KeyboardInterrupt:
        console.warn(INTERRUPTED.get(getattr(args, "data_command", args.command), "Interrupted"))
        return leave(STOPPED_BY_USER, "it was interrupted", everywhere=True)
    except OSError as error:
        what = f"{error.filename or 'a file'}: {error.strerror or error}"
        Console().error(what, "mend it, then run the same command")
        return leave(1, what)
    except Exception as error:
        this_watch().blame(error)
        import traceback

        traceback.print_exc()
        return leave(1, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")


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


# --------------------------------------------------------------------------- commands


# Each returns None, or an exit code.


def _train(args: argparse.Namespace, console: Console) -> int:
    from cml_dist.config.load import load_config

    config = load_config(args.config, args.overrides)
    # Open to the end of the process: a signal that comes while it leaves must not turn a saved run into a killed one.
    interrupts = Interrupts(config.run.stop_signals)
    interrupts.__enter__()
    if launched_by_torchrun():
        # Of a launcher that is killed (or that a signal ends which it does not know, e.g. SIGUSR1) nothing would be
        # left to end its ranks: they stop and save.
        signal_when_parent_ends(signal.SIGTERM)
    try:
        with interrupts.held():
            from cml_dist.run.trainer import train

        code = train(config, console, interrupts).exit_code
    except (Stopped, Exception) as stopped:
        if not isinstance(stopped, Stopped) and not interrupts.cut_short:
            raise
        this_watch().blame(stopped)  # a launcher stops all when one dies
        this_watch().fail(f"it was stopped by {interrupts.stop} before training began", everywhere=True)
        console.warn(f"Stopped by {interrupts.stop} before training began; nothing is lost: run the same command again")
        code = STOPPED_BY_SCHEDULER
    except KeyboardInterrupt:
        from cml_dist.run.folder import RunFolder

        if not RunFolder(config.run.dir).has_checkpoint:
            raise
        console.warn("Interrupted; the last checkpoint is whole, and the same command resumes from it")
        this_watch().fail("it was interrupted", everywhere=True)
        code = STOPPED_BY_USER
    interrupts.deafen()
    # Stopped and saved is not finished: a script that goes on with `&&` must be able to tell. But a launcher that may
    # restart its processes takes any code but 0 for a fault, and would start again what was asked to stop.
    return 0 if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS") or 0) > 0 else code


def _config(args: argparse.Namespace, console: Console) -> None:
    from cml_dist.config.load import dump_config, load_config, valid_keys
    from cml_dist.config.plan import expected_processes, make_plan, plan_rows
    from cml_dist.parallel.deepspeed_config import deepspeed_config, zero_stage

    if args.keys:
        if console.interactive:
            console.table("Settings", ("key", "meaning"), list(valid_keys().items()))
        else:  # for grep
            for key, meaning in valid_keys().items():
                console.note(f"{key}  {meaning}")
        return
    if args.config is None:
        raise CmlError("no configuration was named", "cml-dist config CONFIG, or cml-dist config --keys")
    config = load_config(args.config, args.overrides)
    plan = make_plan(config, expected_processes(config))
    if zero_stage(plan.strategy) is not None or args.deepspeed:
        dictionary = deepspeed_config(config, plan)  # also a check of the user's own file
    if args.deepspeed:
        print(json.dumps(dictionary, indent=2))
        return
    console.header("cml-dist config", plan_rows(config, plan))
    print(dump_config(config), end="")


PLAN_COLUMNS = {
    "parameters": "params",
    "gradients": "grads",
    "moments": "moments",
    "adapted": "copies",
    "activations": "activ.",
    "buffers": "buffers",
    "total": "total",
    "host": "host",
    "sent": "sent",
}
"""Parts of a rank's budget, with names short enough for a table on a terminal."""


def _plan(args: argparse.Namespace, console: Console) -> None:
    from cml_dist.config.load import load_config

    config = load_config(args.config, args.overrides)
    from cml_dist.planning.forecast import forecast

    found = forecast(
        config,
        args.gpus,
        args.gpu_memory_gib,
        image_size=args.image_size,
        channels=args.channels,
        words=[args.config, *args.overrides],
    )
    if args.json:
        print(json.dumps(found.as_dict(), indent=2))
        return
    console.header(
        "cml-dist plan",
        {
            "model": f"{config.model.backbone}: {found.num_parameters:,} parameters, {found.num_constants:,} constants",
            "inputs": f"{'x'.join(map(str, found.inputs))} ({found.input_source})",
            "meta-step": f"inner steps: {config.method.inner_steps}; episodes a rank: {found.episodes_per_rank}"
            + (f"; {found.means[0]}" if len(set(found.means)) == 1 else ""),
            "GPUs": f"{found.gpus} of {found.gpu_memory_gib:g} GiB, of which {found.usable_gib:.4g} GiB may be used",
        },
    )

    def gib(size: int) -> str:
        return f"{size / 2**30:.2f}"

    alike = len(set(found.means)) == 1
    rows = [
        (_strategy_words(row), *(gib(getattr(row, part)) for part in PLAN_COLUMNS), "yes" if found.fits(row) else "no")
        + (() if alike else (str(means),))
        for row, means in zip(found.rows, found.means, strict=True)
    ]
    columns = ("strategy", *PLAN_COLUMNS.values(), "fits", *([] if alike else ["meta-gradient by"]))
    console.table("GiB of each rank at its largest moment, and sent in a meta-step", columns, rows)
    console.note(
        "Copies: adapted parameters of the inner steps. Activations are of second order, moments with the master copy; "
        "host: on the CPU by offloading. Not counted: CUDA context, kernels' workspaces, NCCL, the allocator's slack"
    )
    if found.command is None:
        console.note(f"Nothing fits: the leanest strategy needs GPUs of {found.smallest_gib:.3g} GiB")
    else:
        console.note(f"Recommended: {_strategy_words(found.rows[found.recommended])}")
        print(found.command)


def _strategy_words(row: RankBudget) -> str:
    return row.strategy + {"none": "", "optimizer": " offload", "all": " offload all"}[row.offload]


def _eval(args: argparse.Namespace, console: Console) -> None:
    from cml_dist.run.finished import evaluate_run

    evaluate_run(args.run_dir, args.overrides, args.checkpoint, console)


def _export(args: argparse.Namespace, console: Console) -> None:
    from cml_dist.run.finished import export_again

    export_again(args.run_dir, args.overrides, args.checkpoint, args.to, console)


def _launch(args: argparse.Namespace, console: Console) -> None:
    from cml_dist.launching.slurm import follow, prepare, request_of, submit

    batch = prepare(request_of(vars(args)))
    if args.dry_run:
        print(batch.script, end="")
        return
    for line in follow(batch, submit(batch)):
        console.note(line)


def _status(args: argparse.Namespace, console: Console) -> int:
    from cml_dist.telemetry.console import redrawn
    from cml_dist.tools import run_status

    if args.check:
        if args.watch is not None:
            raise ConfigError("--check answers once", "leave --watch out, or --check")
        views = [run_status.state_of(run_dir) for run_dir in args.run_dir]
        for view in views:
            print(run_status.check_line(view))
        return run_status.worst_exit_code(views)
    if len(args.run_dir) == 1 and not os.path.isdir(args.run_dir[0]):
        raise CmlError(f"there is no folder {args.run_dir[0]}", "name the run.dir of a training run")

    def draw(console: Console) -> None:
        if args.json:
            found = [view.as_dict() for view in views]
            print(json.dumps(found[0] if len(found) == 1 else found, indent=2), flush=True)
        elif len(views) == 1:
            console.header(views[0].run_dir, run_status.rows_of(views[0]))
        else:
            parent, names = run_status.names_of(views)
            rows = [run_status.columns_of(view, name) for view, name in zip(views, names, strict=True)]
            console.table(parent, run_status.COLUMNS, rows)
            for view, name in zip(views, names, strict=True):
                if view.state != "running" and view.reason:
                    console.note(f"{name}: {view.state}, {view.reason}")

    views: list[RunView] = []
    with (
        suppress(KeyboardInterrupt),
        redrawn(console) if args.watch and not args.json else nullcontext(lambda draw: draw(console)) as show,
    ):
        while True:
            views[:] = [run_status.look(run_dir) for run_dir in args.run_dir]
            show(draw)
            if args.watch is None or all(view.state == "finished" for view in views):
                break
            time.sleep(args.watch)
    return 0


def _doctor(args: argparse.Namespace, console: Console) -> int:
    from cml_dist.parallel.srun import join_srun
    from cml_dist.telemetry.console import NullConsole, console_for

    os.environ.update(join_srun())
    console = NullConsole() if args.json else console_for(launched_or_alone().rank)
    from cml_dist.config.load import load_config
    from cml_dist.doctor.examine import Examination, bare_config, num_steps

    overrides = list(args.overrides)
    if args.config is not None and "=" in args.config and not os.path.exists(args.config):
        overrides.insert(0, args.config)  # the first override, where no configuration is named
        args.config = None
    config = bare_config(overrides) if args.config is None else load_config(args.config, overrides)
    run_dir = args.run_dir or config.run.dir

    def present(report: Report) -> None:
        if args.json:
            print(json.dumps(report.as_dict(), indent=2), flush=True)
            return
        console.header("cml-dist doctor", report.head())
        console.findings(report.groups())
        faults = [(f"{row.check}: {row.value}", row.remedy) for row in report.of("fault")]
        console.verdict(report.verdict(), report.ready, faults)

    with console.progress("looking", num_steps()) as view:
        examination = Examination(config, args.config, run_dir, present, lambda done, at: view.update(done, at=at))
        code = examination.run()
    if examination.hung:  # a thread that hangs would keep the interpreter from going down
        sys.stdout.flush()
        os._exit(code)
    return code


def _data(args: argparse.Namespace, console: Console) -> None:
    (_pack if args.data_command == "pack" else _inspect)(args, console)


def _pack(args: argparse.Namespace, console: Console) -> None:
    from cml_dist.telemetry.preparing import preparing
    from cml_dist.tools.pack import pack

    with preparing(console) as progress:
        made = pack(
            args.source,
            args.dest,
            layout=args.layout,
            splits=args.splits,
            image_size=args.image_size,
            channels=args.channels,
            name=args.name,
            progress=progress,
        )
    height, width = made.image_size
    rows = [(split, classes, made.num_images[split]) for split, classes in made.num_classes.items()]
    console.table(f"{made.name} ({made.layout}), {width}x{height} px", ("split", "classes", "images"), rows)
    console.note(
        f"Packed {sum(made.num_images.values()):,} images, {made.size_bytes / 2**20:.1f} MiB, into {made.dest} "
        f"({made.num_kept:,} kept byte for byte, {made.num_converted:,} converted)"
    )
    console.note(f"Look at it: cml-dist data inspect {made.dest}")


def _inspect(args: argparse.Namespace, console: Console) -> None:
    from cml_dist.telemetry.preparing import preparing
    from cml_dist.tools.inspect import inspect

    with preparing(console) as progress:
        root = args.dir
        if root == "glyphs":
            from cml_dist.domains.glyphs import ensure_glyphs

            root = str(ensure_glyphs(progress=progress))
        found = inspect(
            root,
            sheet=args.sheet,
            ways=args.ways,
            shots=args.shots,
            episodes=args.episodes,
            verify=args.verify,
            progress=progress,
        )
    columns = ("split", "classes", "images", "min", "median", "max", "shards", "MiB")
    rows = [
        (r.split, r.num_classes, r.num_images, r.min_per_class, r.median_per_class, r.max_per_class, r.num_shards)
        + (round(r.size_mib, 1),)
        for r in found.rows
    ]
    height, width = found.image_size
    kind = "grey" if found.channels == 1 else "RGB"
    console.table(f"{found.name}, {width}x{height} px, {kind} (min, median, max: images a class)", columns, rows)
    if found.mean and found.std:
        means, stds = (", ".join(f"{x:.4f}" for x in values) for values in (found.mean, found.std))
        console.note(f"mean {means}; std {stds} (pixels in 0..1, train split)")
    if args.verify:
        console.note("All checksums agree")
    if found.sheet_note:
        console.note(found.sheet_note)
    console.note(f"Contact sheet: {found.sheet}")


COMMANDS = {
    "train": _train,
    "config": _config,
    "plan": _plan,
    "doctor": _doctor,
    "eval": _eval,
    "export": _export,
    "status": _status,
    "launch": _launch,
    "data": _data,
}

if __name__ == "__main__":
    sys.exit(main())
