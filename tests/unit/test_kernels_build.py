"""What set-up says where the operators can't be compiled."""

import platform
from pathlib import Path

import pytest
import torch

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


def test_a_build_replaces_older_sources_of_the_same_pytorch_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/sh\nfor last; do :; done\necho library > "$last"\n')
    compiler.chmod(0o755)
    library = tmp_path / "native_2.13.0+cpu_x86_64_new.so"
    monkeypatch.setattr(build, "library_path", lambda: library)
    others = [f"native_{other}_old.so" for other in ("2.13.0_x86_64", "2.14.1+cu130_x86_64", "2.13.0+cpu_aarch64")]
    for name in [*others, "native_2.13.0+cpu_x86_64_old.so"]:
        (tmp_path / name).touch()
    assert build.build(str(compiler)) == library
    assert {path.name for path in tmp_path.glob("native_*")} == {library.name, *others}
    assert library.read_text() == "library\n"


def test_a_library_is_named_after_its_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(torch, "__version__", "2.11.0+cpu")
    assert build.library_path().name.startswith(f"native_2.11.0+cpu_{platform.machine()}_")


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DLRM_KERNELS", "avx3")
    with pytest.raises(
        ConfigError, match=r"^DLRM_KERNELS=avx3: expected none, baseline, AVX2, AVX-512, AVX-512 BF16, or nothing"
    ):
        native.load_native.__wrapped__()
