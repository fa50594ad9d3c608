"""What people read, at 60, 80 and 120 columns and without colour: nothing is wider, no word is broken."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from image_sets import own_pictures, write_folder, write_set
from test_status import make_run

from cml_dist.cli import COMMANDS, main
from cml_dist.telemetry.console import Console, ResultRow
from cml_dist.telemetry.metrics import StepMetrics
from cml_dist.telemetry.table import fitted
from cml_dist.telemetry.text import amount, folded, shape_in_words

WIDTHS = (60, 80, 120)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines_of(screen: str) -> list[str]:
    """As a terminal without colour shows them."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen).replace("\r", "\n").splitlines()


@pytest.fixture
def screen(monkeypatch):
    """Runs a command on a terminal of so many columns; returns its lines."""

    def show(width: int, *words: str) -> list[str]:
        for name, value in {"COLUMNS": str(width), "NO_COLOR": "1", "TERM": "xterm"}.items():
            monkeypatch.setenv(name, value)
        terminal = Terminal()
        monkeypatch.setattr("sys.stdout", terminal)
        assert main(words) == 0
        return lines_of(terminal.getvalue())

    return show


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Runs, pictures and a packed set, small."""
    place = tmp_path_factory.mktemp("made")
    make_run(place / "runs" / "a-run-with-a-name-of-many-letters", "finished")
    make_run(place / "runs" / "sweep" / "b", "stopped", reason="SIGTERM")
    write_folder(place / "pictures", own_pictures(6, [(40, 30), (64, 48)], images=4))
    (place / "pictures" / "notes.txt").write_text("no picture")
    write_set(place / "set", images=4, size=32)
    return place


SCREENS = {
    "status": (
        ["status", "runs/a-run-with-a-name-of-many-letters"],
        "state finished diagnostics validations checkpoint 60.0 % ± 2.0 %",
    ),
    "statuses": (["status", "runs"], "run state score stopped a-run-with-a-name-of-many-letters"),
    "plan": (["plan", "sinusoid", "--gpus", "8", "--gpu-memory-gib", "8"], "strategy total fits zero3 inputs offload"),
    "config": (["config", "sinusoid", "--preset", "quick"], "validation train.steps: recipe preset quick"),
    "keys": (["config", "--keys", "parallel"], "setting default meaning parallel.heartbeat_timeout_s"),
    "key": (["config", "--keys", "engine.compile"], "default takes meaning meta-gradient torch.compile:"),
    "repro": (["repro"], "table what mini_imagenet sinusoid MAML, CML-dagger"),
    "inspect": (["data", "inspect", "set", "--ways", "2"], "split classes images MiB train val test"),
    "pack": (["data", "pack", "pictures", "PACKED"], "split classes images files what packed picture"),
}
"""A command, and words that it shows whole at every width."""


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("command", SCREENS)
def test_what_a_command_shows_fits_the_screen_with_its_words_whole(command, width, made, screen, tmp_path, monkeypatch):
    monkeypatch.chdir(made)
    words, whole = SCREENS[command]
    shown = screen(width, *(word if word != "PACKED" else str(tmp_path / "packed") for word in words))
    # What is to be copied stays in one piece: commands, and words that are longer by themselves.
    wide = [line for line in shown if len(line) > width and len(line.split()) > 1]
    assert [line for line in wide if not re.match(r"(cml-dist|torchrun) ", line)] == []
    words_shown = " ".join(re.sub("[│─╭╮╰╯]", " ", line) for line in shown).split()
    assert [word for word in whole.split() if word not in words_shown and f"{word}," not in words_shown] == []


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_the_screen_examples_too(command, width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    assert [line for line in capsys.readouterr().out.splitlines() if len(line) > width] == []


@pytest.mark.parametrize("width", WIDTHS)
def test_a_running_training_keeps_its_count_and_its_time(width):
    file = io.StringIO()
    console = Console(file, width=width, interactive=True, clock=lambda: 0.0)
    values = {"loss": 1.2, "outer_loss": 0.6, "score": 0.5, "colearner_loss": 0.6, "colearner_score": 0.5}
    with console.training(30_000, method="MAML++ (ridge head) + CML", best=(12_000, 0.512)) as view:
        view.step(StepMetrics(29_000, **values, episodes_per_s=12.3, grad_norm=0.9, gradient_cosine=0.1))
        with console.progress("validating", 200) as count:
            count.update(20)
    console.results([ResultRow("CML (ridge head)", 0.5, 0.01, 600)])
    shown = lines_of(file.getvalue())
    assert [line for line in shown if len(line) > width] == []
    assert any(re.match(r"training .*29000/30000 .* left ", line) for line in shown)
    assert any(re.match(r"validating .* 0/200 +0 s, left ", line) for line in shown)
    assert any(re.match(r"CML \(ridge head\) +50.00 % +± 1.00 %", line) for line in shown)


def test_without_a_terminal_a_table_is_as_wide_as_columns_says_and_lines_are_whole(made, monkeypatch, capsys):
    monkeypatch.chdir(made)
    for columns, left_out in (("60", True), ("", False)):
        monkeypatch.setenv("COLUMNS", columns)
        assert main(["status", "runs"]) == 0
        out = capsys.readouterr().out
        assert ("Left out, for 60 columns: saved, starts" in out) is left_out
        assert "\x1b" not in out and max(map(len, out.splitlines())) <= (60 if left_out else 240)
    assert main(["plan", "sinusoid", "--gpus", "1", "--gpu-memory-gib", "8"]) == 0
    assert "\ncopies: what adapts, of the inner steps; activ.: of second order; moments: with the master copy\n" in (
        capsys.readouterr().out
    )


def test_columns_give_way_in_order_of_worth_and_cells_fold_between_words():
    columns, rows = ("name", "about", "n", "m"), [["a" * 20, "some words of a text", "1", "12345"]]
    kept = {}
    for width in (60, 50, 45, 40, 20):
        table, left_out = fitted(columns, rows, width, ["m", "n"])
        kept[width] = [str(column.header) for column in table.columns]
        assert kept[width] == [name for name in columns if name not in left_out]
        assert sum(column.width for column in table.columns) + 2 * (len(table.columns) - 1) <= width
    assert kept == {
        60: ["name", "about", "n", "m"], 50: ["name", "about", "n", "m"], 45: ["name", "about", "n"],
        40: ["name", "about"], 20: ["name", "about"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("value", "shown"), [(0, "0"), (0.0123456, "0.0123"), (0.5, "0.500"), (12.34, "12.3"), (1234.5, "1,234")]
)
def test_amounts_are_never_shown_as_nothing(value, shown):
    assert amount(value) == shown


def test_a_number_stays_with_its_unit_and_sizes_are_width_by_height():
    assert folded("accuracy 50.0 % ± 1.2 %, 3 min", 22) == "accuracy 50.0 %\n± 1.2 %, 3 min"
    assert folded("runs/a/very/long/path it is", 10, hang=2) == "runs/a/very/long/path\n  it is"
    assert shape_in_words((3, 24, 32)) == "32x24 px, 3 channels" and shape_in_words((5, 4)) == "5x4"
