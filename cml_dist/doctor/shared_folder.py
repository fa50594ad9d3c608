"""Whether all processes see one run folder: rank 0 writes, the others look, while it renames and holds a lock."""

from __future__ import annotations

import fcntl
import secrets
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cml_dist.doctor.board import Board
from cml_dist.doctor.findings import Finding, names
from cml_dist.doctor.place import Place
from cml_dist.doctor.storage import MOUNT_WITH_LOCKS, base_of, look, probe_folder, rename_finding, replace_for, try_lock
from cml_dist.domains.publish import fsync

LIMIT_S = 30.0
APPEAR_S = 10.0
"""Network file systems remember for a few seconds that a file was not there."""
RENAME_S = 0.5


def show_folder(board: Board, run_dir: Path, ranks: list[int]) -> dict[int, Any]:
    """Rank 0: write a token, hold a lock, rename for a while; returns what the others say of it."""
    base = base_of(run_dir)
    try:
        with probe_folder(base) as folder:
            token = secrets.token_hex(8)
            replace_for(folder, 0.0)
            (folder / "renamed").write_bytes(b"a")
            replace_for(folder, 0.01)
            (folder / "token").write_text(token)
            fsync(folder / "token")
            with open(folder / "lock", "a+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                board.say("folder-is", {"name": folder.name, "token": token, "base": str(base)})
                board.hear_all("folder-found", ranks, LIMIT_S)
                board.say("folder-renaming")
                replace_for(folder, RENAME_S)
                board.say("folder-renamed")
                return board.hear_all("folder", ranks, LIMIT_S)
    except OSError as error:
        board.say("folder-is", {"error": str(error.strerror)})
        raise


def find_folder(board: Board, run_dir: Path) -> None:
    """Another rank: look for rank 0's folder where this process would look; leaves the word ``folder``."""
    word = board.hear("folder-is", 0, LIMIT_S)
    if "error" in word:
        return
    base = base_of(run_dir)
    folder = base / word["name"]
    found: dict[str, Any] = {"base": str(base), "token": _token(folder / "token") == word["token"]}
    board.say("folder-found")
    if found["token"]:
        found["lock"] = try_lock(folder / "lock")
        found["seen"] = _watch(board, folder / "renamed")
    board.say("folder", found)


def _token(path: Path) -> str | None:
    end = time.monotonic() + APPEAR_S
    while True:
        try:
            return path.read_text()
        except OSError:
            if time.monotonic() > end:
                return None
        time.sleep(0.1)


def _watch(board: Board, path: Path) -> dict[str, int]:
    """What this process finds of the file while rank 0 replaces it."""
    seen = {"whole": 0, "missing": 0, "mixed": 0}
    board.hear("folder-renaming", 0, LIMIT_S)
    end = time.monotonic() + LIMIT_S
    while not board.heard("folder-renamed", 0) and time.monotonic() < end:
        for _ in range(20):
            seen[look(path)] += 1
    return seen


def folder_findings(words: Mapping[int, Any], run_dir: Path, places: Mapping[int, Place]) -> Iterator[Finding]:
    """Rank 0's findings on what the others saw."""
    others = {rank: words.get(rank) for rank in places if rank != 0}
    if not others:
        return
    base = str(base_of(run_dir))
    blind: dict[str, list[int]] = {}
    for rank, word in others.items():
        if word is None:
            blind.setdefault("nothing was heard of it", []).append(rank)
        elif not word["token"]:
            blind.setdefault(f"it is not in {word['base']} there", []).append(rank)
    if blind:
        shown = "; ".join(f"{names(ranks, places)}: {why}" for why, ranks in blind.items())
        value = f"not every rank sees what rank 0 writes in {base}: {shown}"
        yield Finding(
            "same folder", "fault", value, "put run.dir on a file system that all machines share, by its full path"
        )
    else:
        yield Finding("same folder", "ok", f"all {len(places)} ranks read what rank 0 wrote in {base}")
    seeing = {rank: word for rank, word in others.items() if word and word["token"]}
    broken = [rank for rank, word in seeing.items() if word["lock"] != "held"]
    if broken:
        said = seeing[broken[0]]["lock"]
        value = f"a lock of rank 0 is no obstacle to {names(broken, places)} ({said})"
        yield Finding("locks between ranks", "warning", value, MOUNT_WITH_LOCKS)
    elif seeing:
        yield Finding("locks between ranks", "ok", "a lock of rank 0 keeps the others out")
    if seeing:
        seen = {kind: sum(word["seen"][kind] for word in seeing.values()) for kind in ("whole", "missing", "mixed")}
        yield rename_finding("rename seen by ranks", seen)
