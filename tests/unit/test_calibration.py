"""The fit of the cost model: what it finds where the answer is known, and what is made of measurements."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import calibrate
from benchmarks.calibrate import Measured, Timed
from benchmarks.calibration_cases import CASES, Case
from benchmarks.calibration_fit import (
    Knobs,
    Sample,
    error_percent,
    fit,
    fit_without_each,
    least_squares,
    summarize,
)
from dlrm.bench.harness import rank_ceilings
from dlrm.bench.harness.rank_ceilings import RankCeilings, combine, measure_rank
from dlrm.config.checks import check_config
from dlrm.config.config import ModelConfig
from dlrm.cost.hardware import KINDS, ClusterShape
from dlrm.cost.step import StepWorkload
from dlrm.cost.work import TableWorkload
from dlrm.errors import ConfigError, DatasetError

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "calibration.json"
KNOWN = Knobs(0.6, 0.35, 0.8, 25.0, 1.5)
CEILINGS = RankCeilings(1e11, 1e10, 1e-6, 1e9, 4e8, 2e9, 3e-4)


def make_load(ranks: int, batch_size: int, dim: int, width: int, hotness: int) -> StepWorkload:
    tables = [
        TableWorkload(f"t{i}", 50_000, dim, hotness, "table_wise", "fused", (i % ranks,), (1.0,), 0) for i in range(26)
    ]
    model = ModelConfig(embedding_dim=dim, dense_arch_layer_sizes=(width, dim), over_arch_layer_sizes=(width, width, 1))
    return StepWorkload(model, tables, batch_size, 4, "sgd", hides_input=True, launches=True)


SHAPES = {
    "wide": (1024, 16, 1024, 1),
    "embeddings": (2048, 64, 32, 10),
    "small": (16, 16, 64, 1),
    "exchanges": (8192, 64, 16, 1),
    "middle": (512, 32, 256, 2),
}


def make_samples(
    knobs: Knobs, names: tuple[str, ...] = tuple(SHAPES), ranks_of: tuple[int, ...] = (1, 2, 4)
) -> list[Sample]:
    """Steps that take exactly what the model expects with these knobs."""
    samples = []
    for name in names:
        batch_size, dim, width, hotness = SHAPES[name]
        for ranks in ranks_of:
            load = make_load(ranks, batch_size // ranks, dim, width, hotness)
            peak = calibrate.host_of(dataclasses.replace(CEILINGS, flop_per_second=1e11 / ranks))
            sample = Sample(name, load, ClusterShape("cpu", 1, ranks), peak, 1.0)
            samples.append(dataclasses.replace(sample, seconds=sample.step(knobs).seconds))
    return samples


def test_squares_of_a_line() -> None:
    # a + b x through (0, 1), (1, 3), (2, 5.3): by the normal equations b = 2.15, a = 0.95.
    x, y = np.arange(3.0), np.array([1.0, 3.0, 5.3])

    def off(point: np.ndarray) -> np.ndarray:
        return point[0] + point[1] * x - y

    wide = np.array([10.0, 10.0])
    assert least_squares(off, np.zeros(2), -wide, wide) == pytest.approx([0.95, 2.15], abs=1e-6)
    # With b held at 2 at the most, a is the mean of y - 2 x.
    assert least_squares(off, np.zeros(2), -wide, np.array([10.0, 2.0])) == pytest.approx([1.1, 2.0], abs=1e-6)


def test_known_knobs_are_found() -> None:
    samples = make_samples(KNOWN)
    found = fit(samples)
    assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(KNOWN), rel=0.01)
    for case, knobs in fit_without_each(samples).items():
        held_out = [sample for sample in samples if sample.case == case]
        assert [sample.step(knobs).seconds for sample in held_out] == pytest.approx(
            [sample.seconds for sample in held_out], rel=0.05
        )


def test_a_shape_that_is_left_out_is_not_seen() -> None:
    samples = make_samples(KNOWN, ("wide", "embeddings", "small"), (1, 2))
    slow = [dataclasses.replace(s, seconds=s.seconds * (3 if s.case == "wide" else 1)) for s in samples]
    without = fit_without_each(slow)
    assert without["wide"] == fit([sample for sample in samples if sample.case != "wide"])
    assert without["small"].matrix_efficiency < 0.9 * KNOWN.matrix_efficiency


def test_errors_by_hand() -> None:
    assert error_percent(3.0, 2.0) == 50
    assert error_percent(1.0, 2.0) == -50
    errors = summarize([10, -40, 25])
    assert (errors.mean_percent, errors.largest_percent) == (25, 40)


def test_an_average_rank_in_the_best_round() -> None:
    slow = [RankCeilings(1.0, 10.0, 5.0, 3.0, 1.0, 2.0, 7.0), RankCeilings(3.0, 10.0, 5.0, 3.0, 1.0, 2.0, 9.0)]
    fast = [RankCeilings(4.0, 2.0, 4.0, 5.0, 3.0, 1.0, 9.0), RankCeilings(6.0, 2.0, 2.0, 5.0, 1.0, 1.0, 9.0)]
    assert combine([slow, fast]) == RankCeilings(5.0, 10.0, 3.0, 5.0, 2.0, 2.0, 8.0)


def test_a_rank_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_ceilings, "_PRODUCT_SIZE", 64)
    monkeypatch.setattr(rank_ceilings, "_COPIED_BYTES", 1 << 20)
    monkeypatch.setattr(rank_ceilings, "_OPERATORS", 10)
    found = measure_rank(1)
    assert 1e6 < found.flop_per_second < 1e14
    assert 1e6 < found.bytes_per_second < 1e13
    assert 1e-8 < found.operator_seconds < 1
    assert found == RankCeilings(found.flop_per_second, found.bytes_per_second, found.operator_seconds)


def make_measured() -> Measured:
    """Two cases on one rank and on two, in two rounds."""
    cases = [case for case in CASES if case.name in ("small_batch", "middle")]
    alone = RankCeilings(1e11, 1e10, 1e-6)
    timed = [
        Timed(case, ranks, [[0.002 * ranks, 0.004 * ranks], [0.003 * ranks]], 2 // ranks)
        for ranks in (1, 2)
        for case in cases
    ]
    return Measured({1: [[alone], [alone]], 2: [[CEILINGS] * 2, [CEILINGS] * 2]}, timed)


def test_what_is_made_of_measurements(tmp_path: Path) -> None:
    measured = make_measured()
    result = calibrate.calibrate(measured)
    assert [(case["case"], case["ranks"]) for case in result["cases"]] == [
        (name, ranks) for ranks in (1, 2) for name in ("small_batch", "middle")
    ]
    for case in result["cases"]:
        assert case["measured_ms"]["p50"] == pytest.approx(3 * case["ranks"])
        assert case["measured_ms"]["p10"] == pytest.approx(2.2 * case["ranks"])
        for name, expected in case["expected_ms"].items():
            assert case["error_percent"][name] == pytest.approx(100 * (expected / case["measured_ms"]["p50"] - 1))
        assert sum(case["fitted_parts_ms"].values()) == pytest.approx(case["expected_ms"]["fitted"])
    for name, errors in result["errors"].items():
        sizes = [abs(case["error_percent"][name]) for case in result["cases"]]
        assert errors == {"mean_percent": pytest.approx(sum(sizes) / 4), "largest_percent": max(sizes)}
    assert result["errors"]["fitted"]["mean_percent"] < result["errors"]["before"]["mean_percent"]
    knobs, kind = result["knobs"], result["cpu_kind"]
    assert kind["launch_us"] == round(knobs["launch_factor"])  # an operator took 1 us
    assert kind["memory_efficiency"] == pytest.approx(0.7 * knobs["memory_efficiency"], abs=0.005)
    assert (kind["intra_host_gb_per_second"], kind["ring_share"], kind["reduction_share"]) == (1, 0.4, 2)
    (tmp_path / "result.json").write_text(
        json.dumps({**result, "commit": "c", "command": "d", "machine": {}, "versions": {}})
    )
    again, provenance = calibrate.read(tmp_path / "result.json")
    assert again == measured
    assert provenance["commit"] == "c"


def test_what_was_assumed_before_overlaps_and_reaches_70_percent() -> None:
    case = next(case for case in CASES if case.name == "middle")
    (sample,) = calibrate.to_samples(Measured({1: [[CEILINGS]]}, [Timed(case, 1, [[1.0]])]))
    before = calibrate.expected_step(sample.load, sample.shape, dataclasses.replace(sample.peak, **calibrate.BEFORE))
    (over,) = (span for span in before.spans if span.name == "over arch backward")
    # 512 samples; 383 x 512 + 512 x 256 + 256 x 1 weights; 4 operations a weight and sample backward.
    weights = (32 + 351) * 512 + 512 * 256 + 256
    assert over.seconds == pytest.approx(4 * 512 * weights / 0.7e11)
    assert over.bound_by == "matrix products"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--cases", "small_batch,nothing"],
            "--cases: got 'nothing', expected some of results_table",
        ),
        (["--cases", "middle"], "--cases: expected two or more"),
        (["--ranks", "3"], "--ranks 3: expected divisors of the cases' batches"),
        (["--ranks", "two"], "--ranks: got two, expected a whole number from 1"),
        (["--ranks", "1,2,0"], "--ranks: got 0, expected a whole number from 1"),
        (["--ranks", "1,2,1"], "--ranks: got 1,2,1, expected each once"),
        (["--ranks", "64"], "--ranks 64: expected 2 or fewer among them, which have a core each"),
        (["--rounds", "0"], "--rounds: got 0, expected a whole number from 1"),
        (["--from_json", str(RESULT), "--rounds", "3"], "--rounds with --from_json: nothing is measured"),
        (["--from_json", str(RESULT), "--cases=middle,small_batch"], "--cases with --from_json: nothing is measured"),
    ],
)
def test_mistakes_are_refused(monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str) -> None:
    monkeypatch.setattr(calibrate, "available_cores", lambda: 2)
    monkeypatch.setattr("sys.argv", ["benchmarks/calibrate.py", *arguments])
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        calibrate.main()


def remove(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda result: result.pop(key)


def of_first_case(key: str, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda result: result["cases"][0].update({key: value})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (remove("cases"), "has no cases"),
        (remove("ceilings_by_round"), "has no ceilings_by_round"),
        (lambda result: [result.pop(key, None) for key in ("measured", "commit")], "has no commit"),
        (lambda result: result.update(cases=result["cases"][:1]), "expected two cases or more"),
        (lambda result: result["ceilings_by_round"].pop("1"), "no ceilings of 1 ranks"),
        (lambda result: result["ceilings_by_round"].update({"1": [[]]}), "ceilings of 1 ranks: expected more than 0"),
        (of_first_case("case", "gone"), "KeyError: 'gone'"),
        (of_first_case("step_seconds", []), "expected step_seconds of more than 0"),
        (of_first_case("step_seconds", [[0.1, -0.1]]), "expected step_seconds of more than 0"),
        (of_first_case("step_seconds", ["fast"]), "TypeError"),
        (of_first_case("step_seconds", [[float("nan")]]), "is no JSON (Out of range float values"),
    ],
)
def test_a_file_that_nothing_can_be_fitted_to_is_named(
    tmp_path: Path, damage: Callable[[dict[str, Any]], object], words: str
) -> None:
    result = json.loads(RESULT.read_text())
    damage(result)
    (tmp_path / "damaged.json").write_text(json.dumps(result))
    with pytest.raises(DatasetError, match=rf"damaged\.json: .*{re.escape(words)}"):
        calibrate.read(tmp_path / "damaged.json")


def test_measurements_of_ranks_without_a_core_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "available_cores", lambda: 0)
    with pytest.raises(DatasetError, match="no number of ranks that have a core each of the 0 here"):
        calibrate.read(RESULT)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cases_are_runs(case: Case) -> None:
    for ranks in (1, 2, 4):
        config = case.config(ranks)
        check_config(config)
        assert config.data.batch_size * ranks == case.batch_size
        assert config.training.arithmetic == "fp32"


def test_the_cpu_kind_is_the_measured_one() -> None:
    found = json.loads(RESULT.read_text())["cpu_kind"]
    cpu = KINDS["cpu"]
    kind = {
        "matrix_efficiency": cpu.matrix_efficiency,
        "memory_efficiency": cpu.memory_efficiency,
        "network_efficiency": cpu.network_efficiency,
        "intra_host_gb_per_second": cpu.intra_host_bandwidth / 1e9,
        "ring_share": cpu.ring_share,
        "reduction_share": cpu.reduction_share,
        "launch_us": cpu.launch_seconds * 1e6,
        "collective_latency_us": cpu.collective_seconds * 1e6,
    }
    assert {name: kind[name] for name in found} == pytest.approx(found)
