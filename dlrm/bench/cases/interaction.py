"""`dlrm bench interaction`: pairwise dots of feature vectors, forward and backward.

Shapes: B samples, F embeddings, D columns of each.
"""

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torchrec.models.dlrm import InteractionArch

from dlrm.bench.cases.train import BYTES, show_rate
from dlrm.bench.harness.ceilings import ceilings_side
from dlrm.bench.harness.flags import InteractionBench
from dlrm.bench.harness.floor import Floor
from dlrm.bench.harness.provenance import write_result
from dlrm.bench.harness.repeat import repeat, require_kernels
from dlrm.bench.harness.report import Speed, compare, describe_spread, print_floor, print_speeds, ratios
from dlrm.bench.harness.rounds import best_ceilings, take_turns
from dlrm.bench.harness.shape import make_model
from dlrm.bench.harness.workers import Side, Turns
from dlrm.cost.least_work import least_interaction_work
from dlrm.kernels.interaction import dot_interaction, plain_dot_interaction
from dlrm.schema.criteo import NUM_CATEGORICAL_FEATURES

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def run(bench: InteractionBench) -> dict[str, Any]:
    """Measures, prints, writes; returns the result.

    Raises:
        DlrmError: what a side raised.
    """
    model = make_model((1,) * NUM_CATEGORICAL_FEATURES)
    sides = [
        Side("ours", open_kernel, (bench, model.embedding_dim), ("kernel", "twin")),
        Side("reference", open_torchrec, (bench, model.embedding_dim), ("module",), is_plain=True),
        ceilings_side(bench.arithmetic),
    ]
    results = take_turns(sides, bench.repetition.rounds, show_rate(bench.batch_size))
    speeds = {
        "ours": Speed(bench.batch_size, results["ours"].turns["kernel"]),
        "twin": Speed(bench.batch_size, results["ours"].turns["twin"]),
        "reference": Speed(bench.batch_size, results["reference"].turns["module"]),
    }
    floor = Floor(least_interaction_work(model, bench.batch_size, BYTES[bench.arithmetic]), best_ceilings(results))
    over_twin = ratios(speeds["ours"], speeds["twin"])
    result: dict[str, Any] = {
        "case": "interaction",
        **compare(speeds["ours"], speeds["reference"], floor),
        "over_twin": statistics.median(over_twin),
        "sides": {name: speed.to_json() for name, speed in speeds.items()},
        "bench": asdict(bench),
        "precision": bench.arithmetic,
    }
    print_speeds(speeds)
    print(f"ratio by round: {describe_spread(result['ratios'])}; over the twin: {describe_spread(over_twin)}")
    print_floor(floor, speeds["ours"], "a call")
    write_result(bench.repetition.json, result)
    return result


@contextmanager
def open_kernel(bench: InteractionBench, dim: int) -> Iterator[Turns]:
    """Our side: the fused operator, and the same in plain PyTorch."""
    require_kernels()
    dense_BD, embeddings_BFD = _draw(bench.batch_size, dim, _DTYPES[bench.arithmetic])
    pooled_BG = embeddings_BFD.flatten(1).detach().requires_grad_()
    columns = [list(range(0, pooled_BG.size(1), dim))]
    leaves = (dense_BD, pooled_BG)

    def call(function: Callable[..., torch.Tensor]) -> Callable[[], torch.Tensor]:
        return lambda: function(dense_BD, [pooled_BG], columns)

    yield {
        "kernel": repeat(both_ways(call(dot_interaction), leaves), bench.steps),
        "twin": repeat(both_ways(call(plain_dot_interaction), leaves), bench.steps),
    }


@contextmanager
def open_torchrec(bench: InteractionBench, dim: int) -> Iterator[Turns]:
    """torchrec.models.dlrm.InteractionArch in fp32."""
    dense_BD, embeddings_BFD = _draw(bench.batch_size, dim, torch.float32)
    module = InteractionArch(NUM_CATEGORICAL_FEATURES)
    both = both_ways(lambda: module(dense_BD, embeddings_BFD), (dense_BD, embeddings_BFD))
    yield {"module": repeat(both, bench.steps)}


def _draw(batch_size: int, dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    dense_BD = torch.rand(batch_size, dim).to(dtype).requires_grad_()
    embeddings_BFD = torch.rand(batch_size, NUM_CATEGORICAL_FEATURES, dim).to(dtype).requires_grad_()
    return dense_BD, embeddings_BFD


def both_ways(forward: Callable[[], torch.Tensor], leaves: tuple[torch.Tensor, ...]) -> Callable[[int], object]:
    """Forward, and backward to the leaves from a gradient of ones."""
    with torch.no_grad():
        ones = torch.ones_like(forward())

    def call(number: int) -> object:
        del number
        return torch.autograd.grad(forward(), leaves, ones)

    return call
