"""The tutorial and the notebook: every command and cell is run as it stands there.

``CML_WRITE=1`` keeps what these runs made: the pictures of docs/tutorial.md (Chromium draws the sheet), and what the
notebook's cells show.
"""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
WRITE = "CML_WRITE" in os.environ
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
ENVIRONMENT = {"PATH": PATH, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def blocks() -> list[tuple[str, str]]:
    """(language, text) of the tutorial's code, without its installation."""
    page = (DOCS / "tutorial.md").read_text(encoding="utf-8")
    return re.findall(r"^```(sh|python)\n(.*?)^```", page.partition("\n## 2.")[2], re.M | re.S)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(folder, output) of the tutorial, followed to its end: Python is saved under the name in its first line."""
    folder, said = tmp_path_factory.mktemp("tutorial"), ""
    for language, text in blocks():
        if language == "python":
            (folder / text.partition("\n")[0].removeprefix("# ")).write_text(text, encoding="utf-8")
            continue
        run = subprocess.run(
            ["bash", "-ec", text], cwd=folder, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True
        )
        assert run.returncode == 0, f"{text}\n{run.stdout}\n{run.stderr}"
        said += run.stdout
    print(said)
    return folder, said


def test_the_tutorial_leads_to_a_classifier_and_a_comparison(done):
    folder, said = done
    with open(folder / "predictions.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    right = [row["prediction"] == Path(row["image"]).parent.name for row in rows]
    assert len(right) == 40 and sum(right) > 20  # by chance 8
    assert f"{sum(right)} of 40 are right" in said, "Python says the same"
    assert "Expected accuracy" in said and "Paired difference" in said


def test_its_pictures_are_those_of_its_runs(done):
    folder, _ = done
    for name in ("episodes.png", "curve.png"):
        assert (folder / name).stat().st_size > 5_000
        if WRITE:
            shutil.copy(folder / name, DOCS / f"tutorial-{name}")
    assert (folder / "sheet.html").read_text(encoding="utf-8").count("<img") == 40
    if WRITE:
        draw = ["chromium", "--headless", "--no-sandbox", "--hide-scrollbars", "--window-size=900,620"]
        draw += [f"--screenshot={DOCS / 'tutorial-sheet.png'}", (folder / "sheet.html").as_uri()]
        subprocess.run(draw, check=True, capture_output=True, timeout=120)


def test_the_notebook_runs_and_is_the_tutorial_in_python(tmp_path, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    book = nbformat.read(DOCS / "notebook.ipynb", as_version=4)
    pictures = next(text for _, text in blocks() if text.startswith("# make_pictures.py\n"))
    assert pictures.partition("\n")[2].strip() in [cell.source for cell in book.cells]
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    how = {"timeout": None, "record_timing": False, "coalesce_streams": True}
    nbclient.NotebookClient(book, resources={"metadata": {"path": tmp_path}}, **how).execute()
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    said = "".join(output.get("text", "") for output in outputs)
    assert "CML - MAML: " in said and said.count("untrained MAML ") == 1  # a table is shown once
    if WRITE:
        for cell in book.cells:  # without warnings of other packages
            if cell.cell_type == "code":
                cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        book.metadata.language_info = {"name": "python"}  # not this machine's version of Python
        nbformat.write(book, DOCS / "notebook.ipynb")
