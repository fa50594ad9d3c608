"""The command line itself: what it asks for, what it lists, and what it says when it is interrupted."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from cml_dist.cli import COMMANDS, EXAMPLES, build_parser, main
from cml_dist.config.load import load_config
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


@pytest.mark.parametrize(
    ("pattern", "some", "others"),
    [
        ("optim.lr", {"optim.lr"}, {"method.inner_lr"}),
        ("inner_", {"method.inner_lr", "eval.inner_steps"}, {"optim.lr"}),
        ("optim.*", {"optim.lr", "optim.betas"}, {"method.inner_optim"}),
        ("*_s", {"parallel.hang_timeout_s"}, {"train.steps"}),
        ("step size", {"optim.lr", "method.inner_lr"}, {"run.dir"}),
    ],
)
def test_settings_are_found_by_name_glob_or_meaning(pattern, some, others, capfd):
    assert main(["config", "--keys", pattern]) == 0
    found = {line.split("  ")[0] for line in capfd.readouterr().out.splitlines()}
    assert some <= found and not others & found
    assert pattern != "optim.lr" or found == some


def test_a_setting_that_is_not_there_is_answered_with_the_nearest(capfd):
    assert main(["config", "--keys", "inner_step_size"]) == 2
    said = "no setting matches 'inner_step_size'; did you mean eval.inner_steps or method.inner_steps"
    assert said in capfd.readouterr().err


WORDS = (
    ["glyphs", "method.name=boil", "method.colearner=true", "run.seed=0", "--preset", "quick"],
    ["citeseer", "optim.lr=0.5", "domain.root=x"],
    ["sinusoid", "method.name=maml_pp"],
)


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_what_config_prints_is_a_file_that_comes_to_the_same(words, tmp_path, capfd):
    for all_of_it in ([], ["--all"]):
        assert main(["config", *words, *all_of_it]) == 0
        (tmp_path / "my.yaml").write_text(capfd.readouterr().out)
        overrides = [word for word in words if "=" in word]
        preset = "quick" if "quick" in words else None
        assert load_config(str(tmp_path / "my.yaml")) == load_config(words[0], overrides, preset=preset)


def test_config_shows_first_what_differs_with_its_source_and_all_the_rest_when_asked(capfd):
    shown = {}
    for option in ("--all", ""):
        assert main(["config", *WORDS[0], *filter(None, [option])]) == 0
        shown[option] = [" ".join(line.split()) for line in capfd.readouterr().out.splitlines()]
    told, everything = shown[""], shown["--all"]
    for line in (
        "domain.name: glyphs # recipe",
        "method.adapts: [body] # method boil",
        "train.steps: 100 # preset quick",
        "run.seed: 0 # command line",
    ):
        assert line in told and everything.index(line) < everything.index("# Defaults")
    for line in ("domain.ways: 5 # recipe", "optim.eps: 1.0e-08"):
        assert line not in told and everything.index(line) > everything.index("# Defaults")


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
