"""What benchmarks/soak.py calls growth."""

import pytest

from benchmarks.soak import Sample, has_ended_well, judge, read_end

LOG = """
dlrm: SIGTERM: stopped after step 5,937, which is saved. The same command with the same --run_dir goes on from there.
[0]:
  rank      : 0 (local_rank: 0)
  exitcode  : -15 (pid: 7)
Root Cause (first observed failure):
[1]:
  rank      : 1 (local_rank: 1)
  exitcode  : 143 (pid: 8)
"""


def samples(*, rss=lambda _: 100.0, handles=lambda _: 30, threads=lambda _: 15):
    return [Sample(10.0 * n, 0, rss(n), handles(n), threads(n)) for n in range(180)]


def grown(own):
    return [trend.measure for trend in judge(own) if trend.has_grown]


def test_nothing_grows():
    assert grown(samples()) == []
    assert grown(samples(rss=lambda number: 100.0 + 50.0 * (number < 10))) == []
    assert (
        grown(samples(handles=lambda number: 30 + 4 * (number % 7 == 0), threads=lambda number: 15 + number % 3)) == []
    )


def test_the_warm_up_does_not_count():
    assert grown(samples(rss=lambda number: min(100.0, 40.0 + 4 * number))) == []


def test_what_grows_is_named():
    assert grown(samples(rss=lambda number: 100.0 + 0.1 * number)) == ["rss_mib"]
    assert grown(samples(handles=lambda number: 30 + number // 40)) == ["num_handles"]
    assert grown(samples(threads=lambda number: 15 + (number > 100))) == ["num_threads"]


def test_how_much_a_line_rises():
    trend = next(
        trend for trend in judge(samples(rss=lambda number: 100.0 + 0.1 * number)) if trend.measure == "rss_mib"
    )
    assert trend.growth == pytest.approx(0.1 * 161)
    assert trend.slope_per_hour == pytest.approx(36.0)
    assert (trend.start, trend.end) == (100.0, pytest.approx(117.9))


def test_a_run_that_is_too_short():
    with pytest.raises(ValueError, match="rank 0: 2 samples after the warm-up, expected 3 or more"):
        judge([Sample(10.0 * n, 0, 1.0, 1, 1) for n in range(3)])


def test_how_a_run_ended():
    facts = {**read_end(LOG), "last_checkpoint": 5937}
    assert facts == {"stopped_after": 5937, "exit_codes": {"0": -15, "1": 143}, "last_checkpoint": 5937}
    assert has_ended_well(facts)
    assert not has_ended_well({**facts, "last_checkpoint": 5900})
    assert not has_ended_well({**facts, "exit_codes": {"0": -15}})
    assert not has_ended_well({**facts, "exit_codes": {"0": -9, "1": 143}})
    assert not has_ended_well({**read_end("killed"), "last_checkpoint": 5937})
