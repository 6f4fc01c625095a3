"""`dlrm bench CASE`: what is measured, and against what. A case's module is loaded only when it runs."""

import importlib
from collections.abc import Sequence
from typing import Any

from dlrm.bench.harness.flags import (
    CheckpointBench,
    EmbeddingBench,
    EvaluateBench,
    InteractionBench,
    LoaderBench,
    PreprocessBench,
    ProductsBench,
    TrainBench,
)
from dlrm.config.flags import parse_flags, value_of
from dlrm.errors import EXIT_USER_ERROR, ConfigError
from dlrm.system.console import result_alone

CASES: dict[str, tuple[type[Any], str]] = {
    "train": (TrainBench, "samples/s of training, against a plain TorchRec loop in fp32"),
    "loader": (LoaderBench, "rows/s read from mapped days, against TorchRec's reader and against training"),
    "evaluate": (EvaluateBench, "samples/s of an evaluation pass, against TorchRec with torchmetrics, and training"),
    "interaction": (InteractionBench, "pairwise dots, forward and backward, against TorchRec's module"),
    "products": (ProductsBench, "the MLPs' matrix products through integers, against torch.mm in fp32"),
    "embedding": (EmbeddingBench, "table lookup, backward and update, against FBGEMM"),
    "preprocess": (PreprocessBench, "rows/s from raw text to shuffled days, against torchrec's three functions"),
    "checkpoint": (CheckpointBench, "seconds to save and load a training, against torch.save and torch.load"),
}

USAGE = "\n".join(
    [
        "usage: dlrm bench CASE [FLAGS]",
        "",
        "Runs two sides in turn, several rounds, on this machine's CPU: this trainer, and a reference of plain",
        "TorchRec. Prints median, spread, ratio (above 1: ours is faster), and share of the floor, the least time",
        "that the machine's matrix rate and memory bandwidth allow. Each side has processes of its own and all cores;",
        "while one computes, the other waits. Stop other work first: a noisy machine shows in the spread.",
        "",
        *(f"  {name:<12}{purpose}" for name, (_, purpose) in CASES.items()),
        "",
        "`dlrm bench CASE --help` lists a case's flags. --json FILE keeps every step's time, with config, commit and",
        "machine.",
    ]
)


def main(argv: Sequence[str]) -> int:
    """Runs one case; returns the exit code.

    Raises:
        ConfigError: for a case or flag that is not known, or flags that do not fit each other.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else EXIT_USER_ERROR
    name, *rest = argv
    if name not in CASES:
        raise ConfigError(f"{name}: no such case. Expected one of {', '.join(CASES)}.")
    config = parse_flags(CASES[name][0], rest, f"dlrm bench {name}")
    config.validate()
    with result_alone(value_of(rest, "json")):
        importlib.import_module(f"dlrm.bench.cases.{name}").run(config)
    return 0
