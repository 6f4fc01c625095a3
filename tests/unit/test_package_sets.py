"""The list of sets, the pinned lists, and what the rest of the project says of releases are one."""

import re
from pathlib import Path

import pytest

from dlrm import doctor
from dlrm.package_sets import PINNED, SETS, main, requirement_lines

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
