"""The documentation as a site: whole, complete, and readable without a network."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import cml_dist
from cml_dist.config.keys import valid_keys

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Built as by ``make docs``: a warning, such as a link that leads nowhere, is an error."""
    out = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "sphinx", "-qWE", "--keep-going", "-c", "docs", "-d", out / "doctrees", ".", out]
    run = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    return out


def test_every_page_is_there(site):
    pages = [ROOT / "README.md", ROOT / "CHANGELOG.md"]
    for page in pages + [*(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")]:
        assert (site / page.relative_to(ROOT).with_suffix(".html")).is_file(), page
    assert (site / "index.html").is_file()


def test_every_setting_and_public_function_is_described(site):
    settings = (site / "docs/reference/configuration.html").read_text(encoding="utf-8")
    assert [key for key in valid_keys() if f'id="confval-{key}"' not in settings] == []
    python = (site / "docs/reference/python.html").read_text(encoding="utf-8")
    names = [f"cml_dist.{name}" for name in cml_dist.__all__ if not name.startswith("_")]
    assert [name for name in names if f'id="{name}"' not in python] == []


def test_nothing_is_fetched_from_a_network(site):
    for page in site.rglob("*.html"):
        fetched = re.findall(r'<(?:script|link|img|iframe)\b[^>]*(?:src|href)="(?:https?:)?//[^"]*', page.read_text())
        assert not fetched, (page, fetched)
    for style in site.rglob("*.css"):
        assert not re.search(r"@import|url\(['\"]?(?:https?:)?//", style.read_text(encoding="utf-8")), style
