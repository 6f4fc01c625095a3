"""Source files that README, guides and design pages name are there."""

import re

import pytest

from tests.docs.commands import ROOT

PAGES = sorted(path.relative_to(ROOT) for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")))
_FILE = re.compile(r"`((?:[a-z_]+/)*[a-z_]+\.(?:py|cpp|h|sh))`")


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_files_are_there(page):
    """A path is from the root, from dlrm/, or a file's name after its room has been named."""
    named = _FILE.findall((ROOT / page).read_text())
    sources = [path for folder in ("dlrm", "benchmarks", "tests") for path in (ROOT / folder).rglob("*.*")]
    missing = [
        name
        for name in named
        if not (ROOT / name).exists() and not any(f"/{path.relative_to(ROOT)}".endswith(f"/{name}") for path in sources)
    ]
    assert missing == []
