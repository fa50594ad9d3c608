"""``cml-dist launch slurm``: check a run, write the settings of the shipped batch script, hand it to sbatch."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import yaml

from cml_dist.config.load import find_recipe, load_config
from cml_dist.config.plan import make_plan
from cml_dist.config.schema import RunConfig
from cml_dist.errors import CmlError, ConfigError, WorldError
from cml_dist.run.folder import RunFolder
from cml_dist.tools.slurm_request import SlurmRequest

END = "# ---- end of settings ----\n"
"""What stands before it in a script of ``launch/slurm`` is written anew, the rest is taken as it is."""

_PACKAGE = Path(__file__).resolve().parents[1]
_PLACES = (_PACKAGE / "launch", _PACKAGE.parent / "launch")
"""Installed (setup.py puts the files there), or in a checkout, also an editable one."""

OURS = (
    "array", "chdir", "job-name", "no-requeue", "nodes", "ntasks", "ntasks-per-node", "open-mode", "output", "requeue",
    "signal", "time",
)  # fmt: skip
"""sbatch's options that have another way here, or that the batch script depends on."""


@dataclass(frozen=True)
class Batch:
    """A batch script that is ready to be submitted.

    Attributes:
        script: its text.
        run_dirs: folders of its runs, one for each task of an array.
        log: its log as SLURM names it (``%j``: job, ``%A_%a``: task of an array).
        warning: of what is allowed, but hardly meant; None.
    """

    request: SlurmRequest
    script: str
    run_dirs: tuple[Path, ...]
    log: str
    warning: str | None = None


def launch_folder() -> Path:
    """The folder that holds ``accelerate/*.yaml`` and ``slurm/*``."""
    return next(place for place in _PLACES if (place / "slurm").is_dir())


# --------------------------------------------------------------------------- preparing


def prepare(request: SlurmRequest, warn: Callable[[str], object] = lambda line: None) -> Batch:
    """Check the request and every run of it, and write the batch script; ``warn`` as of :func:`load_config`.

    Raises:
        ConfigError: something asked for cannot be, or the configuration is refused.
        CheckpointError: a run folder holds a run of another configuration.
    """
    _check(request)
    here, launch = Path.cwd(), launch_folder()
    recipe, is_file = find_recipe(request.config), Path(request.config).is_file()
    overrides = [*(["run.device=cpu"] if not request.gpus_per_node else []), *request.overrides]
    config = load_config(request.config, overrides, warn)
    root = (here / Path(config.run.dir).expanduser()).resolve()
    seeds, backbones = request.seeds or (config.run.seed,), request.backbones or (config.model.backbone,)
    runs = {root: []}
    if request.is_sweep:  # folders as sweep.sbatch names them
        runs = {
            root / f"{backbone.replace('/', '_')}-seed{seed}": [f"run.seed={seed}", f"model.backbone={backbone}"]
            for backbone in backbones
            for seed in seeds
        }
    for folder, varied in runs.items():
        one = load_config(request.config, [*overrides, *varied, f"run.dir={folder}"])
        _check_run(request, one, RunFolder(folder))

    log = str(here / f"slurm-{request.job_name}-{'%A_%a' if request.is_sweep else '%j'}.out")
    directives: dict[str, str | int | None] = {
        "job-name": request.job_name,
        "nodes": request.nodes,
        "ntasks-per-node": 1,
        "gres": f"gpu:{request.gpus_per_node}" if request.gpus_per_node else None,
        "cpus-per-task": request.cpus_per_task or max(4 * request.gpus_per_node, request.processes),
        "time": request.time,
        "signal": f"{request.signal}@{request.signal_lead_s}",
        "requeue" if request.requeue else "no-requeue": "",
        "open-mode": "append",
        "output": log,
        "chdir": str(here),
        **{name: getattr(request, name) for name in ("partition", "account", "qos", "constraint")},
    }
    if request.is_sweep:
        directives["array"] = f"0-{len(runs) - 1}" + (f"%{request.array_limit}" if request.array_limit else "")
    for option in request.sbatch:
        name, _, value = option.removeprefix("--").partition("=")
        directives[name] = value
    variables = {
        "LAUNCH": launch,
        "ACCELERATE_FILE": f"{request.launch_file}.yaml",
        "PROCESSES_PER_NODE": request.processes,
        "MAX_RESTARTS": request.max_restarts,
        "PYTHON": request.python or ("python" if request.container else sys.executable),
        "RUN_DIR": root,
    }
    arrays = {
        **({"SEEDS": map(str, seeds), "BACKBONES": backbones} if request.is_sweep else {}),
        # A file by its path, a recipe by its name: in a container it lies elsewhere. The script sets the rest itself.
        "CONFIG": [
            str(recipe.resolve()) if is_file else recipe.stem,
            *(word for word in overrides if not word.startswith(("run.dir=", "parallel.processes="))),
        ],
        "SRUN_OPTIONS": _container(request, here, launch, {"run.dir": root, **({"CONFIG": recipe} if is_file else {})}),
    }
    shipped = "sweep" if request.is_sweep else "one_node" if request.nodes == 1 else "multi_node"
    rest = (launch / "slurm" / f"{shipped}.sbatch").read_text(encoding="utf-8").partition(END)[2]
    lines = [
        "#!/bin/bash",
        *(_directive(name, value) for name, value in directives.items() if value is not None),
        *(f"export {name}={shlex.quote(str(value))}" for name, value in variables.items()),
        *(f"{name}=({shlex.join(values)})" for name, values in arrays.items()),
    ]
    warning = _idle(request.nodes * request.processes, config.train.episodes_per_step)
    return Batch(request, "\n".join(lines) + f"\n{END}{rest}", tuple(runs), log, warning)


def _directive(name: str, value: str | int) -> str:
    return f"#SBATCH --{name}" + ("" if value == "" else f"={shlex.quote(str(value))}")


def _check(request: SlurmRequest) -> None:
    """What can be told without the configuration; what a time or a partition is, sbatch itself knows."""
    for item in fields(request):
        value, least = getattr(request, item.name), item.metadata.get("least")
        if least is not None and value is not None and value < least:
            raise ConfigError(f"--{item.name.replace('_', '-')} is {value}", f"give {least} or more")
    if not request.processes:
        raise ConfigError(
            "neither GPUs nor processes were asked for", "--gpus-per-node 8, or on CPUs --processes-per-node 8"
        )
    files = sorted(path.stem for path in (launch_folder() / "accelerate").glob("*.yaml"))
    if request.launch_file not in files:
        raise ConfigError(f"--strategy is {request.strategy}", f"use one of {', '.join(files)}")
    if not re.fullmatch(r"[\w.+-]+", request.job_name):
        raise ConfigError(f"--job-name is {request.job_name!r}", "use letters, digits and . _ + - alone")
    for option in request.sbatch:
        if not re.fullmatch(r"--[a-z-]+(=.*)?", option):
            raise ConfigError(f"--sbatch is {option!r}", "give one long option of sbatch, e.g. --sbatch=--mem=64G")
        if option.removeprefix("--").partition("=")[0] in OURS:
            raise ConfigError(
                f"--sbatch is {option!r}, which the batch script depends on", "see cml-dist launch slurm --help"
            )
    if request.container_mounts and not request.container:
        raise ConfigError("--container-mounts is given without --container", "name the image as well")


def _check_run(request: SlurmRequest, config: RunConfig, folder: RunFolder) -> None:
    """What the job would be refused for once it runs, hours later."""
    world = request.nodes * request.processes
    asked = config.parallel.processes
    if asked not in (None, world):
        raise ConfigError(
            f"parallel.processes is {asked}, but {request.nodes} x {request.processes} processes were asked for",
            "drop parallel.processes: the batch script sets it",
        )
    if "SIGUSR1" not in config.run.stop_signals:
        raise ConfigError(
            f"run.stop_signals is {list(config.run.stop_signals)}, but the batch script stops processes by SIGUSR1",
            "add SIGUSR1 to run.stop_signals",
        )
    make_plan(config, world, _launched(request.launch_file))
    if folder.exists:
        folder.check_resumable(config)


def _launched(launch_file: str) -> dict[str, str]:
    """The variables by which Accelerate will tell the processes of DeepSpeed."""
    file = launch_folder() / "accelerate" / f"{launch_file}.yaml"
    asked = yaml.safe_load(file.read_text(encoding="utf-8")).get("deepspeed_config")
    if not asked:
        return {}
    told = {f"ACCELERATE_DEEPSPEED_{name.upper()}": str(value) for name, value in asked.items()}
    return {"ACCELERATE_USE_DEEPSPEED": "true", **told}


def _idle(processes: int, episodes: int) -> str | None:
    """Each episode is one process's: where there are fewer, some processes wait for others in every step."""
    if processes <= episodes:
        return None
    many = f"{episodes} episode{'s' * (episodes != 1)}"
    return (
        f"{processes} processes share {many} a meta-step: {processes - episodes} have nothing to do; "
        f"set train.episodes_per_step={processes} or a multiple of it, or ask for less"
    )


def _container(request: SlurmRequest, here: Path, launch: Path, needed: Mapping[str, Path]) -> list[str]:
    """Options of srun (pyxis): the folder that the job starts in and the launch files are always there inside.

    Raises:
        ConfigError: one of ``needed`` is not: a run folder inside the container alone would be gone with each job.
    """
    if not request.container:
        return []
    asked = request.container_mounts.split(",") if request.container_mounts else []
    seen = [here, *(Path(mount.split(":")[:2][-1]) for mount in asked)]
    for name, path in needed.items():
        if not any(path.resolve().is_relative_to(folder) for folder in seen):
            raise ConfigError(
                f"{name} is {path}, which the container does not see",
                f"mount its folder, e.g. --container-mounts={path.parent}:{path.parent}",
            )
    mounts = ",".join([*asked, f"{here}:{here}", f"{launch}:{launch}"])
    # pyxis takes a word without a slash in front for the name of an image in a registry.
    image = Path(request.container).resolve() if Path(request.container).is_file() else request.container
    return [f"--container-image={image}", f"--container-mounts={mounts}", f"--container-workdir={here}"]


# --------------------------------------------------------------------------- submitting


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
    return run.stdout.strip().split(";")[0]  # with several clusters, the cluster's name follows


def follow(batch: Batch, job: str) -> list[str]:
    """What to do with a submitted job, a line each."""
    request, log, several = batch.request, Path(batch.log), len(batch.run_dirs) > 1
    unit = "GPU" if request.gpus_per_node == request.processes else "process"
    world = f"{request.nodes} x {request.processes} {unit}{'s' if unit == 'GPU' else 'es'}"
    after = "goes back into the queue" if request.requeue else "ends with code 75"
    log_name = log.name.replace("%j", job).replace("%A_%a", f"{job}_*")
    runs = f"{shlex.quote(str(batch.run_dirs[0].parent))}/*" if several else shlex.quote(str(batch.run_dirs[0]))
    return [
        f"Submitted job {job}: {world}" + (f", {len(batch.run_dirs)} runs" if several else ""),
        f"  queue   squeue --jobs={job}",
        f"  log     tail -F {shlex.quote(str(log.parent))}/{log_name}",
        f"  status  cml-dist status {runs}",
        f"  cancel  scancel {job}",
        f"  pause   scancel --signal={request.signal} {job}    (saves, and {after})",
    ]
