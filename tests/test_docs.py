"""What the documents say of files."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
PATH = re.compile(
    r"`((?:video_mae|kernels|tests|configs|docs|scripts|experiments|benchmarks)/[\w./*-]*)`"
)


def test_the_way_of_a_clip_names_each_file_once_and_few():
    rows = re.findall(
        r"^\| \d+ \| `([\w/.]+)`", (ROOT / "docs" / "way_of_a_clip.md").read_text(), re.M
    )
    assert 10 < len(rows) <= 25
    assert len(set(rows)) == len(rows)
    for row in rows:
        assert (ROOT / row).is_file(), row


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_are_there(page):
    for name in PATH.findall(page.read_text()):
        assert list(ROOT.glob(name.rstrip("/"))), name
