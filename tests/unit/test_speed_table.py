import pytest

from benchmarks.speed_table import draw_tables, summarize
from dlrm.errors import DatasetError


def result(batch_size: int, ratio: float, cpu: str = "One", rows: str = "uniform100k") -> dict:
    side = {"peak_rss_gib": [2.0, 2.5], "tables_gib": [1.0, 1.0], "state_gib": [0.0, 0.75]}
    return {
        "case": "train",
        "machine": {"cpu": cpu, "cpu_count": 2},
        "versions": {"torch": "2.13.0", "torchrec": "1.8.0"},
        "commit": "0123456789abcdef",
        "bench": {
            "shape": {"rows": rows, "optimizer": "sgd", "ranks": 2, "batch_size": batch_size, "tables_gib": 12.0}
        },
        "config": {"data": {"zipf_exponent": 1.1 if rows == "mlperf" else 0.0}},
        "precision": "bf16",
        "ratio": ratio,
        "ratios": [ratio - 0.5, ratio, ratio + 0.25],
        "share_of_floor": 0.256,
        "sides": {"ours": side, "reference": {**side, "peak_rss_gib": [4.0, 2.0]}},
    }


def test_page():
    page = draw_tables(
        [result(512, 3.0, "Two"), result(4096, 5.5, rows="mlperf"), result(65_536, 6.0), result(512, 4.0)]
    )
    lines = page.splitlines()
    first, second = lines.index("One, 2 cores; torch 2.13.0, torchrec 1.8.0; commit 0123456789ab"), len(lines) - 5
    assert lines[first + 4 : first + 7] == [
        "| uniform | 2.8 | sgd | 2 | 512 | bf16 | **4.00** (3.50 to 4.25) | 26% | 15.6 | 1.00, 3.00 |",
        "| uniform | 2.8 | sgd | 2 | 65,536 | bf16 | **6.00** (5.50 to 6.25) | 26% | 23.4 | 1.00, 3.00 |",
        "| power law, 1.1 | 2.8 | sgd | 2 | 4,096 | bf16 | **5.50** (5.00 to 5.75) | 26% | 21.5 | 1.00, 3.00 |",
    ]
    assert lines[second].startswith("Two, 2 cores")
    assert lines[-1].startswith("| uniform | 2.8 | sgd | 2 | 512 | bf16 | **3.00**")


def test_summary():
    results = [result(4096, 5.5), result(512, 1.28), result(512, 2.56, "Two")]
    assert summarize(results) == (
        "- One, ours in bf16: 2 shapes, 1.3 to 5.5 times the reference's speed, where the floor allows 5.0 to 21.5.\n"
        "- Two, ours in bf16: 1 shape, 2.6 to 2.6 times the reference's speed, where the floor allows 10.0 to 10.0."
    )


def test_nothing_to_draw():
    with pytest.raises(DatasetError, match="no results"):
        draw_tables([{"case": "loader"}])
