"""Seeded mutations of every file that a stranger may send: each read ends well, or in one error that says why not.

    python benchmarks/mutations.py --count 10000 --commands 100 --seed 0 --json found.json

A case is a function of (kind, seed). Some mutations keep the outer format whole (JSON, YAML, checksums), so that what
reads the content is tried too. Cases run in forked batches; each is held to a time and a memory limit, and Python's
audit events must show no write outside of its folder, no process and no connection. With ``--commands`` the command
itself runs, in a forked process of its own: its exit code and what it prints count.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import io
import json
import os
import pickle
import pickletools
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from cml_dist import cli, load
from cml_dist.config.load import dump_config, load_config, read_yaml
from cml_dist.config.plan import make_plan
from cml_dist.config.schema import ImagesConfig
from cml_dist.data.images import ImageDomain
from cml_dist.data.pixels import as_png
from cml_dist.data.shard_writer import new_shard_set
from cml_dist.data.shards import ShardSet
from cml_dist.distributed.env import this_start
from cml_dist.distributed.world import World
from cml_dist.errors import CmlError
from cml_dist.nets.build import make_network
from cml_dist.run import checkpoint as checkpoints
from cml_dist.run.folder import RunFolder, run_config, steps_in
from cml_dist.run.lease import Lease
from cml_dist.tools.pack import pack
from cml_dist.tools.run_status import RunView

CASE_S, MEMORY_GIB, BATCH = 20, 12, 250
EVIL = (
    None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63), 10**400, 1e308, float("nan"), float("inf"), 0.5, "", "a", "0",
    "../../outside/x", "/tmp/outside", "pipe:touch outside", "file:///etc/passwd", "t[1-3].tar", "\x1b[2J", "a\nb",
    "\u202e", "\ud800", "x" * 5000, "my.py:Rule", "{}", "%s%n", "$(touch outside)", [], {}, [[]], [0], ["a"], {"a": 1},
    {"step": -1}, [1] * 1000,
)  # fmt: skip
"""What takes the place of a value."""


# --------------------------------------------------------------------------- mutations


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Bytes changed, cut, repeated or put in."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        place = rng.randrange(len(out) + 1)
        how = rng.randrange(5)
        if how == 0 and out:
            out[min(place, len(out) - 1)] ^= 1 << rng.randrange(8)
        elif how == 1:
            del out[place : place + rng.choice((1, 4, 64, len(out)))]
        elif how == 2:
            out[place:place] = rng.randbytes(rng.choice((1, 8, 512)))
        elif how == 3:
            out[place:place] = out[place : place + rng.choice((8, 64, 512))]
        else:
            out[place : place + 8] = rng.choice((b"\0" * 8, b"\xff" * 8, b"[" * 5000, b'{"a":' * 2000, b"9" * 5000))
    return bytes(out)


def evil(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(EVIL))


def changed(rng: random.Random, data: Any) -> Any:
    """A nested value with one to three of its parts replaced, removed, renamed or doubled."""
    data = json.loads(json.dumps(data))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places: list[tuple[Any, Any]] = []

        def walk(part: Any, places: list = places) -> None:
            for key in list(part) if isinstance(part, dict) else range(len(part)):
                places.append((part, key))
                if isinstance(part[key], (dict, list)):
                    walk(part[key])

        if not isinstance(data, (dict, list)) or not data or rng.random() < 0.02:
            return evil(rng)
        walk(data)
        part, key = rng.choice(places)
        how = rng.randrange(6)
        if how == 0:
            del part[key]
        elif how == 1 and isinstance(part, dict):
            part[rng.choice(("", "a", "step", "name", "__class__", str(key) * 2))] = part.pop(key)
        elif how == 2 and isinstance(part[key], (int, float)):
            part[key] = part[key] * rng.choice((-1, 0, 2, 1000, 10**12)) + rng.choice((-1, 0, 1))
        elif how == 3:
            part[key] = [part[key], part[key]]
        else:
            part[key] = evil(rng)
    return data


def as_json(rng: random.Random, data: bytes) -> bytes:
    """A JSON text with other content, or (one in three) damaged."""
    if rng.random() < 0.33:
        return damaged(rng, data)
    return json.dumps(changed(rng, json.loads(data))).encode()


# --------------------------------------------------------------------------- kinds


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        mutate: changes the copy of the base in a folder; returns whether the outer format is still whole.
        use: reads it in process, as the product does.
        command: the command line that reads it; None: ``use`` itself, in a process of its own.
    """

    base: str
    mutate: Callable[[random.Random, Path], bool]
    use: Callable[[Path], object]
    command: Callable[[random.Random, Path], list[str]] | None = None


def is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True


def rewrite(file: Path, data: bytes) -> None:
    file.write_bytes(data)


def mutate_dataset(rng: random.Random, folder: Path) -> bool:
    data = as_json(rng, (folder / "dataset.json").read_bytes())
    rewrite(folder / "dataset.json", data)
    return is_json(data)


def agree(folder: Path, name: str) -> None:
    """Makes ``dataset.json`` say of a file what it is now."""
    info, data = json.loads((folder / "dataset.json").read_bytes()), (folder / name).read_bytes()
    for file in (info["index"], *info["shards"]):
        if file["name"] == name:
            file.update(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    (folder / "dataset.json").write_text(json.dumps(info))


def mutate_index(rng: random.Random, folder: Path) -> bool:
    file = folder / "index.npz"
    if rng.random() < 0.4:
        rewrite(file, damaged(rng, file.read_bytes()))
        if rng.random() < 0.5:
            agree(folder, file.name)
    else:
        with np.load(file) as stored:
            columns = dict(stored)
        for _ in range(rng.choice((1, 1, 2))):
            name = rng.choice(list(columns))
            column, how = columns[name].copy(), rng.randrange(5)
            if how == 0:
                columns[name] = column[: rng.randrange(len(column))]
            elif how == 1:
                kinds = ("i8", "V0", "S0", "M8[s]") if column.dtype.kind == "S" else ("f8", "u1", "i8", "c16", "?")
                columns[name] = np.zeros(len(column), rng.choice(kinds))
            elif how == 2 and column.dtype.kind == "i":
                column[rng.randrange(len(column))] += rng.choice((-(2**30), -512, -1, 1, 512, 2**30))
                columns[name] = column
            elif how == 3:
                columns[name] = column.reshape(1, -1) if rng.random() < 0.5 else np.resize(column, len(column) + 3)
            else:
                columns.pop(name)
                columns = columns or {"shard": column}
        buffer = io.BytesIO()
        np.savez(buffer, **columns)
        rewrite(file, buffer.getvalue())
        agree(folder, file.name)
    data = file.read_bytes()
    return hashlib.sha256(data).hexdigest() == json.loads((folder / "dataset.json").read_bytes())["index"]["sha256"]


def mutate_shard(rng: random.Random, folder: Path) -> bool:
    file = rng.choice(sorted(folder.glob("*.tar")))
    rewrite(file, damaged(rng, file.read_bytes()))
    if rng.random() < 0.7:
        agree(folder, file.name)
    return file.stat().st_size in [s["size"] for s in json.loads((folder / "dataset.json").read_bytes())["shards"]]


def use_set(folder: Path) -> None:
    shards = ShardSet.open(folder)
    fault = None
    try:
        shards.verify()
    except CmlError as error:
        fault = error
    settings = ImagesConfig(name="images", root=str(folder), ways=2, shots=1, queries=1)
    domain = ImageDomain(settings, dict.fromkeys(("train", "val", "test"), 0))
    for split in ("train", "val", "test"):
        domain.episode(split, 0)
    domain.describe(), domain.fingerprint(), [shards.key(at) for at in range(len(shards))]
    if fault is not None:
        raise fault


def inspect(rng: random.Random, folder: Path) -> list[str]:
    return ["data", "inspect", str(folder), "--verify", "--sheet", str(folder.parent / "sheet.png"), "--ways", "2"]


def mutate_config(rng: random.Random, folder: Path) -> bool:
    file = folder / "config.yaml"
    data = file.read_bytes()
    if rng.random() < 0.33:
        data = damaged(rng, data)
    else:
        found = changed(rng, yaml.safe_load(data))
        data = (yaml.safe_dump(found) if rng.random() < 0.9 else json.dumps(found)).encode(errors="surrogatepass")
        if rng.random() < 0.1:
            data += rng.choice((
                b"a: &a [*a]\n", b"b: &b {c: *b}\n", b"t: 2001-99-99\n", b"x: !!bool x\n",
                b"x: !!python/name:os.system\n",
                b"a: &a [1,1,1,1,1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
                b"d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: [*d,*d,*d,*d,*d,*d,*d,*d,*d]\n",
            ))  # fmt: skip
    rewrite(file, data)
    with contextlib.suppress(CmlError):
        return bool(read_yaml(file))
    return False


def use_config(folder: Path) -> None:
    config = run_config(folder, [])
    make_plan(config, 1, {})
    dump_config(config)
    RunFolder(folder).check_resumable(config)
    config = load_config(str(folder / "config.yaml"))
    assert Path(config.run.dir) == folder, config.run.dir


SHORT = (
    "eval.episodes=2", "eval.val_episodes=2", "eval.every=0", "eval.permutations=1", "eval.ensemble=1", "train.steps=2",
    "train.episodes_per_step=1", "domain.workers=0", "run.device=cpu", "parallel.threads=1",
)  # fmt: skip


def config_command(rng: random.Random, folder: Path) -> list[str]:
    run, config = str(folder), str(folder / "config.yaml")
    return rng.choice((["eval", run, *SHORT], ["export", run], ["train", config, *SHORT], ["status", run]))


def mutate_status(rng: random.Random, folder: Path) -> bool:
    places = ("status.json",) * 3 + ("metrics.jsonl", "validation.jsonl", "sessions.jsonl", "eval.json", "lock")
    file = folder / rng.choice(places)
    if file.suffix == ".jsonl":
        lines = file.read_bytes().splitlines()
        for _ in range(rng.choice((1, 3))):
            at = rng.randrange(len(lines))
            lines[at] = as_json(rng, lines[at]) if is_json(lines[at]) else lines[at]
        rewrite(file, b"\n".join(lines) + b"\n")
        return any(map(is_json, lines))
    rewrite(file, as_json(rng, file.read_bytes()))
    return is_json(file.read_bytes())


def use_status(folder: Path) -> None:
    view = RunView(folder)
    view.rows(), view.columns("a"), json.dumps(view.data)
    Lease(folder, this_start()).release(began=True)


def status(rng: random.Random, folder: Path) -> list[str]:
    return ["status", str(folder), *rng.choice(((), ("--check",), ("--json",)))]


def network() -> Any:
    return make_network(CONFIG[0], (1,), 1)


CONFIG: list[Any] = []
"""The configuration of the run folder that cases copy, once it is made."""


def mutate_checkpoint(rng: random.Random, folder: Path) -> bool:
    *others, step = steps_in(folder / "checkpoints")
    for other in others:  # which would be used in its place
        checkpoints.path_of(folder / "checkpoints", other).unlink()
    file = checkpoints.path_of(folder / "checkpoints", step)
    if rng.random() < 0.5:
        data = file.read_bytes()
        if rng.random() < 0.5:  # the header alone
            length = int.from_bytes(data[:8], "little")
            header = as_json(rng, data[8 : 8 + length])
            data = len(header).to_bytes(8, "little") + header + data[8 + length :]
        else:
            data = damaged(rng, data)
        rewrite(file, data)
        return False
    found = checkpoints.load(file)  # anew with other content, and a checksum that is right
    tensors = {name: found.read(name) for name in found.layout}
    state = found.state
    if rng.random() < 0.7:
        state = changed(rng, state)
    else:
        name = rng.choice(list(tensors))
        value = tensors.pop(name)
        how = rng.randrange(4)
        if how == 0:
            name = rng.choice(("param/x", "moment/a/b", "moment/exp_avg", name + "x", "", "../x"))
        elif how == 1:
            value = torch.zeros(rng.choice(((), (0,), (3, 3), (2**16,))))
        elif how == 2:
            value = value.to(rng.choice((torch.int64, torch.bool, torch.float64, torch.bfloat16)))
        if how < 3:
            tensors[name] = value
    layout = {name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()}
    checkpoints.save(WORLD[0], folder / "checkpoints", step, state, layout, tensors.items())
    return True


WORLD: list[World] = []


def use_checkpoint(folder: Path) -> None:
    net = network()
    found, _ = checkpoints.choose(folder / "checkpoints", "best", net, lambda fault: None)
    values = found.params()
    net.load_state_dict(values, strict=False)


def checkpoint_command(rng: random.Random, folder: Path) -> list[str]:
    run = str(folder)
    return rng.choice((["eval", run, *SHORT], ["export", run], ["train", f"{run}/config.yaml", "train.steps=3"]))


def mutate_export(rng: random.Random, folder: Path) -> bool:
    file = folder / "export" / rng.choice(("model.json", "model.json", "model.safetensors"))
    if file.suffix == ".json":
        rewrite(file, as_json(rng, file.read_bytes()))
        return is_json(file.read_bytes())
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = as_json(rng, data[8 : 8 + length]) if rng.random() < 0.5 else None
    anew = header and len(header).to_bytes(8, "little") + header + data[8 + length :]
    rewrite(file, anew or damaged(rng, data))
    return bool(header) and is_json(header)


def use_export(folder: Path) -> None:
    learner = load(folder)
    x = np.linspace(-1, 1, 6, dtype=np.float32).reshape(3, 2)[:, :1]
    learner.adapt(x, x[:, 0]).predict(x)


def mutate_lists(rng: random.Random, folder: Path) -> bool:
    file = folder / f"{rng.choice(('train', 'val', 'test'))}{'.csv' if (folder / 'train.csv').exists() else '.txt'}"
    lines = file.read_bytes().splitlines()
    if rng.random() < 0.5:
        rewrite(file, damaged(rng, b"\n".join(lines)))
    else:
        for _ in range(rng.choice((1, 2))):
            at = rng.randrange(len(lines))
            lines[at] = rng.choice((
                b"", b"../../outside", b"/etc", b"\xff\xfe", b"a,b,c,d", b"," * 50, lines[at] + b"\0", lines[at] * 2,
                b'"' + lines[at], b"./" + lines[at], lines[at].upper(), b" " + lines[at] + b" ", b"x" * 300_000,
                b"\x1b[2J", b"*", b"[a-z]", b"train/..", b"a/" * 3000,
            ))  # fmt: skip
        rewrite(file, b"\n".join(lines) + b"\n")
    with contextlib.suppress(UnicodeDecodeError):
        return bool(file.read_bytes().decode("utf-8"))
    return False


def use_lists(folder: Path) -> None:
    pack(folder, folder.parent / "packed")


def mutate_specs(rng: random.Random, folder: Path) -> bool:
    file = folder / f"{rng.choice(('train', 'val', 'test'))}.json"
    rewrite(file, as_json(rng, file.read_bytes()))
    return is_json(file.read_bytes())


def mutate_arrays(rng: random.Random, folder: Path) -> bool:
    """Whole means that a pickle's instructions can be listed; nothing here runs them."""
    file = folder / f"mini-imagenet-cache-{rng.choice(('train', 'val', 'test'))}.pkl"
    if rng.random() < 0.5:
        rewrite(file, damaged(rng, file.read_bytes()))
    else:  # whole, with other content
        content = pickle.loads(file.read_bytes())
        content["class_dict"] = changed(rng, content["class_dict"])
        kind = rng.choice(("u1", "u1", "f4", "O", "S1", "i8"))
        content["image_data"] = content["image_data"][: rng.choice((0, 5, 9))].astype(kind)
        rewrite(file, pickle.dumps(content))
    try:
        return bool(list(pickletools.genops(file.read_bytes())))
    except Exception:
        return False


def pack_command(rng: random.Random, folder: Path) -> list[str]:
    return ["data", "pack", str(folder), str(folder.parent / "packed")]


KINDS = {
    "dataset.json": Kind("set", mutate_dataset, use_set, inspect),
    "index": Kind("set", mutate_index, use_set, inspect),
    "shard": Kind("set", mutate_shard, use_set, inspect),
    "config.yaml": Kind("run", mutate_config, use_config, config_command),
    "status.json": Kind("run", mutate_status, use_status, status),
    "checkpoint": Kind("run", mutate_checkpoint, use_checkpoint, checkpoint_command),
    "export": Kind("run", mutate_export, use_export),
    "class lists": Kind("lists", mutate_lists, use_lists, pack_command),
    "CSV lists": Kind("tables", mutate_lists, use_lists, pack_command),
    "JSON lists": Kind("specs", mutate_specs, use_lists, pack_command),
    "pickled arrays": Kind("arrays", mutate_arrays, use_lists, pack_command),
}


# --------------------------------------------------------------------------- the bases


def make_bases(place: Path) -> None:
    """A packed set, a finished run of a few steps with its export, and a source with lists."""
    rng = np.random.default_rng(0)
    with new_shard_set(place / "set", name="small", image_size=(8, 8), channels=1, shard_size_mib=0.02) as writer:
        for split in ("train", "val", "test"):
            for number in range(3):
                for image in range(3):
                    picture = as_png(rng.integers(0, 256, (1, 8, 8), dtype=np.uint8))
                    writer.add(split, f"{split}{number}", f"{split}{number}/{image}", picture)
    source = place / "lists"
    for split in ("train", "val", "test"):
        names = [f"{split}{number}" for number in range(3)]
        for name in names:
            for image in range(3):
                file = source / "images" / name / f"{image}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(as_png(rng.integers(0, 256, (1, 8, 8), dtype=np.uint8)).data)
        (source / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
    for base in ("tables", "specs", "arrays"):
        (place / base).mkdir()
    for split in ("train", "val", "test"):
        names = [f"{split}{number}" for number in range(3)]
        rows = [f"images/{name}/{image}.png,{name}\n" for name in names for image in range(3)]
        (place / "tables" / f"{split}.csv").write_text("".join(["filename,label\n", *rows]))
        roots = [f"./images/{name}" for name in names]
        (place / "specs" / f"{split}.json").write_text(json.dumps({"class_names": names, "class_roots": roots}))
        pixels = rng.integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
        places = {name: list(range(3 * at, 3 * at + 3)) for at, name in enumerate(names)}
        cache = {"image_data": pixels, "class_dict": places}
        (place / "arrays" / f"mini-imagenet-cache-{split}.pkl").write_bytes(pickle.dumps(cache))
    for base in ("tables", "specs"):
        shutil.copytree(source / "images", place / base / "images")
    arguments = ["sinusoid", f"run.dir={place / 'run'}", *SHORT, "eval.every=1", "model.hidden=[4]"]
    ended = in_fork(lambda: cli.main(["train", *arguments]), 300)
    assert (place / "run" / "export" / "model.json").is_file(), ended
    # Cases copy it to another place.
    CONFIG[:] = [load_config("sinusoid", arguments[1:])]
    from cml_dist.distributed.heartbeat import Heartbeat

    world = World(None, 0, 1, 0, 1, torch.device("cpu"), Heartbeat())
    WORLD[:] = [world]


# --------------------------------------------------------------------------- running


@dataclass
class Found:
    """What was seen of a kind."""

    cases: int = 0
    inner: int = 0  # past the outer format
    read: int = 0  # ended well
    refused: int = 0  # ended in one error of ours
    slowest_s: float = 0.0
    faults: list[str] = field(default_factory=list)


class Hung(BaseException):
    pass


def in_fork(work: Callable[[], object], seconds: float) -> dict[str, Any]:
    """Runs work in a forked process: exit code (None: it hung), and what it printed."""
    with tempfile.TemporaryFile() as out:
        child = os.fork()
        if child == 0:
            code = 99
            try:
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
                sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False, errors="replace") for n in (1, 2))
                resource.setrlimit(resource.RLIMIT_AS, (MEMORY_GIB * 2**30,) * 2)
                code = work() or 0
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else 1
            except BaseException:
                traceback.print_exc()
            finally:
                with contextlib.suppress(Exception):
                    sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)
        end_s, code = time.monotonic() + seconds, None
        while time.monotonic() < end_s:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                code = os.waitstatus_to_exitcode(status)
                break
            time.sleep(0.005)
        else:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        out.seek(0)
        return {"code": code, "said": out.read().decode(errors="replace")}


WRITES = {f"os.{name}" for name in ("mkdir", "rmdir", "remove", "rename", "link", "symlink", "truncate", "chmod")}
NEVER = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn", "socket.connect"}


def watch(allowed: Path, seen: list[str]) -> None:
    """From now on this process tells of writes outside of ``allowed``, of processes and of connections."""
    safe = (os.path.join(allowed, ""), "/dev/null", "/dev/shm", "/proc/self")

    def hook(event: str, arguments: tuple) -> None:
        if event in NEVER:
            seen.append(f"{event} {arguments!r}"[:200])
        paths: tuple = ()
        if event == "open" and isinstance(arguments[0], (str, bytes)):
            mode, flags = arguments[1], arguments[2] or 0
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC) or (mode and set(str(mode)) & set("wax+")):
                paths = (arguments[0],)
        elif event in WRITES:
            paths = tuple(a for a in arguments if isinstance(a, (str, bytes)))
        for path in paths:
            real = os.path.realpath(os.fsdecode(path))
            if not f"{real}/".startswith(safe[0]) and not real.startswith(safe[1:]):
                seen.append(f"{event} {real}"[:200])

    sys.addaudithook(hook)


def case(kind: Kind, bases: Path, seed: int, name: str, place: Path) -> tuple[bool, Path]:
    """A mutated copy of the base; whether its outer format is whole."""
    folder = place / kind.base
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(bases / kind.base, folder)
    return kind.mutate(random.Random(f"{name} {seed}"), folder), folder


def tried(kind: Kind, bases: Path, seed: int, name: str, place: Path, seen: list[str]) -> dict[str, Any]:
    """One case in this process."""
    whole, folder = case(kind, bases, seed, name, place)
    del seen[:]

    def alarm(*_: object) -> None:
        raise Hung

    result: dict[str, Any] = {"seed": seed, "whole": whole, "end": "read"}
    began_s = time.monotonic()
    signal.signal(signal.SIGALRM, alarm)
    signal.alarm(CASE_S)
    try:
        kind.use(folder)
    except CmlError as error:
        result["end"] = "refused"
        if len(str(error)) > 4000 or "\n" in str(error):
            result["fault"] = f"a long error: {str(error)[:200]}"
    except Hung:
        result["fault"] = f"hung: {traceback.format_exc(limit=-3)}"
    except BaseException as error:
        result["fault"] = f"{type(error).__name__}: {str(error)[:200]} {traceback.format_exc(limit=-3)[-900:]}"
    finally:
        signal.alarm(0)
    result["s"] = time.monotonic() - began_s
    if seen:
        result["fault"] = f"{result.get('fault', '')} outside: {seen[:3]}"
    return result


def try_kind(name: str, count: int, seed: int, bases: Path, batch: int = BATCH, fork: bool = True) -> Found:
    """``count`` cases of a kind from ``seed`` on."""
    kind, found, place = KINDS[name], Found(), bases.parent / "case" / "x"
    for first in range(seed, seed + count, batch):
        seeds = list(range(first, min(first + batch, seed + count)))
        record = bases.parent / "record.jsonl"
        record.unlink(missing_ok=True)

        def work(seeds: list[int] = seeds, record: Path = record) -> None:
            seen: list[str] = []
            if fork:
                watch(bases.parent, seen)
            with open(record, "a") as file:
                for one in seeds:
                    file.write(json.dumps(tried(kind, bases, one, name, place, seen)) + "\n")
                    file.flush()

        ended = in_fork(work, CASE_S * 4 + len(seeds)) if fork else {"code": work(), "said": ""}
        lines = [json.loads(line) for line in record.read_text().splitlines()]
        if len(lines) < len(seeds):
            at = seeds[len(lines)]
            found.faults.append(f"seed {at}: the process ended ({ended['code']}): {ended['said'][-500:]}")
        found.cases += min(len(lines) + 1, len(seeds))
        for line in lines:
            found.inner += line["whole"]
            found.read += line["end"] == "read" and "fault" not in line
            found.refused += line["end"] == "refused"
            found.slowest_s = max(found.slowest_s, line["s"])
            if "fault" in line:
                found.faults.append(f"seed {line['seed']}: {line['fault']}")
    return found


def tree(place: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.lstat().st_mtime_ns, p.lstat().st_size) for p in sorted(place.rglob("*"))}


def try_command(name: str, count: int, seed: int, bases: Path) -> Found:
    """``count`` cases by the command line, each in a process of its own."""
    kind, found, place, outside = KINDS[name], Found(), bases.parent / "case" / "x", bases.parent / "outside"
    outside.mkdir(exist_ok=True)
    os.environ["XDG_CACHE_HOME"] = str(bases.parent / "cache")
    for one in range(seed, seed + count):
        whole, folder = case(kind, bases, one, name, place)
        words = kind.command(random.Random(f"command {one}"), folder) if kind.command else None

        def work(words: list[str] | None = words, folder: Path = folder) -> int:
            os.chdir(place)
            if words is not None:
                return cli.main(words)
            try:
                kind.use(folder)
            except CmlError as error:
                print(f"error: {error}")
                return 1
            return 0

        before, began_s = (tree(bases), tree(outside)), time.monotonic()
        ended = in_fork(work, 120)
        code, said, took_s = ended["code"], ended["said"], time.monotonic() - began_s
        found.cases += 1
        found.inner += whole
        found.slowest_s = max(found.slowest_s, took_s)
        asked = words and words[0] == "status"
        fault = None
        if code is None:
            fault = "hung"
        elif code not in (0, 1, 2, 3, 75) or "Traceback" in said:
            fault = f"ended with {code}: {said[-900:]}"
        elif code in (1, 2) and not asked and sum(line.startswith("error: ") for line in said.splitlines()) != 1:
            fault = f"ended with {code} without one line: {said[-500:]}"
        elif "\x1b" in said:
            fault = f"control characters on the screen: {said[-300:]!r}"
        elif before != (tree(bases), tree(outside)):
            fault = "wrote elsewhere"
        found.read += fault is None and code in (0, 3, 75)
        found.refused += fault is None and code in (1, 2)
        if fault:
            found.faults.append(f"seed {one} {' '.join(words or ['use'])}: {fault}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=1000, help="cases of each kind in process")
    parser.add_argument("--commands", type=int, default=0, help="cases of each kind by command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows, all_faults = [], {}
    with tempfile.TemporaryDirectory(prefix="mutations-") as place:
        bases = Path(place, "bases")
        bases.mkdir()
        make_bases(bases)
        for how, count, run in (("in process", asked.count, try_kind), ("by command", asked.commands, try_command)):
            for name in asked.kinds if count else ():
                began_s = time.monotonic()
                found = run(name, count, asked.seed, bases)
                row = {"kind": name, "how": how, **{k: v for k, v in vars(found).items() if k != "faults"}}
                row |= {"faults": len(found.faults), "slowest_s": round(found.slowest_s, 2)}
                rows.append({**row, "seconds": round(time.monotonic() - began_s, 1)})
                all_faults[f"{name} {how}"] = found.faults
                print(json.dumps(rows[-1]), flush=True)
                kinds = Counter(fault.partition(": ")[2][:160] for fault in found.faults)
                for fault, times in kinds.most_common(12):
                    print(f"    {times} x {fault}", flush=True)
                if asked.json:  # so far
                    asked.json.write_text(json.dumps({"rows": rows, "faults": all_faults}, indent=1) + "\n")


if __name__ == "__main__":
    main()
