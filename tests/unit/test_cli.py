"""The command line itself: what it asks for, what it lists, and what it says when it is interrupted."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from cml_dist.cli import COMMANDS, EXAMPLES, build_parser, main
from cml_dist.run.interrupts import STOPPED_BY_USER


def test_train_alone_asks_for_a_configuration_and_nothing_else(capfd):
    with pytest.raises(SystemExit):
        main(["train"])
    assert capfd.readouterr().err.rstrip().endswith("required: CONFIG")


def test_settings_are_listed_one_a_line_without_padding_where_there_is_no_terminal(capfd):
    assert main(["config", "--keys"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].startswith("domain.name  glyphs | ")
    assert all(line == line.rstrip() and "." in line.split("  ")[0] for line in lines)


@pytest.mark.parametrize("option", ["--ways", "--shots", "--episodes"])
def test_inspect_refuses_less_than_one(option, tmp_path, capfd):
    assert main(["data", "inspect", str(tmp_path), option, "0"]) == 2
    assert capfd.readouterr().err == f"error: {option[2:]} is 0; give 1 or more: {option} 1\n"


@pytest.mark.parametrize("checkpoint", [True, False])
def test_interrupted_training_speaks_of_a_checkpoint_only_where_there_is_one(tmp_path, capfd, monkeypatch, checkpoint):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("cml_dist.run.trainer.train", interrupted)
    if checkpoint:
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints" / "step-00000001.safetensors").touch()
    assert main(["train", "sinusoid", f"run.dir={tmp_path}"]) == STOPPED_BY_USER
    err = capfd.readouterr().err
    assert ("the last checkpoint is whole" in err) is checkpoint and err.startswith("warning: Interrupted")


def test_an_interrupted_command_says_what_to_do(tmp_path, capfd, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("cml_dist.run.folder.run_config", interrupted)
    assert main(["eval", str(tmp_path)]) == STOPPED_BY_USER
    assert capfd.readouterr().err == "warning: Interrupted; run the same command again before its results are used\n"


# --------------------------------------------------------------------------- help and completion


@pytest.mark.parametrize("width", [60, 80, 120])
def test_help_fits_the_screen_and_has_an_example_of_each_command(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    for name in ("", *COMMANDS):
        with pytest.raises(SystemExit):
            main([*name.split(), "--help"])
        text, _, examples = capsys.readouterr().out.partition("examples:")
        assert max(map(len, text.splitlines())) <= width, name
        assert "\x1b" not in text and f"cml-dist {name}".strip() in examples


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_are_commands(name, monkeypatch):
    """Each line is understood, down to its options."""
    for line in EXAMPLES[name]:
        program, *words = line.split()
        assert program == "cml-dist"
        build_parser().parse_args(words)


def completed(line):
    """What the shell would offer, by the protocol of argcomplete: on file descriptor 8."""
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
    run = "exec 8>&1 9>/dev/null 1>/dev/null; exec \"$@\""
    words = ["bash", "-c", run, "-", sys.executable, "-m", "cml_dist"]
    return subprocess.run(words, env={**os.environ, **asked}, capture_output=True, text=True).stdout.split()


def test_the_shell_completes_commands_recipes_and_settings():
    assert completed("cml-dist do") == ["doctor"]
    assert completed("cml-dist train sinu") == ["sinusoid"]
    assert {"optim.lr=", "optim.name="} <= set(completed("cml-dist train sinusoid optim."))
