"""What benchmarks/calibrate.py measures is what it expects a time for, and two ranks are placed as `dlrm plan` does."""

import dataclasses

import pytest

from benchmarks import calibrate
from benchmarks.calibration_cases import CASES
from dlrm.errors import DlrmError

SMALL = next(case for case in CASES if case.name == "small_batch")
LIGHT = (
    dataclasses.replace(SMALL, steps=2),
    dataclasses.replace(SMALL, name="by_rows", steps=3, optimizer="sgd", rules="all = row_wise"),
)


def test_two_ranks_are_measured(capfd: pytest.CaptureFixture[str]) -> None:
    measured = calibrate.measure(LIGHT, [2], rounds=1)
    assert [(one.case.name, one.ranks, len(one.step_seconds[0])) for one in measured.timed] == [
        ("small_batch", 2, 2),
        ("by_rows", 2, 3),
    ]
    assert all(0 < seconds < 60 for one in measured.timed for seconds in one.step_seconds[0])
    before, after = measured.ceilings[2]
    for rank in (*before, *after):
        assert 0 < rank.operator_seconds < rank.collective_seconds < 1
        for rate in (rank.sent_bytes_per_second, rank.ring_bytes_per_second, rank.reduced_bytes_per_second):
            assert 1e6 < rate < 1e12
    assert len(before) == len(after) == 2
    assert {table.sharding for table in calibrate.place(LIGHT[1], 2).tables} == {"row_wise"}
    lines = [line.split() for line in capfd.readouterr().out.splitlines()]
    assert all(line[:4] == ["round", "1/1", "ranks", "2"] for line in lines)
    assert [line[4] for line in lines] == ["a", "small_batch", "by_rows", "a"]
    result = calibrate.calibrate(measured)
    assert [case["case"] for case in result["cases"]] == ["small_batch", "by_rows"]


def test_a_plan_that_differs_is_said() -> None:
    placed = {table.table: (table.sharding, table.ranks) for table in calibrate.place(LIGHT[0], 2).tables}
    calibrate.check_plan(LIGHT[0], 2, placed)
    with pytest.raises(DlrmError, match=r"small_batch on 2 ranks: training placed t_cat_3 as \('row_wise', \(0, 1\)\)"):
        calibrate.check_plan(LIGHT[0], 2, {**placed, "t_cat_3": ("row_wise", (1, 0))})
