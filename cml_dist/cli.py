"""The command line: the only reader of argv. Imports torch only once a command needs it."""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import re
import shutil
import signal
import sys
import textwrap
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

from cml_dist import __version__
from cml_dist.config.presets import PRESETS
from cml_dist.distributed.env import (
    LAUNCHED_LOCALLY,
    launched_by_torchrun,
    launched_or_alone,
    launcher_adds_noise,
    name_launch_file,
    set_torch_defaults,
)
from cml_dist.distributed.exit import leave, own_process
from cml_dist.distributed.heartbeat import this_heartbeat
from cml_dist.errors import CmlError
from cml_dist.run.hooks import OnStep, nothing
from cml_dist.run.interrupts import STOPPED_BY_USER
from cml_dist.tools.slurm_options import add_slurm_options, at_least

SPEAKS_WITHIN_S = 30.0
"""A busy machine may bring its ranks to the same error this long after each other."""

OUTPUT_CLOSED = 141
"""Exit code where nobody reads the output any more: the shell's own for SIGPIPE."""


def _option(name: str, help: str, **more: Any) -> tuple[str, dict[str, Any]]:
    """One argument, as of ``add_argument``."""
    return name, {"help": help, **more}


RECIPE = "a YAML file, or the short name of a shipped recipe, e.g. glyphs or sinusoid"
CONFIG = _option("config", RECIPE, metavar="CONFIG")
OVERRIDES = _option(
    "overrides", "settings that replace the file's, e.g. train.steps=2000 run.dir=runs/a (all: cml-dist config --keys)",
    metavar="key=value", nargs="*", default=[],
)  # fmt: skip
PRESET = _option(
    "--preset", "length of the run: quick (minutes on a CPU), standard (the recipe's own), paper (30,000 meta-steps, "
    "10,000 test episodes)", choices=[*PRESETS], metavar="LENGTH",
)  # fmt: skip
CODE = _option(
    "--code", "code of yours that may be named there; may be repeated", action="append", default=[],
    metavar="FILE.py:NAME",
)  # fmt: skip
RUN_DIR = _option("run_dir", "the folder of a run (its run.dir)", metavar="RUN_DIR")
CHECKPOINT = _option(
    "--checkpoint", "best (by validation), last, or a kept step (default best)", default="best", metavar="WHICH"
)
JSON = _option("--json", "print everything as JSON", action="store_true")
IMAGES = (
    _option("--image-size", "width and height (default: from the images)", type=int, metavar="PIXELS"),
    _option("--channels", "1 for grey, 3 for RGB (default: those of the images)", type=int, choices=[1, 3]),
)

COMMANDS: dict[str, tuple[str, str, tuple[tuple[str, dict[str, Any]], ...]]] = {
    "train": (
        "train.train", "meta-train, or resume the run in run.dir; then test and export", (CONFIG, PRESET, OVERRIDES)
    ),
    "pretrain": ("train.train", "train the body as a plain classifier of the training classes, for model.init_from", (
        _option("set", "folder or URL of a packed set, or 'glyphs'", metavar="SET"), PRESET, OVERRIDES,
    )),
    "config": ("config.config", "check a configuration and print what would happen", (
        _option("config", RECIPE, metavar="CONFIG", nargs="?"),
        _option("--all", "also the settings that are defaults", action="store_true"),
        _option(
            "--keys", "every setting with its default, range and meaning, or those whose name matches (a part, or a "
            "pattern: 'optim.*')", nargs="?", const="", metavar="PATTERN",
        ),
        _option("--deepspeed", "print the DeepSpeed dictionary (JSON) of a ZeRO strategy", action="store_true"),
        PRESET, OVERRIDES,
    )),
    "plan": ("plan.plan", "memory and traffic of every strategy, before anything runs; no GPU needed", (
        CONFIG,
        _option("--gpus", "GPUs of the run, on all machines together", type=int, required=True, metavar="N"),
        _option("--gpu-memory-gib", "memory of one GPU, e.g. 80", type=float, required=True, metavar="GIB"),
        *IMAGES, JSON, PRESET, OVERRIDES,
    )),
    "sweep": ("sweep.sweep", "train many runs: every combination of values, on this machine or as an array of SLURM", (
        _option("sweep", "a YAML file: base, dir, and what varies", metavar="SWEEP"),
        _option("--plan", "print how many runs, and how long each, and start nothing", action="store_true"),
        _option("--at-once", "runs at a time (default: one for each GPU; SLURM: all)", type=at_least(1), metavar="N"),
        _option("--yes", "also more than 500 runs", action="store_true"),
        CODE,
        _option("--slurm", "submit one job array, with the options below", action="store_true"),
    )),
    "scale": ("scale.scale", "measure how meta-steps scale with processes, backbones and settings; and project it", (
        CONFIG, PRESET,
        _option("--worlds", "how many processes, e.g. 1,2,4", required=True, metavar="N,N"),
        _option("--backbones", "values of model.backbone, e.g. conv4,resnet18", metavar="A,B"),
        _option(
            "--axes", "values of other settings, in every combination, e.g. method.inner_steps=1,5 domain.size=28,56",
            nargs="+", default=[], metavar="KEY=V,V",
        ),
        _option(
            "--scaling", "strong: as many episodes a meta-step in every world; weak: as many a process; or both "
            "(default)", choices=["strong", "weak", "both"], default="both", metavar="KIND",
        ),
        _option("--steps", "meta-steps that are measured (default 10)", type=at_least(2), default=10, metavar="N"),
        _option("--warm-up", "meta-steps before them (default 2)", type=at_least(1), default=2, metavar="N"),
        _option(
            "--cores", "of each process (default: those that are here, by the largest world)", type=at_least(1),
            metavar="N",
        ),
        _option("--project", "worlds to say the seconds of by the fit, e.g. 8,64,256", metavar="N,N"),
        _option("--link", "with --project: Gbit/s between them (default: as measured)", type=float, metavar="GBIT"),
        _option("--srun", "in a job of SLURM: measure in steps of it", action="store_true"),
        _option("--out", "the study's folder (default runs/scale); the same command goes on", default="runs/scale",
                metavar="DIR"),
        _option("--measure", argparse.SUPPRESS),
        OVERRIDES,
    )),
    "repro": ("repro.repro", "train a table of the CML paper, and put it beside what was published", (
        _option("table", "a table's name, or a YAML file like it; without one: all of them, a line each",
                metavar="TABLE", nargs="?"),
        _option("overrides", "settings of all rows, above theirs, which the table then says", metavar="key=value",
                nargs="*", default=[]),
        _option("--data", "where the sets are, a folder or file each: what data/ is in the recipes (default data)",
                default="data", metavar="DIR"),
        _option("--rows", "those with this in their name, or a pattern ('*-5shot'), and their baselines",
                metavar="PATTERN"),
        _option("--seeds", "runs of each row (default: as many as in the table's file)", type=at_least(1), metavar="N"),
        _option("--budget", "train for this fraction of the meta-steps (default 1)", type=float, default=1.0,
                metavar="FRACTION"),
        _option("--out", "where the runs are (default runs/repro)", default="runs/repro", metavar="DIR"),
        _option("--list", "print rows, hours, sources and quirks, and train nothing", action="store_true"),
        _option("--plan", "print how its runs stand, and what they found so far; train nothing", action="store_true"),
        _option("--at-once", "runs at a time (default: one for each GPU; SLURM: all)", type=at_least(1), metavar="N"),
        _option("--csv", "also write the numbers as they are", metavar="FILE"),
        _option("--latex", "also write the tables for LaTeX (booktabs)", metavar="FILE"),
        _option("--md", "also write the tables in Markdown", metavar="FILE"),
        CODE,
        _option("--slurm", "submit one job array for each recipe, with the options below", action="store_true"),
    )),
    "eval": ("finished.evaluate", "test a run again: its learners with 95 %% intervals", (
        RUN_DIR, CHECKPOINT, OVERRIDES,
        _option(
            "--on", "after RUN_DIR: image sets to test on, with one table: folders or URLs of packed sets, or 'glyphs'",
            nargs="+", default=[], metavar="SET",
        ),
        _option("--plot", "regression: also draw fits of a few episodes (.png, .pdf or .svg)", metavar="FILE"),
    )),
    "predict": ("predict.predict", "classify pictures by a trained run and a few examples of each class", (
        _option("run", "the folder of a run or of an export, or a file that --save wrote", metavar="RUN"),
        _option(
            "overrides", "of a model that needs code of yours, the settings that name it, e.g. "
            "model.backbone=my_nets.py:Body", metavar="key=value", nargs="*", default=[],
        ),
        _option(
            "--support", "examples: a folder with a folder of pictures for each class, of any number of classes",
            metavar="EXAMPLES",
        ),
        _option("--images", "pictures to classify: folders, files or patterns", nargs="+", default=[], metavar="NEW"),
        _option(
            "--unlabelled", "further pictures of these classes to learn from, without labels (the new ones, say), of a "
            "model trained with domain.unlabelled: folders, files or patterns", nargs="+", default=[], metavar="MORE",
        ),
        _option(
            "--out", "where to write: .csv, .jsonl, or .html for a contact sheet (default: a table on the screen)",
            metavar="FILE",
        ),
        _option(
            "--min-probability", "call a picture 'unknown' below this probability (default 0)", type=float, default=0.0,
            metavar="P",
        ),
        _option(
            "--leave-one-out", "say what accuracy the examples let expect: one of each class at a time is left out",
            action="store_true",
        ),
        _option(
            "--inner-steps", "gradient steps on the examples (default: as the run was tested)", type=int, metavar="N"
        ),
        _option("--save", "write the adapted classifier, to be given as RUN without --support", metavar="FILE"),
        _option(
            "--device", "where to compute (default auto: a GPU where there is one)", default="auto",
            choices=["auto", "cpu", "cuda"],
        ),
    )),
    "status": ("status.status", "how runs stand, from another terminal or machine; reads only", (
        _option("run_dir", "the folder of a run; several or a folder of runs: a table", metavar="RUN_DIR", nargs="+"),
        _option(
            "--watch", "after RUN_DIR: show it again every so many seconds (default 5), until all runs are finished or "
            "Ctrl-C", type=float, nargs="?", const=5.0, metavar="SECONDS",
        ),
        _option(
            "--check", "one line a run, and as exit code: 0 finished, 75 stopped and saved, 3 running or unknown, 1 "
            "failed or dead; of several the worst", action="store_true",
        ),
        JSON,
    )),
    "compare": ("compare.compare", "finished runs side by side on the same test episodes: paired differences", (
        _option("runs", "run folders, or folders with runs somewhere below", metavar="RUN", nargs="+"),
        _option(
            "--baseline", "what the others differ from: a variant as the table names it, e.g. method.name=maml, or one "
            "of its run folders (default: MAML, else a method without the co-learner, else the first)", metavar="NAME",
        ),
        _option(
            "--reach", "count the steps to so many per cent of the best validation (default 95)", type=float,
            default=95.0, metavar="PERCENT",
        ),
        _option("--csv", "also write the numbers as they are", metavar="FILE"),
        _option("--latex", "also write the tables for LaTeX (booktabs)", metavar="FILE"),
        _option("--md", "also write the tables in Markdown", metavar="FILE"),
    )),
    "report": ("compare.report", "runs, finished or not, as one page to look at: tables, curves, sample episodes", (
        _option("runs", "run folders, or folders with runs somewhere below", metavar="RUN", nargs="+"),
        _option("--out", "the page (.html); its figures lie beside it; what is there is replaced", required=True,
                metavar="FILE"),
        _option("--baseline", "as of compare", metavar="NAME"),
        _option(
            "--episodes", "test episodes that are shown with the answers of the baseline and of the best (default 2)",
            type=int, default=2, metavar="N",
        ),
    )),
    "analyse": ("analyse.analyse", "draw why a co-learner helps, or does not: meta-gradients, features, inner steps", (
        _option("runs", "run folders, or folders with runs somewhere below", metavar="RUN_DIR", nargs="+"),
        _option(
            "--checkpoints", "all of the trail (checkpoint.keep_every; without one best and last), best (by "
            "validation), or so many of them, evenly (default all)", default="all", metavar="WHICH",
        ),
        _option(
            "--episodes", "training episodes, and as many of the test, at each checkpoint (default 32)",
            type=at_least(2), default=32, metavar="N",
        ),
        _option(
            "--out", "folder of the pictures and numbers; what it has of a checkpoint is not computed again (default "
            "analysis)", default="analysis", metavar="DIR",
        ),
        CODE,
        _option("overrides", "settings of where runs are looked at, e.g. run.device=cpu, or domain.root=data/moved",
                metavar="key=value", nargs="*", default=[]),
    )),
    "export": ("finished.export", "write body and head of a run as safetensors with a model card; or as ONNX", (
        _option("run_dir", "the folder of a run; or a classifier that predict --save wrote", metavar="RUN"),
        _option("--to", "where to write (default: RUN/export; of a classifier beside it)", metavar="DIR"),
        _option("--onnx", "also an ONNX file, compared with torch; of a classifier that alone", action="store_true"),
        _option("--license", "of the weights, for the model card, e.g. apache-2.0", metavar="NAME"),
        CHECKPOINT, OVERRIDES,
    )),
    "doctor": (
        "doctor.doctor",
        "look at this machine, or at all processes of a world, before a long run: ready, or what to mend", (
        _option("config", f"{RECIPE}: also check its backbone and data", metavar="CONFIG", nargs="?"),
        _option("--run-dir", "the folder to look at (default: run.dir)", metavar="DIR"),
        JSON, PRESET, OVERRIDES,
    )),
    "launch local": ("launch.local", "run a command in several processes of this machine, by accelerate launch", (
        _option("--processes", "how many; one a GPU", type=at_least(1), required=True, metavar="N"),
        _option(
            "--config", "an Accelerate file: ddp (also without GPUs; default), zero1, zero2, zero3, ..., or a path",
            default="ddp", metavar="FILE",
        ),
        _option(
            "words", "after --: train CONFIG ..., pretrain, eval, analyse, doctor", nargs=argparse.REMAINDER,
            metavar="COMMAND",
        ),
    )),
    "launch slurm": (
        "launch.slurm", "check a run, fill in the shipped batch script and hand it to sbatch",
        (CONFIG, PRESET, OVERRIDES),
    ),
    "launch files": ("launch.files", "write the files for Accelerate and SLURM into a folder, to be edited", (
        _option("dir", "where to; none of the files may be there", metavar="DIR"),
    )),
    "data pack": ("data.pack", "pack a folder or an archive of images into WebDataset shards", (
        _option("source", "a folder, .zip or .tar (.gz, .bz2, .xz) of images, lists or arrays", metavar="SOURCE"),
        _option("dest", "the folder to make; it must not exist", metavar="DEST"),
        _option("--download", "fetch cifar_fs, fc100, omniglot, cub, aircraft, vgg_flower into SOURCE", metavar="SET"),
        _option(
            "--layout", "folders, csv, json, arrays, parquet, cifar100, omniglot, cars, aircraft or vgg_flower "
            "(default: recognised)", metavar="NAME",
            choices="folders csv json arrays parquet cifar100 omniglot cars aircraft vgg_flower ravi".split(),
        ),
        _option(
            "--splits", "folder of train.txt, val.txt and test.txt with class paths; shares of train, val and test to "
            "draw classes by, e.g. 64,16,20; or a published set: mini_imagenet, tiered_imagenet, cifar_fs, fc100, "
            "omniglot, cub, cars, aircraft, vgg_flower (default: as the source says, as published, or drawn)",
            metavar="WHICH",
        ),
        _option("--split-seed", "seed of the draw (default 0)", type=int, default=0, metavar="SEED"),
        *IMAGES,
        _option("--name", "name of the set (default: as published, or that of SOURCE)"),
        _option(
            "--min-images", "leave out classes of fewer images (default 2: one support and one query image)", type=int,
            default=2, metavar="N",
        ),
        _option(
            "--group-by", "regular expression on a picture's path in SOURCE; its first group, or the whole match, is "
            "what pictures have in common (a video, a patient), of which no episode has some in both support and query "
            "set",
            metavar="PATTERN",
        ),
        _option("--strict", "fail where a picture would be left out", action="store_true"),
        _option(
            "--max-member-mib", "refuse a file that unpacks to more (default 1024)", type=float, default=1024,
            metavar="MIB",
        ),
        _option(
            "--max-pixels", "refuse an image of more (default 89478485, Pillow's own limit)", type=int,
            default=89_478_485, metavar="N",
        ),
        _option(
            "--max-files", "refuse a source of more files (default 2000000)", type=int, default=2_000_000, metavar="N"
        ),
    )),
    "data inspect": ("data.inspect", "print a table of a packed set and draw a few of its episodes", (
        _option("dir", "folder or URL of a packed set, or 'glyphs'", metavar="DIR"),
        _option("--sheet", "picture to write (default contact-sheet.png)", default="contact-sheet.png", metavar="PNG"),
        _option("--episodes", "episodes of each split (default 1)", type=int, default=1, metavar="N"),
        _option("--ways", "classes in an episode (default 5)", type=int, default=5, metavar="N"),
        _option("--shots", "support images a class (default 1)", type=int, default=1, metavar="K"),
        _option("--verify", "also read all shards and compare their checksums", action="store_true"),
    )),
}  # fmt: skip
"""Each command: where in ``cml_dist.commands`` it is, what it does, and what it takes."""

GROUPS = {"launch": "start several processes here, or a job on a cluster", "data": "pack image sets, and look at them"}

EXAMPLES: dict[str, tuple[str, ...]] = {
    "": (
        "cml-dist train glyphs run.dir=runs/first",
        "cml-dist launch local --processes 2 -- train glyphs run.dir=runs/first",
        "cml-dist status runs/first --watch",
    ),
    "train": (
        "cml-dist train glyphs run.dir=runs/first",
        "cml-dist train sinusoid method.inner_steps=5 engine.compile=on run.dir=runs/curves",
        "cml-dist train my.yaml optim.lr=5e-4 run.seed=1 run.dir=runs/seed-1",
        "cml-dist train my_images domain.root=data/mine run.dir=runs/mine --preset quick",
    ),
    "pretrain": (
        "cml-dist pretrain data/mine model.backbone=resnet12 run.dir=runs/body",
        "cml-dist train my_images domain.root=data/mine model.init_from=runs/body",
    ),
    "config": (
        "cml-dist config glyphs method.name=boil",
        "cml-dist config glyphs optim.lr=5e-4 > my.yaml",
        "cml-dist config --keys 'optim.*'",
    ),
    "plan": ("cml-dist plan glyphs --gpus 8 --gpu-memory-gib 80",),
    "sweep": (
        "cml-dist sweep study.yaml --plan",
        "cml-dist sweep study.yaml --at-once 2",
        "cml-dist sweep study.yaml --slurm --gpus-per-node 1 --time 04:00:00",
    ),
    "scale": (
        "cml-dist scale glyphs --worlds 1,2 --backbones conv4,resnet18 --out runs/scale",
        "cml-dist scale glyphs --worlds 1,2 --axes method.inner_steps=1,5 --project 8,64 --link 10",
    ),
    "repro": (
        "cml-dist repro",
        "cml-dist repro sinusoid --budget 0.1 --at-once 2",
        "cml-dist repro mini_imagenet --data data --rows '*-5shot' --list",
        "cml-dist repro mini_imagenet --slurm --gpus-per-node 1 --time 04:00:00",
    ),
    "eval": (
        "cml-dist eval runs/first eval.episodes=10000",
        "cml-dist eval runs/birds --on data/cars data/flowers",
        "cml-dist eval runs/curves --plot fits.png",
    ),
    "compare": (
        "cml-dist compare runs/maml-* runs/cml-* --latex table.tex",
        "cml-dist compare runs --baseline method.name=boil --csv compare.csv",
    ),
    "report": ("cml-dist report runs --out report.html",),
    "analyse": (
        "cml-dist analyse runs/study --out study-analysis",
        "cml-dist analyse runs/maml-* runs/cml-* run.device=cpu --checkpoints 5 --episodes 200",
    ),
    "status": ("cml-dist status runs/first --watch", "cml-dist status runs", "cml-dist status runs/* --check"),
    "export": (
        "cml-dist export runs/first --to first-model --license apache-2.0",
        "cml-dist export birds.safetensors --onnx",
    ),
    "predict": (
        "cml-dist predict runs/mine --support examples --images new --out predictions.csv",
        "cml-dist predict runs/mine --support examples --leave-one-out --save birds.safetensors",
        "cml-dist predict birds.safetensors --images new --out sheet.html",
    ),
    "doctor": ("cml-dist doctor", "cml-dist launch local --processes 2 -- doctor glyphs"),
    "launch local": ("cml-dist launch local --processes 2 --config zero2 -- train glyphs run.dir=runs/two",),
    "launch slurm": ("cml-dist launch slurm glyphs run.dir=runs/job --nodes 2 --gpus-per-node 8 --time 04:00:00",),
    "launch files": ("cml-dist launch files my-launch",),
    "data pack": (
        "cml-dist data pack pictures/ data/mine",
        "cml-dist data pack omniglot.zip data/omniglot",
        r"cml-dist data pack scans/ data/scans --group-by 'patient\d+'",
    ),
    "data inspect": ("cml-dist data inspect data/mine --ways 5 --shots 5",),
}
"""Of each command, for its help."""


class _Parser(argparse.ArgumentParser):
    """Arguments of a command, with a coloured help on a terminal."""

    def __init__(self, *args: Any, examples: str = "", **how: Any) -> None:
        width = shutil.get_terminal_size().columns - 4
        whole = {"break_long_words": False, "break_on_hyphens": False}
        wrap = textwrap.TextWrapper(width, subsequent_indent="    ", **whole).wrap
        # Folded as a shell takes it.
        lines = "".join("\n  " + " \\\n  ".join(wrap(line)) for line in EXAMPLES.get(examples, ()))
        super().__init__(*args, formatter_class=_formatter, epilog=f"examples:{lines}" if lines else None, **how)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: see {self.prog} --help: {message}\n")


def _formatter(**how: Any) -> argparse.HelpFormatter:
    from rich_argparse import RawDescriptionRichHelpFormatter  # when help is shown, and not in every process

    RawDescriptionRichHelpFormatter.group_name_formatter = str
    return RawDescriptionRichHelpFormatter(**how)


def _sentence(words: str) -> str:
    """For a description, which is not wrapped where examples are left as they are."""
    text = f"{words[0].upper()}{words[1:]}.".replace("%%", "%")
    return textwrap.fill(text, shutil.get_terminal_size().columns - 2)


def _complete_config(prefix: str, **_: Any) -> list[str]:
    """Recipes, and YAML files here."""
    from cml_dist.config.load import recipes

    return [*recipes(), *(str(path) for path in Path().glob("*.yaml"))]


def _complete_setting(prefix: str, **_: Any) -> list[str]:
    """Settings up to their ``=``."""
    from cml_dist.config.keys import valid_keys

    return [f"{key}=" for key in valid_keys()] if "=" not in prefix else []


COMPLETERS = {"config": _complete_config, "overrides": _complete_setting}
"""Of arguments that are no paths, for the shell (argcomplete)."""


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="cml-dist",
        examples="",
        description="Cooperative Meta-Learning (CML) on many devices.",
    )
    parser.add_argument("--version", action="version", version=f"cml-dist {__version__}")
    commands = {"": parser.add_subparsers(required=True, metavar="COMMAND", prog="cml-dist")}
    for name, (target, help, options) in COMMANDS.items():
        group, _, word = name.rpartition(" ")
        if group not in commands:
            made = commands[""].add_parser(group, help=GROUPS[group])
            commands[group] = made.add_subparsers(required=True, metavar="COMMAND", prog=f"cml-dist {group}")
        command = commands[group].add_parser(word, help=help, description=_sentence(help), examples=name)
        command.set_defaults(command=target)
        for option, how in options:
            command.add_argument(option, **how).completer = COMPLETERS.get(option)  # type: ignore[attr-defined]
        if word in ("slurm", "sweep", "repro"):
            add_slurm_options(command, is_needed=word == "slurm")
    return parser


def command(argv: Sequence[str] | None = None, on_step: OnStep = nothing) -> int:
    """Be the command, in a process that is its own: ``cml-dist`` and ``python -m cml_dist``. Arguments as of main.

    Only such a process is ended from the inside (:func:`leave`), and keeps to its end what is set for the whole of it.
    """
    own_process()
    # Importing torch makes a million objects that stay: to look through them for garbage took a quarter of the start. A
    # meta-step leaves none.
    gc.set_threshold(20_000)
    if LAUNCHED_LOCALLY in os.environ:  # until now signals were ignored
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # they rewrite their line
    try:
        try:
            code = _run(argv, on_step, ExitStack())  # never closed: signals are deferred until the process is gone
        except SystemExit as end:  # of argparse
            code = end.code
        sys.stdout.flush()
    except BrokenPipeError:
        code = OUTPUT_CLOSED
    if code == OUTPUT_CLOSED:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be flushed
    return leave(code)


def main(argv: Sequence[str] | None = None, on_step: OnStep = nothing) -> int:
    """Run one command in a process of the caller's, which goes on; returns the exit code.

    Args:
        on_step: a hook of ``train``, see :mod:`cml_dist.run.hooks`.

    Raises:
        SystemExit: with a code that is not 0, in a world of several processes: its launcher must hear of it.
    """
    with ExitStack() as held:
        code = _run(argv, on_step, held)
    if code != 0 and launched_or_alone().size > 1:
        raise SystemExit(code)
    return code


def _run(argv: Sequence[str] | None, on_step: OnStep, held: ExitStack) -> int:
    """``held``: what lasts until the caller closes it, such as handlers of signals."""
    args = _parsed(argv)
    set_torch_defaults()
    name_launch_file()
    args.on_step, args.held = on_step, held
    from cml_dist.telemetry.console import Console

    console = Console(quiet=launched_or_alone().rank > 0)
    module, _, function = args.command.partition(".")
    try:
        code = getattr(importlib.import_module(f"cml_dist.commands.{module}"), function)(args, console) or 0
        sys.stdout.flush()
        return code
    except CmlError as error:
        _say(error)
        return _failed(error.exit_code, str(error), everywhere=error.everywhere)
    except KeyboardInterrupt:
        console.warn("Interrupted; run the same command again before its results are used")
        return _failed(STOPPED_BY_USER, "it was interrupted", everywhere=True)
    except BrokenPipeError:  # `| head` has seen enough
        return _failed(OUTPUT_CLOSED, "its output was closed")
    except OSError as error:
        what = f"{error.filename or 'a file'}: {error.strerror or error}"
        Console().error(what, "mend it, then run the same command")
        return _failed(1, what)
    except Exception as error:
        this_heartbeat().blame(error)
        import traceback

        traceback.print_exc()
        return _failed(1, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")


def _failed(code: int, cause: str, everywhere: bool = False) -> int:
    """Tell the other ranks why this one ends; see :meth:`Heartbeat.fail`."""
    this_heartbeat().fail(cause, everywhere=everywhere)
    return code


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
    what, remedy = error.what if here.rank == 0 else f"rank {here.rank}: {error.what}", error.remedy
    Console().error(what, f"{remedy}{launcher_adds_noise()}")


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with overrides also after options (argparse takes them in one place alone)."""
    parser = build_parser()
    if "_ARGCOMPLETE" in os.environ:  # the shell asks what may follow, and no command runs
        import argcomplete

        argcomplete.autocomplete(parser, always_complete_options="long")
    args, rest = parser.parse_known_args(argv)
    strays = [word for word in rest if word.startswith("-") or "=" not in word]
    if strays or (rest and not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(strays or rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    for name, said in (
        ("on", "--on: name a set"), ("runs", "RUN_DIR: name a folder"), ("images", "--images: name a picture"),
        ("unlabelled", "--unlabelled: name a picture"),
    ):  # fmt: skip
        if (words := getattr(args, name, None)) and hasattr(args, "overrides"):  # argparse gives it all of them
            settings = [word for word in words if re.match(r"[\w.]+=", word) and not os.path.exists(word)]
            setattr(args, name, left := [word for word in words if word not in settings])
            args.overrides = [*args.overrides, *settings]
            left or parser.error(f"{said} before the settings; of a folder with = write ./NAME")
    if hasattr(args, "set"):
        args.config, where = "pretrain", "domain.name=glyphs" if args.set == "glyphs" else f"domain.root={args.set}"
        args.overrides = [where, *args.overrides]
    if hasattr(args, "words"):
        args.words = args.words[args.words[:1] == ["--"] :]
        args.inner = _parsed(args.words)  # a typo is to be found here, and not in each process
    return args
