import pytest

from dlrm.bench.harness.floor import Ceilings, Floor
from dlrm.bench.harness.report import Speed, compare, print_floor, print_memory, print_speeds, quantile, ratios
from dlrm.cost.work import Work

OURS = Speed(100, [[1.0, 1.0], [0.5, 0.5], [2.0, 2.0]])
REFERENCE = Speed(100, [[4.0], [4.0], [4.0]])
FLOOR = Floor(Work(1e9, 1e9), Ceilings(5e9, 10e9))


def test_rates_and_ratios():
    assert OURS.rates == [100.0, 200.0, 50.0]
    assert (OURS.rate, OURS.seconds) == (100.0, 1.0)
    assert ratios(OURS, REFERENCE) == [4.0, 8.0, 2.0]


def test_quantiles():
    assert [quantile([1.0, 2.0, 3.0], share) for share in (0, 0.25, 0.5, 1)] == [1.0, 1.5, 2.0, 3.0]
    assert quantile([7.0], 0.9) == 7.0


def test_top_level():
    result = compare(OURS, REFERENCE, FLOOR)
    assert result["ratio"] == 4.0
    assert result["ratios"] == [4.0, 8.0, 2.0]
    assert result["share_of_floor"] == pytest.approx(0.2)
    assert result["share_of_floor_sum"] == pytest.approx(0.3)
    assert result["floor"]["matrix_seconds"] == pytest.approx(0.2)


def test_json_of_a_side():
    content = OURS.to_json()
    assert content["samples_per_second"] == {"median": 100.0, "min": 50.0, "max": 200.0}
    assert content["step_ms"] == {"p10": 500.0, "p50": 1000.0, "p90": 2000.0}
    assert content["step_seconds"] == [[1.0, 1.0], [0.5, 0.5], [2.0, 2.0]]


def test_table(capsys):
    print_speeds({"ours": OURS, "reference": REFERENCE})
    head, ours, reference = capsys.readouterr().out.splitlines()[1:]
    assert head.split() == ["samples/s:", "median", "min", "max", "step,", "ms:", "P10", "P50", "P90"]
    assert ours.split() == ["ours", "100", "50", "200", "500.0", "1,000.0", "2,000.0"]
    assert reference.split() == ["reference", "25", "25", "25", "4,000.0", "4,000.0", "4,000.0"]


def test_memory_and_floor_in_words(capsys):
    print_memory("ours", {"peak_rss_gib": [1.0, 3.5], "tables_gib": [0.5, 2.0], "state_gib": [0.0, 0.25]})
    print_floor(FLOOR, OURS, "a step")
    memory, floor = capsys.readouterr().out.splitlines()
    assert memory == "ours: peak RSS 3.50 GiB a rank = tables 2.00 + optimizer state 0.25 + 1.25"
    assert "200.00 ms of matrix products (1.00 GFLOP at 0.005 TFLOP/s), 100.00 ms of memory traffic" in floor
    assert "Ours takes 1,000.00 ms: 20.0% of the floor's speed, 30.0% if the two do not overlap." in floor
