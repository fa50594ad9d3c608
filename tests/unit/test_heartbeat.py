"""Rendezvous and heartbeat with threads in the place of ranks: who comes, who goes, and who is to blame."""

from __future__ import annotations

import re
import threading
import time
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from cml_dist.distributed import failure as failures
from cml_dist.distributed.failure import Failure, Member
from cml_dist.distributed.heartbeat import Heartbeat, this_heartbeat
from cml_dist.distributed.rank_heartbeat import RankHeartbeat, heartbeat_alone
from cml_dist.distributed.rendezvous import join, this_member
from cml_dist.errors import WorldError

NAME = {rank: this_member(rank).name for rank in range(4)}


@pytest.fixture(autouse=True)
def at_rest():
    """No thread of a world goes on behind its test."""
    yield
    while worlds:
        worlds.pop().close()


worlds: list[Ranks] = []


class Ranks:
    """The ranks of a world, each with threads of its own in this process; what befell them.

    Those of ``mute`` came to the rendezvous, and nothing else is heard of them.
    """

    def __init__(self, size, absent=(), mute=(), join_s=20.0, **limits):
        worlds.append(self)
        self.server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.limits = {"heartbeat_timeout_s": 20.0, "hang_timeout_s": 60.0, "tick_s": 0.05, **limits}
        self.beats: dict[int, RankHeartbeat] = {}
        self.errors: dict[int, WorldError] = {}
        self.ends: dict[int, tuple[Failure, bool]] = {}
        self.ended = threading.Condition()
        ranks = [rank for rank in range(size) if rank not in absent]
        threads = [threading.Thread(target=self._join, args=(rank, size, join_s, rank in mute)) for rank in ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert not any(thread.is_alive() for thread in threads)

    def _join(self, rank, size, seconds, mute):
        me = this_member(rank)
        try:
            everyone = join(self._client(), me, size, seconds)
        except WorldError as error:
            self.errors[rank] = error
            return
        if not mute:
            self.beats[rank] = RankHeartbeat(everyone[rank], everyone, self._client(), end=self._end, **self.limits)
            self.beats[rank].start()

    def _client(self):
        return TCPStore("127.0.0.1", self.server.port, is_master=False, timeout=timedelta(seconds=20))

    def _end(self, failure, heartbeat, speaks):
        with self.ended:
            self.ends[heartbeat.me.rank] = (failure, speaks)
            self.ended.notify_all()

    def ended_on(self, *ranks):
        """What these ranks, and no others, ended for, all alike; who of them speaks."""
        with self.ended:
            assert self.ended.wait_for(lambda: set(ranks) <= set(self.ends), 20), self.ends
        assert set(self.ends) == set(ranks)
        (found,) = {failure for failure, _ in self.ends.values()}
        return found, [rank for rank, (_, speaks) in self.ends.items() if speaks]

    def close(self):
        for rank in sorted(self.beats, reverse=True):
            self.beats[rank].close()


def test_all_come_work_and_leave_in_peace():
    ranks = Ranks(3)
    for one in ranks.beats.values():
        one.beat("step 1, episode 1 of 2")
        with one.waiting():
            time.sleep(0.2)
    last = threading.Thread(target=ranks.beats[0].outlast)
    last.start()
    for rank in (2, 1):
        assert last.is_alive(), "rank 0 serves the store, and leaves last"
        ranks.beats[rank].close()
    last.join(20)
    ranks.beats[0].close()
    assert not last.is_alive() and ranks.ends == {} and ranks.errors == {}


def test_who_does_not_come_is_named_on_all_that_came():
    ranks = Ranks(4, absent=(1, 3), join_s=0.5)
    assert set(ranks.errors) == {0, 2} and not ranks.beats
    for error in ranks.errors.values():
        assert error.what == "2 of 4 processes did not come within 0 s: ranks 1, 3" and error.everywhere


def test_a_silent_rank_is_missed_and_its_process_may_be_ended():
    ranks = Ranks(3, mute=(2,), heartbeat_timeout_s=1.0)
    found, speakers = ranks.ended_on(0, 1)
    assert re.match(rf"no word from {re.escape(NAME[2])} for \d s, last seen in its start", found.what)
    assert speakers == [0]
    me = this_member(2)
    assert found.stopped == ((me.machine, me.pid),) and found.stacks


def test_rank_0_that_falls_silent_is_missed_by_the_others():
    ranks = Ranks(3, mute=(0,), heartbeat_timeout_s=1.0)
    found, speakers = ranks.ended_on(1, 2)
    assert found.what.startswith(f"no word from {NAME[0]} for ") and speakers


def test_a_broken_collective_shortens_the_wait_for_a_silent_rank():
    ranks = Ranks(2, mute=(1,), heartbeat_timeout_s=600.0)
    started_s = time.monotonic()
    ranks.beats[0].blame(RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer"))
    assert ranks.ended_on(0)[0].what.startswith(f"no word from {NAME[1]}") and time.monotonic() - started_s < 60


def test_a_failure_is_passed_on_and_who_said_it_says_no_more():
    ranks = Ranks(3)
    ranks.beats[1].fail("shard x.tar is missing; copy it")
    found, speakers = ranks.ended_on(0, 2)
    assert found.what == f"{NAME[1]} failed: shard x.tar is missing; copy it"
    assert speakers == []  # rank 1 has had its say on the same screen
    ranks = Ranks(3)
    ranks.beats[0].fail("no space")
    found, speakers = ranks.ended_on(1, 2)
    assert (found.what, speakers) == (f"{NAME[0]} failed: no space", [])


def test_two_failures_at_once_are_told_as_one():
    ranks = Ranks(4)
    for thread in [threading.Thread(target=ranks.beats[rank].fail, args=(f"cause {rank}",)) for rank in (1, 2)]:
        thread.start()
    assert ranks.ended_on(0, 3)[0].what in (f"{NAME[1]} failed: cause 1", f"{NAME[2]} failed: cause 2")


def test_a_rank_that_hangs_is_named_on_all_rank_0_too():
    for culprit in (2, 0):
        ranks = Ranks(3, hang_timeout_s=0.5)
        for rank, one in ranks.beats.items():
            one.wait("the reduction of step 3") if rank != culprit else one.beat("step 3, episode 1 of 1")
        found, speakers = ranks.ended_on(0, 1, 2)
        assert found.what.startswith(f"{NAME[culprit]} did not move for ")
        assert "in step 3, episode 1 of 1, and the others wait" in found.what
        assert speakers == [0] and found.stacks


def test_what_may_take_longer_is_no_hang_before_that():
    ranks = Ranks(2, hang_timeout_s=0.5)
    ranks.beats[0].wait("the reduction of step 3")
    ranks.beats[1].beat("building the network", may_take_s=2.0)
    time.sleep(1.2)
    assert ranks.ends == {}
    found, _ = ranks.ended_on(0, 1)
    assert re.match(rf"{re.escape(NAME[1])} did not move for [2-9] s in building the network", found.what)


def test_the_limit_grows_with_the_longest_pass():
    """A compiled step takes long once; what then takes a little longer than that is no hang."""
    ranks = Ranks(2, hang_timeout_s=1.0)
    ranks.beats[1].beat("step 1, episode 1 of 1")
    time.sleep(0.9)  # nobody waits for it yet
    ranks.beats[1].touch()
    ranks.beats[0].wait("the reduction of step 1")
    time.sleep(1.8)
    assert ranks.ends == {}
    assert ranks.ended_on(0, 1)[0].what.startswith(f"{NAME[1]} did not move for ")


def test_a_process_that_is_alone_ends_itself_where_it_hangs():
    ends = []
    alone = RankHeartbeat(
        me := this_member(0),
        [me],
        None,
        heartbeat_timeout_s=1.0,
        hang_timeout_s=0.5,
        tick_s=0.05,
        end=lambda *why: ends.append(why),
    )
    alone.start()
    until_s = time.monotonic() + 1.0
    while time.monotonic() < until_s:
        alone.touch()
        time.sleep(0.02)
    assert not ends, "it moves"
    alone.beat("step 3, episode 1 of 2")
    until_s = time.monotonic() + 20.0
    while not ends and time.monotonic() < until_s:
        time.sleep(0.02)
    ((failure, of, speaks),) = ends
    where = "step 3, episode 1 of 2"
    assert re.match(rf"{re.escape(NAME[0])} did not move for [1-9] s in {where}; the log of each rank", failure.what)
    assert speaks and of is alone
    with heartbeat_alone(this_member(0), 60.0):
        assert isinstance(this_heartbeat(), RankHeartbeat)
    assert type(this_heartbeat()) is Heartbeat


# --------------------------------------------------------------------------- who is to blame


def member(rank, waiting, idle_s, where="x", host="n1"):
    return Member(rank, host, 100 + rank, host, where, waiting, idle_s, limit_s=60.0)


def test_only_who_lets_others_wait_hangs():
    hanging = failures.hanging
    assert hanging([member(0, False, 900), member(1, False, 900)]) is None, "a long episode on all ranks"
    assert hanging([member(0, True, 50), member(1, False, 900)]) is None, "nobody has waited long yet"
    assert hanging([member(0, True, 900), member(1, False, 3)]) is None, "it is at work, and will come"
    assert hanging([member(0, True, 900), member(1, True, 3)]) is None, "it has just come"
    slow = member(1, False, 70, "validation, episode 17 of 50")
    found = hanging([member(0, True, 61), slow, member(2, False, 1)])
    assert found.ranks == (1,) and found.stacks
    assert found.what.startswith("rank 1 (host n1, pid 101) did not move for 70 s in validation, episode 17 of 50, and")


def test_ranks_that_wait_for_each_other_are_told_apart_by_place():
    found = failures.hanging([member(0, True, 70, "a"), member(1, True, 70, "a"), member(2, True, 70, "b")])
    assert found.ranks == (2,)
    told = "all ranks waited for each other for 70 s: rank 2 (host n1, pid 102) in b, ranks 0, 1 (host n1) in a"
    assert found.what.startswith(told)


def test_the_ranks_of_a_lost_machine_are_named_together():
    found = failures.lost([member(rank, False, 0, f"step {rank}", host="n2") for rank in range(8, 18)])
    assert found.what.startswith("ranks 8, 9, 10, 11, 12, 13, 14, 15, ... (host n2) ended without a word, last seen in")


def test_a_failure_is_the_same_at_the_other_end():
    for found in (failures.silent([member(1, True, 3)]), failures.failed(member(1, True, 3), "x", True, 75)):
        assert Failure.from_json(found.to_json()) == found
