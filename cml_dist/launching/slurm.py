"""``cml-dist launch slurm``: check a run, fill in the shipped batch script, hand it to sbatch."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from cml_dist.config.load import load_config
from cml_dist.config.plan import make_plan
from cml_dist.config.recipes import find_recipe
from cml_dist.config.schema import RunConfig
from cml_dist.errors import CmlError, ConfigError, WorldError
from cml_dist.launching.batch_script import fill_in
from cml_dist.launching.files import accelerate_files, launch_folder
from cml_dist.run.folder import RunFolder

OURS = {
    "array": "use --seeds and --backbones",
    "chdir": "submit from that folder",
    "job-name": "use --job-name",
    "no-requeue": "use --no-requeue",
    "nodes": "use --nodes",
    "ntasks": "there is one task a node",
    "ntasks-per-node": "there is one task a node",
    "open-mode": "a requeued job appends to its log",
    "output": "the log is written where the job is submitted",
    "requeue": "it is requeued unless --no-requeue is given",
    "signal": "use --signal and --signal-lead-s",
    "time": "use --time",
}
"""sbatch's options that have another way here, which is checked and told of, or that may not be changed."""


@dataclass(frozen=True)
class SlurmRequest:
    """What the command line asked for; ``launching/options.py`` has the meaning of each.

    Attributes:
        config, overrides: as of ``cml-dist train``.
        sbatch: options of sbatch that stand for themselves, e.g. ``--mem=64G``.
        seeds, backbones: of a sweep; empty for one run.
    """

    config: str
    overrides: tuple[str, ...]
    nodes: int
    time: str
    gpus_per_node: int = 0
    processes_per_node: int | None = None
    cpus_per_task: int | None = None
    strategy: str | None = None
    signal: str = "USR1"
    signal_lead_s: int = 300
    max_restarts: int = 1
    requeue: bool = True
    job_name: str = "cml-dist"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    container: str | None = None
    container_mounts: str | None = None
    sbatch: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    backbones: tuple[str, ...] = ()
    array_limit: int | None = None
    python: str | None = None

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


@dataclass(frozen=True)
class Batch:
    """A batch script that is ready to be submitted.

    Attributes:
        script: its text.
        run_dirs: folders of its runs, one for each task of an array.
        log: its log as SLURM names it (``%j``: job, ``%A_%a``: task of an array).
        world: nodes and processes, in words.
        signal: what makes it save and end.
        after: what becomes of it then, in words.
        warning: of what is allowed, but hardly meant; None.
    """

    script: str
    run_dirs: tuple[Path, ...]
    log: str
    world: str
    signal: str
    after: str
    warning: str | None = None


def request_of(options: Mapping[str, Any]) -> SlurmRequest:
    """The request in parsed options (``launching/options.py``)."""
    values = {field.name: options[field.name] for field in fields(SlurmRequest)}
    return SlurmRequest(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def prepare(request: SlurmRequest) -> Batch:
    """Check the request and every run of it, and fill in the batch script.

    Raises:
        ConfigError: something asked for cannot be, or the configuration is refused.
        CheckpointError: a run folder holds a run of another configuration.
    """
    _check(request)
    here = Path.cwd()
    recipe = find_recipe(request.config)
    overrides = [*(["run.device=cpu"] if not request.gpus_per_node else []), *request.overrides]
    config = load_config(request.config, overrides)
    root = (here / Path(config.run.dir).expanduser()).resolve()
    is_file = Path(request.config).is_file()
    _check_container(request, here, {"run.dir": root} | ({"CONFIG": recipe.resolve()} if is_file else {}))
    seeds, backbones = request.seeds or (config.run.seed,), request.backbones or (config.model.backbone,)
    run_dirs = []
    for backbone in backbones if request.is_sweep else (None,):
        for seed in seeds if request.is_sweep else (None,):
            varied = [] if backbone is None else [f"run.seed={seed}", f"model.backbone={backbone}"]
            # As sweep.sbatch names it.
            run_dirs.append(root if backbone is None else root / f"{backbone.replace('/', '_')}-seed{seed}")
            one = load_config(request.config, [*overrides, *varied, f"run.dir={run_dirs[-1]}"])
            _check_run(request, one, RunFolder(run_dirs[-1]))

    shipped = "sweep" if request.is_sweep else "one_node" if request.nodes == 1 else "multi_node"
    launch = launch_folder()
    log = str(here / f"slurm-{request.job_name}-{'%A_%a' if request.is_sweep else '%j'}.out")
    directives: dict[str, str | None] = {
        "job-name": request.job_name,
        "nodes": str(request.nodes),
        "gres": f"gpu:{request.gpus_per_node}" if request.gpus_per_node else None,
        "cpus-per-task": str(request.cpus_per_task or max(4 * request.gpus_per_node, request.processes)),
        "time": request.time,
        "signal": f"{request.signal}@{request.signal_lead_s}",
        "output": log,
        "chdir": str(here),
        **{name: getattr(request, name) for name in ("partition", "account", "qos", "constraint")},
    }
    if not request.requeue:
        directives |= {"requeue": None, "no-requeue": ""}
    for option in request.sbatch:
        name, _, value = option.removeprefix("--").partition("=")
        directives[name] = value
    variables: dict[str, str | int | Sequence[str]] = {
        "LAUNCH": str(launch),
        "ACCELERATE_FILE": f"{request.launch_file}.yaml",
        "PROCESSES_PER_NODE": request.processes,
        "MAX_RESTARTS": request.max_restarts,
        "PYTHON": request.python or ("python" if request.container else sys.executable),
        "RUN_DIR": str(root),
        # A file by its path, a recipe by its name: in a container it lies elsewhere.
        "CONFIG": [str(recipe.resolve()) if is_file else recipe.stem, *_kept(overrides)],
        "SRUN_OPTIONS": _container(request, here, launch),
    }
    if request.is_sweep:
        limit = f"%{request.array_limit}" if request.array_limit else ""
        directives["array"] = f"0-{len(run_dirs) - 1}{limit}"
        variables |= {"SEEDS": [str(seed) for seed in seeds], "BACKBONES": list(backbones)}
    script = (launch / "slurm" / f"{shipped}.sbatch").read_text(encoding="utf-8")
    nodes, unit = request.nodes, "GPU" if request.gpus_per_node == request.processes else "process"
    count = f"{request.processes} {unit}{('s' if unit == 'GPU' else 'es') * (request.processes != 1)}"
    return Batch(
        script=fill_in(script, directives, variables),
        run_dirs=tuple(run_dirs),
        log=log,
        world=f"{nodes} node{'s' * (nodes != 1)} x {count}",
        signal=request.signal,
        after="goes back into the queue" if request.requeue else "ends with code 75",
        warning=_idle(nodes * request.processes, config.train.episodes_per_step),
    )


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
    log, several = Path(batch.log), len(batch.run_dirs) > 1
    log_name = log.name.replace("%j", job).replace("%A_%a", f"{job}_*")
    runs = f"{shlex.quote(str(batch.run_dirs[0].parent))}/*" if several else shlex.quote(str(batch.run_dirs[0]))
    return [
        f"Submitted job {job}: {batch.world}" + (f", {len(batch.run_dirs)} runs" if several else ""),
        f"  queue   squeue --jobs={job}",
        f"  log     tail -F {shlex.quote(str(log.parent))}/{log_name}",
        f"  status  cml-dist status {runs}",
        f"  cancel  scancel {job}",
        f"  pause   scancel --signal={batch.signal} {job}    (saves, and {batch.after})",
    ]


def seconds(time: str) -> int | None:
    """A time limit as sbatch takes it, in seconds; None where it is none.

    minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes or days-hours:minutes:seconds.
    """
    days, dash, rest = time.rpartition("-")
    parts = rest.split(":")
    if len(parts) > 3 or not all(re.fullmatch("[0-9]+", part) for part in (*parts, *([days] if dash else []))):
        return None
    numbers = [int(part) for part in parts]
    if dash:
        hours, minutes, secs = (*numbers, 0, 0)[:3]
    else:
        hours, minutes, secs = {1: (0, *numbers, 0), 2: (0, *numbers), 3: tuple(numbers)}[len(numbers)]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + secs


def _check(request: SlurmRequest) -> None:
    """What can be told without the configuration."""
    limit_s = seconds(request.time)
    if not limit_s:
        raise ConfigError(
            f"--time is {request.time!r}, which is no time of SLURM's",
            "write hours:minutes:seconds, e.g. --time 04:00:00",
        )
    if request.signal_lead_s >= limit_s:
        raise ConfigError(
            f"--signal-lead-s is {request.signal_lead_s}, but --time is {request.time} ({limit_s} s)",
            "give the job more time, or less of a lead",
        )
    lowest = {"nodes": 1, "gpus_per_node": 0, "processes_per_node": 1, "cpus_per_task": 1, "max_restarts": 1}
    for name, least in {**lowest, "signal_lead_s": 1, "array_limit": 1}.items():
        value = getattr(request, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}", f"give {least} or more")
    if not request.processes:
        raise ConfigError(
            "neither GPUs nor processes were asked for", "--gpus-per-node 8, or on CPUs --processes-per-node 8"
        )
    if request.launch_file not in accelerate_files():
        raise ConfigError(f"--strategy is {request.strategy}", f"use one of {', '.join(accelerate_files())}")
    if not re.fullmatch(r"[\w.+-]+", request.job_name):
        raise ConfigError(f"--job-name is {request.job_name!r}", "use letters, digits and . _ + - alone")
    for option in request.sbatch:
        if not re.fullmatch(r"--[a-z-]+(=.*)?", option):
            raise ConfigError(f"--sbatch is {option!r}", "give one long option of sbatch, e.g. --sbatch=--mem=64G")
        name = option.removeprefix("--").partition("=")[0]
        if name in OURS:
            raise ConfigError(f"--sbatch is {option!r}, which the batch script depends on", OURS[name])
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
    zero = re.match(r"zero\d", request.launch_file)
    if zero and config.parallel.strategy not in ("auto", zero[0]):
        raise ConfigError(
            f"parallel.strategy is {config.parallel.strategy}, but --strategy is {request.strategy}",
            "drop parallel.strategy: the launch file decides it",
        )
    if zero:
        config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"strategy": zero[0]})})
    make_plan(config, world)
    if folder.exists:
        folder.check_resumable(config)


def _idle(processes: int, episodes: int) -> str | None:
    """Each episode is one process's: where there are fewer, some processes wait for others in every step."""
    if processes <= episodes:
        return None
    many = f"{episodes} episode{'s' * (episodes != 1)}"
    return (
        f"{processes} processes share {many} a meta-step: {processes - episodes} have nothing to do; "
        f"set train.episodes_per_step={processes} or a multiple of it, or ask for less"
    )


def _check_container(request: SlurmRequest, here: Path, needed: Mapping[str, Path]) -> None:
    """A run folder inside the container alone would be gone with each job, and the run begin anew in the next one."""
    if not request.container:
        return
    mounts = [mount.split(":") for mount in (request.container_mounts or "").split(",") if mount]
    seen = [here, *(Path(mount[min(1, len(mount) - 1)]) for mount in mounts)]
    for name, path in needed.items():
        if not any(path.is_relative_to(folder) for folder in seen):
            raise ConfigError(
                f"{name} is {path}, which the container does not see",
                f"mount its folder, e.g. --container-mounts={path.parent}:{path.parent}",
            )


def _kept(overrides: Sequence[str]) -> list[str]:
    """Those that the batch script does not set itself."""
    return [word for word in overrides if not word.startswith(("run.dir=", "parallel.processes="))]


def _container(request: SlurmRequest, here: Path, launch: Path) -> list[str]:
    """Options of srun (pyxis): the folder that the job starts in and the launch files are always there inside."""
    if not request.container:
        return []
    asked = request.container_mounts.split(",") if request.container_mounts else []
    mounts = ",".join([*asked, f"{here}:{here}", f"{launch}:{launch}"])
    # pyxis takes a word without a slash in front for the name of an image in a registry.
    image = Path(request.container).resolve() if Path(request.container).is_file() else request.container
    return [f"--container-image={image}", f"--container-mounts={mounts}", f"--container-workdir={here}"]
