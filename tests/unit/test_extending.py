"""Code of a user's own: the examples of docs/how-to/extending.md as they stand there, and what is refused."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

import cml_dist
from cml_dist.cli import main
from cml_dist.telemetry.metrics import read_metrics

PAGE = (Path(__file__).resolve().parents[2] / "docs/how-to/extending.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"`(my_\w+\.py)`:\n\n```python\n(.*?)```", PAGE, re.S))
COMMANDS = {
    words[-1].partition("/")[2]: words[1:]
    for words in (shlex.split(line) for line in re.findall(r"^cml-dist train .*$", PAGE, re.M))
}
SHORT = ["train.episodes_per_step=2", "eval.val_episodes=2", "eval.episodes=2", "eval.every=0"]
USES = {"sharp": "method.name=my_rules.py:SharpSgd", "own-net": "model.backbone=my_nets.py:make_body"}
USES["blobs"] = "domain.name=my_data.py:Blobs"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, source in FILES.items():
        (tmp_path / name).write_text(source)
    return tmp_path


def refusal(capsys, *words: str) -> str:
    """What a command says on one line when it refuses."""
    capsys.readouterr()
    assert main(list(words)) in (1, 2)
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("run", COMMANDS)
def test_an_example_of_the_page_trains_resumes_and_is_asked_for_by_name(run, here, capsys):
    words, folder, used = [*COMMANDS[run], *SHORT], f"runs/{run}", USES[run]
    key, _, code = used.partition("=")
    assert main([*words, "train.steps=2"]) == 0
    assert main([*words, "train.steps=3"]) == 0  # goes on
    assert [line["step"] for line in read_metrics(here / folder / "metrics.jsonl")] == [1, 2, 3]
    section, _, name = key.partition(".")
    recorded = yaml.safe_load((here / folder / "config.yaml").read_text())[section][name]
    assert re.fullmatch(re.escape(code) + "@[0-9a-f]{16}", recorded)

    file = Path(code.partition(":")[0])
    file.write_text(f"{FILES[file.name]}\nraise SystemExit('this must not be imported')\n")
    assert main(["status", folder]) == 0
    told = refusal(capsys, *words, "train.steps=3")
    assert f"{key} was '{recorded}', is '{code}@" in told
    for command in (["eval", folder], ["export", folder], ["train", f"{folder}/config.yaml"]):
        assert f"{key} is {code}, which is code" in (told := refusal(capsys, *command)), told
        assert f"name it on the command line: {used}" in told
    with pytest.raises(cml_dist.errors.ConfigError, match=re.escape(f"code=['{used}']")):
        cml_dist.load(folder)
    with pytest.raises(cml_dist.errors.CheckpointError, match="give the source of that checksum"):
        cml_dist.load(folder, code=[used])

    (here / "moved").mkdir()
    file.rename(here / "moved" / file.name)
    (here / "moved" / file.name).write_text(FILES[file.name])
    moved = used.replace("my_", "moved/my_")
    assert main(["eval", folder, moved]) == 0
    tested = json.loads((here / folder / "eval.json").read_text())
    assert tested["overrides"] == {} and tested["method"] == ("SharpSgd" if run == "sharp" else "CML")
    learner = cml_dist.load(folder, code=[moved])
    inputs = np.linspace(-1, 1, 6).reshape(3, 2) if run == "blobs" else np.linspace(-1, 1, 3)[:, None]
    adapted = learner.adapt(inputs, ["a", "b", "c"] if run == "blobs" else inputs[:, 0])
    assert len(adapted.predict(inputs)) == 3


def test_the_configuration_shows_the_checksum_and_a_plan_is_made(capsys):
    words = [word for word in COMMANDS["sharp"][1:] if not word.startswith("run.dir")]
    assert main(["config", *words]) == 0
    assert re.search(r"method.name: 'my_rules.py:SharpSgd@[0-9a-f]{16}' +# command line", capsys.readouterr().out)
    assert main(["plan", *COMMANDS["blobs"][1:], "--gpus", "1", "--gpu-memory-gib", "8", USES["own-net"]]) == 0


RULE = "from dataclasses import dataclass\nfrom cml_dist.meta.rule import InnerRule\n@dataclass(frozen=True)\n"
RULE += "class Mine(InnerRule):\n    def update(self, meta, fast, const, grad, k):\n        "
NET = "import torch\nfrom torch import nn\nfrom cml_dist.types import Features\nclass Mine(nn.Module):\n"
NET += "    def __init__(self, shape):\n        super().__init__()\n        self.a = nn.Linear(shape[0], 4)\n"
NET += "        self.register_buffer('mean', torch.zeros(4))\n"
NET += "    def forward(self, x):\n        h = self.a(x)\n        "
BLOBS = FILES["my_data.py"].replace("class Blobs", "class Mine")
FLAT = "    def grid(self, split, index):\n        return Batch(torch.zeros(3, 1), torch.zeros(3).long())\n"
FORGETFUL = BLOBS.replace("self.seeds[split]", "self.asked").replace(
    "        rng", "        self.asked = getattr(self, 'asked', 0) + 1\n        rng"
)
BROKEN = [
    ("method.name", "import nothing_of_this_name", "No module named 'nothing_of_this_name' (mine.py, line 1)"),
    ("method.name", "x = 1\nx = (", "SyntaxError: '(' was never closed (mine.py, line 2)"),
    ("method.name", "Min = 1", "mine.py has no Mine; did you mean Min?"),
    ("method.name", "Mine = 1", "mine.py:Mine is no inner rule"),
    ("method.name", RULE + "return {}", "Mine.update leaves out"),
    ("method.name", RULE + "return 1 / 0", "ZeroDivisionError: division by zero (mine.py, line 6)"),
    ("model.backbone", "Mine = dict", "TypeError"),
    ("model.backbone", NET + "return h", "return cml_dist.types.Features"),
    ("model.backbone", NET + "return Features(h, h[0])", "give pooled [N, D]"),
    ("model.backbone", NET + "h = h - h.mean(0)\n        return Features(h, h)", "other features in another batch"),
    ("model.backbone", NET + "self.mean += h.mean(0)\n        return Features(h, h)", "writes its buffer mean"),
    ("domain.name", "Mine = dict", "is no domain"),
    ("domain.name", BLOBS.replace("    @staticmethod\n    def loss(", "    def loss(self, "), "no static method loss"),
    ("domain.name", FORGETFUL, "another episode where 0 of train is asked for again"),
    ("domain.name", BLOBS.replace("self.config.shots)", "2)"), "but domain.shots is 10"),
    ("domain.name", BLOBS + FLAT, "the grid of train with inputs of shape (3, 1), not (3, 2)"),
    ("domain.name", BLOBS.replace("dtype if tensor.is_floating_point() else None", "None"), "inputs as torch.float64"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "source", "words"), BROKEN, ids=[words for _, _, words in BROKEN])
def test_code_that_breaks_its_contract_is_one_line(key, source, words, here, capsys):
    (here / "mine.py").write_text(source)
    capsys.readouterr()
    assert main(["train", "sinusoid", f"{key}=mine.py:Mine", "run.dir=runs/mine", *SHORT, "train.steps=1"]) in (1, 2)
    told = " ".join(capsys.readouterr().err.split())
    assert told.startswith("error: ") and words in told and "Traceback" not in told
    assert not (here / "runs/mine/config.yaml").exists()


def test_options_are_those_of_own_code_and_a_package_is_known_as_a_whole(here, capsys, monkeypatch):
    assert "method.options are {'a': 1}, but cml has none" in refusal(
        capsys, "train", "sinusoid", "method.options={a: 1}"
    )
    package = here / "my_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "rules.py").write_text("from my_package.steps import SharpSgd\n")
    (package / "steps.py").write_text(FILES["my_rules.py"])
    monkeypatch.syspath_prepend(str(here))
    words = ["train", "sinusoid", "method.name=my_package.rules:SharpSgd", "run.dir=runs/a", *SHORT, "train.steps=1"]
    assert main(words) == 0
    typo = refusal(capsys, *words, "method.options={raduis: 1}", "run.dir=runs/b")
    assert "unexpected keyword argument 'raduis'" in typo
    (package / "steps.py").write_text(FILES["my_rules.py"] + "\n")
    assert "method.name was 'my_package.rules:SharpSgd@" in refusal(capsys, *words)
    sys.modules.pop("my_package.steps")


def test_analyse_and_tables_take_code_that_the_command_line_names(here, capsys):
    """Only beside a run of the package's own method, which stays what it was."""
    own, few = USES["sharp"].partition("=")[2], ["sinusoid", "train.steps=2", *SHORT]
    for name in (own, "maml"):
        assert main(["train", *few, f"method.name={name}", f"run.dir=runs/{name[:4]}"]) == 0
    looked = ["analyse", "runs", "--episodes=2", "--checkpoints=best"]
    assert f"method.name={own}" in refusal(capsys, *looked)
    assert main([*looked, "--code", own]) == 0
    text = Path("analysis/inner-steps.svg").read_text()
    assert "SharpSgd" in text and "method.name=maml" in text

    rows = f"rows:\n  maml: {{set: {{method.name: maml}}}}\n  mine: {{set: {{method.name: '{own}'}}, baseline: maml}}\n"
    Path("mine.yaml").write_text(f"title: t\nabout: a\nrecipe: sinusoid\nseeds: 1\nsources: {{'*': mine}}\n{rows}")
    planned = ["repro", "mine.yaml", "--slurm", "--time=60", "--processes-per-node=1", "--dry-run"]
    assert f"--code {own}" in refusal(capsys, *planned)
    assert main([*planned, "--code", own]) == 0
    assert own in capsys.readouterr().out
