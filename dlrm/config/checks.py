"""What is refused of a run's knobs before anything else happens: values out of range, combinations that make no sense.

No torch here.
"""

import dataclasses
import math
import os
import re
import tempfile
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import annotated_types

from dlrm.config.config import (
    MOST_LAYERS,
    PROFILE_WARM_UP_STEPS,
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
)
from dlrm.config.frozen import DENSE, read_frozen
from dlrm.config.table_rules import parse_rules
from dlrm.errors import ConfigError, reason_of
from dlrm.schema.criteo import NUM_CATEGORICAL_FEATURES, TABLE_NAMES
from dlrm.system.console import plural
from dlrm.system.files import is_stream

_INTERVAL = re.compile(r"[1-9]\d{0,14}|(?=.*[1-9])\d{1,9}(\.\d+)?m")
_Idle = tuple[str, bool, str]
"""A field, whether it would change nothing, and why."""


def check_config(config: Config) -> None:
    """Refuses values out of range, combinations that make no sense, and flags that would have no effect.

    Raises:
        ConfigError: naming the flag, what it got, what was expected, and what to do.
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
    if config.training.allow_tf32 and config.training.precision not in (None, "tf32"):
        raise ConfigError(f"--allow_tf32 with --precision {config.training.precision}: give one of the two")
    _check_path("in_memory_binary_criteo_path", config.data.in_memory_binary_criteo_path)
    _check_path("synthetic_multi_hot_criteo_path", config.data.synthetic_multi_hot_criteo_path)
    _check_path("run_dir", config.output.run_dir)
    _check_checkpoint(config.checkpoint)
    _check_effects(config)


def check_ranges(section: Any) -> None:
    """Refuses a value outside the bounds in its field's type.

    Raises:
        ConfigError: naming the flag.
    """
    hints = typing.get_type_hints(type(section), include_extras=True)
    for name, hint in hints.items():
        value = getattr(section, name)
        if isinstance(value, tuple):
            _check_sizes(name, value)
            continue
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"--{name} {value}: expected a finite number")
        for bound in getattr(hint, "__metadata__", ()) if value is not None else ():
            _check_bound(name, value, bound)


def _check_sizes(name: str, sizes: tuple[int, ...]) -> None:
    if not sizes or min(sizes) <= 0:
        raise ConfigError(f"--{name} {','.join(map(str, sizes))}: expected positive integers, as in 512,256,128")
    if len(sizes) > MOST_LAYERS:
        raise ConfigError(f"--{name}: got {len(sizes):,} sizes, expected {MOST_LAYERS:,} or fewer")
    if name != "num_embeddings_per_feature" and max(sizes) >= 2**20:
        raise ConfigError(f"--{name}: got {max(sizes)}, expected sizes of less than {2**20}")


def _check_bound(name: str, value: float, bound: object) -> None:
    match bound:
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


def _check_optimizer(optimizer: OptimizerConfig) -> None:
    if optimizer.adagrad and optimizer.optimizer not in (None, "adagrad"):
        raise ConfigError(f"--adagrad with --optimizer {optimizer.optimizer}: give one of the two")
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
    every = checkpoint.checkpoint_every
    if every not in (None, "never") and not _INTERVAL.fullmatch(every):
        raise ConfigError(f"--checkpoint_every {every[:40]}: expected steps, as in 500, minutes, as in 30m, or never")
    _check_path("checkpoint_dir", checkpoint.checkpoint_dir)
    if (checkpoint.checkpoint_dir or "").startswith("memory:"):
        raise ConfigError(f"--checkpoint_dir {checkpoint.checkpoint_dir}: is gone when the process is. Give a folder")
    _check_path("resume", checkpoint.resume)
    _check_path("init_from", checkpoint.init_from)
    if checkpoint.init_from is not None and checkpoint.resume not in ("auto", "never"):
        raise ConfigError(
            f"--init_from {checkpoint.init_from} with --resume {checkpoint.resume}: the first takes weights into a new "
            "training, the second continues the old one. Give one of the two"
        )


def check_output_file(name: str, path: str | Path, may_be_stream: bool = False) -> None:
    """Refuses a file that could not be written once all is done.

    Args:
        may_be_stream: whether `-`, /dev/stdout and other open files of this process are taken.

    Raises:
        ConfigError: naming the flag.
    """
    if may_be_stream and is_stream(path):
        return
    obstacle = _find_obstacle(Path(path))
    if obstacle is not None:
        raise ConfigError(
            f"--{name} {path}: can't be written ({obstacle}). Expected a file's name in a folder of yours."
        )


def _find_obstacle(file: Path) -> str | None:
    """Why `file` can't be written. A folder that is missing is made with it, in the nearest one that is there."""
    try:
        if file.is_symlink():  # as a file is renamed to its name, the link would go, and what it leads to stay
            return "is a link"
        if file.exists() and not file.is_file():
            return "is a folder" if file.is_dir() else "is a device or a pipe"
        folder = file.absolute().parent
        while not (folder.exists() or folder.is_symlink()):
            folder = folder.parent
        # root may write anywhere, as far as permissions tell: only an attempt shows that a file system takes no files.
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
    for section, name, why in fields_without_effect(config):
        value = getattr(getattr(config, section), name)
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
        raise ConfigError(f"--{name}{'' if value is True else f' {shown}'} {why}")


def fields_without_effect(config: Config) -> Iterator[tuple[str, str, str]]:
    """Fields that differ from their defaults and would change nothing: section, field, and why."""
    for section, fields in _idle_fields(config).items():
        owner = getattr(config, section)
        defaults = {field.name: field.default for field in dataclasses.fields(owner)}
        for name, is_idle, why in fields:
            if is_idle and getattr(owner, name) != defaults[name]:
                yield section, name, why


def _idle_fields(config: Config) -> dict[str, list[_Idle]]:
    rules = config.sharding.table_constraints
    has_large = rules is not None and "large" in parse_rules(rules)
    freezes_large = "large" in (config.optimizer.freeze or "").split(",")
    begins_elsewhere = config.checkpoint.init_from is not None
    no_target = config.evaluation.validation_auroc is None
    return {
        "data": [*_idle_sources(config.data), *_idle_multi_hot(config.data), *_idle_limits(config.evaluation)],
        "model": _idle_shapes(config.model),
        "sharding": [("large_table_gib", not (has_large or freezes_large), _NO_LARGE)],
        "optimizer": _idle_rates(config.optimizer),
        "evaluation": [("validation_auroc", not config.evaluation.validates, _VALIDATES_NOT)],
        "checkpoint": _idle_checkpoint(config),
        "output": [
            ("mlperf_log", no_target, "needs --validation_auroc: MLPerf times a run to its target"),
            ("mlperf_log", begins_elsewhere, "with --init_from: MLPerf times a run from its first step"),
        ],
    }


_NO_LARGE = "needs a rule of `large` in --table_constraints, or --freeze large"
_VALIDATES_NOT = "with --no_evaluate_on_epoch_end: nothing validates. Give --validation_freq_within_epoch, or drop one"


def _idle_sources(data: DataConfig) -> Iterator[_Idle]:
    for name in (
        "mmap_mode",
        "shuffle_batches",
        "dataset_name",
        "drop_last_training_batch",
        "shuffle_training_set",
        "undersampling_rate",
    ):
        yield name, data.folder is None, "needs --in_memory_binary_criteo_path; data is random without it"
    for name in ("num_generated_batches", "zipf_exponent"):
        yield name, data.folder is not None, "is for random data; leave out --in_memory_binary_criteo_path"


def _idle_multi_hot(data: DataConfig) -> Iterator[_Idle]:
    is_folder = data.synthetic_multi_hot_criteo_path is not None
    is_expanded = max(data.multi_hot_sizes or (1,)) > 1 and not is_folder
    drawn_already = "with --synthetic_multi_hot_criteo_path: its ids are drawn already. Drop one of them"
    yield "multi_hot_distribution_type", is_folder, drawn_already
    yield "multi_hot_distribution_type", not is_expanded, "needs --multi_hot_sizes of more than one id"
    is_one_hot = data.multi_hot_sizes is None and not is_folder
    needs_several = "needs --multi_hot_sizes or --synthetic_multi_hot_criteo_path"
    yield "collect_multi_hot_freqs_stats", is_one_hot, needs_several


def _idle_limits(evaluation: EvaluationConfig) -> Iterator[_Idle]:
    yield "limit_val_batches", not evaluation.validates, _VALIDATES_NOT
    tests_not = "with --no_evaluate_on_training_end: nothing tests. Drop one of them"
    yield "limit_test_batches", not evaluation.evaluate_on_training_end, tests_not


def _idle_shapes(model: ModelConfig) -> list[_Idle]:
    kind, has_sizes = model.interaction_type, model.num_embeddings_per_feature is not None
    dcn = kind != "dcn", "needs --interaction_type dcn"
    projection = kind != "projection", "needs --interaction_type projection"
    return [
        ("num_embeddings", has_sizes, "has no effect beside --num_embeddings_per_feature; give one of the two"),
        ("dcn_num_layers", *dcn),
        ("dcn_low_rank_dim", *dcn),
        ("interaction_branch1_layer_sizes", *projection),
        ("interaction_branch2_layer_sizes", *projection),
    ]


def _idle_checkpoint(config: Config) -> list[_Idle]:
    checkpoint, algorithm = config.checkpoint, config.optimizer.algorithm
    writes_none = checkpoint.checkpoint_every == "never"
    none = "with --checkpoint_every never: no checkpoint is written. Drop one of them"
    anew = checkpoint.resume == "never"
    return [
        ("keep", writes_none, none),
        ("checkpoint_mode", writes_none, none),
        ("allow_changed_data", anew, "with --resume never: nothing is resumed. Drop one of them"),
        ("allow_other_vocabulary", anew and checkpoint.init_from is None, "with --resume never: nothing is resumed"),
        ("init_optimizer", checkpoint.init_from is None, "needs --init_from"),
        ("init_optimizer", algorithm == "sgd", "with --optimizer sgd, which has no state. Drop it"),
    ]


def _idle_rates(optimizer: OptimizerConfig) -> list[_Idle]:
    algorithm = optimizer.algorithm
    no_decay = "needs --optimizer rowwise_adagrad or adam: no other fused kernel has weight decay"
    return [
        ("eps", algorithm == "sgd", "needs --optimizer adagrad, rowwise_adagrad or adam"),
        ("weight_decay", algorithm in ("sgd", "adagrad"), no_decay),
        ("lr_decay_start", optimizer.lr_decay_steps == 0, "needs --lr_decay_steps"),
    ]


def check_profile(config: Config, steps_per_epoch: int) -> None:
    """Refuses to trace more steps than the run has.

    Raises:
        ConfigError: with the most that there are.
    """
    steps, total = config.output.profile, config.training.epochs * steps_per_epoch
    if steps is None or PROFILE_WARM_UP_STEPS + steps <= total:
        return
    most = total - PROFILE_WARM_UP_STEPS
    raise ConfigError(
        f"--profile {steps}: the run has {plural(total, 'training step')}, of which {PROFILE_WARM_UP_STEPS} warm up. "
        + (f"Expected {most} or less." if most > 0 else "Leave it out, or train longer.")
    )
