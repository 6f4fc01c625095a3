"""`dlrm bench products`: the MLPs' matrix products through integers against torch.mm in fp32.

Shapes: B samples, N outputs, K inputs of a layer.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import torch

from dlrm.bench.cases.train import show_rate
from dlrm.bench.harness.ceilings import ceilings_side
from dlrm.bench.harness.flags import ProductsBench
from dlrm.bench.harness.floor import Floor
from dlrm.bench.harness.provenance import write_result
from dlrm.bench.harness.repeat import repeat, require_kernels
from dlrm.bench.harness.report import Speed, compare, describe_spread, print_floor, print_speeds, ratios
from dlrm.bench.harness.rounds import SideResult, best_ceilings, take_turns
from dlrm.bench.harness.shape import make_model
from dlrm.bench.harness.workers import Side, Turns
from dlrm.config.config import ModelConfig
from dlrm.cost.work import Work
from dlrm.errors import ConfigError
from dlrm.kernels.mlp import ACTIVATIONS, LEAST_INTEGER_SIZE
from dlrm.kernels.native import why_no_vnni
from dlrm.model.dlrm import build_interaction
from dlrm.schema.criteo import NUM_CATEGORICAL_FEATURES, NUM_INTEGER_FEATURES

Layer = tuple[int, int]
"""K and N."""


def run(bench: ProductsBench) -> dict[str, Any]:
    """Measures, prints, writes; returns the result.

    Raises:
        DlrmError: what a side raised.
    """
    if (why := why_no_vnni()) is not None:
        raise ConfigError(f"no integer products to measure: {why}")
    layers = wide_layers(make_model((1,) * NUM_CATEGORICAL_FEATURES))
    kinds = (bench.precision, "fp32")
    turns = tuple(_name(kind, layer) for layer in layers for kind in kinds)
    # One process: both sides with the same memory allocator, and as close in time as can be.
    side = Side("products", open_products, (bench, layers), turns)
    results = take_turns([side, ceilings_side(bench.precision)], bench.repetition.rounds, show_rate(bench.batch_size))
    speeds = {kind: add_layers(results["products"], kind, layers, bench.batch_size) for kind in kinds}
    flop = 6.0 * bench.batch_size * sum(k * n for k, n in layers)
    floor = Floor(Work(flop, 0), best_ceilings(results))
    by_layer = {f"{k}-{n}": _layer_ratios(results["products"], kinds, (k, n), bench.batch_size) for k, n in layers}
    result: dict[str, Any] = {
        "case": "products",
        **compare(speeds[bench.precision], speeds["fp32"], floor),
        "ratios_by_layer": by_layer,
        "sides": {name: speeds[kind].to_json() for name, kind in zip(("ours", "reference"), kinds, strict=True)},
        "bench": asdict(bench),
        "precision": bench.precision,
    }
    print_speeds(speeds)
    for name, values in by_layer.items():
        print(f"{name:<10} {describe_spread(values)}")
    print(f"ratio by round, all layers: {describe_spread(result['ratios'])}")
    print_floor(floor, speeds[bench.precision], "a call of each layer")
    write_result(bench.repetition.json, result)
    return result


def wide_layers(model: ModelConfig) -> list[Layer]:
    """The different layers of the MLPs that integer products are used for."""
    dense = (NUM_INTEGER_FEATURES, *model.dense_arch_layer_sizes)
    over = (build_interaction(model).out_features, *model.over_arch_layer_sizes)
    layers = dict.fromkeys((*pairwise(dense), *pairwise(over)))
    return [layer for layer in layers if min(layer) >= LEAST_INTEGER_SIZE]


def add_layers(side: SideResult, kind: str, layers: list[Layer], batch_size: int) -> Speed:
    """A call of each layer, one after the other."""
    rounds = zip(*(side.turns[_name(kind, layer)] for layer in layers), strict=True)
    return Speed(batch_size, [[sum(calls) for calls in zip(*times, strict=True)] for times in rounds])


def _layer_ratios(side: SideResult, kinds: tuple[str, str], layer: Layer, batch_size: int) -> list[float]:
    ours, theirs = (Speed(batch_size, side.turns[_name(kind, layer)]) for kind in kinds)
    return ratios(ours, theirs)


def _name(kind: str, layer: Layer) -> str:
    return f"{kind} {layer[0]}-{layer[1]}"


@contextmanager
def open_products(bench: ProductsBench, layers: list[Layer]) -> Iterator[Turns]:
    """Of each layer both ways: forward with bias and ReLU, the gradients of input, weight and bias. Operands are there
    in the type that each side takes."""
    require_kernels()
    turns = {}
    for k, n in layers:
        input_BK, grad_BN = torch.randn(bench.batch_size, k).relu_(), torch.randn(bench.batch_size, n)
        weight_NK, bias_N = torch.randn(n, k), torch.randn(n)
        turns[_name("fp32", (k, n))] = repeat(_fp32(input_BK, weight_NK, bias_N, grad_BN), bench.steps)
        operands = (each.to(ACTIVATIONS[bench.precision]) for each in (input_BK, weight_NK, grad_BN))
        turns[_name(bench.precision, (k, n))] = repeat(_integers(bench.precision, bias_N, *operands), bench.steps)
    yield turns


def _integers(
    through: str, bias_N: torch.Tensor, input_BK: torch.Tensor, weight_NK: torch.Tensor, grad_BN: torch.Tensor
) -> Callable[[int], object]:
    linear, grad_input, grad_parameters = (
        getattr(torch.ops.dlrm, f"{through}_{name}") for name in ("linear", "grad_input", "grad_parameters")
    )
    grad_NK, grad_N = torch.empty_like(weight_NK, dtype=torch.float32), torch.empty_like(bias_N)

    def call(number: int) -> object:
        del number
        return (
            linear(input_BK, weight_NK, bias_N, True),
            grad_input(grad_BN, weight_NK),
            grad_parameters(grad_BN, input_BK, grad_NK, grad_N),
        )

    return call


def _fp32(
    input_BK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor, grad_BN: torch.Tensor
) -> Callable[[int], object]:
    grad_NK = torch.empty_like(weight_NK)

    def call(number: int) -> object:
        del number
        output_BN = torch.mm(input_BK, weight_NK.t())
        torch.ops.dlrm.add_bias_(output_BN, bias_N, True)
        torch.mm(grad_BN.t(), input_BK, out=grad_NK)
        return output_BN, torch.mm(grad_BN, weight_NK), torch.ops.dlrm.mask_(grad_BN, None)

    return call
