"""The list of sets, the pinned lists, and what the rest of the project says of releases are one."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dlrm import doctor
from dlrm.system.package_sets import PINNED, SETS, main, requirement_lines

ROOT = Path(__file__).parent.parent.parent


def releases(path: str) -> dict[str, str]:
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if re.fullmatch(r"(torch|torchrec|fbgemm-gpu(-cpu)?)==[\d.]+", line))


@pytest.mark.parametrize(
    ("path", "packages"),
    [
        ("requirements/runtime.in", ["torch", "torchrec"]),
        ("requirements/cpu.txt", ["torch", "torchrec", "fbgemm-gpu-cpu"]),
        ("requirements/cuda.txt", ["torch", "torchrec", "fbgemm-gpu"]),
    ],
)
def test_the_pinned_set_is_what_is_installed(path: str, packages: list[str]) -> None:
    assert releases(path) == {package: PINNED.releases[package] for package in packages}
    assert f"fbgemm={PINNED.fbgemm}\n" in (ROOT / "requirements/lock.sh").read_text(encoding="utf-8")


@pytest.mark.parametrize("package_set", SETS, ids=lambda package_set: package_set.name)
@pytest.mark.parametrize("fbgemm", ["fbgemm-gpu", "fbgemm-gpu-cpu"])
def test_the_doctor_knows_each_set(package_set, fbgemm: str) -> None:
    versions = {"fbgemm-gpu": None, "fbgemm-gpu-cpu": None}
    versions |= {package: package_set.releases[package] for package in ("torch", "torchrec", fbgemm)}
    finding = doctor.check_versions(versions)
    assert finding.is_well
    assert finding.text.endswith(f": the {package_set.name} set")


def test_the_readme_names_each_set() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for each in SETS:
        assert f"| `{each.name}` | {each.torch} | {each.torchrec} | {each.fbgemm} |" in text


def test_the_range_of_pythons_is_one() -> None:
    assert 'requires-python = ">=3.10,<3.13"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert "(3, 10) <= v <= (3, 12)" in (ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_list_with_the_releases_of_a_set(kind: str) -> None:
    pinned = (ROOT / f"requirements/{kind}.txt").read_text(encoding="utf-8").splitlines()
    assert requirement_lines(PINNED, pinned) == pinned
    oldest = requirement_lines(SETS[-1], pinned)
    changed = {line for line in oldest if line not in pinned}
    fbgemm = "fbgemm-gpu" if kind == "cuda" else "fbgemm-gpu-cpu"
    assert changed == {"torch==2.11.0", "torchrec==1.6.1", f"{fbgemm}==1.6.0", "setuptools==81.0.0"}
    left_out = [line for line in pinned if line.startswith(("nvidia-", "cuda-", "triton=="))]
    assert len(oldest) == len(pinned) - len(left_out)
    assert bool(left_out) == (kind == "cuda")


def test_an_unknown_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["latest"]) == 2
    assert capsys.readouterr().err == "latest: expected one of newest, pinned, oldest\n"
    assert main([]) == 2
    assert capsys.readouterr().err == "no set: expected one of newest, pinned, oldest\n"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository for try.sh. Its set-up makes an interpreter that only says what tests/PART.says holds."""
    lists = ("requirements/cpu.txt", "requirements/cuda.txt")
    for name in ("requirements/try.sh", *lists, "dlrm/__init__.py", "dlrm/system/package_sets.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "tests").mkdir()
    (tmp_path / "python").write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exec echo Python 3.11.7\n'
        'echo "$3" >> ran.txt; cat "$3.says"; grep -q failed "$3.says" && exit 1; exit 0\n'
    )
    (tmp_path / "dlrm" / "doctor").write_text('#!/bin/sh\necho "ok    versions      torch 2.14.1: the newest set"\n')
    (tmp_path / "Makefile").write_text(
        "setup:\n\tmkdir -p $(VENV)/bin && cp python $(VENV)/bin && cp dlrm/doctor $(VENV)/bin/dlrm\n"
        "\tchmod +x $(VENV)/bin/*; cp $(LISTS)/$(DEVICE).txt installed.txt\n"
    )
    (tmp_path / ".gitignore").write_text("/build\n/ran.txt\n/installed.txt\n")
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    return tmp_path


def try_set(checkout: Path, *arguments: str) -> tuple[int, str]:
    """The exit code and the last line."""
    environment = {**os.environ, "PYTHON": sys.executable, "DEVICE": "cpu", "PARTS": "unit docs", "PYTHONPATH": ""}
    command = ["bash", str(checkout / "requirements/try.sh"), *arguments]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, check=False
    )
    return done.returncode, done.stdout.splitlines()[-1]


def test_try_continues_where_it_ended(checkout: Path) -> None:
    (checkout / "tests/unit.says").write_text("== 30 passed, 2 skipped in 1.00s ==\n")
    (checkout / "tests/docs.says").write_text("== 1 failed, 4 passed in 1.00s ==\n")
    code, verdict = try_set(checkout, "newest")
    assert code == 1
    assert verdict == (
        f"newest: FAILED, tests/docs at last: {checkout}/build/sets/newest/docs.log. 34 passed, 1 failed, 0 errors, "
        "2 skipped in tests/{unit,docs} with torch 2.14.1, Python 3.11.7"
    )
    assert "torch==2.14.1\n" in (checkout / "installed.txt").read_text()
    assert try_set(checkout, "newest")[0] == 1
    assert (checkout / "ran.txt").read_text().split() == ["tests/unit", "tests/docs", "tests/docs"]
    (checkout / "tests/docs.says").write_text("== 5 passed in 1.00s ==\n")
    code, verdict = try_set(checkout, "newest")
    assert (code, verdict.split(" in ")[0]) == (0, "newest: passed. 35 passed, 0 failed, 0 errors, 2 skipped")
    assert (checkout / "ran.txt").read_text().split()[3:] == ["tests/unit", "tests/docs"]
    assert try_set(checkout, "newest")[0] == 0
    assert len((checkout / "ran.txt").read_text().split()) == 5


def test_try_refuses_an_unknown_set_and_a_set_up_that_fails(checkout: Path) -> None:
    assert try_set(checkout, "latest") == (2, "latest: expected one of newest, pinned, oldest")
    assert try_set(checkout)[0] == 2
    assert not (checkout / "build").exists()
    (checkout / "Makefile").write_text("setup:\n\tfalse\n")
    assert try_set(checkout, "oldest") == (1, "oldest: FAILED in set-up")
