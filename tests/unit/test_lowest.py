"""The lower bounds that setup.py states are versions with which the package was run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TESTED = (
    "tests/unit/test_untrusted.py", "tests/unit/test_shards.py", "tests/unit/test_export.py",
    "tests/unit/test_checkpoint.py", "tests/unit/test_timm_backbone.py", "tests/unit/test_bad_input.py",
    "tests/unit/test_sources.py", "tests/unit/test_compiling.py", "tests/unit/test_onnx.py",
)  # fmt: skip

EXTRAS = ("parquet", "graphs")


def lower_bounds() -> dict[str, str]:
    """Of what is always installed and of the extras that read data or write ONNX, by name."""
    text = (ROOT / "setup.py").read_text()
    required = "".join(re.findall(r"^(?:ONNX_)?REQUIREMENTS = \[(.*?)^\]", text, re.M | re.S))
    extras = re.findall(rf'^        "(?:{"|".join(EXTRAS)})": \["([\w.-]+)>=([\w.]+)', text, re.M)
    return dict(re.findall(r'^    ["\']([\w.-]+)>=([\w.]+)', required, re.M) + extras)


def test_every_requirement_has_a_lower_bound():
    some = {"torch", "timm", "numpy", "pillow", "webdataset", "fsspec", "safetensors", "pyarrow", "onnxscript"}
    assert some <= lower_bounds().keys()


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info >= (3, 13), reason="the lowest numpy is of a time before this Python")
def test_the_lowest_versions_run(tmp_path):
    """Each as low as pip can have it at once: where another requirement asks for more of one, that counts."""
    python = tmp_path / "venv" / "bin" / "python"
    # What torch 2.6 writes as ONNX has booleans in the place of whole numbers, which protobuf 7 refuses.
    bounds = "".join(f"{name}=={least}\n" for name, least in lower_bounds().items()) + "protobuf<7\n"
    (tmp_path / "lowest.txt").write_text(bounds)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", tmp_path / "lowest.txt"]
    asked = [f"{ROOT}[onnx,{','.join(EXTRAS)}]", "pytest", "pytest-timeout"]
    made = subprocess.run([*pip, *asked], capture_output=True, text=True, timeout=3000)
    if re.search(r"Connection|Network|resolve host|Temporary failure", made.stderr):
        pytest.skip(f"no index of packages: {made.stderr.splitlines()[-1]}")
    assert made.returncode == 0, made.stderr
    # Warnings are of newer versions' time: an old one may say that it is old.
    words = ["-q", "-W", "default", "-o", "filterwarnings=", "-p", "no:cacheprovider", *TESTED]
    run = subprocess.run([python, "-m", "pytest", *words], capture_output=True, text=True, timeout=3000, cwd=ROOT)
    assert run.returncode == 0, run.stdout[-8000:]
