"""The console: plain lines in a log, live displays on a terminal, silence on other ranks, names shown as they are."""

from __future__ import annotations

import builtins
import io
import math
import re

import pytest

from cml_dist.telemetry import text
from cml_dist.telemetry.console import Console, ResultRow
from cml_dist.telemetry.metrics import StepMetrics
from cml_dist.telemetry.summary import TrainingSummary


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def at(step: int, **changes) -> StepMetrics:
    values = {"loss": 1.234, "outer_loss": 0.6, "score": 0.512, "colearner_loss": 0.634, "colearner_score": 0.501}
    return StepMetrics(step, **{**values, "episodes_per_s": 12.3, "grad_norm": 0.87, **changes})


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def log(clock):
    """(console, what it has written so far) without a terminal."""
    file = io.StringIO()
    return Console(file, clock=clock), file.getvalue


def live(width: int = 80, **kwargs):
    file = io.StringIO()
    return Console(file, width=width, interactive=True, **kwargs), file


# --------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0 s"), (130, "2 min 10 s"), (59.7, "1 min 0 s"), (3722, "1 h 2 min"), (None, "-"), (math.inf, "-")],
)
def test_durations(seconds, shown):
    assert text.duration(seconds) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (1.2341, "1.234"),
        (-0.5, "-0.5000"),
        (0.01234, "0.01234"),
        (123.456, "123.5"),
        (1234.56, "1235"),
        (12345.6, "1.235e+04"),
        (2.5e-7, "2.500e-07"),
        (0, "0.000"),
        (math.nan, "-"),
    ],
)
def test_numbers(value, shown):
    assert text.number(value) == shown


def test_scores_are_per_cent_only_where_they_are_accuracies():
    assert text.score("accuracy", 0.5123, 2) == "51.23 %"
    assert text.score("mse", 0.5123) == "0.5123"
    assert text.interval("accuracy", 0.0062, 2) == "± 0.62 %"
    assert text.interval("accuracy", None) == text.interval("accuracy", math.nan) == "-"


# --------------------------------------------------------------------------- a log


def test_training_writes_one_line_every_so_many_steps(log, clock):
    console, written = log
    with console.training(1500, log_every=100) as view:
        for step in range(1, 101):
            clock.now += 0.1
            view.step(at(step))
        assert written() == (
            "step 100/1500  loss 1.234  accuracy 51.2 %  co-learner 50.1 %  12.3 episodes/s  left 2 min 20 s\n"
        )


def test_a_line_is_the_mean_over_its_window_without_skipped_steps(clock):
    summary = TrainingSummary(10, window=2, clock=clock)
    for step, loss in enumerate([9.0, 1.0, 3.0], start=1):
        summary.add(at(step, loss=loss).record())
    summary.add(at(4, loss=math.nan, skipped=True).record())
    assert summary.mean("loss") == 2.0
    assert "loss 2.000" in summary.line() and "skipped 1" in summary.line()


def test_time_left_counts_from_where_this_session_began(clock):
    summary = TrainingSummary(200, start_step=100, clock=clock)
    assert summary.left_s is None
    clock.now += 50
    summary.add(at(150).record())
    assert summary.left_s == 50


def test_slow_training_speaks_before_log_every_steps_are_done(log, clock):
    console, written = log
    with console.training(100, log_every=50) as view:
        for step in (1, 2, 3):
            clock.now += 40
            view.step(at(step))
    assert [line.split()[1] for line in written().splitlines()] == ["2/100"]


def test_regression_and_a_method_without_colearner(log):
    console, written = log
    with console.training(1, score_name="mse") as view:
        view.step(at(1, score=2.5, score_name="mse", colearner_loss=None, colearner_score=None))
    assert "MSE 2.500" in written() and "co-learner" not in written() and "%" not in written()


def test_short_progress_is_silent_and_long_progress_ends_with_its_last_line(log, clock):
    console, written = log
    with console.progress("validation", 200) as view:
        view.update(100)
        view.update(200)
    assert written() == ""
    with console.progress("rendering glyphs", 300) as view:
        for done in (100, 200, 300):
            clock.now += 6
            view.update(done)
    assert written() == "rendering glyphs 200/300\nrendering glyphs 300/300\n"


def test_validation_names_the_best(log):
    console, written = log
    rows = [ResultRow("CML", 0.512, 0.011, 200), ResultRow("CML-dagger", 0.5)]
    console.validation(500, rows, best=(500, 0.512))
    console.validation(1000, rows, best=(500, 0.512))
    first, second = written().splitlines()
    assert first == "step 500  validation  CML 51.2 % ± 1.1 %  CML-dagger 50.0 %  best so far"
    assert second.endswith("best 51.2 % at step 500")


def test_results_show_every_row_with_interval_and_episodes(log):
    console, written = log
    console.results([ResultRow("CML", 0.61234, 0.0062, 1000), ResultRow("chance", 0.2)])
    lines = [line.split() for line in written().splitlines() if line.split()]
    assert ["CML", "61.23", "%", "±", "0.62", "%", "1,000"] in lines
    assert ["chance", "20.00", "%", "-", "-"] in lines
    console.results([ResultRow("CML", 0.61234, 0.0062, 1000)], score_name="mse")
    assert "MSE" in written() and "0.6123" in written()


def test_a_log_has_no_escape_codes_no_folding_and_no_live_display(log):
    console, written = log
    long = "runs/" + "x" * 500
    console.header("plan", {"run folder": long})
    console.note(long)
    console.table("t", ["a", "b"], [["x", 1]])
    with console.training(2, log_every=1) as view, console.progress("validation", 3) as bar:
        bar.update(1)
        view.step(at(1))
    assert f"  run folder: {long}\n" in written() and f"\n{long}\n" in written()
    assert "\x1b" not in written() and "\r" not in written()


def test_force_color_does_not_make_a_log_live(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    file = io.StringIO()
    console = Console(file)
    assert not console.interactive
    with console.training(1, log_every=1) as view:
        view.step(at(1))
    assert file.getvalue().count("\n") == 1


def test_an_ascii_stream_goes_on():
    raw = io.BytesIO()
    console = Console(io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    console.results([ResultRow("CML-dagger (†)", 0.5, 0.01, 10)])
    assert b"CML-dagger (?)" in raw.getvalue()


def test_a_title_wider_than_its_table_is_one_line(log):
    console, written = log
    console.results([ResultRow("CML", 0.5, 0.01, 10)], title="test split, step 12,000 (best), " + "x" * 200)
    console.table("y" * 300, ["a"], [[1]])
    assert f"step 12,000 (best), {'x' * 200}\n" in written() and f"{'y' * 300}\n" in written()


# --------------------------------------------------------------------------- a terminal


def test_nothing_is_read_as_markup_and_control_codes_do_not_pass():
    name = "a[red]b[/red]\x1b[2J:smile:[/]"
    shown = "a[red]b[/red]\N{REPLACEMENT CHARACTER}[2J:smile:[/]"
    for console, file in (live(width=200), live(width=200)):
        console.note(name)
        console.warn(name)
        console.error(name, name)
        console.header(name, {name: name})
        console.table(name, [name], [[name]])
        console.results([ResultRow(name, 0.5)], title=name)
        console.validation(1, [ResultRow(name, 0.5)])
        with console.progress(name, 3) as view:
            view.update(3)
            console._live.refresh()
        assert file.getvalue().count(shown) >= 10
        assert "\x1b[2J" not in file.getvalue()


def test_undecodable_file_names_can_be_shown(log):
    console, written = log
    console.error("bad\udcff.png cannot be decoded", "remove it")
    assert written() == "error: bad\N{REPLACEMENT CHARACTER}.png cannot be decoded; remove it\n"


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_live_display_stays_inside_the_terminal(width, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    console, file = live(width)
    console.header("plan", {"run folder": "runs/" + "x" * 300})
    with console.training(1000, best=(10, 0.4)) as view:
        view.step(at(1))
        with console.progress("validation", 200) as bar:
            bar.update(100)
            console._live.refresh()
    lines = _visible(file.getvalue())
    assert max(map(len, lines)) <= width
    if width >= 80:
        assert any("meta-learner" in line and "51.2 %" in line for line in lines)
        assert any("co-learner" in line and "50.1 %" in line for line in lines)
        assert any("12.3 episodes/s   best 40.0 % at step 10" in line for line in lines)
        assert any("  gradient norm 0.870" in line for line in lines)
        assert any("validation" in line and "100/200" in line for line in lines)


def _visible(output: str) -> list[str]:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output).replace("\r", "\n").split("\n")


def test_the_cursor_comes_back_after_an_error():
    console, file = live()
    with pytest.raises(KeyboardInterrupt), console.training(10) as view:
        view.step(at(1))
        raise KeyboardInterrupt
    assert file.getvalue().rindex("\x1b[?25h") > file.getvalue().rindex("\x1b[?25l")
    with console.progress("again", 1) as bar:  # and a new display can start
        bar.update(1)


def test_no_color_means_no_colour(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    console, file = live()
    console.error("what", "remedy")
    assert "\x1b[31m" not in file.getvalue() and "1;31m" not in file.getvalue()


# --------------------------------------------------------------------------- streams and ranks


def test_errors_go_to_standard_error_in_one_line(capsys):
    Console().error("domain.ways is 50, but split 'val' has 16 classes " * 5, "lower domain.ways")
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("error: domain.ways is 50") and err.endswith("; lower domain.ways\n")


def say_everything(console):
    console.header("a", {"b": 1})
    for say in (console.note, console.warn, console.error):
        say("x")
    console.table("t", ["a"], [[1]])
    console.results([ResultRow("CML", 0.5)])
    console.validation(1, [ResultRow("CML", 0.5)])
    with console.training(3, log_every=1) as view, console.progress("p", 3) as bar:
        bar.update(1)
        view.step(at(1))


def test_other_ranks_say_nothing_on_the_screen(capsys):
    say_everything(Console(quiet=True))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("how", [{"quiet": True}, {"interactive": True}, {}])
def test_the_log_has_plain_lines_of_everything_that_is_said(caplog, how):
    say_everything(Console(io.StringIO(), **how))
    said = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert said[:5] == [("INFO", "a"), ("INFO", "  b: 1"), ("INFO", "x"), ("WARNING", "x"), ("ERROR", "x")]
    lines = [line for _, line in said]
    assert "step 1  validation  CML 50.0 %" in lines and any(line.startswith("step 1/3  loss 1.234") for line in lines)
    assert any(line.split() == ["CML", "50.00", "%", "-", "-"] for line in lines)
    assert not any("\x1b" in line for line in lines)


def test_a_notebook_gets_plain_text_once(monkeypatch, capsys):
    shell = type("ZMQInteractiveShell", (), {})()
    monkeypatch.setattr(builtins, "get_ipython", lambda: shell, raising=False)
    Console().table("Runs", ("name",), [("conv4",)])
    assert capsys.readouterr().out.count("conv4") == 1
