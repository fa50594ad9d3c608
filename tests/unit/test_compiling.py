"""``engine.compile`` in a run: what is computed stays the same, and ``auto`` compiles where that wins time back."""

from __future__ import annotations

from functools import partial

import pytest
from test_trainer import ALONE, BASE, final_params, losses, stop_after
from toy import accuracy, cross_entropy, make_episode, make_net

from cml_dist.config.load import merge, parse_config
from cml_dist.meta.compiled import CompiledGradient, distance
from cml_dist.meta.gradient import meta_gradient
from cml_dist.meta.model import MetaModel
from cml_dist.meta.rule import Method
from cml_dist.run import compiling
from cml_dist.run.compiling import MEASURED, Compiling
from cml_dist.run.hooks import nothing
from cml_dist.run.trainer import train
from cml_dist.telemetry.console import Console

TRACED = partial(CompiledGradient, "eager")
"""Traced, checked and called as a compiled one is, without a compiler."""


def go(folder, *overrides, on_step=nothing):
    how = ("run.precision=fp64", "eval.final=false", *overrides)
    return train(parse_config(merge(BASE, [f"run.dir={folder}", *how])), Console(quiet=True), on_step=on_step)


@pytest.fixture(scope="module")
def eager(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "eager"
    assert go(folder).finished
    return folder


def test_on_gives_the_run_of_off_and_resumes(eager, tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "CompiledGradient", TRACED)
    assert not go(tmp_path / "run", "engine.compile=on", on_step=stop_after(6)).finished
    assert go(tmp_path / "run", "engine.compile=on").finished
    assert distance(final_params(tmp_path / "run"), final_params(eager)) < 1e-10


def test_auto_stays_eager_in_a_short_run(eager, tmp_path):
    assert go(tmp_path / "run", "engine.compile=auto").finished
    assert losses(tmp_path / "run") == losses(eager)


@pytest.mark.parametrize(
    ("left", "then_s", "compiled"), [(100_000, 0.5, True), (100_000, 1.5, False), (10, None, False)]
)
def test_auto_compiles_a_long_run_and_keeps_what_is_faster(left, then_s, compiled, capsys, monkeypatch):
    monkeypatch.setattr(compiling, "CompiledGradient", TRACED)
    config = parse_config(merge(BASE, ["engine.compile=auto"]))
    model = MetaModel(make_net("vector"), cross_entropy, accuracy, Method.sgd(1, 0.1, 0.1), "graph")
    switch = Compiling(config, model, ALONE, Console(interactive=False), None)
    for _ in range(MEASURED + 1):
        assert model.compute is meta_gradient and switch.decided is None
        switch.after_step(1.0, left)
    if then_s is not None:
        assert isinstance(model.compute, CompiledGradient)
        model([make_episode("vector")], 1.0)
        for seconds in (90.0, *[then_s] * MEASURED):  # the first compiles
            switch.after_step(seconds, left)
        said = capsys.readouterr().out
        assert f"A compiled meta-step takes {then_s} s, an eager one 1 s: {'kept' if compiled else 'given up'}" in said
    assert switch.decided is compiled
    assert isinstance(model.compute, CompiledGradient) == compiled
    again = Compiling(config, model, ALONE, Console(quiet=True), switch.decided)
    assert again.decided is compiled
