"""The log of a rank: what comes before the run begins, what cannot be written, and Python's warnings."""

from __future__ import annotations

import re
import warnings

import pytest

from cml_dist.telemetry.rank_log import RankLog


@pytest.fixture
def log():
    log = RankLog(3)
    yield log
    log.close()


def lines(folder):
    return (folder / "rank-00003.log").read_text().splitlines()


def test_a_run_that_never_begins_leaves_nothing(tmp_path, log):
    log.console.note("early")
    log.close()
    assert not any(tmp_path.iterdir())


def test_every_line_has_its_time_and_a_later_start_goes_on(tmp_path, log):
    log.console.note("early")
    log.open(tmp_path / "logs", "first start")
    log.console.table("Table", ("a",), [(1,), (2,)])
    log.close()
    again = RankLog(3)
    again.open(tmp_path / "logs", "second start")
    again.failed(ValueError("two\nlines"))
    again.close()
    found = lines(tmp_path / "logs")
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d  \S", line) or "   " in line for line in found)
    words = [line[21:] for line in found]
    assert words[:3] == ["first start", "early", "Table"]
    assert "second start" in words and "error: ValueError: two" in words and words[-2:] == ["ValueError: two", "lines"]


def test_what_cannot_be_written_costs_one_warning(tmp_path, log, capfd):
    (tmp_path / "rank-00003.log").symlink_to("/dev/full")
    log.open(tmp_path, "start")
    log.console.note("more")
    log.close()
    out, err = capfd.readouterr()
    assert out == ""
    assert err == "warning: the log of rank 3 cannot be written: No space left on device; the run goes on without it\n"


def test_a_folder_that_cannot_be_made_costs_one_warning(tmp_path, log, capfd):
    (tmp_path / "logs").touch()
    log.open(tmp_path / "logs", "start")
    log.console.note("more")
    assert capfd.readouterr().err.count("warning: the log of rank 3 cannot be written") == 1


def test_warnings_of_python_are_in_the_log_alone_once_it_is_open(tmp_path):
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        log = RankLog(3)
        warnings.warn("before", stacklevel=1)
        log.open(tmp_path, "start")
        warnings.warn("while it is open", stacklevel=1)
        log.close()
        warnings.warn("after", stacklevel=1)
    assert [str(w.message) for w in shown] == ["before", "after"]
    found = [line.split("UserWarning: ")[1] for line in lines(tmp_path) if "UserWarning" in line]
    assert found == ["before", "while it is open"]
