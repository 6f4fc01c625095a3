"""What the committed results say of where they come from."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.pages import RESULTS, ROOT

FILES = sorted((ROOT / RESULTS).rglob("*.json"))


def git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def _history() -> None:
    """Skips where this repository's commits are not at hand."""
    try:
        found = git("rev-parse", "--show-toplevel", "--is-shallow-repository")
    except FileNotFoundError:
        pytest.skip("git is not installed")
    folder, is_shallow = found.stdout.split("\n")[:2] if found.returncode == 0 else ("", "")
    if Path(folder) != ROOT.resolve():
        pytest.skip(f"{ROOT} is no repository that git reads: {found.stderr.strip() or folder}")
    if is_shallow == "true":
        pytest.skip("a shallow clone lacks commits. Fetch them with `git fetch --unshallow`")


def commits_of(content: Any) -> Iterator[str]:
    """Each `commit`, at any depth."""
    if isinstance(content, dict):
        for key, value in content.items():
            if key == "commit":
                yield value
            else:
                yield from commits_of(value)
    elif isinstance(content, list):
        for value in content:
            yield from commits_of(value)


@pytest.mark.usefixtures("_history")
@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / RESULTS)))
def test_commits_are_in_the_history(path: Path) -> None:
    commits = list(commits_of(json.loads(path.read_text())))
    assert commits
    for commit in commits:
        known = git("merge-base", "--is-ancestor", commit, "HEAD")
        assert known.returncode == 0, f"{commit}: {known.stderr.strip() or 'is no ancestor of HEAD'}. Measure it again."
