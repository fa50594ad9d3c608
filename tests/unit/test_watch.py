"""The watch between ranks, with threads in the place of processes: who comes, who goes, and who is to blame."""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
import warnings

import pytest
from torch.distributed import HashStore

from cml_dist.config.schema import ParallelConfig
from cml_dist.errors import WorldError
from cml_dist.parallel import arrival, meeting, star, verdict, watch
from cml_dist.parallel.arrival import Arriving, identity
from cml_dist.parallel.launched import Launched
from cml_dist.parallel.meeting import KEY
from cml_dist.parallel.verdict import Member, Verdict
from cml_dist.parallel.wire import Wire

HERE = "127.0.0.1"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for module in (watch, star):
        monkeypatch.setattr(module, "TICK_S", 0.05)
    monkeypatch.setattr(star, "TOGETHER_S", 0.2)
    monkeypatch.setattr(star, "STRANGER_S", 0.3)
    monkeypatch.setattr(watch, "MARGIN_S", 5.0)
    for module in (arrival, meeting):
        monkeypatch.setattr(module, "RETRY_S", 0.05)


class Ranks:
    """The ranks of a world, each in a thread of this process; what befell them.

    Those of ``late`` still import their libraries, until their event is set.
    """

    def __init__(self, size, absent=(), join_s=20.0, late=(), port=None, **limits):
        self.store, self.size = HashStore(), size
        self.port = port or (free_port() if late else 0)
        self.late = {rank: threading.Event() for rank in late}
        self.arriving = {}
        self.config = ParallelConfig().model_copy(update={"silence_s": 20.0, **limits})  # below the least too
        self.join_s = join_s
        self.watches, self.errors, self.ends = {}, {}, {}
        self.ended = threading.Condition()
        self.threads = [threading.Thread(target=self._join, args=(rank,)) for rank in range(size) if rank not in absent]
        for thread in self.threads:
            thread.start()

    def arrive(self, rank):
        self.arriving[rank] = Arriving(identity(rank), self.size, self.config, HERE, self.port, "the word", self.end)
        return self.arriving[rank]

    def _join(self, rank):
        arriving = self.arrive(rank)
        if rank in self.late:
            self.late[rank].wait(20)
        try:
            self.watches[rank] = meeting.join(arriving, self.store, self.join_s)
        except WorldError as error:
            self.errors[rank] = error

    def end(self, why, of, speaks):
        with self.ended:
            self.ends[of.me.rank] = (why, speaks)
            self.ended.notify_all()

    def joined(self):
        for thread in self.threads:
            thread.join(30)
        assert not any(thread.is_alive() for thread in self.threads)
        return self

    def ended_on(self, *ranks):
        """What these ranks, and no others, ended for; all the same."""
        with self.ended:
            assert self.ended.wait_for(lambda: set(ranks) <= set(self.ends), 10), self.ends
        assert set(self.ends) == set(ranks)
        whats = {why.what for why, _ in self.ends.values()}
        assert len(whats) == 1, whats
        return whats.pop(), [rank for rank, (_, speaks) in self.ends.items() if speaks]

    def by_hand(self, rank):
        """A rank that says its name, and of which nothing else is heard."""
        arriving = Arriving(identity(rank), self.size, self.config, HERE, 0, "", self.end)
        _, wire = meeting._find_leader(arriving, self.store, time.monotonic() + 10)
        wire.write({"here": True})
        return wire

    def close(self):
        for one in reversed(self.watches.values()):
            one.close()


def free_port():
    with socket.create_server((HERE, 0)) as server:
        return server.getsockname()[1]


def published(ranks):
    ranks.store.wait([KEY])
    return json.loads(ranks.store.get(KEY))


def test_all_come_work_and_leave_in_peace():
    ranks = Ranks(3).joined()
    assert len({one.meeting for one in ranks.watches.values()}) == 1
    for one in ranks.watches.values():
        one.beat("step 1, episode 1 of 2")
        with one.waiting():
            time.sleep(0.2)
    ranks.close()
    assert ranks.ends == {} and ranks.errors == {}
    assert not any(one._thread.is_alive() for one in ranks.watches.values())


def test_a_port_scanner_and_a_wrong_token_disturb_nobody():
    ranks = Ranks(2, absent=(1,))
    there = published(ranks)
    noise = [
        b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\n", b"[1]\n", b"{}\n", b"\xff" * 100_000, b"",
        json.dumps({"token": "0" * 32, "member": vars(identity(1)), "size": 2}).encode() + b"\n",
        json.dumps({"token": there["token"], "member": 1, "size": 2}).encode() + b"\n",
        json.dumps({"token": there["token"], "member": vars(identity(7)), "size": 2}).encode() + b"\n",
    ]  # fmt: skip
    strangers = [socket.create_connection((HERE, there["port"])) for _ in noise]
    for stranger, words in zip(strangers, noise, strict=True):
        stranger.sendall(words)
    for stranger in strangers:  # also the one that says nothing is sent away
        stranger.settimeout(10)
        try:
            while stranger.recv(2**16):
                pass
        except ConnectionResetError:
            pass
        stranger.close()
    thread = threading.Thread(target=ranks._join, args=(1,))
    thread.start()
    thread.join(10)
    ranks.joined()
    assert set(ranks.watches) == {0, 1}
    ranks.close()
    assert ranks.ends == {}


def test_who_does_not_come_is_named_on_all_that_came():
    ranks = Ranks(4, absent=(1, 3), join_s=0.5).joined()
    assert set(ranks.errors) == {0, 2} and not ranks.watches
    for error in ranks.errors.values():
        assert error.what == "2 of 4 processes did not come within 0 s: ranks 1, 3" and error.everywhere


def test_a_rank_lost_while_others_are_still_to_come_is_named():
    ranks = Ranks(3, absent=(1, 2))
    ranks.by_hand(1).close()
    ranks.joined()
    assert ranks.errors[0].what.startswith("rank 1 (host ") and "ended without a word" in ranks.errors[0].what


def test_a_rank_may_come_later_than_silence_would_be_borne():
    ranks = Ranks(3, absent=(2,), silence_s=1.0)
    time.sleep(2.5)
    assert ranks.errors == {}, "rank 0 is alive, and says so"
    ranks._join(2)
    ranks.joined()
    assert set(ranks.watches) == {0, 1, 2}
    ranks.close()


def test_rank_0_that_does_not_come_is_named():
    ranks = Ranks(2, absent=(0,), join_s=0.3).joined()
    assert ranks.errors[1].what.startswith("rank 0 did not let in this process on host ")
    assert not ranks.errors[1].everywhere, "who else could say so"


def test_what_an_earlier_start_left_in_the_store_is_passed_over():
    with socket.create_server((HERE, 0)) as gone:
        port = gone.getsockname()[1]
    ranks = Ranks(2, absent=(0,))
    ranks.store.set(KEY, json.dumps({"addresses": [HERE], "port": port, "token": "a", "countersign": "b"}))
    time.sleep(0.2)
    thread = threading.Thread(target=ranks._join, args=(0,))
    thread.start()
    thread.join(10)
    ranks.joined()
    assert set(ranks.watches) == {0, 1}
    ranks.close()


def test_two_of_one_rank_are_refused():
    ranks = Ranks(3, absent=(1, 2), join_s=0.5)
    first = ranks.by_hand(1)
    time.sleep(0.1)
    with pytest.raises(WorldError, match="two processes call themselves rank 1"):
        meeting._find_leader(ranks.arrive(1), ranks.store, time.monotonic() + 0.2)
    ranks.joined()
    first.close()


def test_ranks_find_each_other_before_the_meeting():
    ranks = early(Ranks(3, late=(0, 1, 2)), 1, 2)
    assert not ranks.watches, "they have not met"
    for event in ranks.late.values():
        event.set()
    ranks.joined()
    assert len({one.meeting for one in ranks.watches.values()}) == 1
    ranks.close()
    assert ranks.ends == {} and ranks.errors == {}


def test_rank_0_that_starts_late_may_take_its_time_once_it_is_known():
    ranks = Ranks(2, absent=(0,), late=(0,), join_s=4.0)
    time.sleep(0.5)
    assert 1 in ranks.arriving and ranks.arriving[1].joined is None
    thread = threading.Thread(target=ranks._join, args=(0,))
    thread.start()
    time.sleep(4.5)
    assert ranks.errors == {}, "rank 0 imports, as rank 1 knows"
    ranks.late[0].set()
    thread.join(10)
    ranks.joined()
    assert set(ranks.watches) == {0, 1}
    ranks.close()


def test_restarts_in_place_find_each_other_and_never_the_start_before(monkeypatch):
    world = Launched(1, 2, 0, 1, "n1", 29500)
    word = arrival.world_word(world)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # torchrun counts where the fault was, and nowhere else
    assert arrival.world_word(world) == word
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert arrival.world_word(world) != word
    monkeypatch.setattr(star, "TOGETHER_S", 5.0)
    ranks = Ranks(3, absent=(1, 2), join_s=2.0)
    ranks.by_hand(1).close()
    until_s = time.monotonic() + 4
    while not ranks.arriving[0].joined._gone:
        assert time.monotonic() < until_s
        time.sleep(0.02)
    with pytest.raises(WorldError, match="rank 1 has left this start of the world"):
        meeting._find_leader(ranks.arrive(1), ranks.store, time.monotonic() + 0.5)
    ranks.joined()
    assert "rank 1 (host " in ranks.errors[0].what


def killed(arriving):
    """As the kernel does for a process that is killed."""
    for wire in [arriving.joined._wire] if arriving.me.rank else list(arriving.joined._wires.values()):
        wire._socket.shutdown(socket.SHUT_RDWR)


def early(ranks, *them):
    until_s = time.monotonic() + 10
    while not all(rank in ranks.arriving and ranks.arriving[rank].joined for rank in (0, *them)):
        assert time.monotonic() < until_s
        time.sleep(0.02)
    while not set(them) <= set(ranks.arriving[0].joined._members):
        assert time.monotonic() < until_s
        time.sleep(0.02)
    return ranks


def test_a_rank_killed_while_it_imports_is_named_by_those_that_wait_for_it():
    ranks = early(Ranks(3, late=(1,), absent=(2,)), 1)
    killed(ranks.arriving[1])
    ranks.threads[0].join(10)
    assert ranks.errors[0].what.startswith("rank 1 (host ")
    assert "ended without a word, last seen in its start" in ranks.errors[0].what
    ranks.late[1].set()
    ranks.joined()
    assert not ranks.watches and not ranks.ends


def test_who_still_imports_when_a_rank_is_lost_is_ended_after_a_while(monkeypatch):
    monkeypatch.setattr(watch, "GRACE_S", 0.5)
    ranks = early(Ranks(3, late=(0, 1, 2), join_s=1.0), 1, 2)
    killed(ranks.arriving[1])
    with ranks.ended:
        ranks.ended.wait_for(lambda: {0, 2} <= set(ranks.ends), 10)
    assert {rank: speaks for rank, (_, speaks) in ranks.ends.items() if rank != 1} == {0: True, 2: False}
    for event in ranks.late.values():
        event.set()
    ranks.joined()


def test_what_all_will_find_out_may_take_as_long_as_their_imports(monkeypatch):
    monkeypatch.setattr(watch, "GRACE_S", 0.2)
    ranks = early(Ranks(2, late=(0, 1)), 1)
    ranks.arriving[1].fail("it was stopped by SIGUSR1 before training began", everywhere=True, stop_code=75)
    time.sleep(0.6)
    assert ranks.ends == {}
    ranks.late[0].set()
    ranks.threads[0].join(10)
    assert ranks.errors[0].what.endswith("left: it was stopped by SIGUSR1 before training began")
    assert ranks.errors[0].exit_code == 75, "no fault, which a launcher would answer by another start"
    ranks.late[1].set()
    ranks.joined()


def test_a_rank_that_does_not_answer_during_its_imports_is_not_taken_for_lost():
    ranks = early(Ranks(2, late=(0,), silence_s=2.0), 1)
    leader = ranks.arriving[0].joined
    leader._tick = lambda now_s: time.sleep(2.5)  # as in an import that keeps Python's lock
    time.sleep(3)
    del leader._tick
    assert ranks.errors == {} and ranks.ends == {}
    ranks.late[0].set()
    ranks.joined()
    ranks.close()
    assert ranks.ends == {} and ranks.errors == {}


def test_rank_0_that_never_gets_out_of_its_imports_is_missed():
    ranks = early(Ranks(2, late=(0,), silence_s=1.0, timeout_s=2.0), 1)
    leader, goes_on = ranks.arriving[0].joined, threading.Event()
    leader._tick = lambda now_s: goes_on.wait(20)  # it is stopped
    what, _ = ranks.ended_on(1)
    assert what.startswith(f"no word from {identity(0).name} for ") and "last seen in its start" in what
    ranks.late[0].set()
    goes_on.set()
    ranks.joined()


def test_a_port_that_another_program_holds_is_passed_over():
    with socket.create_server((HERE, 0)) as other:  # answers nothing
        ranks = Ranks(2, port=other.getsockname()[1]).joined()
        assert set(ranks.watches) == {0, 1} and ranks.arriving[0].meeting["port"] != ranks.port
        ranks.close()


def test_a_killed_rank_is_named_by_all_and_rank_0_speaks():
    ranks = Ranks(4, absent=(3,))
    killed = ranks.by_hand(3)
    ranks.joined()
    killed.write({"where": "step 7, episode 2 of 3", "waiting": False, "idle_s": 0.0})
    killed.close()
    what, speakers = ranks.ended_on(0, 1, 2)
    where = "last seen in step 7, episode 2 of 3 (killed? out of memory?)"
    assert what == f"{identity(3).name} ended without a word, {where}"
    assert speakers == [0]


def test_where_rank_0_is_lost_the_lowest_of_the_others_speaks():
    ranks = Ranks(4).joined()
    ranks.watches[0].beat("saving step 500")
    time.sleep(0.3)
    for wire in list(ranks.watches[0]._wires.values()):
        wire._socket.shutdown(socket.SHUT_RDWR)  # as the kernel does for a process that is killed
    with ranks.ended:
        ranks.ended.wait_for(lambda: {1, 2, 3} <= set(ranks.ends), 10)
    ranks.ends.pop(0, None)
    what, speakers = ranks.ended_on(1, 2, 3)
    assert what.startswith(f"{identity(0).name} ended without a word, last seen in saving step 500")
    assert speakers == [1]


def test_a_silent_rank_is_missed():
    ranks = Ranks(3, absent=(2,), silence_s=1.5)
    mute = ranks.by_hand(2)
    mute.write({"where": "step 1", "waiting": True, "idle_s": 0.0})
    ranks.joined()
    what, speakers = ranks.ended_on(0, 1)
    assert what.startswith(f"no word from {identity(2).name} for 2 s") and speakers == [0]
    assert ranks.ends[1][0].stopped == ((identity(2).machine, os.getpid()),)
    mute.close()


def test_a_process_that_stood_still_itself_blames_nobody_for_that_time():
    """A suspended job: when it goes on, nobody has been heard for long."""
    ranks = Ranks(2, absent=(1,), silence_s=1.5)
    other = ranks.by_hand(1)
    other.write({"where": "step 1", "waiting": True, "idle_s": 0.0})
    ranks.joined()
    leader, goes_on = ranks.watches[0], threading.Event()

    def stand_still():
        if not goes_on.is_set():
            time.sleep(2.0)
            goes_on.set()

    leader._guard = stand_still
    assert goes_on.wait(10)
    time.sleep(0.5)
    assert ranks.ends == {}
    assert ranks.ended_on(0)[0].startswith(f"no word from {identity(1).name}"), "it has its own time again"
    other.close()


def test_a_failure_is_passed_on_and_who_said_it_says_no_more():
    ranks = Ranks(3).joined()
    ranks.watches[1].fail("shard x.tar is missing; copy it")
    what, speakers = ranks.ended_on(0, 2)
    assert what == f"{identity(1).name} failed: shard x.tar is missing; copy it"
    assert speakers == []  # rank 1 has its say on the same screen
    ranks = Ranks(3).joined()
    ranks.watches[0].fail("no space")
    assert ranks.ended_on(1, 2) == (f"{identity(0).name} failed: no space", [])


def test_what_all_will_find_out_they_get_the_time_to(monkeypatch):
    monkeypatch.setattr(watch, "GRACE_S", 0.6)
    ranks = Ranks(2).joined()
    ranks.watches[1].fail("the world is wrong", everywhere=True)
    time.sleep(0.3)
    assert ranks.ends == {}
    started_s = time.monotonic()
    ranks.watches[0].fail("the world is wrong", everywhere=True)  # does not wait for a thread that waits for it
    assert time.monotonic() - started_s < 0.3
    assert ranks.ended_on(0)[1] == [0]  # had it not left by then


def test_a_hanging_rank_is_named_on_all():
    ranks = Ranks(3, timeout_s=0.5).joined()
    for rank, one in ranks.watches.items():
        one.wait("the reduction of step 3") if rank != 2 else one.beat("step 3, episode 1 of 1")
    what, speakers = ranks.ended_on(0, 1, 2)
    assert what.startswith(f"{identity(2).name} did not move for ") and "in step 3, episode 1 of 1, and" in what
    assert speakers == [0] and all(why.stacks for why, _ in ranks.ends.values())


def test_rank_0_that_hangs_says_so_itself_and_nobody_else_does():
    ranks = Ranks(3, timeout_s=0.5).joined()
    for rank, one in ranks.watches.items():
        one.wait("the end") if rank != 0 else one.beat("closing files and trackers")
    what, speakers = ranks.ended_on(0, 1, 2)
    assert what.startswith(f"{identity(0).name} did not move for ") and speakers == [0]


def test_rank_0_leaves_last_and_watches_the_others_to_their_end():
    ranks = Ranks(3, timeout_s=1.5).joined()
    for one in ranks.watches.values():
        one.beat("leaving the process group")
    ranks.watches[1].close()
    ranks.watches[0].beat("the end")
    waits = threading.Thread(target=ranks.watches[0].outlast)
    waits.start()
    what, _ = ranks.ended_on(0, 2)
    name = re.escape(identity(2).name)
    assert re.match(rf"{name} did not move for [2-9] s in leaving the process group, and the others wait", what), what
    waits.join(10)
    assert not waits.is_alive()
    ranks = Ranks(2).joined()
    waits = threading.Thread(target=ranks.watches[0].outlast)
    waits.start()
    time.sleep(0.3)
    assert waits.is_alive()
    ranks.watches[1].close()
    waits.join(10)
    assert not waits.is_alive()
    ranks.close()
    assert ranks.ends == {}


def test_what_may_take_longer_is_no_hang_before_that():
    ranks = Ranks(2, timeout_s=0.5).joined()
    ranks.watches[0].wait("the reduction of step 3")
    ranks.watches[1].beat("building the network", may_take_s=1.5)
    time.sleep(1.0)
    assert ranks.ends == {}
    what, _ = ranks.ended_on(0, 1)
    assert what.startswith(f"{identity(1).name} did not move for ") and "in building the network" in what


def test_a_child_holds_no_connection_open():
    ranks = Ranks(2).joined()
    wires = [ranks.watches[1]._wire, *ranks.watches[0]._wires.values()]
    descriptors = [wire.fileno() for wire in wires]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 dislikes forks of threaded processes
        child = os.fork()
    if child == 0:
        closed = [not os.path.exists(f"/proc/self/fd/{descriptor}") for descriptor in descriptors]
        os._exit(0 if all(closed) else 1)
    assert os.waitpid(child, 0)[1] == 0
    ranks.close()
    assert ranks.ends == {}


# --------------------------------------------------------------------------- who is to blame


def member(rank, waiting, still_s, where="x", host="n1"):
    return Member(rank, host, 100 + rank, host, where, waiting, moved_s=1000.0 - still_s)


def hanging(*members):
    return verdict.hanging(members, 1000.0, timeout_s=60)


def test_only_who_lets_others_wait_hangs():
    assert hanging(member(0, False, 900), member(1, False, 900)) is None, "a long episode on all ranks"
    assert hanging(member(0, True, 50), member(1, False, 900)) is None, "nobody has waited long yet"
    assert hanging(member(0, True, 900), member(1, False, 3)) is None, "it is at work, and will come"
    assert hanging(member(0, True, 900), member(1, True, 3)) is None, "it has just come"
    found = hanging(member(0, True, 61), member(1, False, 70, "validation, episode 17 of 50"), member(2, False, 1))
    assert found.ranks == (1,) and found.stacks
    assert found.what.startswith("rank 1 (host n1, pid 101) did not move for 70 s in validation, episode 17 of 50, and")


def test_ranks_that_wait_for_each_other_are_told_apart_by_place():
    found = hanging(member(0, True, 70, "a"), member(1, True, 70, "a"), member(2, True, 70, "b"))
    assert found.ranks == (2,)
    told = "all ranks waited for each other for 60 s: rank 2 (host n1, pid 102) in b, ranks 0, 1 (host n1) in a"
    assert found.what.startswith(told)


def test_the_ranks_of_a_lost_machine_are_named_together():
    found = verdict.lost([member(rank, False, 0, f"step {rank}", host="n2") for rank in range(8, 18)])
    assert found.what.startswith("ranks 8, 9, 10, 11, 12, 13, 14, 15, ... (host n2) ended without a word, last seen in")


def test_a_verdict_survives_the_wire():
    found = verdict.silent([member(1, True, 3)], 1000.0)
    one, two = (Wire(end) for end in socket.socketpair())
    one.write({"verdict": vars(found)})
    assert Verdict.from_json(two.await_one(5)["verdict"]) == found
    one.close()
    two.close()
