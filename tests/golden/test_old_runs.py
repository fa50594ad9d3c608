"""A run folder and an export of an earlier version, d81044a: the run goes on, and the export still loads."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import cml_dist
from cml_dist.cli import main
from cml_dist.telemetry.metrics import read_metrics

RECORDED = Path(__file__).with_name("run-d81044a")


def test_a_run_of_an_earlier_version_goes_on_as_it_would_have_there(tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(RECORDED, folder)
    settings = (RECORDED / "config.yaml").read_text()
    (tmp_path / "run.yaml").write_text(settings)
    assert main(["train", str(tmp_path / "run.yaml"), f"run.dir={folder}", "train.steps=12"]) == 0
    lines, expected = read_metrics(folder / "metrics.jsonl"), read_metrics(RECORDED / "expected.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 13)) and lines[:6] == expected[:6]
    for line, there in zip(lines, expected, strict=True):
        for name in ("loss", "mse", "colearner_loss", "grad_norm"):
            assert line[name] == pytest.approx(there[name], rel=1e-9), (line["step"], name)
    assert "draw: 1" in (folder / "config.yaml").read_text()


def test_an_export_of_an_earlier_version_answers_as_it_did_there():
    learner = cml_dist.load(RECORDED / "export")
    inputs = torch.linspace(-5, 5, 5, dtype=torch.float64).view(-1, 1)
    answers = torch.as_tensor(learner.adapt(inputs, inputs.sin()).predict(inputs)).flatten()
    there = [0.5798441171646118, 0.4938277006149292, 0.2975687086582184, 0.273237407207489, 0.29863226413726807]
    assert answers.tolist() == pytest.approx(there, rel=1e-5)  # float32
