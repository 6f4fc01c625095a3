"""What set-up says where the operators can't be compiled."""

from pathlib import Path

import pytest

from dlrm.errors import ConfigError
from dlrm.kernels import build, native


@pytest.fixture(autouse=True)
def never_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "library_path", lambda: tmp_path / "native.so")


def test_no_compiler_is_no_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(build, "find_compiler", lambda: None)
    assert build.main() == 0
    assert capsys.readouterr().out.startswith("No C++ compiler found. dlrm will run, slower, on PyTorch's and FBGEMM's")


def test_a_compiler_that_fails_is_quoted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    compiler = tmp_path / "old-g++"
    compiler.write_text("#!/bin/sh\necho 'x.cpp:1: error: what is this' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(build, "find_compiler", lambda: str(compiler))
    assert build.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == [
        f"{compiler} failed: x.cpp:1: error: what is this",
        "dlrm will run, slower, on PyTorch's and FBGEMM's own operators. "
        "With g++ 10 or newer: python -m dlrm.kernels.build",
    ]
    assert not (tmp_path / "native.so").exists()


def test_a_folder_that_cannot_be_written_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(build, "library_path", lambda: tmp_path / "absent" / "native.so")
    assert build.main() == 0
    assert f"{tmp_path}/absent/native.so: can't be written (No such file or directory)." in capsys.readouterr().out


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DLRM_KERNELS", "avx3")
    with pytest.raises(
        ConfigError, match=r"^DLRM_KERNELS=avx3: expected none, baseline, AVX2, AVX-512, AVX-512 BF16, or nothing"
    ):
        native.load_native.__wrapped__()
