"""The Dockerfile is built, and the image runs: as it stands, as any user, read-only, without network."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest
from container import GIB_NEEDED, ROOT, Builder, Image, build, debian, first_process, missing, scratch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]  # the image is made in the first test
ANOTHER_USER = "12345"
DEMO = "train.episodes_per_step=2 train.steps=30 eval.every=1000 checkpoint.every=1000 eval.episodes=4"
SINUSOID = ["sinusoid", "model.hidden=[8]", "domain.shots=2", "domain.queries=2", "parallel.threads=1"]


# In the image that holds cpu_adam. Three steps of Adam, of AdamW and of torch's own, on the same numbers.
ADAM = """
import sys
import torch
from cml_dist.distributed.deepspeed import import_deepspeed

import_deepspeed()
operator = "deepspeed.ops.adam.cpu_adam_op"
assert operator not in sys.modules, "loaded by the trainer's own import"
from deepspeed.ops.adam import DeepSpeedCPUAdam

def stepped(optimizer, **settings):
    weights = torch.nn.Parameter(torch.linspace(-1, 1, 1000))
    steps = optimizer([weights], lr=1e-2, weight_decay=0.1, **settings)
    for k in range(1, 4):
        weights.grad = torch.sin(torch.arange(1000.0) * k)
        steps.step()
    return weights.detach()

for adamw, reference in ((False, torch.optim.Adam), (True, torch.optim.AdamW)):
    torch.testing.assert_close(stepped(DeepSpeedCPUAdam, adamw_mode=adamw), stepped(reference), rtol=0, atol=1e-6)
print(sys.modules[operator].__file__)
"""


@pytest.fixture(scope="module")
def make():
    """Builds an image, with arguments of the build."""
    if (reason := missing()) is not None:
        pytest.skip(reason)
    with scratch() as folder:
        if shutil.disk_usage(folder).free < GIB_NEEDED * 2**30:
            pytest.skip(f"needs {GIB_NEEDED} GiB free in {folder.parent}")
        builder = Builder(folder)
        base = debian(builder, "bookworm")
        if base is None:
            pytest.skip("debootstrap could not fetch a Debian here")
        yield partial(build, builder, base)


@pytest.fixture(scope="module")
def image(make):
    return make()


def test_holds_what_is_pinned_and_no_more(image: Image):
    code, out = image.run("pip", "freeze", "--all", "--disable-pip-version-check")
    assert code == 0, out
    installed = {line.lower() for line in out.splitlines() if "cml-dist" not in line and not line.startswith("#")}
    pinned = {line.lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")}
    assert len(installed) > 50 and installed - pinned == set()
    assert image.run("pip", "check") == (0, "No broken requirements found.\n")
    assert _compilers(image) == ""
    left = [*image.root.glob("tmp/*"), *image.root.glob("root/.cache/*"), *image.root.glob("var/lib/apt/lists/*")]
    left += image.root.glob("var/cache/apt/archives/*.deb")
    assert left == []


def test_says_what_it_is_and_runs_as_nobody(image: Image):
    labels = image.config["Labels"]
    assert labels["org.opencontainers.image.title"] == "cml_dist"
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    code, out = image.run("cml-dist", "--help")
    assert code == 0 and out.startswith("usage: cml-dist"), out
    places = ". cml_dist $VENV /etc $HOME runs"
    writes = f"for place in {places}; do touch $place/new 2>/dev/null && echo $place; done; id -u"
    assert image.run("sh", "-c", writes) == (0, "/runs\nruns\n10001\n")
    (image.root / "runs/new").unlink()


def test_the_demo_is_what_it_runs_saves_at_docker_stop_and_goes_on(image: Image):
    demo, more = image.root / "runs/demo", {"DEMO_ARGS": DEMO, "OMP_NUM_THREADS": "1"}
    with image.start(environment=more) as process:
        _wait_for(demo / "metrics.jsonl", process)
        subprocess.run(["kill", "-TERM", str(first_process(process))], check=True)
        out, _ = process.communicate(timeout=180)
    assert process.returncode != 0, out
    assert "nstall" not in out, "make installed something at run time"
    status = json.loads((demo / "status.json").read_text())
    assert status["state"] == "stopped" and 0 < status["step"] < 30 and status["world"] == 2, (status, out)

    code, out = image.run(environment=more, timeout_s=300)
    assert code == 0 and "CML-dagger" in out and "Exported model: runs/demo/export" in out, out
    steps = [json.loads(line)["step"] for line in (demo / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 31)), "a step was done twice or not at all"


def test_zero_compiles_nothing_for_any_user_in_a_read_only_image(image: Image, tmp_path):
    runs = tmp_path / "runs"
    runs.mkdir()
    shutil.chown(runs, int(ANOTHER_USER), int(ANOTHER_USER))
    options = {"user": ANOTHER_USER, "read_only": True, "volumes": [(runs, "/runs")]}
    # The home folder of a runtime that takes the name from the host, and mounts nothing there.
    options["environment"] = {"HOME": "/home/nobody-made-it", "TORCH_EXTENSIONS_DIR": "/runs/extensions"}
    launch = ["accelerate", "launch", "--config_file", "launch/accelerate/zero2.yaml", "--num_processes", "2"]
    train = ["train", *SINUSOID, "run.dir=runs/zero", "train.steps=6", "eval.every=3", "eval.val_episodes=4"]
    code, out = image.run(*launch, "-m", "cml_dist", *train, "eval.episodes=4", **options, timeout_s=300)
    assert code == 0 and "2 processes (zero2)" in out, out
    assert not (runs / "extensions").exists() and "ninja" not in out, "an operator was built"
    assert (runs / "zero/export").is_dir()
    assert {path.stat().st_uid for path in runs.rglob("*")} == {int(ANOTHER_USER)}


def test_one_process_saves_at_docker_stop(image: Image, tmp_path):
    runs = tmp_path / "runs"
    runs.mkdir(mode=0o777)
    runs.chmod(0o777)
    train = ["cml-dist", "train", *SINUSOID, "run.dir=runs/one", "train.steps=1000000"]
    with image.start(*train, volumes=[(runs, "/runs")]) as process:
        _wait_for(runs / "one/metrics.jsonl", process)
        subprocess.run(["kill", "-TERM", str(first_process(process))], check=True)
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 75, out
    assert json.loads((runs / "one/status.json").read_text())["state"] == "stopped", out


def test_an_operator_built_ahead_works_where_no_compiler_is(make, image: Image):
    operators = make("operators", DEEPSPEED_OPS="cpu_adam")
    compiled = [line for line in operators.log.splitlines() if " -c " in line and "cpu_adam" in line]
    flags = [re.findall(r"-march=\S+|-D__AVX\w+__", line) for line in compiled]
    assert flags == [["-march=x86-64-v3", "-D__AVX256__"]] * 2, compiled
    assert _compilers(operators) == ""
    more = {path.name.partition(".")[0] for path in _files(operators) - _files(image)}
    assert more == {"cpu_adam_op", "git_version_info_installed"}, "something else of the build is in the image"

    options = {"user": ANOTHER_USER, "read_only": True}
    options["environment"] = {"TORCH_EXTENSIONS_DIR": "/tmp/extensions", "DS_ACCELERATOR": "cpu"}
    code, out = operators.run("python", "-c", ADAM, **options)
    assert code == 0 and out.startswith("/opt/venv/") and out.endswith(".so\n") and out.count("\n") == 1, out
    code, out = image.run("python", "-c", ADAM, **options)
    assert code != 0 and "failed to build/load" in out, "the operator is in every image, or compiled at run time"

    said = "from deepspeed.git_version_info import installed_ops as ops; print(*(name for name in ops if ops[name]))"
    code, out = operators.run("python", "-c", said, **options)
    assert code == 0 and out.splitlines()[-1] == "cpu_adam", out


def _files(image: Image) -> set[Path]:
    return {path.relative_to(image.root) for path in image.root.rglob("*") if path.is_file()}


def _compilers(image: Image) -> str:
    names = ("cc", "gcc", "g++", "c++", "clang", "nvcc")
    code, out = image.run("sh", "-c", f"for name in {' '.join(names)}; do command -v $name; done; true")
    assert code == 0, out
    return out


def _wait_for(metrics: Path, process: subprocess.Popen, limit_s: float = 300.0) -> None:
    """Until the first meta-step is recorded."""
    end = time.monotonic() + limit_s
    while not (metrics.exists() and metrics.stat().st_size):
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            raise AssertionError(f"no meta-step; the container printed:\n{process.communicate(timeout=30)[0]}")
        time.sleep(0.2)
