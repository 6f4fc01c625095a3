"""`dlrm plan`: memory, sharding and step time of a training on a cluster that is not available. No torch here."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

import tyro

from dlrm.config.checks import check_ranges
from dlrm.config.config import Config, ShardingConfig, optional
from dlrm.config.flags import base_of, is_named, parse_flags, settle, value_of
from dlrm.cost.hardware import (
    ClusterShape,
    Hardware,
    HardwareConfig,
    check_effects,
    hardware_of,
    parse_cluster,
    precision_on,
)
from dlrm.errors import DoesNotFitError
from dlrm.plan.picture import check_plot, draw
from dlrm.plan.report import to_text
from dlrm.system.console import plural, signs_of_life
from dlrm.system.quiet import quieten_libraries

PROG = "dlrm plan"
DESCRIPTION = """Says whether a training fits a cluster, how its tables would be sharded, and how long a step would
take. The cluster need not be available. TorchRec's planner makes the same plan as training with the same flags; a cost
model (docs/design/plan.md) computes the rest.

Takes the flags of training in addition to its own.

Example: `dlrm plan --recipe spec_mlperf_x2_a100x16 --cluster a100_40gb:2x8 --plot plan.html`: 2 hosts of 8 GPUs."""


@dataclass(frozen=True)
class PlanConfig:
    """What is planned, and for which cluster."""

    cluster: Annotated[str, tyro.conf.arg(metavar="KIND:HOSTSxDEVICES")]
    """Hosts x devices of a host: a100_40gb:2x8 is 2 hosts of 8 GPUs, 16 ranks. Kinds: a100_40gb, a100_80gb, h100, h200,
    b200, cpu (whose devices are processes that share the host). Flags replace single numbers of a kind."""

    json: bool = False
    """Print JSON."""

    plot: Annotated[str | None, optional("none", "FILE.html|FILE.svg")] = None
    """File for a picture of each rank's memory and the step's timeline."""

    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    run: Config = field(default_factory=Config)


def parse_plan(argv: Sequence[str]) -> PlanConfig:
    """The checked config of a command line.

    Raises:
        ConfigError: for an unknown flag, a value of the wrong kind, or a combination that makes no sense.
        SystemExit: after --help, with code 0.
    """
    default = PlanConfig(value_of(argv, "cluster") or tyro.MISSING, run=base_of(argv))
    asked = parse_flags(PlanConfig, argv, PROG, description=DESCRIPTION, default=default)
    shape = parse_cluster(asked.cluster)
    check_ranges(asked.hardware)
    if asked.plot is not None:
        check_plot(asked.plot)
    run = settle(asked.run, argv, needs_data=False)
    check_effects(asked.hardware, run, shape)
    return PlanConfig(asked.cluster, asked.json, asked.plot, asked.hardware, run)


def plan(
    asked: PlanConfig, hardware: Callable[[ClusterShape], Hardware], note: Callable[[str], None]
) -> dict[str, Any]:
    """Facts of the plan, ready for JSON.

    If the tables do not fit, these are only `fits`, `cluster`, `error`, `smallest_cluster` and the missing GiB. If the
    tables fit but activations do not, all facts are there, and `fits` and `error` say so.

    Args:
        hardware: what a rank of a cluster has.
        note: shows a line, before something that takes long.

    Raises:
        PlanError: if a rule can't be met, or the optimizer makes every plan impossible.
        ConfigError: if there is no such cluster, or it has no such arithmetic.
    """
    shape = parse_cluster(asked.cluster)
    quieten_libraries()
    # Imported here, so that --help and a mistyped flag are answered without loading torch.
    from dlrm.plan.cluster_search import ClusterSearch
    from dlrm.plan.forecast import forecast

    if precision_on(asked.run, hardware(shape), shape) != asked.run.training.arithmetic:
        note(f"No GPU in {shape}: tf32 without effect.")
    search = ClusterSearch(asked.run, shape, hardware)
    try:
        with signs_of_life(f"Placing tables on {plural(shape.world_size, 'rank')}"):
            placement = search.place()
    except DoesNotFitError as error:
        note(f"Does not fit {shape.describe()}. Looking for the fewest such hosts that would do.")
        with signs_of_life("Placing tables on larger clusters"):
            smallest = search.find_smallest()
        return _refuse(error, shape, smallest)
    return forecast(asked.run, shape, hardware(shape), placement)


def _refuse(error: DoesNotFitError, shape: ClusterShape, smallest: ClusterShape | None) -> dict[str, Any]:
    missing = error.missing_gib_per_rank * shape.world_size
    remedy = (
        f"--cluster {smallest} has the fewest such hosts that would do ({smallest.describe().split(', ', 1)[1]})"
        if smallest is not None
        else "more hosts of this kind would not do, as far as was searched"
    )
    return {
        "fits": False,
        "cluster": {"name": str(shape), "world_size": shape.world_size},
        "missing_gib": missing,
        "missing_gib_per_rank": error.missing_gib_per_rank,
        "smallest_cluster": None if smallest is None else str(smallest),
        "error": f"{error} On all ranks {missing:.2f} GiB are missing; {remedy}.",
    }


def main(argv: Sequence[str]) -> None:
    """`dlrm plan`.

    Raises:
        DoesNotFitError: if the cluster is too small.
    """
    asked = parse_plan(argv)
    sharding = asked.run.sharding

    def given(name: str) -> float | None:
        value = getattr(sharding, name)
        return value if is_named(argv, name) or value != getattr(ShardingConfig, name) else None

    hardware = partial(
        hardware_of,
        config=asked.hardware,
        device_gib=sharding.device_memory_gib,
        intra=given("intra_host_bandwidth"),
        inter=given("inter_host_bandwidth"),
    )
    facts = plan(asked, hardware, (lambda _: None) if asked.json else partial(print, flush=True))
    if asked.json:
        print(json.dumps(facts, indent=2, allow_nan=False))
    if "tables" not in facts:
        raise DoesNotFitError(facts["error"], facts["missing_gib_per_rank"])
    if not asked.json:
        print("\n".join(to_text(facts, parse_cluster(asked.cluster).describe())))
    if asked.plot is not None:
        draw(facts, asked.plot, asked.run.recipe)
        if not asked.json:
            print(f"Drawn: {asked.plot}")
    if not facts["fits"]:
        raise DoesNotFitError(facts["error"], facts["activations_missing_gib"])
