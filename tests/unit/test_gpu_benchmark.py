"""What benchmarks/gpu.py does beside the GPU."""

import json
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import CASES, CHECK_GROUPS, Outcome, Session, run_cases, run_checks
from benchmarks.gpu_report import add_floor, to_markdown
from benchmarks.gpu_step import fit_rows, sum_kernels
from dlrm.config.recipes import MLPERF_ROWS
from tests.gpu.checks import CHECKS
from tests.launching import ROOT, run

GIB = 2**30


def test_tables_fill_what_there_is() -> None:
    whole = sum(MLPERF_ROWS) * 512 / GIB
    assert whole == pytest.approx(97.36, abs=0.01)
    assert fit_rows(MLPERF_ROWS, 512, 98 * GIB) == MLPERF_ROWS
    cut = fit_rows(MLPERF_ROWS, 512, 40 * GIB)
    assert 39.99 < sum(cut) * 512 / GIB <= 40
    assert min(own - cut_rows for own, cut_rows in zip(MLPERF_ROWS, cut, strict=True)) == 0
    assert len({rows for rows, own in zip(cut, MLPERF_ROWS, strict=True) if rows < own}) == 1


def test_a_step_is_held_against_its_floor() -> None:
    work = {"flop": 14.5e6 * 65_536, "num_bytes": 100e3 * 65_536}
    ids = {"work": work, "median_step_ms": 5.0}
    add_floor(ids, "bf16", {"bf16": 790e12, "fp32": 1.0, "bytes": 4.3e12})
    assert ids["floor"]["sum_seconds"] == pytest.approx(0.00273, rel=0.01)
    assert ids["share_of_floor"] == pytest.approx(0.305, rel=0.01)
    assert ids["share_of_floor_sum"] == pytest.approx(0.545, rel=0.01)


def test_kernels_of_a_trace_are_summed_by_step() -> None:
    events = [
        {"ph": "X", "cat": "kernel", "name": "gemm", "ts": 0.0, "dur": 4000.0},
        {"ph": "X", "cat": "kernel", "name": "gemm", "ts": 3000.0, "dur": 2000.0},
        {"ph": "X", "cat": "cpu_op", "name": "mm", "ts": 0.0, "dur": 9.0},
        {"ph": "X", "cat": "gpu_memcpy", "name": "copy", "ts": 6000.0, "dur": 2000.0},
    ]
    summed = sum_kernels(events, steps=2)
    assert summed["kernel_ms_per_step"] == {"gemm": 3.0, "copy": 1.0}
    assert summed["idle_share"] == pytest.approx(1 / 8)
    assert summed["kernels_per_step"] == 1.5
    assert sum_kernels([], 2) == {}


class Scripted(Session):
    """Answers as told, without a process."""

    def start(self, tag, module, arguments, seconds):  # noqa: ARG002
        if tag == "CHECK":
            return Outcome([{"check": arguments[0], "passed": True, "seconds": 1.0, "error": ""}], "stopped after 1 s")
        return Outcome([], "Traceback\nRuntimeError: CUDA error | no room")


def session_of(folder: Path, seconds: float) -> Session:
    result = {"commit": "unknown", "device": {}, "checks": [], "cases": []}
    return Scripted(folder, time.monotonic() + seconds, result)


def test_what_failed_or_had_no_time_is_listed(tmp_path: Path) -> None:
    session = session_of(tmp_path, 45)
    run_checks(session, [["one", "two"]])
    run_cases(session, CASES[:2], lambda _: None)  # the second is compiled, which takes longer than there is
    saved = json.loads((tmp_path / "gpu.json").read_text())
    assert [(check["check"], check["passed"]) for check in saved["checks"]] == [("one", True), ("two", False)]
    assert [case["error"].splitlines()[-1][:20] for case in session.result["cases"]] == [
        "RuntimeError: CUDA e",
        "not run: no time lef",
    ]
    assert "| two | FAILED: stopped after 1 s |" in to_markdown(session.result)


def test_every_check_is_in_a_group() -> None:
    assert sorted(name for group in CHECK_GROUPS for name in group) == sorted(CHECKS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so_in_a_line(tmp_path: Path) -> None:
    done = run([str(ROOT / "benchmarks/gpu.sh")], OUT=str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "no CUDA device, expected one" in done.stderr
    assert not (tmp_path / "out").exists()
