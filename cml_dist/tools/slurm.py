"""``cml-dist launch slurm``: check a run, write the settings of the shipped batch script, hand it to sbatch."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cml_dist.atomic import append_json_line
from cml_dist.config.load import find_recipe, load_config, silently
from cml_dist.config.schema import RunConfig
from cml_dist.errors import CmlError, ConfigError, WorldError
from cml_dist.tools.launch_files import accelerate_file, check_run, launch_folder

END = "# ---- end of settings ----\n"
"""What stands before it in a script of ``launch/slurm`` is written anew, the rest is taken as it is."""

OURS = (
    "array", "chdir", "job-name", "no-requeue", "nodes", "ntasks", "ntasks-per-node", "open-mode", "output", "requeue",
    "signal", "time",
)  # fmt: skip
"""sbatch's options that have another way here, or that the batch script depends on."""


SUBMITTED = "slurm.jsonl"
"""In the folder of a sweep: a line for each array, with its number and the runs of its tasks."""


@dataclass(frozen=True)
class Batch:
    """A batch script that is ready to be submitted.

    Attributes:
        asked: what was asked for.
        script: its text.
        run_dirs: folders of its runs, one for each task of an array.
        log: its log as SLURM names it (``%j``: job, ``%A_%a``: task of an array).
        is_array: whether they are those of a sweep.
    """

    asked: argparse.Namespace
    script: str
    run_dirs: tuple[Path, ...]
    log: Path
    is_array: bool = False


def prepare(
    asked: argparse.Namespace,
    warn: Callable[[str], object] = lambda line: None,
    array: Sequence[Sequence[str]] = (),
) -> Batch:
    """Check every run that is asked for, and write the batch script.

    Args:
        asked: options of :func:`add_slurm_options`, and of one run ``config``, ``preset`` and ``overrides`` as of
            ``cml-dist train``.
        warn: told of what is allowed, but hardly meant.
        array: of the runs of a sweep, all with one configuration and in one folder, these words of ``cml-dist train``;
            ``at_once`` of ``asked`` run at a time.

    Raises:
        ConfigError: something asked for cannot be, or the configuration is refused.
        CheckpointError: a run folder holds a run of another configuration.
    """
    here, launch, gpus = Path.cwd(), launch_folder(), asked.gpus_per_node
    processes = asked.processes_per_node or gpus
    _check(asked, processes)
    file = accelerate_file(asked.strategy or ("ddp" if gpus else "cpu"), "--strategy")
    preset = None if array else asked.preset
    name, runs = array[0][0] if array else asked.config, {}
    recipe, is_file = find_recipe(name), Path(name).is_file()
    for _, *words in array or [[name, *asked.overrides]]:
        overrides = [*([] if gpus else ["run.device=cpu"]), *words]
        config = load_config(name, overrides, silently if runs else warn, preset)
        _check_run(config, asked.nodes, processes, file)
        # A file by its path, a recipe by its name: in a container it lies elsewhere. The script sets the rest itself.
        runs[folder := (here / config.run.dir).resolve()] = (
            recipe.resolve() if is_file else recipe.stem,
            *([f"--preset={preset}"] if preset else []),
            *(word for word in overrides if not word.startswith(("run.dir=", "parallel.processes="))),
        )
    world, episodes = asked.nodes * processes, config.train.episodes_per_step
    if world > episodes:  # each episode is one process's
        warn(
            f"{world} processes share {episodes} episode{'s' * (episodes != 1)} a meta-step: {world - episodes} have "
            f"nothing to do; set train.episodes_per_step={world} or a multiple of it, or ask for less"
        )
    root = folder.parent if array else folder

    log = here / f"slurm-{asked.job_name}-{'%A_%a' if array else '%j'}.out"
    limit = f"%{asked.at_once}" if array and asked.at_once else ""
    directives = {
        "job-name": asked.job_name,
        "nodes": asked.nodes,
        "ntasks-per-node": 1,
        "gres": f"gpu:{gpus}" if gpus else None,
        "cpus-per-task": asked.cpus_per_task or max(4 * gpus, processes),
        "time": asked.time,
        "signal": f"{asked.signal}@{asked.signal_lead_s}",
        "requeue" if asked.requeue else "no-requeue": "",
        "open-mode": "append",
        "output": log,
        "chdir": here,
        **{name: getattr(asked, name) for name in ("partition", "account", "qos", "constraint")},
        "array": f"0-{len(runs) - 1}{limit}" if array else None,
        **{name: value for name, _, value in (option[2:].partition("=") for option in asked.sbatch)},
    }
    settings = {
        "LAUNCH": launch,
        "ACCELERATE_FILE": file.name,
        "PROCESSES_PER_NODE": processes,
        "MAX_RESTARTS": asked.max_restarts,
        "PYTHON": asked.python or ("python" if asked.container else sys.executable),
        "RUN_DIR": root,
        "CONFIG": next(iter(runs.values())),
        "RUNS": tuple(shlex.join([folder.name, *map(str, words)]) for folder, words in runs.items()),
        "SRUN_OPTIONS": _container(asked, here, launch, {"run.dir": root, **({"CONFIG": recipe} if is_file else {})}),
    }
    del settings["CONFIG" if array else "RUNS"]
    lines = ["#!/bin/bash"]
    for name, value in directives.items():
        if value is not None:
            lines.append(f"#SBATCH --{name}" + (f"={shlex.quote(str(value))}" if value != "" else ""))
    for name, value in settings.items():
        space = "\n    " if name == "RUNS" else " "
        several = space.join(map(shlex.quote, map(str, value))) if isinstance(value, tuple) else None
        lines.append(f"export {name}={shlex.quote(str(value))}" if several is None else f"{name}=({several})")
    shipped = "sweep" if array else "one_node" if asked.nodes == 1 else "multi_node"
    rest = (launch / "slurm" / f"{shipped}.sbatch").read_text(encoding="utf-8").partition(END)[2]
    return Batch(asked, "\n".join(lines) + f"\n{END}{rest}", tuple(runs), log, bool(array))


def _need(good: object, what: str, remedy: str) -> None:
    if not good:
        raise ConfigError(what, remedy)


def _check(asked: argparse.Namespace, processes: int) -> None:
    """What can be told without the configuration; what a time or a partition is, sbatch itself knows."""
    remedy = "--gpus-per-node 8, or on CPUs --processes-per-node 8"
    _need(processes, "neither GPUs nor processes were asked for", remedy)
    name = asked.job_name
    _need(re.fullmatch(r"[\w.+-]+", name), f"--job-name is {name!r}", "use letters, digits and . _ + - alone")
    for option in asked.sbatch:
        remedy = "give one long option of sbatch, e.g. --sbatch=--mem=64G"
        _need(re.fullmatch(r"--[a-z-]+(=.*)?", option), f"--sbatch is {option!r}", remedy)
        what = f"--sbatch is {option!r}, which the batch script depends on"
        _need(option[2:].partition("=")[0] not in OURS, what, "see cml-dist launch slurm --help")
    what = "--container-mounts is given without --container"
    _need(asked.container or not asked.container_mounts, what, "name the image as well")


def _check_run(config: RunConfig, nodes: int, processes: int, file: Path) -> None:
    """What the job would be refused for once it runs, hours later; ``file`` is that of Accelerate."""
    signals = config.run.stop_signals
    what = f"run.stop_signals is {list(signals)}, but the batch script stops processes by SIGUSR1"
    _need("SIGUSR1" in signals, what, "add SIGUSR1 to run.stop_signals")
    check_run(config, nodes * processes, file, f"{nodes} x {processes}")


def _container(asked: argparse.Namespace, here: Path, launch: Path, needed: Mapping[str, Path]) -> tuple[str, ...]:
    """Options of srun (pyxis): the folder that the job starts in and the launch files are always there inside.

    Raises:
        ConfigError: one of ``needed`` is not: a run folder inside the container alone would be gone with each job.
    """
    if not asked.container:
        return ()
    given = asked.container_mounts.split(",") if asked.container_mounts else []
    seen = [here, *(Path(mount.split(":")[:2][-1]) for mount in given)]
    for name, path in needed.items():
        inside = any(path.resolve().is_relative_to(folder) for folder in seen)
        remedy = f"mount its folder, e.g. --container-mounts={path.parent}:{path.parent}"
        _need(inside, f"{name} is {path}, which the container does not see", remedy)
    mounts = ",".join([*given, f"{here}:{here}", f"{launch}:{launch}"])
    # pyxis takes a word without a slash in front for the name of an image in a registry.
    image = Path(asked.container).resolve() if Path(asked.container).is_file() else asked.container
    return f"--container-image={image}", f"--container-mounts={mounts}", f"--container-workdir={here}"


def submit(batch: Batch) -> str:
    """Hand the script to sbatch; returns the job's number.

    Raises:
        WorldError: there is no sbatch here.
        CmlError: sbatch refused, in its own words.
    """
    if shutil.which("sbatch") is None:
        raise WorldError(
            "there is no sbatch on this machine",
            "run this on a login node of the cluster, or print the script with --dry-run",
        )
    run = subprocess.run(["sbatch", "--parsable"], input=batch.script, capture_output=True, text=True)
    if run.returncode:
        words = [re.sub(r"^sbatch: (error: )?", "", line) for line in run.stderr.splitlines() if line.strip()]
        raise CmlError(f"sbatch refused the job: {'; '.join(words)}", "correct the options, or ask --dry-run")
    job = run.stdout.strip().split(";")[0]  # with several clusters, the cluster's name follows
    if batch.is_array:
        runs = [folder.name for folder in batch.run_dirs]
        append_json_line(batch.run_dirs[0].with_name(SUBMITTED), {"job": job, "runs": runs})
    return job


def queued(folder: Path) -> set[str]:
    """The runs of a sweep in ``folder`` of which a task that was submitted here is in the queue, or runs."""
    with suppress(OSError, ValueError, LookupError):
        arrays = [json.loads(line) for line in (folder / SUBMITTED).read_text(encoding="utf-8").splitlines()]
        command = ["squeue", "--me", "--noheader", "--array", "--format=%F %K"]
        tasks = {*subprocess.run(command, capture_output=True, text=True).stdout.splitlines()}
        return {run for array in arrays for n, run in enumerate(array["runs"]) if f"{array['job']} {n}" in tasks}
    return set()


def follow(batch: Batch, job: str) -> list[tuple[str, str]]:
    """What to do with a submitted job, a line each: in words, and the command."""
    asked = batch.asked
    processes = f"{asked.processes_per_node} processes" if asked.processes_per_node else f"{asked.gpus_per_node} GPUs"
    after = "goes back into the queue" if asked.requeue else "ends with code 75"
    log_name = batch.log.name.replace("%j", job).replace("%A_%a", f"{job}_*")
    folder = shlex.quote(str(batch.run_dirs[0].parent if batch.is_array else batch.run_dirs[0]))
    return [
        (f"Submitted job {job}:", f"{asked.nodes} x {processes}" + f", {len(batch.run_dirs)} runs" * batch.is_array),
        ("  queue  ", f"squeue --jobs={job}"),
        ("  log    ", f"tail -F {shlex.quote(str(batch.log.parent))}/{log_name}"),
        ("  status ", f"cml-dist status {folder}"),
        ("  cancel ", f"scancel {job}"),
        ("  pause  ", f"scancel --signal={asked.signal} {job}    (saves, and {after})"),
    ]
