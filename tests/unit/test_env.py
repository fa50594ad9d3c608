"""What the environment says of the world: read as it is, refused in one line where it cannot be, and never guessed."""

from __future__ import annotations

import os

import pytest

from cml_dist.cli import build_parser, main
from cml_dist.commands.config import config
from cml_dist.config.load import parse_config
from cml_dist.distributed.env import Launched, check_launch, forget_others, idle_nodes, launched, launched_or_alone
from cml_dist.distributed.rendezvous import choose_interface
from cml_dist.errors import NetworkError, WorldError
from cml_dist.run import folder as folders
from cml_dist.run.folder import same_everywhere
from cml_dist.telemetry.console import Console

BY_HAND = {
    "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}  # fmt: skip
TORCHRUN = {
    **BY_HAND, "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "2",
}  # fmt: skip

SINUSOID = {"domain": {"name": "sinusoid"}, "model": {"backbone": "mlp"}}


def only(monkeypatch, environment):
    """These variables alone, for what reads the environment itself."""
    for name in list(os.environ):
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def without(*names, **others):
    return {**{name: value for name, value in BY_HAND.items() if name not in names}, **others}


@pytest.mark.parametrize(
    ("environment", "world"),
    [
        ({}, Launched()),
        ({"RANK": "5", "LOCAL_RANK": "1"}, Launched()),  # left behind by something else
        ({"WORLD_SIZE": "1", "RANK": "0"}, Launched()),
        ({"WORLD_SIZE": "", "RANK": "", "MASTER_ADDR": "node0"}, Launched()),
        (BY_HAND, Launched(1, 2, 0, 1, "node0", 29500)),
        (TORCHRUN, Launched(3, 4, 1, 2, "node0", 29500)),
    ],
)
def test_a_world_is_read_as_it_is(environment, world):
    assert launched(environment) == world


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        (without("LOCAL_RANK", "LOCAL_WORLD_SIZE"), "LOCAL_RANK and LOCAL_WORLD_SIZE are not set; set RANK"),
        (without("MASTER_PORT"), "WORLD_SIZE is 2, but MASTER_PORT is not set"),
        (without("WORLD_SIZE"), "RANK and MASTER_ADDR are set, but WORLD_SIZE is not"),
        (without(RANK="2"), "RANK is 2, but must lie in 0 to 1"),
        (without(LOCAL_RANK="1"), "LOCAL_RANK is 1, but must lie in 0 to 0"),
        (without(LOCAL_WORLD_SIZE="3"), "LOCAL_WORLD_SIZE is 3, but must lie in 1 to 2"),
        (without(MASTER_PORT="0"), "MASTER_PORT is 0, but must lie in 1 to 65535"),
        (without(WORLD_SIZE="two"), "WORLD_SIZE is 'two', which is no count"),
        (without(RANK="-1"), "RANK is '-1', which is no count"),
    ],
)
def test_a_world_that_cannot_be_is_refused(environment, words, monkeypatch):
    with pytest.raises(WorldError) as caught:
        launched(environment)
    assert words in str(caught.value)
    only(monkeypatch, environment)
    assert launched_or_alone() == Launched()


@pytest.mark.parametrize(
    ("asked", "environment", "words"),
    [
        (4, BY_HAND, "parallel.processes asks for 4 processes, but the world has 2"),
        (2, {}, "parallel.processes asks for 2 processes, but the world has 1"),
        (None, {"SLURM_STEP_NUM_TASKS": "2"}, "srun started 2 copies of this command (SLURM_STEP_NUM_TASKS), but they"),
        (None, {"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun started 2 copies"),
        (None, {"PMI_SIZE": "2", "WORLD_SIZE": "1"}, "that of this copy has 1 process on 1 machine"),
        # srun with an accelerate launch of one machine on each of two
        (None, {**TORCHRUN, "GROUP_WORLD_SIZE": "1", "SLURM_STEP_NUM_TASKS": "2"}, "has 4 processes on 1 machine"),
        (None, {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "node0"}, "but accelerate launch started one"),
    ],
)
def test_another_world_than_was_meant_is_refused(asked, environment, words):
    with pytest.raises(WorldError) as caught:
        check_launch(asked, environment)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("asked", "environment"),
    [
        (None, {**TORCHRUN, "SLURM_STEP_NUM_TASKS": "2"}),  # an accelerate launch on each of two nodes
        (None, {**BY_HAND, "SLURM_STEP_NUM_TASKS": "2", "PMI_SIZE": "2"}),  # srun of the processes themselves
        (None, {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "1"}),  # one of several steps of a job
        (1, {"SLURM_STEP_NUM_TASKS": "8"}),  # eight runs, and said so
        (2, BY_HAND),
    ],
)
def test_what_was_meant_passes(asked, environment):
    assert check_launch(asked, environment) == launched(environment)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, False),
        ({"SLURM_JOB_NUM_NODES": "2"}, True),  # a batch script without srun
        ({**BY_HAND, "SLURM_JOB_NUM_NODES": "2"}, False),
        ({**TORCHRUN, "SLURM_JOB_NUM_NODES": "3", "SLURM_STEP_NUM_NODES": "2"}, False),  # srun --nodes 2
        ({"SLURM_JOB_NUM_NODES": "2", "SLURM_STEP_NUM_NODES": "2"}, True),
    ],
)
def test_nodes_that_stay_idle_are_told_of(environment, said):
    assert (idle_nodes(environment) is not None) is said
    if said:
        assert "the job has 2 nodes, but this run is on 1" in idle_nodes(environment)


def test_cml_dist_config_plans_for_the_world_that_a_run_here_would_have(monkeypatch, capfd):
    def planned(*overrides):
        config(build_parser().parse_args(["config", "sinusoid", *overrides]), Console())
        return capfd.readouterr().out

    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert "4 processes (ddp)" in planned()
    assert "3 processes (ddp)" in planned("parallel.processes=3")
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert main(["config", "sinusoid"]) == 1
    assert capfd.readouterr().err.startswith("error: WORLD_SIZE is 'two', which is no count; set it right, or unset")


def test_a_lone_process_is_alone(monkeypatch):
    """Accelerate would wait for the others that these speak of."""
    for environment, left in (
        ({"LOCAL_RANK": "0", "PMI_SIZE": "2", "HOME": "/root"}, {"HOME"}),
        ({**BY_HAND, "RANK": "0", "WORLD_SIZE": "1"}, set(BY_HAND)),  # torchrun of one process
        (BY_HAND, set(BY_HAND)),
    ):
        only(monkeypatch, environment)
        forget_others()
        assert set(os.environ) == left


def test_an_interface_of_ones_own_is_left_alone(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    choose_interface("no.such.host.invalid", 29500)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ("127.0.1.1", "MASTER_ADDR is 127.0.1.1, which is the loopback"),
        ("no.such.host.invalid", "there is no way to no.such.host.invalid (MASTER_ADDR)"),
    ],
)
def test_a_way_that_leads_nowhere_is_refused(host, words, monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    with pytest.raises(NetworkError) as caught:
        choose_interface(host, 29500)
    assert words in str(caught.value)
    assert "GLOO_SOCKET_IFNAME" not in os.environ


def test_a_folder_that_the_machines_do_not_share_is_refused(tmp_path, monkeypatch):
    folders.wait_until_seen("run.dir", lambda: True)
    monkeypatch.setattr(folders, "SEEN_WITHIN_S", 0.3)
    with pytest.raises(NetworkError, match=r"does not see run.dir runs/own, which rank 0 has made; put"):
        folders.wait_until_seen("run.dir runs/own", lambda: False)


def test_where_the_data_lies_may_differ_from_machine_to_machine_and_nothing_else():
    settings = same_everywhere(parse_config(SINUSOID, source="test"))
    assert {"optim.lr", "run.dir", "parallel.strategy", "engine.name"} <= set(settings)
    assert not {"domain.root", "domain.cache"} & set(settings)
