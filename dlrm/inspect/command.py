"""The command `dlrm inspect`: what a checkpoint holds, read from its manifest. No torch here."""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from dlrm.checkpoint.checkpoint import Checkpoint, RemovedError, naming, read_checkpoint
from dlrm.checkpoint.find import best_of, checkpoint_names, locate
from dlrm.checkpoint.manifest import Tensor
from dlrm.checkpoint.position import Position
from dlrm.checkpoint.saved_tables import Table, tables_of
from dlrm.checkpoint.store import Store, open_store, size_of
from dlrm.config.flags import parse_flags
from dlrm.errors import CheckpointError, reason_of
from dlrm.system.console import Progress, align, plural, printable, show_bytes

_DENSE = "dense."


@dataclass(frozen=True)
class InspectConfig:
    """Shows what a checkpoint holds: where training stood, the last validation, each embedding table and the
    optimizer's state of it. For a run directory it first lists all checkpoints, the newest one on top, and why one
    can't be used. No tensor is loaded and no code from the checkpoint runs. Exit code 2 if none is sound.

    Example: `dlrm inspect runs/first`, then `dlrm inspect runs/first/checkpoints/step_0000001200 --verify`."""

    path: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PATH")]
    """Checkpoint (step_...), run directory or folder of checkpoints; or an address that fsspec knows, such as
    s3://bucket/run."""

    verify: bool = False
    """Read every file and compare its SHA-256. Without it only names and sizes are compared."""

    json: bool = False
    """Print JSON."""


def inspect(config: InspectConfig) -> dict[str, Any]:
    """Facts about checkpoints, ready for JSON: `checkpoint`, the one named or the newest sound one, and all
    `checkpoints` unless one was named.

    Raises:
        CheckpointError: if nothing is there, or the checkpoint that was named is not sound.
    """
    location = locate(config.path)
    store = open_store(location.store_address)
    if location.name is not None:
        with naming(f"{store.address}/{location.name}"):
            return {"checkpoint": describe(_read_sound(store, location.name, config))}
    names = checkpoint_names(store)
    examined = {name: _examine(store, name, config) for name in names}
    found = {name: outcome for name, outcome in examined.items() if not isinstance(outcome, RemovedError)}
    if not found:  # a run that trains has removed them all and has written newer ones
        return inspect(config)
    sound = [outcome for outcome in found.values() if isinstance(outcome, Checkpoint)]
    newest, best = next(iter(sound), None), best_of(sound)
    return {
        "address": store.address,
        "checkpoints": [
            {"name": name, "is_usable": False, "why": str(outcome)}
            if isinstance(outcome, CheckpointError)
            else {
                "name": name,
                "is_usable": True,
                **_basics(outcome),
                "is_newest": outcome is newest,
                "is_best": name == best,
            }
            for name, outcome in found.items()
        ],
        "num_unfinished": len(set(store.leftovers()) - set(names)),
        "checkpoint": describe(newest) if newest is not None else None,
    }


def _examine(store: Store, name: str, config: InspectConfig) -> Checkpoint | CheckpointError:
    """A sound checkpoint, or why it is not sound."""
    try:
        return _read_sound(store, name, config)
    except CheckpointError as error:
        return error


def _read_sound(store: Store, name: str, config: InspectConfig) -> Checkpoint:
    """A checkpoint whose manifest and sizes were checked; with --verify all that is in its files too.

    Raises:
        CheckpointError: if it is not sound.
    """
    checkpoint = read_checkpoint(store, name)
    describe(checkpoint)
    _check_sizes(checkpoint)
    if config.verify:
        progress = Progress(f"Verifying {name}", checkpoint.num_bytes, "bytes", shown=not config.json)
        with closing(progress):
            checkpoint.verify(checkpoint.manifest.files, progress.advance)
    return checkpoint


def _check_sizes(checkpoint: Checkpoint) -> None:
    """Compares the sizes of files, without reading them.

    Raises:
        CheckpointError: at a file that is missing or of another size.
    """
    store = checkpoint.store
    for file, expected in checkpoint.manifest.files.items():
        try:
            num_bytes = size_of(store, checkpoint.name, file)
        except OSError as error:
            checkpoint.check_is_there()
            raise CheckpointError(f"{file}: {reason_of(error)}") from None
        if num_bytes != expected.num_bytes:
            raise CheckpointError(f"{file} has {num_bytes:,} bytes, expected {expected.num_bytes:,}")


def _basics(checkpoint: Checkpoint) -> dict[str, Any]:
    manifest = checkpoint.manifest
    return {
        "step": manifest.step,
        "created": manifest.created,
        "val_auroc": manifest.val_auroc,
        "num_bytes": checkpoint.num_bytes,
    }


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Facts about one checkpoint, ready for JSON.

    Raises:
        CheckpointError: if a part of its manifest is of another type.
    """
    manifest = checkpoint.manifest
    position = Position.from_json(manifest.position)
    tensors = manifest.tensors
    dense = {name: tensor for name, tensor in tensors.items() if name.startswith(_DENSE)}
    states = {name: tensor for name, tensor in dense.items() if name.rpartition(".")[0] in dense}
    weights = {name: tensor for name, tensor in dense.items() if name not in states}
    others = {name: tensor for name, tensor in tensors.items() if not name.startswith((_DENSE, "tables."))}
    facts = {
        "address": checkpoint.address,
        **_basics(checkpoint),
        "num_files": len(manifest.files),
        "world_size": manifest.world_size,
        "epoch": position.epoch,
        "row": position.row,
        "num_samples": position.num_samples,
        "train_seconds": position.train_seconds,
        "validated_step": position.validated_step if position.validations else None,
        "validation": dict(position.validations[-1]) if position.validations else None,
        "data": manifest.data,
        "tables": [_describe_table(table) for table in tables_of(tensors).values()],
        "dense": {**_sum_up(weights), "num_parameters": sum(math.prod(tensor.shape) for tensor in weights.values())},
        "dense_optimizer": _sum_up(states),
        "others": {
            kind: _sum_up({name: tensor for name, tensor in others.items() if name.split(".")[0] == kind})
            for kind in sorted({name.split(".")[0] for name in others})
        },
    }
    try:
        to_text(facts)
        _show(manifest.val_auroc, 6)
    except (TypeError, ValueError, KeyError, AttributeError):
        raise CheckpointError("manifest.json is damaged: a number or a text is of another type") from None
    return facts


def _describe_table(table: Table) -> dict[str, Any]:
    return {
        "name": table.name,
        "rows": table.rows,
        "dim": table.dim,
        "dtype": table.weight.dtype,
        "num_bytes": table.weight.num_bytes,
        "num_chunks": len(table.weight.chunks),
        "optimizer": {kind: state.num_bytes for kind, state in table.states.items()},
    }


def _sum_up(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    return {"num_tensors": len(tensors), "num_bytes": sum(tensor.num_bytes for tensor in tensors.values())}


def to_text(facts: Mapping[str, Any]) -> list[str]:
    """Lines that show the facts of one checkpoint."""
    lines = [
        ("checkpoint", facts["address"]),
        ("step", f"{facts['step']:,} (epoch {facts['epoch']:,}, {facts['row']:,} rows of it taken)"),
        ("samples", f"{facts['num_samples']:,}, in {facts['train_seconds']:,.1f} s of training"),
        ("written", f"{facts['created']} by {plural(facts['world_size'], 'rank')}"),
        ("validation", _show_validation(facts)),
        ("data", facts["data"] or "random"),
        ("size", f"{show_bytes(facts['num_bytes'])} in {plural(facts['num_files'], 'file')}"),
    ]
    return [*align(lines), "", *_show_tables(facts["tables"]), "", *_show_rest(facts)]


def _show_validation(facts: Mapping[str, Any]) -> str:
    result = facts["validation"]
    if result is None:
        return "none yet"
    named = {"AUROC": result["auroc"], "log loss": result["logloss"], "NE": result["ne"]}
    shown = [f"{name} {_show(value, 6)}" for name, value in {**named, "calibration": result["calibration"]}.items()]
    when = "" if facts["validated_step"] == facts["step"] else f", at step {facts['validated_step']:,}"
    return f"{' | '.join(shown)} ({plural(result['num_samples'], 'sample')}{when})"


def _show(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _show_tables(tables: Sequence[Mapping[str, Any]]) -> list[str]:
    gib = 2**30
    head = ("table", "rows", "dim", "dtype", "GiB", "optimizer state", "GiB")
    rows = [
        (
            table["name"],
            f"{table['rows']:,}",
            str(table["dim"]),
            table["dtype"],
            f"{table['num_bytes'] / gib:.4f}",
            ", ".join(table["optimizer"]) or "none",
            f"{sum(table['optimizer'].values()) / gib:.4f}",
        )
        for table in tables
    ]
    weights = sum(table["num_bytes"] for table in tables)
    states = sum(sum(table["optimizer"].values()) for table in tables)
    count = f"{sum(table['rows'] for table in tables):,}"
    total = (plural(len(tables), "table"), count, "", "", f"{weights / gib:.4f}", "", f"{states / gib:.4f}")
    return align([head, *rows, total], right={1, 2, 4, 6})


def _show_rest(facts: Mapping[str, Any]) -> list[str]:
    dense, states = facts["dense"], facts["dense_optimizer"]
    parameters = f"{dense['num_parameters']:,} parameters and statistics in {plural(dense['num_tensors'], 'tensor')}"
    lines = [("dense parts", f"{parameters}, {show_bytes(dense['num_bytes'])}; optimizer {_show_sum(states)}")]
    return align([*lines, *((kind, _show_sum(summed)) for kind, summed in facts["others"].items())])


def _show_sum(summed: Mapping[str, int]) -> str:
    return f"{plural(summed['num_tensors'], 'tensor')}, {show_bytes(summed['num_bytes'])}"


def _list_all(facts: Mapping[str, Any]) -> list[str]:
    """A line for each checkpoint of a folder."""
    lines = [("checkpoint", "step", "created", "val AUROC", "size", "")]
    for entry in facts["checkpoints"]:
        if not entry["is_usable"]:
            lines.append((entry["name"], "", "", "", "", f"not usable: {entry['why']}"))
            continue
        marks = [mark for mark in ("newest", "best") if entry[f"is_{mark}"]]
        auroc, size = _show(entry["val_auroc"], 6), show_bytes(entry["num_bytes"])
        lines.append((entry["name"], f"{entry['step']:,}", entry["created"], auroc, size, ", ".join(marks)))
    text = [f"{facts['address']}:", *align(lines, right={1, 3, 4})]
    if facts["num_unfinished"]:
        text.append(f"{plural(facts['num_unfinished'], 'saving')} not finished, left out")
    return text


def _count_sound(facts: Mapping[str, Any]) -> int:
    return sum(entry["is_usable"] for entry in facts["checkpoints"]) if "checkpoints" in facts else 1


def main(argv: Sequence[str]) -> None:
    """`dlrm inspect`.

    Raises:
        CheckpointError: if no checkpoint is sound; with --verify if one is not.
    """
    config = parse_flags(InspectConfig, argv, "dlrm inspect")
    facts = inspect(config)
    if config.json:
        print(json.dumps(facts, indent=2, allow_nan=False))
    else:
        listed = [*_list_all(facts), ""] if "checkpoints" in facts else []
        text = [*listed, *(to_text(facts["checkpoint"]) if facts["checkpoint"] else [])]
        print("\n".join(map(printable, text)))
    if config.verify and facts["checkpoint"] is not None and not config.json:
        print(f"\nverified    {plural(_count_sound(facts), 'checkpoint')}: the SHA-256 of every file is the manifest's")
    damaged = [entry for entry in facts.get("checkpoints", ()) if not entry["is_usable"]]
    if facts["checkpoint"] is None:
        raise CheckpointError(f"{facts['address']}: no checkpoint there is sound.")
    if config.verify and damaged:
        raise CheckpointError(f"{facts['address']}: {plural(len(damaged), 'checkpoint')} not sound.")
