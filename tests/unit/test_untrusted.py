"""What a stranger sends (a packed set, a run folder, weights, an export) runs nothing and writes nowhere else."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import os
import shutil
import threading
from itertools import pairwise
from pathlib import Path

import fsspec
import mutations
import numpy as np
import pytest
import torch
import yaml
from image_sets import write_set
from rich.text import Text

import cml_dist
from cml_dist.cli import main
from cml_dist.config.load import load_config
from cml_dist.data.shards import ShardSet
from cml_dist.errors import CmlError, ConfigError, DataError
from cml_dist.run.folder import run_config
from cml_dist.telemetry import text
from cml_dist.telemetry.console import Console

SETTINGS = ("train.steps=1", "train.episodes_per_step=1", "eval.every=0", "eval.val_episodes=2", "eval.episodes=2",
            "model.hidden=[4]", "parallel.threads=1", "eval.untrained=false")  # fmt: skip


# --------------------------------------------------------------------------- addresses of data


@pytest.mark.parametrize(
    "root",
    [
        "pipe:touch made", "pipe::touch made", "pipe://touch made", "PIPE:touch made", "local://{set}", "data:,x",
        "simplecache::file://{set}", "filecache::memory://bucket/set", "reference://set", "zip://x::file://{set}",
        "memory://bucket/set::file://{set}", "git://{set}", "ssh://host/set", "libarchive://x", "nosuch://x", "s3:x",
    ],
)  # fmt: skip
def test_no_address_but_of_a_known_protocol_is_opened(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_set(tmp_path / "set", images=2)
    with pytest.raises(DataError, match="neither a folder nor an address of a protocol that is opened here"):
        ShardSet.open(root.format(set=folder), cache=tmp_path / "cache")
    assert os.listdir(tmp_path) == ["set"]


def test_a_folder_whose_name_looks_like_an_address_can_be_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_set(tmp_path / "pipe:set", images=2)
    assert ShardSet.open("./pipe:set").name == "small"


def described(folder: Path, **changes) -> None:
    """``dataset.json`` with other content."""
    content = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**content, **changes}))


@pytest.mark.parametrize(
    "name",
    ["../x.tar", "/x.tar", "a/b.tar", "t[1-3].tar", "*.tar", "pipe:x", "-rf.tar", "a b.tar", "a.tar\n", ".x.tar", "",
     "dataset.json", "index.npz", "\u00e4.tar", "x" * 300],
)  # fmt: skip
def test_names_in_a_set_are_plain_and_inside_of_it(name, tmp_path):
    folder = write_set(tmp_path / "set", images=2)
    shards = json.loads((folder / "dataset.json").read_text())["shards"]
    described(folder, shards=[{**shards[0], "name": name}, *shards[1:]])
    with pytest.raises(DataError, match=r"dataset.json is damaged"):
        ShardSet.open(folder)


@pytest.mark.parametrize(
    ("column", "change"),
    [
        ("shard", lambda c: c - 1),
        ("shard", lambda c: c + 1),
        ("offset", lambda c: c - 10**6),
        ("offset", lambda c: c + 10**6),
        ("size", lambda c: c * 0),
        ("size", lambda c: c + 2**40),
        ("size", lambda c: c.astype(float)),
        ("size", lambda c: c[:-1]),
        ("key", lambda c: np.zeros(len(c), "S100000")),
        ("key", lambda c: np.arange(len(c))),
    ],
)
def test_an_index_with_a_right_checksum_is_still_held_against_the_set(column, change, tmp_path):
    folder = write_set(tmp_path / "set", images=2)
    with np.load(folder / "index.npz") as stored:
        columns = dict(stored)
    columns[column] = change(columns[column])
    data = io.BytesIO()
    np.savez_compressed(data, **columns)
    (folder / "index.npz").write_bytes(data.getvalue())
    sha256 = hashlib.sha256(data.getvalue()).hexdigest()
    described(folder, index={"name": "index.npz", "size": len(data.getvalue()), "sha256": sha256})
    with pytest.raises(DataError, match="index.npz is damaged"):
        ShardSet.open(folder)


# --------------------------------------------------------------------------- remote sets


@pytest.fixture
def remote(tmp_path):
    """A set in fsspec's own memory file system."""
    store = fsspec.filesystem("memory")
    store.put(f"{write_set(tmp_path / 'set', images=2)}/", "/bucket/set/", recursive=True)
    yield store
    store.rm("/bucket", recursive=True)


class Endless(io.RawIOBase):
    def read(self, size: int = -1) -> bytes:
        return b" " * min(max(size, 2**16), 2**22)


@pytest.mark.parametrize("name", ["dataset.json", "index.npz", "train-000000.tar"])
def test_an_endless_file_ends_at_the_size_it_may_have(name, remote, tmp_path, monkeypatch):
    real = type(remote).open
    monkeypatch.setattr(type(remote), "open", lambda s, p, *a, **k: Endless() if name in p else real(s, p, *a, **k))
    with pytest.raises(DataError, match=f"{name} is larger than the .* bytes it may have"):
        ShardSet.open("memory://bucket/set", cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.tar"))


def test_a_slow_server_is_given_up(remote, tmp_path, monkeypatch):
    monkeypatch.setattr("cml_dist.data.shard_cache.GRACE_S", -1)
    monkeypatch.setattr("cml_dist.data.shard_cache.SLOWEST", 2**60)
    with pytest.raises(DataError, match="dataset.json comes too slowly"):
        ShardSet.open("memory://bucket/set", cache=tmp_path / "cache")


def test_a_set_larger_than_the_disk_is_refused_before_it_is_fetched(remote, tmp_path):
    described(tmp_path / "set", shards=[{"name": "a.tar", "size": 2**50, "sha256": "0" * 64}])
    remote.put(str(tmp_path / "set" / "dataset.json"), "/bucket/set/dataset.json")
    with pytest.raises(DataError, match=r"has 1,048,576.0 GiB, but .* GiB are free in its cache; set domain.cache"):
        ShardSet.open("memory://bucket/set", cache=tmp_path / "cache")


def test_http_is_not_redirected_to_a_file_and_a_silent_server_is_left(tmp_path, monkeypatch):
    pytest.importorskip("aiohttp")
    answers, silent = [], threading.Event()

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802 - its name there
            answers.append(self.path)
            if "silent" in self.path:
                silent.wait(30)
            self.send_response(302)
            self.send_header("Location", f"file://{tmp_path}/set/dataset.json")
            self.end_headers()

        def log_message(self, *_):
            pass

    write_set(tmp_path / "set", images=2)
    monkeypatch.setattr("cml_dist.data.shard_cache.SILENT_S", 0.3)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for path in ("set", "silent"):
            with pytest.raises(DataError, match="cannot be fetched"):
                ShardSet.open(f"http://127.0.0.1:{server.server_port}/{path}", cache=tmp_path / "cache")
        silent.set()
        server.shutdown()
    assert answers == ["/set/dataset.json", "/silent/dataset.json"] and not (tmp_path / "cache").exists()


# --------------------------------------------------------------------------- run folders


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", "sinusoid", f"run.dir={folder}", *SETTINGS]) == 0
    return folder


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


COMMANDS = {
    "eval": lambda run: ["eval", str(run)],
    "export": lambda run: ["export", str(run)],
    "status": lambda run: ["status", str(run)],
    "train": lambda run: ["train", "sinusoid", f"run.dir={run}", *SETTINGS, "train.steps=2"],
}
PLACES = (
    "config.yaml", "deepspeed.json", "status.json", "sessions.jsonl", "metrics.jsonl", "validation.jsonl", "eval.json",
    "eval_scores.npz", "evals", "evals/0001-own.json", "checkpoints", "checkpoints/step-00000001.safetensors",
    "checkpoints/.step-00000002.safetensors.writing-a-1-2", "logs", "logs/rank-00000.log", "logs/rank-00001.log",
    "export", "export/model.safetensors", "tensorboard", "wandb/run-id", "lock", ".lock.writing-a-1-2",
)  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_a_link_in_a_run_folder_leads_no_command_out_of_it(place, run, tmp_path, capfd):
    outside, link = tmp_path / "outside", run / place
    if link.exists():
        outside.parent.mkdir(exist_ok=True)
        link.rename(outside)
    else:
        outside.mkdir()
        link.parent.mkdir(exist_ok=True)
    link.symlink_to(outside)
    files = [outside] if outside.is_file() else sorted(outside.rglob("*"))
    before = {file: file.read_bytes() for file in files if file.is_file()}
    for name, words in COMMANDS.items():
        assert main(words(run)) == 1, name
        err = capfd.readouterr().err
        assert err.count("\n") == 1 and f"{link} is a link to {outside}, and leads out of the run folder; move" in err
    files = [outside] if outside.is_file() else sorted(outside.rglob("*"))
    assert {file: file.read_bytes() for file in files if file.is_file()} == before


def test_a_run_folder_may_be_a_link_itself_and_hold_links_that_stay_inside(run, tmp_path):
    (tmp_path / "link").symlink_to(run)
    (run / "newest").symlink_to("checkpoints/step-00000001.safetensors")
    for words in COMMANDS.values():
        assert main(words(tmp_path / "link")) == 0


def test_what_is_no_file_is_not_waited_for(run, capfd):
    (run / "eval.json").unlink()
    os.mkfifo(run / "eval.json")
    assert main(["status", str(run)]) == 1
    assert "eval.json is neither a file nor a folder" in capfd.readouterr().err


def test_a_temporary_file_that_somebody_put_there_is_not_written_through(tmp_path, monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "a")
    (tmp_path / "outside").write_text("kept")
    name = f".file.writing-a-{os.getpid()}-{threading.get_ident()}"
    (tmp_path / name).symlink_to(tmp_path / "outside")
    from cml_dist.atomic import write_text

    write_text(tmp_path / "file", "new")
    assert (tmp_path / "outside").read_text() == "kept" and (tmp_path / "file").read_text() == "new"
    assert not (tmp_path / "file").is_symlink()


def test_a_run_folder_does_not_say_where_to_write(run, tmp_path):
    def configured(**domain):
        config = yaml.safe_load((run / "config.yaml").read_text())
        config["run"]["dir"], config["domain"] = str(tmp_path / "elsewhere"), domain
        config["model"]["backbone"] = "conv4"
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        return run_config(run, []), load_config(str(run / "config.yaml"))

    for config in configured(name="images", root="/data/set", cache=str(tmp_path / "elsewhere")):
        assert (Path(config.run.dir), config.domain.root, config.domain.cache) == (run, "/data/set", None)
    for config in configured(name="glyphs", root=str(tmp_path / "elsewhere")):
        assert (Path(config.run.dir), config.domain.root) == (run, None)
    assert load_config(str(run / "config.yaml"), [f"run.dir={tmp_path}/b"]).run.dir == f"{tmp_path}/b"
    shutil.copy(run / "config.yaml", tmp_path / "config.yaml")  # a recipe of the user's own says where
    assert load_config(str(tmp_path / "config.yaml")).run.dir == str(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    "content",
    [
        "a: &a [1]\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in pairwise("abcdefghijk")),
        "a: &a {b: *a}\n", "a: &a [*a]\n", "[" * 5000, "a: !!bool x\n", "a: 2001-99-99\n", "a: !!timestamp x\n",
        "a: !!python/object/apply:os.system ['touch made']\n", "a: " + "9" * 5000 + "\n", "x" * 2**21, "\xff",
    ],
    ids=lambda content: content[:20].strip(),
)  # fmt: skip
def test_a_configuration_that_is_a_trap_is_one_line(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(content, encoding="latin-1")
    with pytest.raises(ConfigError) as refused:
        load_config(str(tmp_path / "c.yaml"))
    assert len(str(refused.value)) < 1000 and os.listdir(tmp_path) == ["c.yaml"]


# --------------------------------------------------------------------------- weights


class Runs:
    """Unpickled, it makes a file."""

    def __reduce__(self):
        return os.mkdir, ("made",)


@pytest.mark.parametrize("name", ["w.pth", "w.bin", "w.safetensors"])
def test_a_weight_file_runs_nothing(name, tmp_path, monkeypatch):
    from cml_dist.errors import ModelError
    from cml_dist.nets.timm_backbone import TimmBackbone

    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"conv1.weight": Runs()}}, name)
    with pytest.raises(ModelError, match=f"weight file {name} does not fit"):
        TimmBackbone("test_resnet", (3, 32, 32), pretrained=name)
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize(
    "change",
    [{"model": []}, {"score": None}, {"input_shape": [-1]}, {"input_shape": "a"}, {"output_dim": 7},
     {"rule": {"kind": "os"}}, {"preprocessing": 3}],
    ids=str,
)  # fmt: skip
def test_an_export_that_cannot_be_is_refused_in_one_line(change, run):
    file = run / "export" / "model.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(CmlError):
        cml_dist.load(run).adapt(np.zeros((2, 1)), np.zeros(2)).predict(np.zeros((2, 1)))


# --------------------------------------------------------------------------- text


def test_text_of_a_file_is_plain_text_wherever_it_is_shown():
    evil = "\x1b[2J\u202ea\nb <img src=x onerror=alert(1)> [link](javascript:x) `c` *d* $e$ | &lt;"
    shown = text.markdown(evil)
    assert shown.startswith("\ufffd\\[2J\ufffda b \\<img") and "\\[link\\](javascript" in shown
    assert all(shown[at - 1] == "\\" for at, char in enumerate(shown) if char in "<>[]`*|&$")
    for interactive in (True, False):
        out = io.StringIO()
        console = Console(out, interactive=interactive, width=200)
        console.header(evil, {evil: evil})
        console.table(evil, [evil], [[evil]])
        console.note(evil), console.warn(evil), console.error(evil, evil), console.say(Text(text.line(evil)))
        assert "\x1b[2J" not in out.getvalue() and "\u202e" not in out.getvalue()


def test_a_model_card_holds_names_of_files_as_plain_text(run):
    tested = json.loads((run / "eval.json").read_text())
    (run / "eval.json").write_text(json.dumps({**tested, "split": "<script>[x](y)"}))
    assert main(["export", str(run)]) == 0
    assert "\\<script\\>\\[x\\](y)" in (run / "export" / "README.md").read_text()


# --------------------------------------------------------------------------- mutations


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("mutations") / "bases"
    place.mkdir()
    mutations.make_bases(place)
    return place


@pytest.mark.parametrize("kind", list(mutations.KINDS))
def test_a_sample_of_mutations_ends_well_or_in_one_line(kind, bases):
    """More of them: benchmarks/mutations.py."""
    found = mutations.try_kind(kind, 40, 0, bases, fork=False)
    assert not found.faults, found.faults
    assert found.cases == 40 and found.inner >= 8 and found.refused > 0
