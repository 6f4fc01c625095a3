"""How far off `dlrm plan` is on this machine, before and after its cost model is fitted to it.

    python -m benchmarks.calibrate --json benchmarks/results/calibration.json

Measures, on 1, 2 and 4 ranks of this host's CPU, what the cost model takes as peak numbers (every rank at once: fp32
matrix rate, copy, gloo's all-to-all, an operator and a collective with nothing to do), and the training step of several
shapes in fp32, in rounds: each round all numbers of ranks, each with all shapes. The expected step times come from
dlrm/plan itself, with hardware of these peak numbers:

before      what was assumed: 70 % of each peak, 2 us an operator, 200 us a collective, bytes of one price in all
            collectives, everything overlapping as on a GPU
fitted      efficiencies, launch and latency with the least squares of log(expected / measured) over all cases
held_out    each shape by a fit to the other shapes: the error to be expected of a shape that was not measured

Cores do one thing after the other, and so does the model of them; `structures` in the JSON has the fit of a model that
overlaps, for comparison.
"""

import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from benchmarks.calibration_cases import CASES, CEILINGS, Case, Sharding, open_cases
from benchmarks.calibration_fit import (
    Knobs,
    Sample,
    error_percent,
    expected_step,
    fit,
    fit_without_each,
    summarize,
)
from benchmarks.flags import Parser, each, positive_int, result_file, run_script, some_of
from dlrm.bench.harness.provenance import read_result, write_result
from dlrm.bench.harness.rank_ceilings import RankCeilings, combine
from dlrm.bench.harness.report import quantile
from dlrm.bench.harness.workers import Side, Workers, start_workers
from dlrm.config.flags import is_named
from dlrm.cost.hardware import ASSUMED_EFFICIENCY, ClusterShape, Hardware
from dlrm.cost.step import Step
from dlrm.errors import ConfigError, DatasetError, DlrmError
from dlrm.plan.cluster_search import ClusterSearch
from dlrm.plan.forecast import workload_of
from dlrm.sharding.placement import Placement
from dlrm.system.host import available_cores, available_memory_bytes
from dlrm.system.quiet import quieten_libraries

BEFORE = {
    "matrix_efficiency": 0.7,
    "memory_efficiency": 0.7,
    "network_efficiency": 0.7,
    "launch_seconds": 2e-6,
    "collective_seconds": 200e-6,
    "ring_share": 1.0,
    "reduction_share": 1.0,
    "overlaps": True,
}
"""What `dlrm plan` reckoned with on a CPU until it was calibrated."""

_PROVENANCE = ("command", "commit", "machine", "versions")


@dataclass
class Timed:
    """A case at a number of ranks: seconds of each step by round, and threads of a rank."""

    case: Case
    ranks: int
    step_seconds: list[list[float]] = field(default_factory=list)
    threads: int = 0

    def quantile(self, share: float) -> float:
        """Of all steps of all rounds."""
        return quantile(sorted(seconds for steps in self.step_seconds for seconds in steps), share)


@dataclass(frozen=True)
class Measured:
    """What a call has measured: ceilings by time (twice a round) and rank for each number of ranks, and all cases."""

    ceilings: Mapping[int, Sequence[Sequence[RankCeilings]]]
    timed: Sequence[Timed]


def measure(cases: tuple[Case, ...], ranks: Sequence[int], rounds: int) -> Measured:
    """Takes the rounds.

    Raises:
        DlrmError: if training places its tables otherwise than `dlrm plan` does.
    """
    ceilings: dict[int, list[list[RankCeilings]]] = {count: [] for count in ranks}
    timed = {(count, case.name): Timed(case, count) for count in ranks for case in cases}
    for number in range(rounds):
        for count in ranks:
            label = f"round {number + 1}/{rounds}  ranks {count}"
            with start_workers(Side("calibrate", open_cases, (cases,), (), count)) as workers:
                ceilings[count].append(_measure_ceilings(workers, label))
                for case in cases:
                    reply = workers.take_turn(case.name)[0].value
                    check_plan(case, count, reply["sharding"])
                    one = timed[count, case.name]
                    one.step_seconds.append(reply["step_seconds"])
                    one.threads = reply["threads"]
                    median = statistics.median(reply["step_seconds"])
                    print(f"{label}  {case.name:<20} {1e3 * median:>10,.2f} ms a step", flush=True)
                ceilings[count].append(_measure_ceilings(workers, label))
    return Measured(ceilings, list(timed.values()))


def _measure_ceilings(workers: Workers, label: str) -> list[RankCeilings]:
    ranks = [reply.value for reply in workers.take_turn(CEILINGS)]
    found = combine([ranks])
    rates = (found.sent_bytes_per_second, found.ring_bytes_per_second, found.reduced_bytes_per_second)
    exchange = (
        f", {' '.join(f'{rate / 1e9:.2f}' for rate in rates)} GB/s by all-to-all, rings, all-reduce, "
        f"{1e6 * found.collective_seconds:,.0f} us a collective"
    )
    print(
        f"{label}  a rank: {found.flop_per_second / 1e9:.1f} GFLOP/s, {found.bytes_per_second / 1e9:.1f} GB/s, "
        f"{1e6 * found.operator_seconds:.2f} us an operator{exchange if all(rates) else ''}",
        flush=True,
    )
    return ranks


def check_plan(case: Case, ranks: int, sharding: Sharding) -> None:
    """Refuses what was trained with another plan than the expected time is for.

    Raises:
        DlrmError: naming a table.
    """
    planned = {table.table: (table.sharding, table.ranks) for table in place(case, ranks).tables}
    trained = {table: (kind, tuple(sorted(set(held)))) for table, (kind, held) in sharding.items()}
    if planned != trained:
        differing = next(table for table in planned if planned[table] != trained.get(table))
        raise DlrmError(
            f"{case.name} on {ranks} ranks: training placed {differing} as {trained.get(differing)}, "
            f"`dlrm plan` as {planned[differing]}"
        )


@cache
def place(case: Case, ranks: int) -> Placement:
    """Where `dlrm plan` puts a case's tables."""
    host = replace(host_of(RankCeilings(1.0, 1.0, 1.0)), memory_bytes=available_memory_bytes() / ranks)
    return ClusterSearch(case.config(ranks), ClusterShape("cpu", 1, ranks), lambda _: host).place()


def host_of(found: RankCeilings) -> Hardware:
    """A rank's hardware, of measured peak numbers, for the cost model. Its memory does not matter to a step.

    A collective's time is that of the number of ranks that it was measured on, messages and all.
    """
    sent = found.sent_bytes_per_second or 1.0  # a single rank sends nothing
    in_rings, reduced = found.ring_bytes_per_second or sent, found.reduced_bytes_per_second or sent
    return Hardware(
        device="cpu",
        memory_bytes=0.0,
        memory_bandwidth=found.bytes_per_second,
        matrix_rates={"fp32": found.flop_per_second},
        intra_host_bandwidth=sent,
        inter_host_bandwidth=sent,
        host_memory_bytes=0.0,
        host_device_bandwidth=found.bytes_per_second,
        launch_seconds=found.operator_seconds,
        collective_seconds=found.collective_seconds,
        message_seconds=0.0,
        ring_share=in_rings / sent,
        reduction_share=reduced / sent,
        overlaps=False,
    )


def to_samples(measured: Measured) -> list[Sample]:
    """What is fitted to."""
    samples = []
    for one in measured.timed:
        shape = ClusterShape("cpu", 1, one.ranks)
        load = workload_of(one.case.config(one.ranks), shape, place(one.case, one.ranks))
        peak = host_of(combine(measured.ceilings[one.ranks]))
        samples.append(Sample(one.case.name, load, shape, peak, one.quantile(0.5)))
    return samples


def calibrate(measured: Measured) -> dict[str, Any]:
    """Errors before and after, the fit, and every case: ready for JSON."""
    samples = to_samples(measured)
    overlapping = [replace(sample, peak=replace(sample.peak, overlaps=True)) for sample in samples]
    fitted, without = fit(samples), fit_without_each(samples)
    expected = {
        "before": [expected_step(s.load, s.shape, replace(s.peak, **BEFORE)) for s in samples],
        "fitted": [sample.step(fitted) for sample in samples],
        "held_out": [sample.step(without[sample.case]) for sample in samples],
    }
    errors = {name: errors_of(steps, samples) for name, steps in expected.items()}
    cases = [
        {
            "case": one.case.name,
            "ranks": one.ranks,
            "threads_per_rank": one.threads,
            "measured_ms": {f"p{share}": 1e3 * one.quantile(share / 100) for share in (10, 50, 90)},
            "expected_ms": {name: 1e3 * steps[number].seconds for name, steps in expected.items()},
            "error_percent": {name: values[number] for name, values in errors.items()},
            "fitted_parts_ms": {
                part: 1e3 * expected["fitted"][number].seconds_of(part)  # type: ignore[arg-type] # one of the three
                for part in ("lookup", "dense", "communication")
            },
            "step_seconds": [[round(seconds, 6) for seconds in steps] for steps in one.step_seconds],
        }
        for number, one in enumerate(measured.timed)
    ]
    return {
        "errors": {name: summarize(values).to_json() for name, values in errors.items()},
        "knobs": asdict(fitted),
        "cpu_kind": describe_kind(fitted, measured),
        "structures": {
            "one_after_another": {name: summarize(errors[name]).to_json() for name in ("fitted", "held_out")},
            "overlapping": _fit_again(overlapping),
        },
        "held_out_knobs": {case: asdict(knobs) for case, knobs in without.items()},
        "ceilings": {str(ranks): combine(found).to_json() for ranks, found in measured.ceilings.items()},
        "cases": cases,
        "ceilings_by_round": {
            str(ranks): [[rank.to_json() for rank in turn] for turn in found]
            for ranks, found in measured.ceilings.items()
        },
    }


def errors_of(steps: Sequence[Step], samples: Sequence[Sample]) -> list[float]:
    """Percent, with signs."""
    return [error_percent(step.seconds, sample.seconds) for step, sample in zip(steps, samples, strict=True)]


def _fit_again(samples: Sequence[Sample]) -> dict[str, Any]:
    fitted, without = fit(samples), fit_without_each(samples)
    return {
        "fitted": summarize(errors_of([s.step(fitted) for s in samples], samples)).to_json(),
        "held_out": summarize(errors_of([s.step(without[s.case]) for s in samples], samples)).to_json(),
        "knobs": asdict(fitted),
    }


def describe_kind(fitted: Knobs, measured: Measured) -> dict[str, float]:
    """The numbers of the `cpu` kind that follow, for dlrm/cost/hardware.py: of ranks that have a core each.

    Its matrix rate and memory bandwidth are a data sheet's. What a large product and a copy reach of those is not known
    here, and taken to be ASSUMED_EFFICIENCY. What is gloo's is this machine's.
    """
    alone = {ranks: combine(found) for ranks, found in measured.ceilings.items() if ranks <= available_cores()}
    kind = {
        "matrix_efficiency": round(ASSUMED_EFFICIENCY * fitted.matrix_efficiency, 2),
        "memory_efficiency": round(ASSUMED_EFFICIENCY * fitted.memory_efficiency, 2),
        "launch_us": round(1e6 * fitted.launch_factor * min(one.operator_seconds for one in alone.values())),
    }
    for one in (one for ranks, one in alone.items() if ranks > 1):  # the largest number of ranks stays
        host = host_of(one)
        kind |= {
            "network_efficiency": round(fitted.network_efficiency, 2),
            "intra_host_gb_per_second": round(host.intra_host_bandwidth / 1e9, 2),
            "ring_share": round(host.ring_share, 2),
            "reduction_share": round(host.reduction_share, 2),
            "collective_latency_us": round(1e6 * fitted.latency_factor * one.collective_seconds),
        }
    return kind


def read(path: Path) -> tuple[Measured, dict[str, Any]]:
    """What an earlier call measured, and where it was.

    Raises:
        DatasetError: if it is no result of this benchmark, or of cases that are no more.
    """
    found = read_result(path)
    by_name = {case.name: case for case in CASES}
    try:
        timed = [
            Timed(by_name[one["case"]], one["ranks"], one["step_seconds"], one["threads_per_rank"])
            for one in found["cases"]
        ]
        ceilings = {
            int(ranks): [[RankCeilings(**rank) for rank in turn] for turn in turns]
            for ranks, turns in found["ceilings_by_round"].items()
        }
        measured = Measured(ceilings, timed)
        _check_numbers(measured)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DatasetError(
            f"{path}: no result of this benchmark ({type(error).__name__}: {error}). Expected one that measured "
            f"{', '.join(by_name)} or some of them."
        ) from None
    return measured, found.get("measured") or {name: found[name] for name in _PROVENANCE}


def _check_numbers(measured: Measured) -> None:
    """Refuses what nothing can be fitted to.

    Raises:
        ValueError: with the place.
    """
    if len({one.case.name for one in measured.timed}) < 2:
        raise ValueError("expected two cases or more")
    for one in measured.timed:
        if one.ranks not in measured.ceilings:
            raise ValueError(f"{one.case.name}: no ceilings of {one.ranks} ranks")
        if not one.step_seconds or not all(steps and min(steps) > 0 for steps in one.step_seconds):
            raise ValueError(f"{one.case.name} on {one.ranks} ranks: expected step_seconds of more than 0")
    for ranks, turns in measured.ceilings.items():
        if not turns or not all(turn and min(min(astuple(rank)[:3]) for rank in turn) > 0 for turn in turns):
            raise ValueError(f"ceilings of {ranks} ranks: expected more than 0")
    if min(measured.ceilings) > available_cores():
        raise ValueError(f"no number of ranks that have a core each of the {available_cores()} here")


def print_result(result: Mapping[str, Any]) -> None:
    """A line for each case, then the fit and its errors."""
    print(f"\n{'case':<22}{'ranks':>6}{'P50, ms':>12}{'P10':>11}{'P90':>11}{'before':>10}{'fitted':>9}{'held out':>10}")
    for one in result["cases"]:
        times = [one["measured_ms"][name] for name in ("p50", "p10", "p90")]
        errors = [one["error_percent"][name] for name in ("before", "fitted", "held_out")]
        print(
            f"{one['case']:<22}{one['ranks']:>6}{times[0]:>12,.2f}{times[1]:>11,.2f}{times[2]:>11,.2f}"
            f"{errors[0]:>+9.0f}%{errors[1]:>+8.0f}%{errors[2]:>+9.0f}%"
        )
    for name, errors in result["errors"].items():
        print(f"{name:<9} off by {errors['mean_percent']:.0f} % on average, {errors['largest_percent']:.0f} % at most")
    print("knobs     " + ", ".join(f"{name} {value:.3g}" for name, value in result["knobs"].items()))
    print("cpu kind  " + ", ".join(f"{name} {value:g}" for name, value in result["cpu_kind"].items()))
    for name, structure in result["structures"].items():
        held = structure["held_out"]
        print(f"{name}: held out {held['mean_percent']:.0f} %, at most {held['largest_percent']:.0f} %")


def main() -> None:
    """Measures, or reads what was measured; fits, prints, writes."""
    known = {case.name: case for case in CASES}
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--ranks", type=partial(each, positive_int), default="1,2,4", help="numbers of ranks (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=positive_int, default=3, help="rounds (default: %(default)s)")
    parser.add_argument("--cases", type=some_of(*known), default=",".join(known), help="shapes (default: all)")
    parser.add_argument("--from_json", type=Path, help="fit what an earlier call measured, and measure nothing")
    parser.add_argument("--json", type=result_file, help="where to write the result")
    arguments = parser.parse_args()
    quieten_libraries()
    provenance: dict[str, Any] = {}
    if arguments.from_json:
        for name in ("ranks", "rounds", "cases"):
            if is_named(sys.argv[1:], name):
                raise ConfigError(f"--{name} with --from_json: nothing is measured. Drop one of them.")
        measured, provenance["measured"] = read(arguments.from_json)
    else:
        cases = tuple(known[name] for name in arguments.cases)
        if len(cases) < 2:
            parser.error("--cases: expected two or more; each is held out from a fit to the others")
        shown = ",".join(map(str, arguments.ranks))
        if any(case.batch_size % ranks for case in cases for ranks in arguments.ranks):
            parser.error(f"--ranks {shown}: expected divisors of the cases' batches, such as 1,2,4")
        if min(arguments.ranks) > available_cores():
            parser.error(f"--ranks {shown}: expected {available_cores()} or fewer among them, which have a core each")
        measured = measure(cases, arguments.ranks, arguments.rounds)
    result = {**calibrate(measured), **provenance}
    print_result(result)
    write_result(arguments.json, result)


if __name__ == "__main__":
    run_script(main)
