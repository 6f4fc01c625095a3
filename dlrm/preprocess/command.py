"""`dlrm preprocess`: checks before it starts, and says what it does."""

import shlex
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from dlrm import __version__
from dlrm.config.flags import parse_flags
from dlrm.dataset.manifest import read_manifest
from dlrm.dataset.name_order import source_names
from dlrm.errors import ConfigError, DatasetError
from dlrm.preprocess.config import PreprocessConfig, Resources
from dlrm.preprocess.layout import Layout
from dlrm.preprocess.logarithm import check_logarithm, record_logarithm
from dlrm.preprocess.ranks import Ranks
from dlrm.preprocess.raw import Sample, check_raw, sample
from dlrm.preprocess.raw_files import check_distinct, describe_parts
from dlrm.preprocess.workspace import Workspace
from dlrm.schema.criteo import CATEGORICAL_NAMES, NUM_COLUMNS
from dlrm.system.console import plural, show_bytes
from dlrm.system.files import writing
from dlrm.system.shortage import check_room_for_libraries

IF_INTERRUPTED = "Continue with --resume."
KEPT_BYTES_PER_ROW = 160
_IF_UNWRITABLE = "Fix that, and continue with --resume: what is finished is kept."
_COLUMN_BYTES_PER_ROW, _RECORD_BYTES_PER_ROW = 261, 168
_STAGES_OVER_PARSE = 4.0
"""Time of all stages divided by that of parsing, as `dlrm bench preprocess` measures it."""


def preprocess(config: PreprocessConfig, ranks: Ranks) -> None:
    """Writes arrays, vocabulary and manifest, whole or not at all.

    Raises:
        ConfigError: if the output exists already, or the flags contradict each other or an unfinished run.
        DatasetError: if a file is missing, damaged or not Criteo text, or the disk is too small.
    """
    if config.frequency_threshold == 0:
        config = replace(config, frequency_threshold=1)
        if ranks.is_main:
            print("--frequency_threshold 0 is the same as 1: every id that was counted has an index of its own.")
    output = Path(config.output).resolve()
    if output.exists() or Path(config.output).is_symlink():
        if config.resume and output.is_dir() and read_manifest(output):
            if ranks.is_main:
                _check_finished(config, read_manifest(output))
                with Workspace(output) as workspace:
                    workspace.discard_leftovers()
                print(f"{config.output}: is finished already.", flush=True)
            return
        raise ConfigError(f"--output {config.output}: is there already. Choose another folder, or remove it.")
    ordered, note = config.ordered
    raw = [Path(path) for path in ordered]
    for path in raw:
        check_raw(path)
    if config.repeated_rows == "refuse":
        check_distinct(raw)
    applied = config.applied
    # Imported here, since numba takes a second to load, and --help should be fast.
    from dlrm.preprocess.pipeline import run_stages
    from dlrm.preprocess.run import Run

    names = ("train",) if config.is_split else tuple(f"day_{day}" for day in range(len(raw)))
    with writing(output, _IF_UNWRITABLE), Workspace(output) as workspace:
        lines = [sample(path, config.rows) for path in raw]
        labelled = _check_labels(config, raw, lines)
        warm_up(lines[0])
        resources = Resources.within(config.memory_gib, config.workers, max(one.window_bytes for one in lines))
        resumed = False
        if ranks.is_main:
            estimate = _estimate(config, lines, workspace, ranks, resources)
            changed = workspace.open(_plan(config, raw, applied), config.resume, names)
            if resumed := changed is not None:
                print(f"Continuing in {workspace.root}; what is finished is kept.")
            for path in changed or ():
                print(f"{path} has changed since the run began: it is read again.")
            if note:
                print(note)
            print(describe_parts(source_names(raw), config.is_split))
            print(estimate, flush=True)
            record_logarithm(workspace, applied)
            workspace.flush()
        ranks.barrier()
        check_logarithm(workspace)
        started = time.monotonic()
        with ThreadPoolExecutor(resources.workers) as pool:
            run = Run(config, raw, names, workspace, resources, ranks, pool, labelled)
            layout = run_stages(run, sum(one.total_lines for one in lines))
    if ranks.is_main:
        _conclude(config, layout, time.monotonic() - started, run.seconds, resumed)


def _check_labels(config: PreprocessConfig, raw: Sequence[Path], samples: Sequence[Sample]) -> bool:
    """Whether the rows have labels.

    Raises:
        DatasetError: if they have none. Only a single file for a trained model may have none.
    """
    # Imported here, since numba loads with it.
    from dlrm.preprocess.columns import has_labels

    unlabelled = [path for path, one in zip(raw, samples, strict=True) if not has_labels(one.block)]
    if unlabelled and (config.vocabulary is None or len(raw) > 1):
        raise DatasetError(
            f"{unlabelled[0]}: {NUM_COLUMNS - 1} columns, so its rows have no labels: they can't be trained on or "
            "scored. To have them indexed for a trained model, give this file alone, with --vocabulary FOLDER."
        )
    return not unlabelled


def _check_finished(config: PreprocessConfig, manifest: dict[str, Any]) -> None:
    """Refuses a finished output whose manifest tells that other flags wrote it.

    Raises:
        ConfigError: naming the first choice that differs.
    """
    ids, integers = manifest.get("ids", {}), manifest.get("integers", {})
    made = {**ids, "missing_integers": integers.get("missing", "zero")}
    names = ["seed", "compat"]
    if config.vocabulary is None:
        names += ["frequency_threshold", "missing_integers"]
        names += [] if config.is_compat else ["max_embeddings", "vocabulary_days"]
    asked = {name: getattr(config, name) for name in names}
    asked["raw files"] = source_names([Path(path) for path in config.ordered[0]])
    made["raw files"] = [day.get("source") for day in manifest.get("days", {}).values()]
    for name, value in asked.items():
        if made.get(name) != value:
            raise ConfigError(
                f"--output {config.output}: is finished already, and its {name} is {made.get(name)!r}, not {value!r}. "
                "Choose another folder, or remove it."
            )


def _plan(config: PreprocessConfig, raw: Sequence[Path], applied: dict[str, Any] | None) -> dict[str, Any]:
    """Everything that the output depends on. Memory and workers do not count: a resumed run may have others."""
    fields = (
        "dataset_name", "frequency_threshold", "max_embeddings", "vocabulary_days", "vocabulary", "missing_integers",
        "seed", "rows", "compat",
    )  # fmt: skip
    return {
        "software": f"dlrm {__version__}",
        **{name: getattr(config, name) for name in fields},
        "order of raw files": [str(path.absolute()) for path in raw],
        "raw files": {str(path.absolute()): [path.stat().st_size, path.stat().st_mtime_ns] for path in raw},
        "vocabulary's manifest": applied,
    }


def warm_up(head: Sample) -> float:
    """Compiles the parser; returns the seconds that it then takes for a row."""
    from dlrm.preprocess.columns import parse_block

    parse_block(head.block, 1)
    started = time.perf_counter()
    parse_block(head.block, 1)
    return (time.perf_counter() - started) / head.num_lines


def _estimate(
    config: PreprocessConfig, samples: Sequence[Sample], workspace: Workspace, ranks: Ranks, resources: Resources
) -> str:
    """Describes the size of the work: rows, disk and time.

    Raises:
        DatasetError: if the disk is too small.
    """
    sizes = [one.total_lines for one in samples]
    rows = sum(sizes)
    # A rank removes a day's columns once the whole day is scattered. Until then the day is there twice.
    held_twice = sum(sorted(sizes)[-ranks.world_size :])
    needed = rows * (_COLUMN_BYTES_PER_ROW + KEPT_BYTES_PER_ROW // 8) + held_twice * _RECORD_BYTES_PER_ROW
    there = next(folder for folder in (workspace.root, *workspace.root.parents) if folder.exists())
    used = sum(path.stat().st_size for path in workspace.root.rglob("*") if path.is_file())
    free = shutil.disk_usage(there).free + used
    minutes = rows * warm_up(samples[0]) * _STAGES_OVER_PARSE / resources.workers / ranks.world_size / 60
    if needed > free:
        raise DatasetError(
            f"--output {config.output}: about {show_bytes(needed)} of disk needed, {show_bytes(free)} free. "
            "Choose a folder on another disk, or take fewer --days or --rows."
        )
    time_needed = "less than a minute" if minutes < 1 else f"roughly {plural(round(minutes), 'minute')}"
    return (
        f"About {rows:,} rows in {plural(len(samples), 'file')}; {show_bytes(needed)} of disk while at work, "
        f"{show_bytes(rows * KEPT_BYTES_PER_ROW)} in the end, {show_bytes(free)} free; {time_needed} with "
        f"{plural(resources.workers, 'worker')}."
    )


def _conclude(
    config: PreprocessConfig, layout: Layout, seconds: float, stages: dict[str, float], resumed: bool
) -> None:
    rows = layout.num_rows
    output = Path(config.output)
    manifest = read_manifest(output)
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    rejected = sum(day["rejected"] for day in manifest["days"].values())
    spent = ", ".join(f"{label.lower()} {spent:.2f}" for label, spent in stages.items())
    rate = "after an interruption" if resumed else f"{rows / seconds:,.0f} rows/s"
    print(f"{rows:,} rows in {seconds:.2f} s ({rate}): {spent}")
    if rejected:
        print(f"{plural(rejected, 'bad line')} left out, listed in {output / 'rejected.tsv'}")
    if manifest["integers"]["clamped"]:
        print(f"{manifest['integers']['clamped']:,} integers were below the counted rows' smallest, and count as it")
    kaggle = " --dataset_name criteo_kaggle" if config.dataset_name == "criteo_kaggle" else ""
    table_rows = ",".join(str(manifest["columns"][name]["rows"]) for name in CATEGORICAL_NAMES)
    print(f"{config.output}: {show_bytes(size)}, with manifest.json.", end="")
    path = f"--in_memory_binary_criteo_path {shlex.quote(config.output)}"
    if any(day.get("labels") is False for day in manifest["days"].values()):
        print(" Its rows have no labels: a model can predict them, but not be trained or scored on them.")
        return
    if config.vocabulary is not None:
        print(
            f" Score {layout.num_rows - layout.num_train_rows:,} held-out rows with a model of {config.vocabulary}:\n"
            f"dlrm evaluate --checkpoint RUN {path}"
        )
        return
    path += kaggle
    print(" Train on it:")
    integers = " --standardize_dense --dense_buckets 32" if config.tells_missing_integers else ""
    print(f"python dlrm_main.py --recipe debug_cpu {path}{integers} --num_embeddings_per_feature {table_rows}")


def main(argv: Sequence[str]) -> None:
    """`dlrm preprocess`."""
    config = parse_flags(PreprocessConfig, argv, "dlrm preprocess")
    config.validate()
    check_room_for_libraries()
    with Ranks.start() as ranks:
        preprocess(config, ranks)
