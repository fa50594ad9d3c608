"""How a run stands, from another terminal or machine: ``cml-dist status`` reads the run folder alone, without torch."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from cml_dist.errors import CheckpointError, CmlError
from cml_dist.run.folder import RunFolder, path_of, steps_in
from cml_dist.run.status import read_status
from cml_dist.telemetry import text
from cml_dist.telemetry.metrics import read_metrics
from cml_dist.telemetry.summary import TrainingSummary

RECENT = 50
"""Rates and means are over so many of the last meta-steps."""

SILENT_S = 120.0
"""A run that has not written its status for this long is taken for dead; it does so every ten seconds."""

GONE_S = 15.0
"""The same where its process is known to be gone."""

EXIT_CODES = {"finished": 0, "stopped": 75, "unknown": 3, "waiting": 3, "running": 3, "dead": 1, "failed": 1}
"""Of ``cml-dist status --check``; of several runs the one that comes last here counts."""

SWEEP_RECORD = "sweep.json"
"""In the folder of a sweep: what it is."""


def state_of(run_dir: str | Path) -> dict[str, Any]:
    """What ``status.json`` holds, with the state that is: ``state``, and ``reason`` in words, which may be empty.

    ``running``; ``stopped`` (and saved); ``finished``; ``failed``; ``dead``: its status says running, but nothing moves
    any more; ``waiting``: it has not begun, but its sweep has; ``unknown``: no run, or none that has a status. Of a run
    for each class split that of the worst of them.
    """
    folder = RunFolder(run_dir)
    folder.check_contained()
    status = read_status(folder.status_file)
    if status is None:
        with suppress(CmlError):
            if parts := folder.parts(folder.read_config()):
                return {"run_dir": str(run_dir), **_of_all([state_of(part) for part in parts])}
        if (folder.path.parent / SWEEP_RECORD).is_file():
            return {"run_dir": str(run_dir), "state": "waiting", "reason": ""}
        why = "no run has begun here: it has no status.json" if folder.path.is_dir() else "there is no such folder"
        return {"run_dir": str(run_dir), "state": "unknown", "reason": why}
    quiet_s = max(0.0, time.time() - _mtime(folder.status_file))
    state, reason = status.state, " ".join(status.reason.split())  # a library's error may have many lines
    if state == "running":
        gone = is_gone(status.host, status.pid)
        if quiet_s > (GONE_S if gone else SILENT_S):
            who = f"process {status.pid} on {status.host} is gone" if gone else f"was {reason or 'running'}"
            state, reason = "dead", f"nothing written for {text.duration(quiet_s)}, {who}"
    return {"run_dir": str(run_dir), **asdict(status), "state": state, "reason": reason, "quiet_s": quiet_s}


def is_gone(host: object, pid: object) -> bool:
    """Whether a process of this machine has ended, buried or not; of another machine nobody knows."""
    if host != socket.gethostname():
        return False
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True


def _of_all(parts: list[dict[str, Any]]) -> dict[str, str]:
    """State and reason of a run for each class split: of the split that needs attention most."""
    begun = [part for part in parts if part["state"] != "unknown"]
    rest = [{"state": "stopped", "reason": "the next has not begun"}] * (len(begun) < len(parts))
    worst = max(begun + rest, key=lambda part: list(EXIT_CODES).index(part["state"]))
    done = f"{[part['state'] for part in parts].count('finished')} of {len(parts)} splits finished"
    return {"state": worst["state"], "reason": f"{done}; {worst['reason']}".rstrip("; ")}


class RunView:
    """Everything that the folder tells; what is missing or torn is left out.

    Attributes:
        summary: of the last meta-steps.
        data: what ``--json`` prints: that of :func:`state_of` and ``last``, the last line of ``metrics.jsonl``;
            ``recent``, means over the last ``recent_steps``, and ``episodes_per_s`` of these; ``left_s`` to the last
            step, at the pace of the last start; ``validations``, their number, with the last and the best line in
            ``validated`` and ``best``; ``checkpoint``, the step of the newest, and ``checkpoint_age_s``; ``test``, the
            run's own; ``logs``, the folder.
    """

    def __init__(self, run_dir: str | Path) -> None:
        """Raises CheckpointError where what is read cannot be shown: somebody else wrote it."""
        try:
            self._read(run_dir)
            self.rows(), self.columns("")
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            what = f"the records in {run_dir} are damaged ({type(error).__name__}: {str(error)[:200]})"
            raise CheckpointError(what, "look at its .json and .jsonl files, and remove what no run wrote") from error

    def _read(self, run_dir: str | Path) -> None:
        self.data = data = state_of(run_dir)
        folder = RunFolder(run_dir)
        metrics = read_metrics(folder.metrics_file, last_bytes=1 << 16)[-RECENT:]
        name = "mse" if metrics and "mse" in metrics[-1] else "accuracy"
        self.summary = summary = TrainingSummary(data.get("steps", 0), window=RECENT, score_name=name)
        for record in metrics:
            summary.add(record)
        if metrics:
            measured = {key for line in metrics for key, value in line.items() if isinstance(value, float)}
            means = {key: summary.mean(key) for key in sorted(measured)}
            data |= {"last": metrics[-1], "recent_steps": len(metrics), "recent": means}
            data["episodes_per_s"] = summary.episodes_per_s
            data["step"] = max(summary.step, data.get("step", 0))
        if validations := read_metrics(folder.validation_file):
            scored = [line for line in validations if line.get("mean") is not None]
            best = (min if name == "mse" else max)(scored, key=lambda line: line["mean"], default=None)
            data |= {"validations": len(validations), "validated": validations[-1], "best": best}
        data["left_s"] = None
        sessions = read_metrics(folder.sessions_file)
        if sessions and "steps" in data and data["state"] != "finished":
            with suppress(ValueError):
                began_s = datetime.strptime(str(sessions[-1].get("time")), "%Y-%m-%dT%H:%M:%S%z").timestamp()
                done, elapsed_s = data["step"] - sessions[-1]["step"], _mtime(folder.metrics_file) - began_s
                if done > 0 and elapsed_s > 0:
                    data["left_s"] = (data["steps"] - data["step"]) * elapsed_s / done
        if kept := steps_in(folder.checkpoints):
            data["checkpoint"] = kept[-1]
            data["checkpoint_age_s"] = max(0.0, time.time() - _mtime(path_of(folder.checkpoints, kept[-1])))
        if (test := folder.own_test()) is not None:
            data["test"] = test
        if folder.logs.is_dir():
            data["logs"] = str(folder.logs)

    def rows(self) -> dict[str, str]:
        """The run in words, for a panel; what is not known has no row."""
        data, name = self.data, self.summary.score_name
        rows = {"state": data["state"] + (f" ({data['reason']})" if data["reason"] else "")}
        rows["method"] = data.get("method", "")
        if "step" in data:
            rows["step"] = f"{data['step']:,}"
        if "steps" in data:
            rows["step"] += f" of {data['steps']:,}, {100 * data['step'] / data['steps']:.1f} %"
        if data["left_s"]:
            paused = "" if data["state"] == "running" else " once it runs again"
            rows["time left"] = text.duration(data["left_s"]) + paused
        if "recent" in data:
            rows[f"last {data['recent_steps']} steps"] = ", ".join(self.summary.figures())
            rows["diagnostics"] = ", ".join(self.summary.details())
        if "validated" in data:
            best = f"; best {_scored(data['best'], name)}" if data["best"] else ""
            rows["validations"] = f"{data['validations']}, last {_scored(data['validated'], name)}{best}"
        if "started" in data:
            restart = f"; restart {data['restart']} of its job" if data["restart"] else ""
            rows["starts"] = f"{data['starts']}, the last {data['started']}{restart}"
            job = f", job {data['job']}" if data["job"] else ""
            rows["processes"] = f"{data['world']}, rank 0 is pid {data['pid']} on {data['host']}{job}"
        if "checkpoint" in data:
            rows["checkpoint"] = f"step {data['checkpoint']}, {text.duration(data['checkpoint_age_s'])} ago"
        if data.get("exit_s") is not None:
            rows["safe exit"] = f"within {text.number(data['exit_s'], 2)} s of a signal, so far"
        if data.get("test"):
            test = data["test"]
            shown, title = test.get("score", "accuracy"), test.get("method")
            named = (("meta", title or "meta-learner"), ("co", f"{title}-dagger" if title else "co-learner"))
            found = (
                f"{learner} {text.measured(shown, test[key].get('mean'), test[key].get('ci95'), 2)}"
                for key, learner in named
                if key in test
            )
            rows["test"] = f"{test.get('split')} split, step {test.get('step')}: {', '.join(found)}"
        rows["logs"] = data.get("logs", "")
        return {key: value for key, value in rows.items() if value}

    def columns(self, run: str) -> dict[str, object]:
        """The run as one line of a table, under the name ``run``; ``saved``: step of the newest checkpoint."""
        get, summary, name = self.data.get, self.summary, self.summary.score_name
        left_s = get("left_s") if get("state") == "running" else None
        return {
            "run": run,
            "method": get("method") or None,
            "state": get("state"),
            "step": get("step"),
            "of": get("steps"),
            "loss": text.number(summary.mean("loss")),
            "score": text.score(name, summary.mean(name)),
            "best": text.score(name, (get("best") or {}).get("mean")),
            "ep/s": text.number(summary.episodes_per_s, 3),
            "left": text.duration(left_s) if left_s else None,
            "starts": get("starts"),
            "saved": get("checkpoint"),
        }


def time_left(views: Sequence[RunView]) -> float | None:
    """Seconds to the last meta-step of all, by as many as run now; None: none does, or nobody knows."""
    timed = [view.data for view in views if "steps" in view.data and view.data.get("recent", {}).get("seconds")]
    states = [view.data["state"] for view in views]
    if not timed or "running" not in states:
        return None
    whole_s = sum(data["steps"] * data["recent"]["seconds"] for data in timed) / len(timed)
    begun = [data for data in timed if data["state"] != "finished"]
    rest_s = sum((data["steps"] - data["step"]) * data["recent"]["seconds"] for data in begun)
    return (rest_s + states.count("waiting") * whole_s) / states.count("running")


def _scored(line: dict[str, Any], name: str) -> str:
    return f"{text.measured(name, line.get('mean'), line.get('ci95'))} at step {line['step']}"


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
