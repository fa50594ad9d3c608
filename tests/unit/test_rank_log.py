"""The log of a rank: what comes before the run begins, what cannot be written, and Python's warnings."""

from __future__ import annotations

import logging
import re
import warnings

import pytest

from cml_dist.telemetry.console import Console
from cml_dist.telemetry.rank_log import RankLog


@pytest.fixture
def make_log():
    """RankLog, and each that was made is closed."""
    made = []
    yield lambda rank=3: made.append(RankLog(rank)) or made[-1]
    for log in made:
        log.close()


def lines(folder):
    return (folder / "rank-00003.log").read_text().splitlines()


def test_a_run_that_never_begins_leaves_nothing(tmp_path, make_log):
    log = make_log()
    Console(quiet=True).note("early")
    log.close()
    assert not any(tmp_path.iterdir())


def test_every_line_has_its_time_and_a_later_start_goes_on(tmp_path, make_log):
    log, console = make_log(), Console(quiet=True)
    console.note("early")
    log.open(tmp_path / "logs", "first start")
    console.warn("late")
    log.close()
    console.note("nobody hears it")
    again = make_log()
    again.open(tmp_path / "logs", "second start")
    again.failed(ValueError("bad value"))
    again.close()
    *found, last = lines(tmp_path / "logs")
    assert last == "ValueError: bad value"  # the traceback
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d [A-Z]+ +\S", line) for line in found)
    assert [line.split(maxsplit=1)[1] for line in found] == [
        "INFO    first start", "INFO    early", "WARNING late", "INFO    second start", "ERROR   ValueError: bad value",
    ]  # fmt: skip


@pytest.mark.parametrize("broken", ["a full disk", "no folder"])
def test_what_cannot_be_written_costs_one_warning(tmp_path, make_log, capfd, broken):
    if broken == "no folder":
        (tmp_path / "logs").touch()
    else:
        (tmp_path / "logs").mkdir()
        (tmp_path / "logs" / "rank-00003.log").symlink_to("/dev/full")
    log = make_log()
    for _ in range(2):
        log.open(tmp_path / "logs", "start")
        Console(quiet=True).note("more")
    log.close()
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1
    assert re.match(r"warning: .*/rank-00003.log cannot be written: [\w ]+; the run goes on without this log\n", err)


@pytest.mark.parametrize("rank", [0, 3])
def test_warnings_of_python_and_libraries_are_in_the_log_and_on_the_screen_of_rank_0(tmp_path, make_log, capfd, rank):
    log = make_log(rank)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("before", stacklevel=1)
        log.open(tmp_path, "start")
        warnings.warn("after", stacklevel=1)
    logging.getLogger("library").warning("of a library")
    Console(quiet=True).warn("said by the console itself")
    log.close()
    (file,) = tmp_path.iterdir()
    screen = capfd.readouterr().err
    for word in ("UserWarning: before", "UserWarning: after", "of a library"):
        assert file.read_text().count(word) == 1 and screen.count(word) == (rank == 0)
    assert "by the console itself" in file.read_text() and "by the console itself" not in screen
