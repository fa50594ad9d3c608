"""The documentation: links lead somewhere, and the commands that it prints exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from cml_dist.cli import build_parser
from cml_dist.config.keys import valid_keys

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page: Path) -> list[str]:
    """The shell commands of its code blocks, a line each."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def own_words(line: str) -> list[str]:
    """What a command hands to ``cml-dist``; nothing where it does not."""
    found = re.search(r".*(?:^|\s)cml[-_]dist\s+(?!\S*\.)(\w.*)", line)
    words = shlex.split(found[1], comments=True) if found else []
    ends = [number for number, word in enumerate(words) if word in ("|", ">", ";", "&&") or word.endswith(";")]
    return [word.strip(";") for word in words[: ends[0] + 1] if word not in (">", "|", "&&")] if ends else words


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_to_files_and_headings_that_are_there(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http:", "https:")):
            continue
        path, _, heading = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        assert not heading or heading in anchors(there), target


def test_pages_that_files_name_are_there():
    for folder in ("cml_dist", "configs", "launch", "scripts", "Dockerfile", "Makefile"):
        for file in [ROOT / folder] if (ROOT / folder).is_file() else (ROOT / folder).rglob("*.*"):
            if file.suffix != ".pyc":
                for page in re.findall(r"\bdocs/[\w/.-]+\.md", file.read_text(encoding="utf-8")):
                    assert (ROOT / page).is_file(), f"{file}: {page}"


def test_every_page_is_in_the_index():
    listed = re.findall(r"\]\(([^)]+\.md)\)", (ROOT / "docs/README.md").read_text(encoding="utf-8"))
    pages = [str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")]
    assert sorted(listed) == sorted(set(pages) - {"README.md"})


def test_commands_have_the_options_and_settings_that_pages_print(capsys):
    parser, keys, seen = build_parser(), valid_keys(), 0
    for page in PAGES:
        for line in commands(page):
            words = own_words(line)
            if not words or "--help" in words:
                continue
            try:
                args, rest = parser.parse_known_args(words)
            except SystemExit:
                pytest.fail(f"{page.name}: {line}\n{capsys.readouterr().err}")
            assert all("=" in word and word[0] != "-" for word in rest), f"{page.name}: {line}"
            for setting in [*getattr(args, "overrides", []), *rest]:
                assert setting.partition("=")[0] in keys, f"{page.name}: {setting}"
            seen += 1
    assert seen > 30
