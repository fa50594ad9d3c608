"""What a run folder tells of its run, from another terminal or machine: read only, without torch."""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from cml_dist.run.folder import RunFolder
from cml_dist.run.status import RunStatus, read_status
from cml_dist.telemetry import text
from cml_dist.telemetry.metrics import read_tail

RECENT = 50
"""Rates and means are over so many of the last meta-steps."""

SILENT_S = 120.0
"""A run in which nothing was written for this long is taken for dead, unless its meta-steps are longer."""

GONE_S = 15.0
"""The same where its process is known to be gone."""

EXIT_CODES = {"finished": 0, "stopped": 75, "unknown": 3, "running": 3, "dead": 1, "failed": 1}
"""Of ``cml-dist status --check``; of several runs the one that comes last here counts."""

_CHECKPOINT = re.compile(r"step-(\d{8})\.safetensors")


@dataclass(frozen=True)
class RunView:
    """How a run stands.

    Attributes:
        run_dir: its folder.
        state: ``running``, ``stopped`` (and saved), ``finished``, ``failed``, ``dead`` (its status says running, but
            nothing moves any more) or ``unknown``.
        reason: of the state, in words; may be empty.
        method: what runs, as tables name it; empty in folders of earlier versions.
        step, steps: meta-steps done, and of the whole run.
        steps_per_s, episodes_per_s: over the last meta-steps, without validations.
        left_s: seconds to the last meta-step: at the pace of this start, validations included, where it runs; else at
            ``steps_per_s``.
        score_name: ``accuracy`` or ``mse``.
        last: the last line of ``metrics.jsonl``.
        recent: means over the last ``recent_steps`` meta-steps.
        validations: how many there were; ``validated`` is the last of them, ``best`` the best (lines of
            ``validation.jsonl``).
        starts: how often the run was started; ``restart`` is the scheduler's or launcher's count within its job.
        exit_s: seconds that a safe exit takes at most, as far as seen.
        quiet_s: seconds since anything was written.
        checkpoint, checkpoint_age_s: step and age of the newest one.
        test: ``evals/own.json``, where the run was tested.
        logs: folder of the ranks' logs, if there is one.
    """

    run_dir: str
    state: str
    reason: str = ""
    method: str = ""
    step: int | None = None
    steps: int | None = None
    steps_per_s: float | None = None
    episodes_per_s: float | None = None
    left_s: float | None = None
    score_name: str = "accuracy"
    last: dict[str, Any] | None = None
    recent: dict[str, float] = field(default_factory=dict)
    recent_steps: int = 0
    validations: int = 0
    validated: dict[str, Any] | None = None
    best: dict[str, Any] | None = None
    started: str | None = None
    starts: int = 0
    restart: int = 0
    exit_s: float | None = None
    world: int | None = None
    host: str | None = None
    pid: int | None = None
    job: str | None = None
    quiet_s: float | None = None
    checkpoint: int | None = None
    checkpoint_age_s: float | None = None
    test: dict[str, Any] | None = None
    logs: str | None = None

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.state]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def state_of(run_dir: str | Path) -> RunView:
    """State and step alone, which take no look at the metrics; see :func:`look`."""
    folder = RunFolder(run_dir)
    if not folder.path.is_dir():
        return RunView(str(run_dir), "unknown", "there is no such folder")
    status = read_status(folder.status_file)
    quiet_s = _quiet_s(folder)
    if status is None:
        return RunView(str(run_dir), *_state_without_status(folder), quiet_s=quiet_s)
    state, reason = _state(status, quiet_s, folder)
    return RunView(
        str(run_dir),
        state,
        " ".join(reason.split()),  # a library's error may have many lines
        method=status.method,
        step=status.step,
        steps=status.steps,
        started=status.started,
        starts=status.starts,
        restart=status.restart,
        exit_s=status.exit_s,
        world=status.world,
        host=status.host,
        pid=status.pid,
        job=status.job,
        quiet_s=quiet_s,
    )


def look(run_dir: str | Path) -> RunView:
    """Everything that the folder tells. What is missing, torn or of an earlier version leaves its fields empty."""
    brief = state_of(run_dir)
    folder = RunFolder(run_dir)
    if not folder.path.is_dir():
        return brief
    metrics = read_tail(folder.metrics_file)[-RECENT:]
    validations = read_tail(folder.validation_file, limit=1 << 24)
    sessions = read_tail(folder.sessions_file, limit=1 << 20)
    known = vars(brief).copy()
    if metrics:
        last = metrics[-1]
        known |= {"last": last, "recent": _means(metrics), "recent_steps": len(metrics)}
        known["step"] = max(last["step"], brief.step or 0)
        known["score_name"] = "mse" if "mse" in last else "accuracy"
        known |= _rates(metrics)
    if known["steps"] is None:
        known["steps"] = _asked_steps(folder)
    if sessions:
        known["started"] = brief.started or sessions[-1].get("time")
        known["starts"] = brief.starts or len(sessions)
        known["world"] = brief.world or sessions[-1].get("plan", {}).get("processes")
    if validations:
        known |= {
            "validations": len(validations),
            "validated": validations[-1],
            "best": _best(validations, known["score_name"]),
        }
    known["left_s"] = _left_s(known, sessions, folder)
    kept = _checkpoints(folder.checkpoints)
    if kept:
        known["checkpoint"], saved = max(kept)
        known["checkpoint_age_s"] = max(0.0, time.time() - saved)
    known["test"] = _read_json(folder.own_eval_file)
    if folder.logs.is_dir():
        known["logs"] = str(folder.logs)
    return RunView(**known)


def check_line(view: RunView) -> str:
    """One line for logs of batch scripts, e.g. ``runs/a: stopped after step 120 of 500 (SIGUSR1)``."""
    step = "" if view.step is None else f", step {view.step}/{view.steps}"
    return f"{view.run_dir}: {view.state}{step}" + (f" ({view.reason})" if view.reason else "")


def worst_exit_code(views: Iterable[RunView]) -> int:
    """The exit code of the run that needs attention most."""
    return max(views, key=lambda view: list(EXIT_CODES).index(view.state)).exit_code


def rows_of(view: RunView) -> dict[str, str]:
    """A run in words, for a panel; what is not known has no row."""
    score = view.score_name
    rows: dict[str, str | None] = {
        "state": view.state + (f" ({view.reason})" if view.reason else ""),
        "method": view.method,
        "step": _progress(view),
        "rate": view.steps_per_s
        and f"{text.number(view.steps_per_s, 3)} meta-steps/s, {text.number(view.episodes_per_s, 3)} episodes/s",
        "time left": None if view.left_s is None or view.step == view.steps else _left(view),
        f"last {view.recent_steps} steps": _metrics(view),
        "validations": view.validated
        and f"{view.validations}, last {_scored(view.validated, score)}"
        + (f"; best {_scored(view.best, score)}" if view.best else ""),
        "starts": view.started and _starts(view),
        "processes": view.world and _processes(view),
        "checkpoint": None
        if view.checkpoint is None
        else f"step {view.checkpoint}, {text.duration(view.checkpoint_age_s)} ago",
        "safe exit": None if view.exit_s is None else f"within {text.number(view.exit_s, 2)} s of a signal, so far",
        "test": view.test and _tested(view.test),
        "logs": view.logs,
    }
    return {name: value for name, value in rows.items() if value}


COLUMNS = ("run", "method", "state", "step", "of", "loss", "score", "best", "ep/s", "left", "starts", "saved")
"""Of the table of several runs; ``saved``: step of the newest checkpoint."""


def columns_of(view: RunView, name: str) -> tuple[object, ...]:
    """A run as one line of a table, under ``name``."""
    score = view.score_name
    return (
        name,
        view.method or text.MISSING,
        view.state,
        view.step,
        view.steps,
        text.number(view.recent.get("loss")),
        text.score(score, view.recent.get(score)),
        text.score(score, view.best and view.best["mean"]),
        text.number(view.episodes_per_s, 3),
        text.duration(view.left_s) if view.left_s and view.state == "running" else text.MISSING,
        view.starts or None,
        view.checkpoint,
    )


def names_of(views: Iterable[RunView]) -> tuple[str, list[str]]:
    """The folder that all runs lie in (or nothing), and their short names in it."""
    paths = [Path(view.run_dir) for view in views]
    parents = {path.parent for path in paths}
    if len(parents) == 1 and all(path.name for path in paths):
        return str(parents.pop()), [path.name for path in paths]
    return "", [str(path) for path in paths]


def _progress(view: RunView) -> str | None:
    if view.step is None:
        return None
    return f"{view.step:,}" + (f" of {view.steps:,}, {100 * view.step / view.steps:.1f} %" if view.steps else "")


def _left(view: RunView) -> str:
    return text.duration(view.left_s) + ("" if view.state == "running" else " once it runs again")


def _metrics(view: RunView) -> str | None:
    recent, score = view.recent, view.score_name
    parts = [
        f"loss {text.number(recent.get('loss'))}",
        f"{'MSE' if score == 'mse' else score} {text.score(score, recent.get(score))}",
    ]
    if f"colearner_{score}" in recent:
        parts.append(f"co-learner {text.score(score, recent[f'colearner_{score}'])}")
    if "grad_norm" in recent:
        parts.append(f"gradient norm {text.number(recent['grad_norm'], 3)}")
    if "gradient_cosine" in recent:
        parts.append(f"cosine {recent['gradient_cosine']:+.2f}")
    return ", ".join(parts) if view.recent_steps else None


def _scored(line: dict[str, Any], score: str) -> str:
    interval = f" {text.interval(score, line['ci95'])}" if line.get("ci95") is not None else ""
    return f"{text.score(score, line.get('mean'))}{interval} at step {line['step']}"


def _starts(view: RunView) -> str:
    words = f"{view.starts}, the last {view.started}"
    return words + (f"; restart {view.restart} of its job" if view.restart else "")


def _processes(view: RunView) -> str:
    words = str(view.world)
    if view.host:
        words += f", rank 0 is pid {view.pid} on {view.host}"
    return words + (f", job {view.job}" if view.job else "")


def _tested(test: dict[str, Any]) -> str | None:
    """The result of the final test, both learners."""
    score, title = test.get("score", "accuracy"), test.get("method")
    names = ("meta-learner", "co-learner") if title is None else (title, f"{title}-dagger")
    found = [
        f"{name} {text.score(score, test[key].get('mean'), 2)} {text.interval(score, test[key].get('ci95'), 2)}"
        for key, name in zip(("meta", "co"), names, strict=True)
        if isinstance(test.get(key), dict)
    ]
    return f"{test.get('split')} split, step {test.get('step')}: {', '.join(found)}" if found else None


# --------------------------------------------------------------------------- state


def _state(status: RunStatus, quiet_s: float, folder: RunFolder) -> tuple[str, str]:
    """The state that is, of the state that was written last."""
    if status.state != "running":
        return ("running", "starting") if _starts_again(folder) else (status.state, status.reason)
    gone = status.host == socket.gethostname() and not Path(f"/proc/{status.pid}").exists()
    patience_s = GONE_S if gone else max(SILENT_S, 3 * (status.exit_s or 0.0))
    if quiet_s <= patience_s or _held(folder):
        return "running", status.reason
    who = f"process {status.pid} on {status.host} is gone" if gone else f"was {status.reason or 'running'}"
    return "dead", f"nothing written for {text.duration(quiet_s)}, {who}"


def _starts_again(folder: RunFolder) -> bool:
    """Whether a later start than that of the status has the folder: it says nothing of itself until it is ready."""
    taken_s = _mtime(folder.path / "lock")
    if taken_s <= _mtime(folder.status_file):
        return False
    return time.time() - taken_s <= SILENT_S or _held(folder)


def _state_without_status(folder: RunFolder) -> tuple[str, str]:
    if not folder.exists:
        empty = not any(folder.path.iterdir())
        return "unknown", "the folder is empty" if empty else "no run has begun here"
    if folder.own_eval_file.is_file():
        return "finished", ""
    return "unknown", "it has no status.json: an earlier version ran it"


def _held(folder: RunFolder) -> bool:
    """Whether a process of this machine, also in a container, holds the lock: found out without taking it."""
    try:
        inode = os.stat(folder.path / "lock").st_ino
        locks = Path("/proc/locks").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    return any("FLOCK" in line and f":{inode} " in line for line in locks)


def _quiet_s(folder: RunFolder) -> float:
    """Seconds since anything was written: status every few seconds, metrics, logs and checkpoints between."""
    moving = (folder.status_file, folder.metrics_file, folder.validation_file)
    times = [_mtime(path) for path in (*moving, folder.checkpoints)]
    times += [_mtime(path) for path in folder.logs.glob("*.log")]
    return max(0.0, time.time() - max(times))


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


# --------------------------------------------------------------------------- figures


def _means(metrics: list[dict[str, Any]]) -> dict[str, float]:
    """Means of what was measured, without skipped steps."""
    values: dict[str, list[float]] = {}
    for record in metrics:
        for key, value in record.items():
            if isinstance(value, float) and not record.get("skipped"):
                values.setdefault(key, []).append(value)
    return {key: sum(found) / len(found) for key, found in values.items()}


def _rates(metrics: list[dict[str, Any]]) -> dict[str, float]:
    timed = [m for m in metrics if m.get("seconds") and m.get("episodes_per_s")]
    seconds = sum(m["seconds"] for m in timed)
    if not seconds:
        return {}
    episodes = sum(m["seconds"] * m["episodes_per_s"] for m in timed)
    return {"steps_per_s": len(timed) / seconds, "episodes_per_s": episodes / seconds}


def _left_s(known: dict[str, Any], sessions: list[dict[str, Any]], folder: RunFolder) -> float | None:
    step, steps = known["step"], known["steps"]
    if step is None or steps is None or known["state"] == "finished":
        return None
    rate = known["steps_per_s"]
    if known["state"] == "running" and sessions:
        done = step - sessions[-1]["step"]
        elapsed = _mtime(folder.metrics_file) - (_seconds(sessions[-1].get("time")) or 0.0)
        if done > 0 and elapsed > 0:
            rate = done / elapsed
    return (steps - step) / rate if rate else None


def _seconds(time_text: object) -> float | None:
    """A time of ``sessions.jsonl`` in seconds since 1970."""
    try:
        return datetime.strptime(str(time_text), "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except ValueError:
        return None


def _best(validations: list[dict[str, Any]], score_name: str) -> dict[str, Any] | None:
    sign = -1 if score_name == "mse" else 1
    return max((v for v in validations if v.get("mean") is not None), key=lambda v: sign * v["mean"], default=None)


def _asked_steps(folder: RunFolder) -> int | None:
    """``train.steps`` of a run without ``status.json``."""
    import yaml

    try:
        return int(yaml.safe_load(folder.config_file.read_text(encoding="utf-8"))["train"]["steps"])
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return None


def _checkpoints(folder: Path) -> list[tuple[int, float]]:
    """(step, time of writing) of each, by its name: the files themselves are not opened."""
    try:
        found = [(match, entry) for entry in os.scandir(folder) if (match := _CHECKPOINT.fullmatch(entry.name))]
    except OSError:
        return []
    return [(int(match.group(1)), _mtime(Path(entry.path))) for match, entry in found]


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
