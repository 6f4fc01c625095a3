"""Checks of a run's flags, before anything else happens: values out of range, combinations that make no sense.

What one field's type can say, bounds and rules, is only read here. A check that compares several fields is a function.
No torch here.
"""

import dataclasses
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import annotated_types

from dlrm.config.config import (
    MOST_LAYERS,
    PROFILE_WARM_UP_STEPS,
    CheckpointConfig,
    Config,
    ModelConfig,
    OptimizerConfig,
)
from dlrm.config.field_rules import AliasOf, Flag, NoEffect, flags_of, rules_of
from dlrm.config.frozen import DENSE, read_frozen
from dlrm.config.table_rules import parse_rules
from dlrm.errors import ConfigError, reason_of
from dlrm.schema.criteo import NUM_CATEGORICAL_FEATURES, TABLE_NAMES
from dlrm.system.console import plural
from dlrm.system.files import is_stream


def check_config(config: Config) -> None:
    """Refuses values out of range, combinations that make no sense, and flags that would have no effect.

    Raises:
        ConfigError: with the flag, its value, what was expected, and what to do.
    """
    for section in dataclasses.fields(config):
        if dataclasses.is_dataclass(owner := getattr(config, section.name)):
            check_ranges(owner)
    if config.sharding.table_constraints is not None:
        parse_rules(config.sharding.table_constraints)
    if (sizes := config.data.multi_hot_sizes) is not None and len(sizes) != NUM_CATEGORICAL_FEATURES:
        raise ConfigError(f"--multi_hot_sizes: got {len(sizes)} sizes, expected {NUM_CATEGORICAL_FEATURES}")
    _check_tables(config.model)
    _check_layers(config.model)
    _check_optimizer(config.optimizer)
    _check_freeze(config)
    _check_aliases(config)
    _check_path("in_memory_binary_criteo_path", config.data.in_memory_binary_criteo_path)
    _check_path("synthetic_multi_hot_criteo_path", config.data.synthetic_multi_hot_criteo_path)
    _check_path("run_dir", config.output.run_dir)
    _check_checkpoint(config.checkpoint)
    _check_effects(config)


def check_ranges(section: Any) -> None:
    """Refuses a value outside the bounds in its field's type.

    Args:
        section: an instance of a dataclass whose fields are flags.

    Raises:
        ConfigError: with the flag, its value and the bound.
    """
    for name, rules in rules_of(type(section)).items():
        value = getattr(section, name)
        if isinstance(value, tuple):
            _check_sizes(name, value)
            continue
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"--{name} {value}: expected a finite number")
        for rule in rules if value is not None else ():
            _check_bound(name, value, rule)


def _check_sizes(name: str, sizes: tuple[int, ...]) -> None:
    if not sizes or min(sizes) <= 0:
        raise ConfigError(f"--{name} {','.join(map(str, sizes))}: expected positive integers, as in 512,256,128")
    if len(sizes) > MOST_LAYERS:
        raise ConfigError(f"--{name}: got {len(sizes):,} sizes, expected {MOST_LAYERS:,} or fewer")
    if name != "num_embeddings_per_feature" and max(sizes) >= 2**20:
        raise ConfigError(f"--{name}: got {max(sizes)}, expected sizes of less than {2**20}")


def _check_bound(name: str, value: float, rule: object) -> None:
    match rule:
        case annotated_types.Gt(gt=limit):
            holds, words = value > limit, f"more than {limit}"  # type: ignore[operator]
        case annotated_types.Ge(ge=limit):
            holds, words = value >= limit, f"{limit} or more"  # type: ignore[operator]
        case annotated_types.Lt(lt=limit):
            holds, words = value < limit, f"less than {limit}"  # type: ignore[operator]
        case annotated_types.Le(le=limit):
            holds, words = value <= limit, f"{limit} or less"  # type: ignore[operator]
        case _:
            return
    if not holds:
        raise ConfigError(f"--{name} {value}: expected {words}")


def _check_tables(model: ModelConfig) -> None:
    dim, rows = model.embedding_dim, model.num_embeddings_per_feature
    if dim % 4:
        raise ConfigError(
            f"--embedding_dim {dim}: expected a multiple of 4, as FBGEMM's kernels need. Try {-(-dim // 4) * 4}."
        )
    if rows is not None and len(rows) != NUM_CATEGORICAL_FEATURES:
        raise ConfigError(f"--num_embeddings_per_feature: got {len(rows)} sizes, expected {NUM_CATEGORICAL_FEATURES}")
    if rows is not None and max(rows) >= 2**31:
        raise ConfigError(
            f"--num_embeddings_per_feature: {max(rows)} rows, expected less than {2**31} (ids are 32 bits)"
        )


def _check_layers(model: ModelConfig) -> None:
    dim = model.embedding_dim
    if model.dense_arch_layer_sizes[-1] != dim:
        raise ConfigError(
            f"--dense_arch_layer_sizes ends in {model.dense_arch_layer_sizes[-1]}, expected embedding_dim, which is "
            f"{dim}. Change one of the two."
        )
    over = model.over_arch_layer_sizes
    if len(over) < 2 or over[-1] != 1:
        raise ConfigError(
            f"--over_arch_layer_sizes {','.join(map(str, over))}: expected two or more layers, the last of size 1"
        )
    if model.interaction_type == "projection":
        for branch in ("interaction_branch1_layer_sizes", "interaction_branch2_layer_sizes"):
            if (last := getattr(model, branch)[-1]) % dim:
                raise ConfigError(f"--{branch} ends in {last}, expected a multiple of embedding_dim, which is {dim}")


def _check_aliases(config: Config) -> None:
    flags = flags_of(config)
    for flag in flags.values():
        for rule in flag.rules:
            if isinstance(rule, AliasOf) and flag.value(config):
                other = flags[rule.flag].value(config)
                if other not in (None, rule.value):
                    raise ConfigError(f"--{flag.name} with --{rule.flag} {other}: give one of the two")


def _check_optimizer(optimizer: OptimizerConfig) -> None:
    warmup, start = optimizer.lr_warmup_steps, optimizer.lr_decay_start
    if optimizer.lr_decay_steps and start < warmup:
        raise ConfigError(f"--lr_decay_start {start}: expected lr_warmup_steps, which is {warmup}, or more")


def _check_freeze(config: Config) -> None:
    names = config.optimizer.freeze
    if names is None:
        return
    read_frozen([names])
    if "large" in names.split(",") and not config.large_tables:
        raise ConfigError(
            f"--freeze large: no table has the {config.sharding.large_table_gib:g} GiB of --large_table_gib. Give a "
            "smaller --large_table_gib, or names of tables."
        )
    if set(config.frozen) == {*TABLE_NAMES, DENSE}:
        raise ConfigError(
            f"--freeze {names}: leaves nothing to train. Expected some tables, or dense, not to be frozen"
        )
    if config.frozen_tables and config.training.pipeline == "prefetch":
        raise ConfigError(
            f"--freeze {names} with --pipeline prefetch: frozen tables would never release the GPU's cache lines. Use "
            "--pipeline sparse_dist, or freeze dense alone."
        )


def _check_checkpoint(checkpoint: CheckpointConfig) -> None:
    _check_path("checkpoint_dir", checkpoint.checkpoint_dir)
    if (checkpoint.checkpoint_dir or "").startswith("memory:"):
        raise ConfigError(
            f"--checkpoint_dir {checkpoint.checkpoint_dir}: an in-memory store is lost when the process ends. Give a "
            "folder or bucket."
        )
    _check_path("resume", checkpoint.resume)
    _check_path("init_from", checkpoint.init_from)
    if checkpoint.init_from is not None and checkpoint.resume not in ("auto", "never"):
        raise ConfigError(
            f"--init_from {checkpoint.init_from} with --resume {checkpoint.resume}: the first takes weights into a new "
            "training, the second continues the old one. Give one of the two"
        )


def check_output_file(name: str, path: str | Path, may_be_stream: bool = False) -> None:
    """Refuses a result's file that could not be written once the work is done. Leaves nothing behind.

    Args:
        name: the flag that the file was given with.
        may_be_stream: whether `-`, /dev/stdout and other open files of this process are accepted.

    Raises:
        ConfigError: with the flag and the obstacle.
    """
    if may_be_stream and is_stream(path):
        return
    obstacle = _find_obstacle(Path(path))
    if obstacle is not None:
        raise ConfigError(
            f"--{name} {path}: can't be written ({obstacle}). Expected a file in a folder that you can write to."
        )


def _find_obstacle(file: Path) -> str | None:
    """Why `file` can't be written; None if it can. Missing folders will be made, so the nearest existing one counts."""
    try:
        if file.is_symlink():  # the result is renamed to this name: it would replace the link, not the link's target
            return "is a link"
        if file.exists() and not file.is_file():
            return "is a folder" if file.is_dir() else "is a device or a pipe"
        folder = file.absolute().parent
        while not (folder.exists() or folder.is_symlink()):
            folder = folder.parent
        # Permissions allow root everything: only an attempt shows that a file system accepts no files.
        with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{file.name}."):
            return None
    except OSError as error:
        return reason_of(error)


def _check_path(name: str, path: str | None) -> None:
    if path is None:
        return
    if not path.strip():
        raise ConfigError(f"--{name} {path!r}: expected a folder's name")
    if any(len(os.fsencode(part)) > 255 for part in Path(path).parts):
        raise ConfigError(f"--{name} {path[:40]}...: expected names of at most 255 bytes")


def _check_effects(config: Config) -> None:
    for flag, why in flags_without_effect(config):
        value = flag.value(config)
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
        raise ConfigError(f"--{flag.name}{'' if value is True else f' {shown}'} {why}")


def flags_without_effect(config: Config) -> Iterator[tuple[Flag, str]]:
    """Flags that differ from their defaults and would change nothing, each with the reason."""
    for flag in flags_of(config).values():
        for rule in flag.rules:
            if isinstance(rule, NoEffect) and rule.is_idle(config) and flag.value(config) != flag.default:
                yield flag, rule.why


def check_profile(config: Config, steps_per_epoch: int) -> None:
    """Refuses to trace more steps than the run has.

    Raises:
        ConfigError: with the largest number of steps that can be traced.
    """
    steps, total = config.output.profile, config.training.epochs * steps_per_epoch
    if steps is None or PROFILE_WARM_UP_STEPS + steps <= total:
        return
    most = total - PROFILE_WARM_UP_STEPS
    raise ConfigError(
        f"--profile {steps}: the run has {plural(total, 'training step')}, of which {PROFILE_WARM_UP_STEPS} warm up. "
        + (f"Expected {most} or less." if most > 0 else "Leave it out, or train longer.")
    )
