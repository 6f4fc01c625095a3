"""Scaling: the rule that places tables, the arithmetic of efficiency, and a picture that is the same every time."""

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks import scaling
from benchmarks.scaling import RANKS, Point, compare_to_smallest, expect, hardware, place_by_rule, run_of
from benchmarks.scaling_picture import draw
from dlrm.cost.hardware import ClusterShape
from dlrm.plan.forecast import forecast

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "scaling.json"


@pytest.mark.parametrize("ranks", RANKS)
def test_the_rule_places_all_of_every_table(ranks: int) -> None:
    placement = place_by_rule(run_of("weak", ranks), ranks)
    assert placement.gib == pytest.approx(420.94, abs=0.005)
    parts = min(16, ranks)
    for table in placement.tables:
        assert len(set(table.ranks)) == len(table.gib_by_rank) == parts
        assert sum(table.gib_by_rank) == pytest.approx(table.gib)
    held = [0] * ranks
    for table in placement.tables:
        for rank in table.ranks:
            held[rank] += 1
    # 26 x 16 parts, as even as they go, over ranks and over hosts; none for some of more than 416 ranks.
    assert max(held) == -(-26 * parts // ranks)
    hosts = [sum(held[first : first + 8]) for first in range(0, ranks, 8)]
    assert max(hosts) - min(hosts) <= 1
    assert sum(1 for parts_of_rank in held if parts_of_rank) == min(ranks, 26 * parts)


def test_batches() -> None:
    for ranks in RANKS:
        assert run_of("weak", ranks).data.batch_size == 819
        assert run_of("strong", ranks).data.batch_size * ranks == 65_536


def test_what_travels_by_hand() -> None:
    config, shape = run_of("weak", 16), ClusterShape("a100_40gb", 2, 8)
    facts = forecast(config, shape, hardware(shape), place_by_rule(config, 16))
    (pooled,) = (one for one in facts["collectives"] if one["name"] == "pooled all-to-all")
    # Each rank has 8 columns of 26 tables, and sends them for the 819 samples of each of 15 others, 8 elsewhere.
    to_each = 26 * 8 * 4 * 819
    assert pooled["bytes_per_rank"] == 15 * to_each
    assert pooled["inter_host_bytes_per_host"] == 8 * 8 * to_each
    # 50 GB/s of a host, of which 70 % are reached; 30 us, and 7 + 1 messages.
    assert pooled["time_ms"] == pytest.approx(1e3 * (8 * 8 * to_each / 35e9 + 38e-6))
    point = expect("a100_40gb", "weak", 16, "rule")
    assert point.step_time_ms == facts["step"]["step_time_ms"]
    assert point.samples_per_second == pytest.approx(16 * 819 / point.step_time_ms * 1e3)


def test_what_does_not_fit_is_said() -> None:
    point = expect("a100_40gb", "weak", 8, "rule")
    assert point.samples_per_second is None
    # 420.94 GiB of tables over 8 ranks of 40 GiB; 6 GiB and less beside them.
    missing = float(str(point.error).split()[0])
    assert 420.94 / 8 - 40 < missing < 420.94 / 8 - 40 + 6
    assert expect("h100", "weak", 8, "rule").error is None


def test_efficiency_by_hand() -> None:
    too_small = Point("h100", "weak", "rule", 8, 1, error="too small")
    points = [
        too_small,
        *(Point("h100", "weak", "rule", ranks, 1, samples_per_second=rate) for ranks, rate in ((16, 320), (64, 640))),
    ]
    assert compare_to_smallest(points) == [
        too_small,
        dataclasses.replace(points[1], efficiency=1.0),
        dataclasses.replace(points[2], efficiency=0.5),
    ]
    assert compare_to_smallest([too_small]) == [too_small]


def test_the_committed_result_is_what_the_model_says() -> None:
    committed = [point for point in json.loads(RESULT.read_text())["points"] if point["placement"] == "rule"]
    assert len(committed) == len(scaling.KINDS) * len(scaling.MODES) * len(RANKS)
    for point in committed:
        now = expect(point["kind"], point["mode"], point["ranks"], "rule")
        assert now.error == point["error"]
        if now.error is None:
            assert now.step_time_ms == pytest.approx(point["step_time_ms"], rel=1e-6)
            assert now.exposed_communication == pytest.approx(point["exposed_communication"], rel=1e-6)


def test_the_picture_is_the_same_every_time() -> None:
    result = json.loads(RESULT.read_text())
    picture = draw(result)
    assert draw(result) == picture
    for words in ("Weak scaling: 819 samples a rank", "Strong scaling: 65,536 samples", "Nothing here was measured"):
        assert words in picture
    assert any("18.6 GiB a rank are missing" in line for line in scaling.to_text(result))
