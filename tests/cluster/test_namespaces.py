"""Two machines without SLURM: the documented lines over a network that delays 20 ms each way and loses 1 % of packets.

The machines are namespaces (namespaces.py), with bare host names: each line must find its way by the address alone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import sys
import time
from pathlib import Path

import namespaces
import pytest
from launching import ROOT, finish, start
from lossy_wire import inside

from cml_dist.telemetry.metrics import read_metrics

if (reason := namespaces.why_not()) is not None:
    pytest.skip(reason, allow_module_level=True)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
WIRES = namespaces.wires()
BAD = {"delay_ms": 20, "loss_percent": 1}
LIMIT_S = 300.0
"""For a run that ends by itself on a busy machine."""
SETTINGS = (
    "domain.shots=5", "domain.queries=5", "model.hidden=[8, 8]", "method.inner_steps=2", "train.steps=10",
    "train.episodes_per_step=3", "eval.every=0", "eval.val_episodes=4", "eval.final=false", "optim.name=sgd",
    "checkpoint.every=2", "parallel.threads=1",
)  # fmt: skip
STRATEGIES = {"ddp": ("run.precision=fp64",), "zero2": ("parallel.strategy=zero2",)}
FILES = {"ddp": "cpu", "zero2": "zero2"}
TIMES = ("seconds", "episodes_per_s", "peak_memory_gib")
PORT = "29500"


@pytest.fixture(scope="module", params=WIRES[:1])
def machines(request):
    """The names of the tests say by which wire."""
    with namespaces.two_machines(request.param, **BAD) as both:
        yield both
    for machine in both:
        assert not Path("/run/netns", machine.namespace).exists()


@pytest.fixture(scope="module")
def on_one_machine(tmp_path_factory):
    """The metrics of an undisturbed run of two processes on one machine, by strategy."""
    folder = tmp_path_factory.mktemp("one")
    found = {}
    for strategy, file in FILES.items():
        launch = ROOT / "launch" / "accelerate" / f"{file}.yaml"
        process = start(2, *train(folder / strategy, strategy), launch_file=launch)
        out = finish(process)
        assert process.returncode == 0, out
        found[strategy] = lines(folder / strategy)
    return found


def train(folder: Path, strategy: str, *overrides: str) -> tuple[str, ...]:
    return ("-m", "cml_dist", "train", "sinusoid", f"run.dir={folder}", *SETTINGS, *STRATEGIES[strategy], *overrides)


def accelerate(machines, rank: int, strategy: str, *options: str) -> tuple[str, ...]:
    """The documented line of machine ``rank``."""
    return (
        sys.executable, "-m", "accelerate.commands.launch",
        "--config_file", f"launch/accelerate/{FILES[strategy]}.yaml", "--num_machines", "2",
        "--machine_rank", str(rank), "--main_process_ip", machines[0].address, "--main_process_port", PORT,
        "--num_processes", "2", *options,
    )  # fmt: skip


def lines(folder: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(folder / "metrics.jsonl")]


def finish_all(processes) -> list[str]:
    """What each machine printed; none is left behind where one does not end."""
    try:
        return [finish(process) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()


def await_steps(folder: Path, count: int) -> None:
    """Until the run has made ``count`` meta-steps."""
    metrics, end_s = folder / "metrics.jsonl", time.monotonic() + LIMIT_S
    while not metrics.is_file() or metrics.read_bytes().count(b"\n") < count:
        assert time.monotonic() < end_s, "the run does not get going"
        time.sleep(0.1)


def udp(machine) -> socket.socket:
    """A socket on ``machine`` in the hands of this process."""
    with inside(machine.namespace):
        return socket.socket(type=socket.SOCK_DGRAM)


@pytest.mark.parametrize("wire", ["netem", "lossy_wire"])
def test_a_wire_is_late_and_loses(wire):
    if wire not in WIRES:
        pytest.skip(f"no {wire} in this kernel: the wire of the tests below is {WIRES[0]}")
    with namespaces.two_machines(wire, **BAD) as both:
        for sender, receiver in (both, both[::-1]):
            ages_s = {}
            with udp(sender) as out, udp(receiver) as into:
                into.bind((receiver.address, 0))
                into.setblocking(False)
                for number in range(2100):  # the last hundred only wait for what is on its way
                    if number < 2000:
                        out.sendto(struct.pack("id", number, time.monotonic()), into.getsockname())
                    time.sleep(0.001)
                    with contextlib.suppress(BlockingIOError):
                        while True:
                            arrived, sent_s = struct.unpack("id", into.recv(64))
                            ages_s[arrived] = time.monotonic() - sent_s
            lost = 2000 - min(ages_s) - len(ages_s)  # before the first, the addresses were not known yet
            assert min(ages_s.values()) >= 0.02 and 1 <= lost <= 80, (min(ages_s.values()), lost)


@pytest.mark.parametrize("strategy", FILES)
def test_the_shipped_files_train_as_on_one_machine(machines, on_one_machine, tmp_path, strategy):
    command = train(tmp_path / "run", strategy)
    processes = [machine.start(*accelerate(machines, r, strategy), *command) for r, machine in enumerate(machines)]
    said = finish_all(processes)
    assert [process.returncode for process in processes] == [0, 0], said
    assert f"2 processes ({strategy})" in said[0] and "loopback" not in said[0], said
    assert lines(tmp_path / "run") == on_one_machine[strategy]


def test_torchrun_waits_for_a_machine_that_starts_10_s_later(machines, on_one_machine, tmp_path):
    """c10d: --local_addr and is_host stand in for host names that nobody knows."""
    processes = []
    for rank, machine in enumerate(machines):
        torchrun = (
            "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d",
            "--rdzv_endpoint", f"{machines[0].address}:{PORT}", "--rdzv_id", "run", "--local_addr", machine.address,
            "--rdzv_conf", f"is_host={1 - rank}",
        )  # fmt: skip
        processes.append(machine.start(sys.executable, *torchrun, *train(tmp_path / "run", "zero2")))
        if rank == 0:
            time.sleep(10)
    said = finish_all(processes)
    assert [process.returncode for process in processes] == [0, 0], said
    assert lines(tmp_path / "run") == on_one_machine["zero2"]


def test_a_wrong_address_ends_both_machines_with_a_line_each(machines, tmp_path):
    """Plain python, a process a machine: within parallel.join_timeout_s of its start."""
    command = train(tmp_path / "run", "ddp", "parallel.join_timeout_s=5")
    processes = []
    for rank, address in enumerate((machines[0].address, "10.77.0.9")):
        world = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        world |= {"MASTER_ADDR": address, "MASTER_PORT": PORT}
        processes.append(machines[rank].start(sys.executable, *command, **world))
    here, there = finish_all(processes)
    assert [process.returncode for process in processes] == [1, 1], (here, there)
    assert "error: 1 of 2 processes did not come within 5 s: rank 1" in here and here.count("error: ") == 1, here
    assert "machine1 did not reach the rendezvous at 10.77.0.9:29500 within 5 s: No route to host" in there, there
    assert len(there.splitlines()) == 1 and not (tmp_path / "run").exists()


def test_a_killed_rank_is_restarted_in_place_on_both_machines(machines, on_one_machine, tmp_path):
    """--max_restarts with a static rendezvous: both launchers start again, meet, and the curve shows no trace."""
    command = train(tmp_path / "run", "ddp")
    options = ("--max_restarts", "1", "--monitor_interval", "1")
    processes = [
        machine.start(*accelerate(machines, rank, "ddp", *options), *command) for rank, machine in enumerate(machines)
    ]
    await_steps(tmp_path / "run", 3)
    os.kill(machines[1].rank_pid(), signal.SIGKILL)
    said = finish_all(processes)
    assert [process.returncode for process in processes] == [0, 0], said
    # Alone on its machine, it is missed by its silence, some seconds after the collective broke.
    assert "error: no word from rank 1 (host machine1, pid " in said[0] and "Restart 1 of 1 in place" in said[0], said
    assert "Resuming at step" in said[0], said
    assert lines(tmp_path / "run") == on_one_machine["ddp"]


def test_a_machine_that_is_cut_off_ends_the_run_on_both_sides(machines, tmp_path):
    command = train(tmp_path / "run", "ddp", "parallel.heartbeat_timeout_s=5", "train.steps=100000")
    processes = [machine.start(*accelerate(machines, r, "ddp"), *command) for r, machine in enumerate(machines)]
    await_steps(tmp_path / "run", 3)
    ranks = [Path(f"/proc/{machine.rank_pid()}") for machine in machines]
    machines[1].unplug()
    try:
        end_s = time.monotonic() + 60
        while any(rank.exists() for rank in ranks):
            assert time.monotonic() < end_s, "a rank lives on"
            time.sleep(0.2)
    finally:
        said = finish_all(processes)
        machines[1].plug()
    assert all(process.returncode != 0 for process in processes), said
    assert "error: no word from rank 1 (host machine1, pid " in said[0], said
    assert "error: no word from rank 0 (host machine0, pid " in said[1], said
