"""Expected samples/s of the public example's largest run, from 8 to 4,096 GPUs: arithmetic, nothing is measured.

    python -m benchmarks.scaling --json benchmarks/results/scaling.json
    python -m benchmarks.pages            # draws docs/pictures/scaling.svg

Weak scaling keeps the samples of a rank (the recipe's), strong scaling those of all ranks together. Numbers come from
the cost model of `dlrm plan` (docs/design/plan.md), for hosts of 8 GPUs. TorchRec's planner takes time in proportion to
the ranks, too long for thousands; so tables are placed by one rule at all sizes, which makes sizes comparable too.
Where the planner is quick its own plan is reckoned beside it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.flags import Parser, between, result_file, run_script
from dlrm.bench.harness.provenance import write_result
from dlrm.config.config import Config
from dlrm.config.recipes import spec_full_size_a100x80
from dlrm.cost.hardware import GIB, ClusterShape, Hardware, HardwareConfig, hardware_of
from dlrm.cost.optimizer_state import state_floats
from dlrm.errors import DoesNotFitError
from dlrm.plan.cluster_search import ClusterSearch
from dlrm.plan.forecast import forecast
from dlrm.schema.criteo import TABLE_NAMES
from dlrm.sharding.placement import Placement, TablePlacement
from dlrm.system.console import align
from dlrm.system.quiet import quieten_libraries

KINDS = ("a100_40gb", "h100")
MODES = ("weak", "strong")
RANKS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
RANKS_PER_HOST = 8
STRONG_BATCH_SIZE = 65_536
MOST_PARTS = 16
"""Of a table: 8 columns of 4 bytes, the 32 bytes that a GPU reads from its memory at once."""

ASSUMPTIONS = (
    f"Tables are placed by a rule, not by TorchRec's planner: each is split by columns over {MOST_PARTS} ranks (8 on 8 "
    "ranks), and parts are dealt to hosts in turn, so that of more than 416 ranks some hold none.",
    "70 % of the data sheets' matrix rates, memory bandwidths and network bandwidths are reached. Not measured.",
    "A collective takes 30 us, and 1 us more for each message that a rank sends after another: in an all-to-all one to "
    "each other rank of its host and one to each other host, in an all-reduce those of a tree. Not measured.",
    "Ids are drawn uniformly; nothing waits for data; a host's network is never shared with others, nor congested.",
)


@dataclass(frozen=True)
class Point:
    """A cluster and what is expected there. `error` says why there is nothing to expect, and then numbers are None.

    Attributes:
        placement: by the `rule`, or by TorchRec's `planner`.
        efficiency: samples/s of a rank, over those on the smallest cluster that fits, of the same kind and mode.
        exposed_communication: share of a step in which nothing computes.
    """

    kind: str
    mode: str
    placement: str
    ranks: int
    batch_size: int
    step_time_ms: float | None = None
    samples_per_second: float | None = None
    efficiency: float | None = None
    exposed_communication: float | None = None
    most_gib_per_rank: float | None = None
    bound_by: str | None = None
    error: str | None = None


def run_of(mode: str, ranks: int) -> Config:
    """The run of each rank."""
    config = spec_full_size_a100x80()
    if mode == "weak":
        return config
    return replace(config, data=replace(config.data, batch_size=STRONG_BATCH_SIZE // ranks))


def place_by_rule(config: Config, ranks: int) -> Placement:
    """Each table by columns over MOST_PARTS ranks, or all if there are fewer; parts go to hosts in turn, and to the
    ranks of a host in turn."""
    model = config.model
    dim, parts, hosts = model.embedding_dim, min(MOST_PARTS, ranks), max(1, ranks // RANKS_PER_HOST)
    tables = []
    for number, (name, rows) in enumerate(zip(TABLE_NAMES, model.table_rows, strict=True)):
        dealt = range(number * parts, (number + 1) * parts)
        held = sorted(part % hosts * RANKS_PER_HOST + part // hosts % RANKS_PER_HOST for part in dealt)
        floats = dim + state_floats(config.optimizer.algorithm, dim)
        gib = 4 * rows * dim / GIB
        tables.append(
            TablePlacement(
                name,
                rows,
                dim,
                gib,
                4 * rows * (floats - dim) / GIB,
                "column_wise",
                "fused",
                tuple(held),
                (4 * rows * floats / parts / GIB,) * parts,
            )
        )
    return Placement(ranks, tuple(tables))


def hardware(shape: ClusterShape) -> Hardware:
    """The kind's numbers."""
    return hardware_of(shape, HardwareConfig(), None, None, None)


def expect(kind: str, mode: str, ranks: int, placement: str) -> Point:
    """A point, its efficiency not yet known."""
    config, shape = run_of(mode, ranks), ClusterShape(kind, ranks // RANKS_PER_HOST, RANKS_PER_HOST)
    point = Point(kind, mode, placement, ranks, config.data.batch_size)
    try:
        placed = place_by_rule(config, ranks) if placement == "rule" else ClusterSearch(config, shape, hardware).place()
    except DoesNotFitError as error:
        return replace(point, error=f"{error.missing_gib_per_rank:.1f} GiB a rank are missing")
    facts = forecast(config, shape, hardware(shape), placed)
    if not facts["fits"]:
        return replace(point, error=f"{facts['activations_missing_gib']:.1f} GiB a rank are missing")
    memory, step = facts["memory_gib_per_rank"], facts["step"]
    return replace(
        point,
        step_time_ms=step["step_time_ms"],
        samples_per_second=step["samples_per_second"],
        exposed_communication=step["exposed_communication_time_ms"] / step["step_time_ms"],
        most_gib_per_rank=max(rank["weights"] + rank["optimizer"] + rank["activations"] for rank in memory),
        bound_by=step["bound_by"],
    )


def compare_to_smallest(points: Sequence[Point]) -> list[Point]:
    """The points with their efficiency: of one kind, mode and placement, smallest cluster first."""
    rates = [point.samples_per_second and point.samples_per_second / point.ranks for point in points]
    base = next((rate for rate in rates if rate), None)
    return [
        replace(point, efficiency=rate / base) if rate and base else point
        for point, rate in zip(points, rates, strict=True)
    ]


def compute(planner_ranks: int) -> dict[str, Any]:
    """All points, ready for JSON.

    Args:
        planner_ranks: up to which TorchRec's planner is asked too.
    """
    points: list[Point] = []
    for kind in KINDS:
        for mode in MODES:
            ruled = _sweep(kind, mode, "rule", RANKS)
            # Where tables do not fit into the GPUs' memory the planner would turn to the hosts'.
            quick = [point.ranks for point in ruled if point.ranks <= planner_ranks and not point.error]
            points += [*ruled, *_sweep(kind, mode, "planner", quick)]
    config = spec_full_size_a100x80()
    return {
        "recipe": config.recipe,
        "tables_gib": sum(4 * rows * config.model.embedding_dim for rows in config.model.table_rows) / GIB,
        "weak_batch_size": config.data.batch_size,
        "strong_global_batch_size": STRONG_BATCH_SIZE,
        "assumptions": list(ASSUMPTIONS),
        "hardware": {kind: asdict(hardware(ClusterShape(kind, 1, RANKS_PER_HOST))) for kind in KINDS},
        "points": [asdict(point) for point in points],
    }


def _sweep(kind: str, mode: str, placement: str, sizes: Sequence[int]) -> list[Point]:
    found = []
    for ranks in sizes:
        found.append(expect(kind, mode, ranks, placement))
        print(f"{kind:<10} {mode:<7} {placement:<8} {ranks:>5} ranks", flush=True)
    return compare_to_smallest(found)


def to_text(result: Mapping[str, Any]) -> list[str]:
    """A line for each point."""
    head = ("kind", "scaling", "placed by", "ranks", "batch", "ms", "samples/s", "efficiency", "exposed", "bound by")
    rows = []
    for point in result["points"]:
        start = (point["kind"], point["mode"], point["placement"], f"{point['ranks']:,}", f"{point['batch_size']:,}")
        if point["error"]:
            rows.append((*start, "", "", "", "", point["error"]))
            continue
        numbers = (f"{point['step_time_ms']:.2f}", f"{point['samples_per_second']:,.0f}")
        shares = (f"{point['efficiency']:.0%}", f"{point['exposed_communication']:.0%}")
        rows.append((*start, *numbers, *shares, point["bound_by"]))
    return align([head, *rows], right=range(3, 9))


def main() -> None:
    """Computes, prints, writes."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--planner_ranks",
        type=between(0, RANKS[-1]),
        default=64,
        help="ask TorchRec's planner too up to here (default: %(default)s)",
    )
    parser.add_argument("--json", type=result_file, help="where to write the result")
    arguments = parser.parse_args()
    quieten_libraries()
    result = compute(arguments.planner_ranks)
    print("\n".join(to_text(result)))
    write_result(arguments.json, result)


if __name__ == "__main__":
    run_script(main)
