"""Two machines on one: network namespaces with host names and addresses of their own, and a bad wire between them."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launching import spawn

APART = ("unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
"""A host name, and processes that no other machine sees: the heartbeat may kill a silent rank on its own machine."""
WIRE = Path(__file__).with_name("lossy_wire.py")
_number = itertools.count()


@dataclass(frozen=True)
class Machine:
    """Namespaces with one network interface, ``eth0``, and processes of their own; no host name has an address.

    Attributes:
        namespace: its name for ``ip netns``; it carries this process's id, so that runs side by side do not meet.
        host: its host name.
        address: of ``eth0``.
    """

    namespace: str
    host: str
    address: str

    def start(self, *command: str, **environment: str) -> subprocess.Popen:
        """Run ``command`` here, with standard error in its output; :func:`launching.finish` ends it."""
        named = [*APART, "sh", "-c", 'hostname "$0" && exec "$@"', self.host]
        return spawn(["ip", "netns", "exec", self.namespace, *named, *command], **environment)

    def pids(self) -> list[int]:
        """All processes that run here, by their numbers outside."""
        return _pids(self.namespace)

    def rank_pid(self) -> int:
        """The process of the one rank that trains here."""
        for pid in self.pids():
            with contextlib.suppress(OSError):  # gone in between
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if b"cml_dist" in command and any(variable.startswith(b"RANK=") for variable in variables):
                    return pid
        raise AssertionError(f"no rank runs on {self.host}")

    def unplug(self) -> None:
        """Cut the machine off the network."""
        _run("ip", "-n", self.namespace, "link", "set", "eth0", "down")

    def plug(self) -> None:
        _run("ip", "-n", self.namespace, "link", "set", "eth0", "up")


@contextlib.contextmanager
def two_machines(wire: str, delay_ms: float, loss_percent: float) -> Iterator[tuple[Machine, Machine]]:
    """Two machines on a wire that delays each way and loses some frames.

    All that was made is removed at the end, with every process in it.

    Args:
        wire: ``netem``, the kernel's, or ``lossy_wire``, a process that does its work.
        delay_ms: each way.
        loss_percent: of the frames, each way.
    """
    names = [_name(), _name()]
    machines = tuple(Machine(name, f"machine{i}", f"10.77.0.{i + 1}") for i, name in enumerate(names))
    process = None
    _sweep()
    try:
        for machine in machines:
            _run("ip", "netns", "add", machine.namespace)
        if wire == "netem":
            ends = [["name", "eth0", "netns", name] for name in names]
            _run("ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1])
            for name in names:
                netem = ["netem", "delay", f"{delay_ms}ms", "loss", f"{loss_percent}%"]
                _run("tc", "-n", name, "qdisc", "add", "dev", "eth0", "root", *netem)
        else:
            command = [sys.executable, str(WIRE), *names, str(delay_ms), str(loss_percent)]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            assert process.stdout.readline() == "up\n", "the wire between the namespaces did not come up"
        for machine in machines:
            _run("ip", "-n", machine.namespace, "link", "set", "lo", "up")
            _run("ip", "-n", machine.namespace, "address", "add", f"{machine.address}/24", "dev", "eth0")
            machine.plug()
        yield machines
    finally:
        for machine in machines:
            if machine.namespace in _run("ip", "netns", "list").split():
                _remove(machine.namespace)
        if process is not None:
            process.kill()
            process.communicate()


def _name() -> str:
    return f"cml-{os.getpid()}-{next(_number)}"


def _pids(namespace: str) -> list[int]:
    return [int(pid) for pid in _run("ip", "netns", "pids", namespace).split()]


def _remove(namespace: str) -> None:
    """Take away a namespace with every process in it."""
    for pid in _pids(namespace):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    _run("ip", "netns", "delete", namespace)


def _sweep() -> None:
    """Remove what an earlier run of these tests left behind that was itself killed."""
    for name in _run("ip", "netns", "list").split():
        owner = re.fullmatch(r"cml-(\d+)-\d+", name)
        if owner and not Path(f"/proc/{owner[1]}").exists():
            _remove(name)


def why_not() -> str | None:
    """Why namespaces cannot be made here; None where they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "tc", "unshare"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    name = _name()
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, timeout=30)
    if tried.returncode:
        return f"no network namespace may be made here: {tried.stderr.strip()}"
    try:
        inside = ["ip", "netns", "exec", name, *APART, "true"]
        entered = subprocess.run(inside, capture_output=True, text=True, timeout=30)
    finally:
        _run("ip", "netns", "delete", name)
    if entered.returncode:
        return f"no network namespace may be entered here: {entered.stderr.strip()}"
    return None if wires() else "this kernel has neither netem nor /dev/net/tun"


def wires() -> list[str]:
    """The wires that this kernel can do, the best first. What goes wrong with one that it can do is a failure."""
    device = ["lossy_wire"] if Path("/dev/net/tun").exists() else []
    name = _name()
    _run("ip", "netns", "add", name)
    try:
        _run("tc", "-n", name, "qdisc", "add", "dev", "lo", "root", "netem")
    except OSError as error:
        if "qdisc kind is unknown" not in str(error):
            raise
        return device
    finally:
        _run("ip", "netns", "delete", name)
    return ["netem", *device]


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
