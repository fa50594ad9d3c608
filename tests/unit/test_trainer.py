"""The training loop on one process: resume, skipped steps, damage, refusals, and what a run leaves behind."""

from __future__ import annotations

import errno
import importlib.metadata
import io
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

import cml_dist
from cml_dist.cli import main
from cml_dist.config.load import merge, parse_config
from cml_dist.data.sinusoid import SinusoidDomain
from cml_dist.distributed import strategy as strategies
from cml_dist.distributed.failure import Failure
from cml_dist.distributed.heartbeat import Heartbeat, this_heartbeat
from cml_dist.distributed.optim import build_optimizer
from cml_dist.distributed.world import World, set_arithmetic
from cml_dist.errors import (
    CheckpointError,
    ConfigError,
    DeviceMemoryError,
    NetworkError,
    TrainingError,
    WorldError,
)
from cml_dist.run import checkpoint as checkpoints
from cml_dist.run import folder as folders
from cml_dist.run import session as sessions
from cml_dist.run.assemble import assemble
from cml_dist.run.export import Wanted, export_again
from cml_dist.run.folder import run_config
from cml_dist.run.hooks import nothing
from cml_dist.run.report import evaluate_run
from cml_dist.run.status import read_status
from cml_dist.run.trainer import train
from cml_dist.telemetry.console import Console
from cml_dist.telemetry.metrics import read_metrics

BASE = {
    "domain": {"name": "sinusoid", "shots": 5, "queries": 5},
    "model": {"backbone": "mlp", "hidden": [8, 8], "colearner": {"depth": 1}},
    "method": {"gamma": 0.2, "inner_steps": 2},
    "train": {"steps": 12, "episodes_per_step": 3},
    "eval": {"every": 5, "val_episodes": 4, "episodes": 6},
    "checkpoint": {"every": 4},
    "engine": {"name": "graph"},  # with "auto" each start would first measure its memory
    "parallel": {"threads": 1},
    "run": {"log_every": 4},
}
ALONE = World(accelerator=None, rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
TIMES = ("seconds", "episodes_per_s", "peak_memory_gib")


def configure(folder, *overrides):
    return parse_config(merge(BASE, [f"run.dir={folder}", *overrides]))


def go(folder, *overrides, on_step=nothing):
    return train(configure(folder, *overrides), Console(quiet=True), on_step=on_step)


def losses(folder):
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(folder / "metrics.jsonl")]


def final_params(folder):
    return checkpoints.load(checkpoints.path_of(folder / "checkpoints", 12)).params()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert go(folder).finished
    return folder


def at(step, what, act):
    """A hook that does something where ``what`` happens after ``step`` meta-steps, the first time."""
    left = [act]

    def on_step(done, happened):
        if (done, happened) == (step, what) and left:
            left.pop()()

    return on_step


def stop_after(step, name="SIGINT"):
    """As if a signal came while meta-step ``step`` runs."""
    return at(step - 1, "episode", lambda: signal.raise_signal(signal.Signals[name]))


def failing(error):
    def fail():
        raise error

    return fail


class Listening(Console):
    """Keeps the warnings."""

    def __init__(self):
        super().__init__(quiet=True)
        self.warnings = []

    def warn(self, message):
        self.warnings.append(message)


# --------------------------------------------------------------------------- what a run leaves


def test_a_run_leaves_what_was_promised(undisturbed):
    lines = losses(undisturbed)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert all(line["loss"] == pytest.approx(line["outer_loss"] + 0.2 * line["colearner_loss"]) for line in lines)
    assert all(line["grad_norm"] > 0 for line in lines)
    cosines = {line["step"]: line["gradient_cosine"] for line in lines if line.get("gradient_cosine") is not None}
    assert set(cosines) == {4, 8, 12} and all(-1 <= cosine <= 1 for cosine in cosines.values())  # run.log_every
    report = json.loads((undisturbed / "eval.json").read_text())
    scores = np.load(undisturbed / "eval_scores.npz")
    for learner in ("meta", "co"):
        assert report[learner]["episodes"] == 6
        assert report[learner]["mean"] == pytest.approx(scores[learner].mean())
        assert report[learner]["ci95"] == pytest.approx(2.570582 * scores[learner].std(ddof=1) / 6**0.5)  # t of 5
    assert set(report["untrained"]) == {"meta", "co"}
    validated = [json.loads(line) for line in (undisturbed / "validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in validated] == [5, 10, 12]
    best = min(validated, key=lambda line: line["mean"])
    assert report["step"] == best["step"]
    assert best["step"] in checkpoints.steps_in(undisturbed / "checkpoints")
    assert (undisturbed / "config.yaml").is_file()
    card = (undisturbed / "export" / "README.md").read_text()
    assert "5-point regression" in card and "labels = np.random.rand(10, 1)" in card and "tabular-regression" in card
    assert "image" not in card and "BatchNorm" not in card
    session = json.loads((undisturbed / "sessions.jsonl").read_text().splitlines()[0])
    assert "commit" in session and "changed" not in session
    assert session["versions"]["torch"] == torch.__version__.split("+")[0] or session["versions"]["torch"]


def test_a_finished_run_is_not_trained_again(undisturbed, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(undisturbed, folder)
    before = losses(folder)
    assert go(folder).finished
    assert losses(folder) == before


# --------------------------------------------------------------------------- resume


@pytest.mark.parametrize("step", [1, 5, 7])
def test_resume_is_exact(undisturbed, tmp_path, step):
    folder = tmp_path / "run"
    outcome = go(folder, on_step=stop_after(step))
    assert (outcome.step, outcome.finished) == (step, False)
    assert not (folder / "eval.json").exists()
    assert go(folder).finished
    assert losses(folder) == losses(undisturbed)
    ours, theirs = (checkpoints.path_of(run / "checkpoints", 12).read_bytes() for run in (folder, undisturbed))
    assert ours == theirs
    assert json.loads((folder / "eval.json").read_text()) == json.loads((undisturbed / "eval.json").read_text())


def test_a_killed_run_loses_only_the_steps_since_its_checkpoint(undisturbed, tmp_path):
    """Killed at step 7 without a word: metrics 5 to 7 are there, the checkpoint is of step 5."""
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        go(folder, on_step=at(7, "episode", failing(KeyboardInterrupt)))
    assert len(losses(folder)) == 7
    assert go(folder).finished
    assert losses(folder) == losses(undisturbed)


def test_a_run_killed_in_a_validation_loses_nothing(undisturbed, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        go(folder, on_step=at(10, "testing", failing(KeyboardInterrupt)))
    assert checkpoints.load_newest(folder / "checkpoints").step == 10
    assert go(folder).finished
    assert losses(folder) == losses(undisturbed)
    for name in ("validation.jsonl", "eval.json"):
        assert (folder / name).read_text() == (undisturbed / name).read_text()


@pytest.mark.parametrize("asked", [3, 12, 20])
def test_a_stop_between_tested_episodes_loses_nothing(undisturbed, tmp_path, asked):
    """Asked in the first validation, in the last one, and in the final test: each is done again."""
    folder, tested = tmp_path / "run", []

    def on_step(step, what):
        if what == "testing":
            tested.append(step)
            if len(tested) == asked:
                signal.raise_signal(signal.SIGUSR1)

    outcome = go(folder, on_step=on_step)
    assert not outcome.finished and outcome.exit_code == 75 and len(tested) == asked
    status = read_status(folder / "status.json")
    assert (status.state, status.reason, status.step, status.steps) == ("stopped", "SIGUSR1", outcome.step, 12)
    assert go(folder).finished
    assert losses(folder) == losses(undisturbed)
    for name in ("validation.jsonl", "eval.json"):
        assert (folder / name).read_text() == (undisturbed / name).read_text()


def test_patience_ends_a_run_at_the_same_step_whatever_interrupts_it(tmp_path):
    whole, folder, said = tmp_path / "whole", tmp_path / "run", io.StringIO()
    patient = ("optim.lr=0.03", "eval.every=2", "train.steps=30", "train.patience=3")
    ended = go(whole, *patient)
    lines = [json.loads(line) for line in (whole / "validation.jsonl").read_text().splitlines()]
    best = min(lines, key=lambda line: line["mean"])
    assert ended.finished and ended.step == lines[-1]["step"] < 30 and lines.index(best) == len(lines) - 4
    for stops in (stop_after(ended.step - 1), at(ended.step, "testing", lambda: signal.raise_signal(signal.SIGUSR1))):
        assert not go(folder, *patient, on_step=stops).finished
    for console in (Console(quiet=True), Console(said)):  # the second of them finds it finished
        assert train(configure(folder, *patient), console) == ended
        assert losses(folder) == losses(whole)
        for name in ("validation.jsonl", "eval.json", f"checkpoints/step-{ended.step:08d}.safetensors"):
            assert (folder / name).read_bytes() == (whole / name).read_bytes()
    why = f"no gain in 3 validations, best at step {best['step']}"
    assert f"Training ended at step {ended.step} of 30: {why}; raise train.patience to go on" in said.getvalue()
    status = read_status(folder / "status.json")
    assert (status.state, status.reason, status.step) == ("finished", why, ended.step)
    assert go(folder, *patient, "train.patience=null", f"train.steps={ended.step + 2}").step == ended.step + 2


def test_minutes_make_checkpoints_too_and_change_nothing(undisturbed, tmp_path):
    folder, saved = tmp_path / "run", []
    go(folder, "checkpoint.every_minutes=1e-9", on_step=lambda step, what: saved.append(step) if what == "saved" else 0)
    assert set(saved) == set(range(1, 13))
    assert losses(folder) == losses(undisturbed)


def test_the_status_tells_how_a_run_stands_also_in_a_long_step(undisturbed, tmp_path, monkeypatch):
    status = read_status(undisturbed / "status.json")
    assert (status.state, status.step, status.steps, status.world, status.starts) == ("finished", 12, 12, 1, 1)
    assert status.exit_s > 0
    folder, wanted = tmp_path / "run", [("training", 4), ("validating step 5", 5), ("training", 6)]

    def on_step(step, what):
        if what in ("episode", "testing") and wanted and step == wanted[0][1]:
            told, ends_s = wanted.pop(0), time.monotonic() + 60
            while (status := read_status(folder / "status.json")) is None or (status.reason, status.step) != told:
                assert time.monotonic() < ends_s
                time.sleep(0.01)
            assert status.state == "running"
            if step == 6:
                raise TrainingError("the sky fell", "look up")

    monkeypatch.setattr(sessions, "STATUS_S", 0.01)
    with pytest.raises(TrainingError):
        go(folder, on_step=on_step)
    status = read_status(folder / "status.json")
    assert not wanted and (status.state, status.reason, status.step) == ("failed", "the sky fell; look up", 6)


def test_the_last_word_is_that_of_the_watch(tmp_path):
    """It ends the process from a thread of its own, while the main thread may be about to say that all is well."""
    folder = tmp_path / "run"

    def lose():
        failure = Failure((1,), "rank 1 was killed")
        thread = threading.Thread(target=this_heartbeat().at_end, args=(failure,), name="heartbeat")
        thread.start()
        thread.join()

    go(folder, on_step=at(6, "episode", lose))
    status = read_status(folder / "status.json")
    assert (status.state, status.reason, status.step) == ("failed", "rank 1 was killed", 6)
    assert not list(folder.glob(".*writing*"))


def test_the_watch_hears_of_every_pass_through_the_network(tmp_path, monkeypatch):
    heard = Counter()
    monkeypatch.setattr(Heartbeat, "touch", lambda self: heard.update([self._at[0]]))
    steps = ("train.steps=1", "method.inner_steps=3", "engine.name=adjoint", "engine.micro_batch=2")
    go(tmp_path / "run", *steps, "eval.val_episodes=2", "eval.final=false")
    # Of 5 support and 5 query examples, in threes: three inner steps, the query set, and three steps back.
    assert [heard[f"step 1, episode {number} of 3"] for number in (1, 2, 3)] == 3 * [7 * 3]
    assert heard["val, episode 1 of 2"] == 4 * 3


def goes_on_elsewhere(folder, monkeypatch):
    """As if the job were requeued on another node, and ran to its end there, while this start is cut off."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")

    def elsewhere():
        with monkeypatch.context() as patch:
            patch.setenv("SLURM_RESTART_COUNT", "1")
            assert go(folder).finished

    return elsewhere


def test_a_trainer_that_was_cut_off_while_it_saved_deletes_nothing(tmp_path, monkeypatch):
    """Its write hung until the job went on elsewhere: what lies there now is not its own."""
    folder, left = tmp_path / "run", []
    elsewhere = goes_on_elsewhere(folder, monkeypatch)

    def hang():
        elsewhere()
        (folder / "checkpoints" / ".step-00000013.safetensors.writing-elsewhere").write_bytes(b"")
        left.extend(sorted(path.name for path in (folder / "checkpoints").iterdir()))

    with pytest.raises(CheckpointError, match="a later start of this run has taken over"):
        go(folder, on_step=at(8, "saved", hang))
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == left


@pytest.mark.parametrize(
    ("step", "what"), [(0, "assembled"), (6, "episode"), (10, "testing"), (12, "validated"), (12, "tested")]
)
def test_a_trainer_whose_job_was_requeued_elsewhere_writes_nothing_more(tmp_path, monkeypatch, step, what):
    """Wherever the job goes on elsewhere, to its end: nothing that this one leaves behind is new."""
    folder, left = tmp_path / "run", {}
    elsewhere = goes_on_elsewhere(folder, monkeypatch)

    def files():
        found = [path for path in folder.rglob("*") if path.is_file() and not {path.name, path.parent.name} & {"logs"}]
        return {path: (path.stat().st_ino, path.read_bytes()) for path in found}

    def requeued():
        elsewhere()
        left.update(files())

    with pytest.raises(CheckpointError, match="a later start of this run has taken over"):
        go(folder, on_step=at(step, what, requeued))
    assert {"eval.json", "0001-own.json", "model.json", "sessions.jsonl"} <= {path.name for path in left}
    assert files() == left
    assert [line["step"] for line in losses(folder)] == list(range(1, 13))
    status = read_status(folder / "status.json")
    assert (status.state, status.restart) == ("finished", 1)


@pytest.mark.parametrize("shared", [True, False])
def test_another_machine_opens_the_checkpoint_that_rank_0_has_chosen_once_it_sees_it(
    undisturbed, tmp_path, monkeypatch, shared
):
    """The view of another rank: rank 0's word comes by ``gather``, the file a moment later, or never."""
    source = checkpoints.load_newest(undisturbed / "checkpoints")
    target, rank_0 = tmp_path / source.path.name, []
    monkeypatch.setattr(World, "run_on_all_ranks", lambda self, work: work())
    monkeypatch.setattr(World, "gather", lambda self, value: rank_0 or [value])
    rank_0.append(((str(target), source.sha256), "said", ["step 13 is damaged"]))
    warned: list[str] = []
    monkeypatch.setattr(folders, "SEEN_WITHIN_S", 60.0 if shared else 0.3)
    if shared:
        whole = shutil.copy(source.path, tmp_path / "whole")  # a checkpoint appears at once, as the trainer writes it
        threading.Timer(0.3, lambda: os.replace(whole, target)).start()
        found, said = checkpoints.on_all_ranks(replace(ALONE, rank=1, size=2), failing(AssertionError), warned.append)
        assert (found.path, found.step, said) == (target, 12, "said")
    else:
        with pytest.raises(NetworkError, match=rf"does not see {target}, which rank 0 has made; put run.dir on"):
            checkpoints.on_all_ranks(replace(ALONE, rank=1, size=2), failing(AssertionError), warned.append)
    assert warned == ["step 13 is damaged"], "each rank's log has it"


def test_a_truncated_checkpoint_is_passed_over_and_said(undisturbed, tmp_path):
    folder = tmp_path / "run"
    go(folder, on_step=stop_after(7))
    newest = checkpoints.path_of(folder / "checkpoints", 7)
    newest.write_bytes(newest.read_bytes()[:100])
    console = Listening()
    assert train(configure(folder), console).finished
    assert any(newest.name in message and "damaged" in message for message in console.warnings)
    assert losses(folder) == losses(undisturbed)


def test_a_damaged_checkpoint_never_pushes_out_a_good_one(tmp_path):
    """With one kept: a damaged step 8 is no longer the newest once step 5 is resumed."""
    folder = tmp_path / "run"
    go(folder, "checkpoint.keep_last=1", "eval.every=0", on_step=stop_after(8))
    good = checkpoints.load(checkpoints.path_of(folder / "checkpoints", 8))
    tensors = ((name, good.read(name)) for name in good.layout)
    checkpoints.save(ALONE, folder / "checkpoints", 5, good.state, good.layout, tensors)
    checkpoints.path_of(folder / "checkpoints", 8).write_bytes(b"cut off")
    go(folder, "checkpoint.keep_last=1", "eval.every=0", on_step=stop_after(6))
    assert checkpoints.steps_in(folder / "checkpoints") == [6]
    assert (folder / "checkpoints" / "step-00000008.safetensors.damaged").exists()
    assert checkpoints.load_newest(folder / "checkpoints").step == 6


def test_a_double_precision_run_can_be_used(tmp_path):
    import cml_dist

    go(tmp_path / "run", "run.precision=fp64", "train.steps=1")
    x = np.linspace(-1, 1, 5)
    assert cml_dist.load(tmp_path / "run").adapt(x[:, None], x).predict(x[:, None]).shape == (5, 1)


def test_export_refuses_another_network(undisturbed, tmp_path):
    with pytest.raises(CheckpointError, match="another network"):
        config = run_config(str(undisturbed), ["model.hidden=[8, 9]"])
        export_again(config, Wanted("best", str(tmp_path / "out")), Console(quiet=True))


def test_a_checkout_that_is_not_installed_trains(tmp_path, monkeypatch):
    real = importlib.metadata.version

    def version(name):
        if name == "cml-dist":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert go(tmp_path / "run", "train.steps=1", "eval.final=false").finished
    (session,) = map(json.loads, (tmp_path / "run" / "sessions.jsonl").read_text().splitlines())
    assert session["versions"]["cml_dist"] == cml_dist.__version__


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.25 GiB "
            "is free. Process 7 has 77.86 GiB memory in use.",
            "the GPU's memory ran out (cpu): 2.00 GiB were asked for, 1.25 GiB of 79.11 GiB were free",
        ),
        ("something new", "the GPU's memory ran out (cpu)"),
    ],
)
def test_memory_that_runs_out_is_one_line_with_the_remedy(tmp_path, said, told):
    full = at(0, "episode", failing(torch.OutOfMemoryError(said)))
    with pytest.raises(DeviceMemoryError, match="set memory.budget_gib below what is free") as raised:
        go(tmp_path / "run", on_step=full)
    assert raised.value.what == told
    assert read_status(tmp_path / "run" / "status.json").reason.startswith(told)


def test_a_longer_run_goes_on_from_a_shorter_one(undisturbed, tmp_path):
    folder = tmp_path / "run"
    go(folder, "train.steps=6", "eval.final=false")
    assert go(folder).finished
    assert losses(folder) == losses(undisturbed)
    _, second = read_metrics(folder / "sessions.jsonl")
    assert second["changed"] == {"train.steps": [6, 12], "eval.final": [False, True]}


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("train.steps=11", "holds a run of 12 meta-steps, but train.steps is 11; set train.steps=12 or more"),
        ("run.seed=1", "run.seed was 0, is 1"),
        ("eval.seed=1", "eval.seed was 0, is 1"),
        ("domain.draw=1", "domain.draw was 2, is 1"),
    ],
)
def test_the_record_of_a_finished_run_stays_that_of_its_weights(undisturbed, asked, told):
    files = ("config.yaml", "sessions.jsonl", "status.json", "eval.json")
    before = [(undisturbed / name).read_bytes() for name in files]
    with pytest.raises(CheckpointError, match=told):
        go(undisturbed, asked)
    assert [(undisturbed / name).read_bytes() for name in files] == before


def test_a_run_goes_on_by_the_versions_of_rules_that_it_began_with(tmp_path):
    """Also where its files are older than the settings that name them; a checkpoint knows its own."""
    folder = tmp_path / "run"
    earlier = ("domain.noise=0.1", "domain.draw=1", "optim.schedule=step", "optim.step_every=2", "optim.warmup_steps=3")
    go(tmp_path / "whole", *earlier, "optim.step_from=start", "eval.final=false")
    go(folder, *earlier, "optim.step_from=start", "train.steps=6", "eval.final=false")
    file = folder / "config.yaml"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if "draw:" not in line and "step_from" not in line))
    asked = [setting for setting in earlier if "draw" not in setting]
    assert go(folder, *asked, "eval.final=false").finished
    assert losses(folder) == losses(tmp_path / "whole")
    assert "draw: 1" in file.read_text() and "step_from: start" in file.read_text()
    file.write_text(file.read_text().replace("draw: 1", "draw: 2"))
    with pytest.raises(CheckpointError, match="'domain.draw': 1.*config.yaml says.*'domain.draw': 2"):
        go(folder, *asked, "eval.final=false")


def test_a_changed_configuration_is_refused_with_the_difference(undisturbed):
    with pytest.raises(CheckpointError, match=r"optim.lr was 0.001, is 0.1.*another run.dir"):
        go(undisturbed, "optim.lr=0.1")
    with pytest.raises(CheckpointError, match="domain.shots was 5, is 4"):
        go(undisturbed, "domain.shots=4")
    with pytest.raises(CheckpointError, match="train.steps"):
        go(undisturbed, "train.steps=20", "optim.schedule=cosine")


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(CheckpointError, match="not empty"):
        go(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("begun", [True, False])
def test_two_trainers_in_one_folder_are_refused(tmp_path, begun):
    import fcntl

    folder = tmp_path / "run"
    if begun:
        go(folder, "train.steps=1", "eval.final=false")
    else:
        folder.mkdir()
    with open(folder / "lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="another process trains"):
            go(folder, "train.steps=1", "eval.final=false")
    assert (folder / "lock").exists()  # the other's


def test_a_checkpoint_of_another_network_is_refused(undisturbed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("- 8\n  - 8", "- 8\n  - 9"))
    with pytest.raises(CheckpointError, match="another network: body"):
        go(folder, "model.hidden=[8, 9]")


# --------------------------------------------------------------------------- faults


def poison(monkeypatch, bad_steps, batch=3):
    """NaN in the support inputs of one episode of some meta-steps."""
    episode = SinusoidDomain.episode

    def poisoned(self, split, index):
        made = episode(self, split, index)
        if split == "train" and index // batch in bad_steps and index % batch == 1:
            made.support.inputs[0] = float("nan")
        return made

    monkeypatch.setattr(SinusoidDomain, "episode", poisoned)


def test_a_non_finite_step_is_skipped_and_counted(tmp_path, monkeypatch):
    poison(monkeypatch, {2, 3})
    folder = tmp_path / "run"
    moved = []
    apply = strategies.DataParallel.apply

    def watched(self, lr, clip_norm):
        before = [p.detach().clone() for p in self.model.values]
        result = apply(self, lr, clip_norm)
        moved.append(any(not torch.equal(a, b) for a, b in zip(before, self.model.values, strict=True)))
        return result

    monkeypatch.setattr(strategies.DataParallel, "apply", watched)
    assert go(folder).finished
    assert [line["step"] for line in losses(folder) if line["skipped"]] == [3, 4]
    assert [i + 1 for i, m in enumerate(moved) if not m] == [3, 4]
    assert checkpoints.load(checkpoints.path_of(folder / "checkpoints", 12)).state["skipped"] == 2


@pytest.mark.parametrize(
    ("first", "settings", "remedy"),
    [
        (5, [], "a lower method.inner_lr or optim.lr, or with optim.clip_norm; the checkpoint of step 5 stays in {}"),
        (5, ["optim.clip_norm=1"], "a lower method.inner_lr or optim.lr; the checkpoint of step 5 stays in {}"),
        (1, ["method.head_lr=0.1", "method.body_lr=0.1", "optim.clip_norm=1"],
         "a lower method.head_lr or method.body_lr or optim.lr"),
        (0, [], "a lower method.inner_lr"),  # nothing was ever stepped by optim.lr, or clipped
    ],
)  # fmt: skip
def test_too_many_non_finite_steps_in_a_row_end_the_run(tmp_path, monkeypatch, first, settings, remedy):
    poison(monkeypatch, {first, first + 1, first + 2})
    folder = tmp_path / "run"
    with pytest.raises(TrainingError, match=f"3 steps in a row, up to step {first + 3}") as raised:
        go(folder, "train.max_nonfinite=3", "checkpoint.every=5", *settings)
    assert raised.value.remedy == "train in another run.dir with " + remedy.format(folder / "checkpoints")


def test_a_full_disk_ends_the_run_and_loses_nothing(undisturbed, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    replace = os.replace

    def full(source, target):
        if "step-00000008" in str(target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(CheckpointError, match=r"No space left.*step 5 stays good"):
            go(folder)
    assert go(folder).finished
    assert losses(folder) == losses(undisturbed)


def test_the_world_that_was_asked_for_is_checked(tmp_path):
    with pytest.raises(WorldError, match="asks for 3 processes, but the world has 1"):
        go(tmp_path / "run", "parallel.processes=3")
    assert not (tmp_path / "run").exists()


def test_a_missing_gpu_is_said(tmp_path):
    with pytest.raises(WorldError, match="run.device is cuda"):
        go(tmp_path / "run", "run.device=cuda")


def test_tf32_is_refused_where_it_is_not(tmp_path, monkeypatch):
    """Before anything else: no folder is made."""
    asked = "run.precision=tf32"
    with pytest.raises(WorldError, match="run.precision is tf32, which the CPU does not have") as found:
        go(tmp_path / "run", asked)
    assert "run.precision=fp32" in found.value.remedy
    with pytest.raises(ConfigError, match="which no CPU has, but run.device is cpu: set run.precision=fp32"):
        configure(tmp_path / "run", asked, "run.device=cpu")
    gpu = {"is_available": True, "device_count": 1, "get_device_capability": (7, 0), "get_device_name": "Tesla V100"}
    for name, value in gpu.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    with pytest.raises(WorldError, match=r"which Tesla V100 \(compute capability 7.0, below 8.0\) does not have"):
        go(tmp_path / "run", asked)
    assert not (tmp_path / "run").exists()


def test_tf32_is_taken_where_it_is_asked_for_alone(tmp_path):
    found = {}
    for precision in ("tf32", "fp32"):
        set_arithmetic(configure(tmp_path, f"run.precision={precision}"), ALONE)
        found[precision] = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    assert found == {"tf32": (True, True), "fp32": (False, False)}
    assert configure(tmp_path, "run.precision=tf32").run.dtype == "float32"


# --------------------------------------------------------------------------- methods, evaluation, command line


@pytest.mark.parametrize("clip_norm", ["null", "0.1"])
def test_gamma_zero_is_maml_to_the_bit(tmp_path, clip_norm):
    """Also where clipping is at work: phi's gradient of zeros must not change the bits of the norm."""
    settings = ("method.gamma=0", "model.hidden=[8, 8, 8, 8]", "eval.final=false", f"optim.clip_norm={clip_norm}")
    go(tmp_path / "cml", *settings)
    go(tmp_path / "maml", *settings, "method.name=maml")
    ours, maml = (final_params(tmp_path / name) for name in ("cml", "maml"))
    assert all(torch.equal(ours[n], maml[n]) for n in maml)
    assert set(ours) > set(maml)
    for a, b in zip(losses(tmp_path / "cml"), losses(tmp_path / "maml"), strict=True):
        assert (a["outer_loss"], a["mse"], a["grad_norm"]) == (b["outer_loss"], b["mse"], b["grad_norm"])
        assert a["grad_norm"] > 0.1


def test_engines_train_alike(undisturbed, tmp_path):
    for engine in ("graph", "adjoint"):
        go(tmp_path / engine, f"engine.name={engine}", "run.precision=fp64", "eval.final=false", "optim.name=sgd")
    a, b = (final_params(tmp_path / engine) for engine in ("graph", "adjoint"))
    assert max((a[n] - b[n]).abs().max().item() for n in a) < 1e-12


def test_workers_change_nothing(undisturbed, tmp_path):
    go(tmp_path / "run", "domain.workers=1")
    assert losses(tmp_path / "run") == losses(undisturbed)


def test_a_run_that_fails_leaves_no_worker(tmp_path):
    """Python would wait at its end for one that a traceback keeps."""
    with pytest.raises(OSError, match="boom") as caught:
        go(tmp_path / "run", "domain.workers=1", on_step=at(3, "step", failing(OSError("boom"))))
    assert caught.tb is not None and not multiprocessing.active_children()


def test_a_second_pass_asks_for_the_same_episodes_again_by_index(tmp_path, monkeypatch):
    """Sharp-MAML's upper level: each step's share twice, also after a resume; the outer steps by hand."""
    sharp = ("method.name=sharp_maml", "method.colearner=true", "method.radius=0.3", "train.steps=4")
    asked: list[int] = []
    episode = SinusoidDomain.episode

    def counted(self, split, index):
        asked.extend([index] * (split == "train"))
        return episode(self, split, index)

    config = configure(tmp_path / "run", *sharp)
    parts = assemble(config, ALONE, Console(quiet=True))
    model, optimizer = parts.model, build_optimizer(config.optim, parts.model)
    for step in range(4):
        indices = range(3 * step, 3 * step + 3)
        made = [parts.domain.prepare(parts.domain.episode("train", n), ALONE.device, parts.dtype) for n in indices]
        optimizer.zero_grad()
        model(made, 1 / 3, meta_step=step)[0].backward()
        optimizer.step()
    monkeypatch.setattr(SinusoidDomain, "episode", counted)
    go(tmp_path / "run", *sharp, on_step=stop_after(2))
    go(tmp_path / "run", *sharp)
    assert asked[: 3 * 4] == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]
    assert asked[-3 * 4 :] == [6, 7, 8, 6, 7, 8, 9, 10, 11, 9, 10, 11]
    found = checkpoints.load(checkpoints.path_of(tmp_path / "run" / "checkpoints", 4)).params()
    assert all(torch.equal(found[name], value) for name, value in model.params().items())


def test_testing_again_gives_the_same_figures(undisturbed, tmp_path):
    folder = tmp_path / "moved"
    shutil.copytree(undisturbed, folder)
    before = json.loads((folder / "eval.json").read_text())
    evaluate_run(run_config(str(folder), []), "best", Console(quiet=True))
    assert json.loads((folder / "eval.json").read_text()) == before
    kept = [json.loads((folder / "evals" / f"000{number}-own.json").read_text()) for number in (1, 2)]
    assert all(before.items() <= one.items() for one in kept)
    assert all(one.keys() - before.keys() == {"time", "versions", "commit", "checkpoint"} for one in kept)


def test_an_ensemble_is_of_the_best_validations_and_a_row_of_its_own(tmp_path):
    """Their checkpoints are kept; one that is lost is said, and the others are averaged."""
    folder = tmp_path / "run"
    few = ("eval.every=2", "eval.ensemble=3", "checkpoint.keep_last=1")
    go(folder, *few)
    report, scores = json.loads((folder / "eval.json").read_text()), np.load(folder / "eval_scores.npz")
    validated = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
    best = [line["step"] for line in sorted(validated, key=lambda line: line["mean"])[:3]]
    assert report["ensemble_steps"] == best and report["step"] == best[0]
    assert set(checkpoints.steps_in(folder / "checkpoints")) == {*best, 12}
    for learner in ("meta", "co"):
        assert report["ensemble"][learner]["mean"] == pytest.approx(scores[f"ensemble_{learner}"].mean())
    # A mean of outputs has no larger squared error than its members have in the mean; ours differ.
    members = []
    for step in best:
        evaluate_run(run_config(str(folder), []), str(step), Console(quiet=True))
        (file,) = (folder / "evals").glob(f"*-checkpoint={step}.json")
        members.append(json.loads(file.read_text()))
        assert "ensemble" not in members[-1]
    assert 0 < report["ensemble"]["meta"]["mean"] < sum(one["meta"]["mean"] for one in members) / 3
    checkpoints.path_of(folder / "checkpoints", best[1]).unlink()
    console = Listening()
    evaluate_run(run_config(str(folder), []), "best", console)
    assert json.loads((folder / "eval.json").read_text())["ensemble_steps"] == [best[0], best[2]]
    assert any("eval.ensemble is 3, but 2 of these checkpoints were kept" in line for line in console.warnings)


def test_a_test_with_other_settings_leaves_the_runs_own_figures(undisturbed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    before = (folder / "eval.json").read_bytes(), (folder / "eval_scores.npz").read_bytes()
    evaluate_run(run_config(str(folder), ["eval.episodes=9", "eval.co_adapt=released"]), "last", Console(quiet=True))
    name = "0002-checkpoint=last,eval.episodes=9,eval.co_adapt=released"
    report = json.loads((folder / "evals" / f"{name}.json").read_text())
    assert (report["meta"]["episodes"], report["step"], report["chosen"]) == (9, 12, "last")
    assert report["overrides"] == {"eval.episodes": 9, "eval.co_adapt": "released"}
    assert len(np.load(folder / "evals" / f"{name}.npz")["meta"]) == 9
    assert ((folder / "eval.json").read_bytes(), (folder / "eval_scores.npz").read_bytes()) == before


def exported(folder, *overrides, which="best"):
    export_again(run_config(str(folder), overrides), Wanted(which, str(folder / "out")), Console(quiet=True))
    return json.loads((folder / "out" / "model.json").read_text())["eval"], (folder / "out" / "README.md").read_text()


def test_a_card_claims_a_figure_only_for_the_task_that_was_tested(undisturbed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    own = json.loads((folder / "eval.json").read_text())
    evaluate_run(run_config(str(folder), ["domain.shots=3"]), "best", Console(quiet=True))
    figures, card = exported(folder)
    assert figures["meta"] == own["meta"]
    assert f"| {own['meta']['mean']:#.4g} ± {own['meta']['ci95']:#.4g} (6 episodes of the test split) |" in card
    for figures, card in (exported(folder, "domain.shots=3"), exported(folder, "eval.inner_steps=4")):
        assert figures is None and "| not tested |" in card
    own["overrides"] = {"domain.shots": 3}
    (folder / "eval.json").write_text(json.dumps(own))
    assert exported(folder)[0] is None


def test_what_is_damaged_is_passed_over_and_said_by_eval_and_export(undisturbed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    kept = checkpoints.steps_in(folder / "checkpoints")
    newest = checkpoints.path_of(folder / "checkpoints", kept[-1])
    newest.write_bytes(newest.read_bytes()[:-8])
    console = Listening()
    report = evaluate_run(run_config(str(folder), []), "last", console)
    assert (report["step"], report["chosen"]) == (kept[-2], "last")
    export_again(run_config(str(folder), []), Wanted("last", str(tmp_path / "out")), console)
    assert json.loads((tmp_path / "out" / "model.json").read_text())["step"] == kept[-2]
    assert len(console.warnings) == 2
    assert all(newest.name in w and "damaged" in w and "one before it is used" in w for w in console.warnings)


def test_without_a_validated_step_the_newest_is_called_last(tmp_path):
    folder = tmp_path / "run"
    go(folder, on_step=stop_after(3))
    assert evaluate_run(run_config(str(folder), []), "best", Console(quiet=True))["chosen"] == "last"
    assert json.loads((folder / "eval.json").read_text())["chosen"] == "last"


def test_a_missing_best_step_is_passed_over_and_said(undisturbed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    newest = checkpoints.load_newest(folder / "checkpoints")
    tensors = ((name, newest.read(name)) for name in newest.layout)
    state = {**newest.state, "best": {**newest.state["best"], "step": 2}}
    checkpoints.save(ALONE, folder / "checkpoints", 13, state, newest.layout, tensors)
    console = Listening()
    report = evaluate_run(run_config(str(folder), []), "best", console)
    assert (report["step"], report["chosen"]) == (13, "last")
    assert len(console.warnings) == 1 and "step-00000002.safetensors is missing" in console.warnings[0]


def test_run_config_refuses_what_is_no_run(tmp_path):
    with pytest.raises(CheckpointError, match="no run folder"):
        run_config(tmp_path, [])


def test_command_line_ends_in_one_clear_line(undisturbed, capfd):
    assert main(["train", "sinusoid", f"run.dir={undisturbed}", "domain.shots=0"]) == ConfigError.exit_code
    out, err = capfd.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and "domain.shots is 0" in err
    assert main(["eval", str(undisturbed / "nowhere")]) == 1
    assert "no run folder" in capfd.readouterr().err


class _Reads(TorchFunctionMode):
    """Counts what reads values of tensors: on a GPU the host would wait for it there."""

    READ = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "nonzero", "isfinite")

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ in self.READ:
            self.seen[func.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_a_step_waits_once_for_the_device(tmp_path):
    """For the norm; the metrics are on their way by then, and reading them waits for nothing more."""
    reads, by_step = _Reads(), []

    def on_step(step, what):
        if what == "step":
            by_step.append(dict(reads.seen))
        if what in ("started", "step"):
            reads.seen.clear()

    settings = ("eval.every=0", "eval.final=false", "checkpoint.every=100", "optim.name=sgd")
    with reads:  # torch's Adam has its count on the CPU, and reads it there
        go(tmp_path / "run", *settings, on_step=on_step)
    assert by_step == [{"tolist": 2}] * 12
