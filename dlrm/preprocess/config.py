"""`dlrm preprocess`: its flags, what it checks before it starts, and what it says."""

import shlex
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import psutil
import tyro

from dlrm import __version__
from dlrm.config import optional
from dlrm.errors import ConfigError, DatasetError
from dlrm.flags import parse_flags
from dlrm.host import available_cores
from dlrm.preprocess.ranks import Ranks
from dlrm.preprocess.raw import check_raw, sample
from dlrm.preprocess.verify import read_manifest
from dlrm.preprocess.workspace import Workspace
from dlrm.schema import CATEGORICAL_NAMES

MAX_REJECTED_PER_BLOCK = 10_000
DISK_BYTES_PER_ROW = 330
"""At the fullest: parsed columns and indices of all rows (261), or records and arrays (328)."""
_MARGIN_BYTES = 128 << 20
_LEAST_BYTES_PER_WORKER = 200 << 20
_STAGES_OVER_PARSE = 4.0
"""Time of all stages over that of parsing, as benchmarks/preprocess.py measures it."""


@dataclass(frozen=True)
class PreprocessConfig:
    """Turns raw Criteo text into binary days that the trainer reads, in bounded memory.

    Ids are counted in the training days; those seen often enough get indices from 2 on, the most frequent first. The
    others become 1. A missing id becomes 0, and so does the id 00000000, from which the public example does not tell it
    either: being missing says something, and an index of its own lets the model learn what. Integers become
    log(x - m + 2) with m the smallest of the training rows. Training rows are shuffled over all training days, held-out
    rows stay in order. Work is done in OUTPUT.partial; after a crash, `--resume` goes on where it ended."""

    raw: tyro.conf.Positional[tuple[str, ...]]
    """Tab-separated files (label, 13 integers, 26 hex ids; plain, .gz or .zst), in order of time: one a day for
    criteo_1t, of which the last is held out; one file for criteo_kaggle, of which the last seventh is."""

    output: Annotated[str, tyro.conf.arg(metavar="FOLDER")]
    """Folder to write; it must not be there yet."""

    dataset_name: Literal["criteo_1t", "criteo_kaggle"] = "criteo_1t"
    """criteo_1t writes day_0, day_1, ...; criteo_kaggle writes train."""

    resume: bool = False
    """Go on with the unfinished run of the same flags, if there is one."""

    frequency_threshold: int = 3
    """Ids seen fewer times become 1."""

    max_embeddings: Annotated[int | None, optional("no limit", "INT")] = None
    """Most table rows of a column; larger indices are reduced modulo it, as the trainer would."""

    vocabulary_days: Literal["train", "all"] = "train"
    """Which rows' ids are counted. all lets held-out rows decide what is frequent, as the public example does."""

    vocabulary: Annotated[str | None, optional("from these files", "FOLDER")] = None
    """Take ids' indices and the integers' minimum from this folder, an earlier output, for a model trained on it. A
    single file is then held-out."""

    seed: int = 0
    """Seed of the shuffle: the same seed, the same bytes, whatever the memory and the workers."""

    bad_rows: Literal["refuse", "skip"] = "refuse"
    """refuse ends at the first line that is not a row. skip leaves such lines out and lists them in rejected.tsv."""

    days: Annotated[int | None, optional("all", "INT")] = None
    """Only the first so many files; the last of them is held out."""

    rows: Annotated[int | None, optional("all", "INT")] = None
    """Only the first so many lines of each file."""

    memory_gib: float = 4.0
    """Most RAM of this process, in GiB (1024**3 bytes), whatever the number of rows and ids."""

    workers: Annotated[int | None, optional("a thread a core", "INT")] = None
    """Threads. To use several machines, start the command under torchrun, on a folder that all of them see."""

    compat: Annotated[Literal["torchrec"] | None, optional("our own way", "torchrec")] = None
    """torchrec writes, byte for byte, what torchrec's tsv_to_npys, sparse_to_contiguous and shuffle write: ids of all
    days counted, each day with its own minimum, and ids above 2**24 rounded to float32 in the training days. For
    criteo_kaggle, the first two of them."""

    @property
    def is_compat(self) -> bool:
        """Whether the output is to be torchrec's."""
        return self.compat is not None

    @cached_property
    def applied(self) -> dict[str, Any] | None:
        """Manifest of the folder whose vocabulary is applied.

        Raises:
            DatasetError: if it has none.
        """
        if self.vocabulary is None:
            return None
        manifest = read_manifest(Path(self.vocabulary))
        try:
            minimum, kept = manifest["integers"]["minimum"], [manifest["columns"][n]["kept"] for n in CATEGORICAL_NAMES]
        except (KeyError, TypeError):
            minimum, kept = None, []
        if not isinstance(minimum, int) or not all(isinstance(count, int) for count in kept):
            raise DatasetError(
                f"--vocabulary {self.vocabulary}: holds no vocabulary that can be applied. Expected an output of "
                "`dlrm preprocess` without --compat."
            )
        return manifest

    def validate(self) -> None:
        """Refuses values out of range and combinations that make no sense.

        Raises:
            ConfigError: naming the flag.
        """
        least = {"frequency_threshold": 1, "max_embeddings": 3, "seed": 0, "days": 1, "rows": 1, "workers": 1}
        for name, low in least.items():
            if (value := getattr(self, name)) is not None and not low <= value < 2**63:
                raise ConfigError(f"--{name} {value}: expected {low} or more")
        if not self.memory_gib > 0:
            raise ConfigError(f"--memory_gib {self.memory_gib}: expected more than 0")
        if not self.output.strip():
            raise ConfigError(f"--output {self.output!r}: expected a folder's name")
        if self.is_compat:
            idle = {"max_embeddings": None, "vocabulary_days": "train", "vocabulary": None}
            for name, default in idle.items():
                if getattr(self, name) != default:
                    raise ConfigError(
                        f"--{name} with --compat torchrec: torchrec has no such choice. Drop one of them."
                    )
            if self.seed >= 2**32:
                raise ConfigError(f"--seed {self.seed} with --compat torchrec: expected less than 2**32, as numpy does")
        if self.vocabulary is not None and (self.vocabulary_days != "train" or self.frequency_threshold != 3):
            raise ConfigError("--vocabulary with --vocabulary_days or --frequency_threshold: nothing is counted anew.")
        count = len(self.raw) if self.days is None else min(self.days, len(self.raw))
        if self.days is not None and self.days > len(self.raw):
            raise ConfigError(f"--days {self.days}: got {len(self.raw)} files")
        if self.dataset_name == "criteo_kaggle" and len(self.raw) != 1:
            raise ConfigError(f"{len(self.raw)} files for criteo_kaggle: expected one, train.txt")
        if self.dataset_name == "criteo_1t" and count < 2 and self.vocabulary is None:
            raise ConfigError(
                f"{_count(count, 'file')} for criteo_1t: expected two or more, the last is held out. "
                "For a single file in time order give --dataset_name criteo_kaggle."
            )
        if count == 0:
            raise ConfigError("no files: expected raw Criteo text")


@dataclass(frozen=True)
class Resources:
    """What the stages may take."""

    workers: int
    bytes_per_worker: int
    blocks_ahead: int

    @staticmethod
    def within(memory_gib: float, workers: int | None) -> "Resources":
        """A share for each worker of what the process does not hold already.

        Raises:
            ConfigError: if that is too little.
        """
        held = psutil.Process().memory_info().rss + _MARGIN_BYTES
        free = int(memory_gib * 2**30) - held
        most = max(1, free // _LEAST_BYTES_PER_WORKER)
        if free < _LEAST_BYTES_PER_WORKER or (workers or 1) > most:
            needed = (held + (workers or 1) * _LEAST_BYTES_PER_WORKER) / 2**30
            raise ConfigError(
                f"--memory_gib {memory_gib:g} is too little for {_count(workers or 1, 'worker')}: expected "
                f"{needed:.1f} or more. Give more, or fewer --workers."
            )
        count = workers or min(available_cores(), most)
        return Resources(count, free // count, min(2 * count, max(1, free // (64 << 20) - count)))


def preprocess(config: PreprocessConfig, ranks: Ranks) -> None:
    """Writes arrays, vocabulary and manifest, whole or not at all.

    Raises:
        ConfigError: if the output is there already, or the flags don't fit each other or an unfinished run.
        DatasetError: if a file is missing, damaged or not Criteo text, or the disk too small.
    """
    config.validate()
    output = Path.cwd() / config.output
    if output.exists() or output.is_symlink():
        if config.resume and (output / "manifest.json").exists():
            Workspace(output).discard_leftovers()
            print(f"{config.output}: is finished already.", flush=True)
            return
        raise ConfigError(f"--output {config.output}: is there already. Choose another folder, or remove it.")
    raw = [Path(path) for path in config.raw[: config.days]]
    for path in raw:
        check_raw(path)
    applied = config.applied
    # Here and not above: numba takes a second to load, and --help should not.
    from dlrm.preprocess.pipeline import Pipeline

    names = ("train",) if config.dataset_name == "criteo_kaggle" else tuple(f"day_{day}" for day in range(len(raw)))
    with Workspace(output) as workspace:
        rows = _announce(config, raw, workspace, ranks)
        resources = Resources.within(config.memory_gib, config.workers)
        if ranks.is_main:
            workspace.open(_plan(config, raw, applied), config.resume)
        ranks.barrier()
        started = time.monotonic()
        pipeline = Pipeline(config, raw, names, workspace, resources, ranks)
        layout = pipeline.run(rows)
    if ranks.is_main:
        _conclude(config, layout.num_rows, time.monotonic() - started, pipeline.seconds)


def _plan(config: PreprocessConfig, raw: Sequence[Path], applied: dict[str, Any] | None) -> dict[str, Any]:
    """All that the output depends on. Memory and workers are not in it: they may change when a run is resumed."""
    fields = (
        "dataset_name", "frequency_threshold", "max_embeddings", "vocabulary_days", "vocabulary", "seed", "bad_rows",
        "rows", "compat",
    )  # fmt: skip
    return {
        "software": f"dlrm {__version__}",
        **{name: getattr(config, name) for name in fields},
        "raw files": [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in raw],
        "vocabulary's manifest": applied,
    }


def _announce(config: PreprocessConfig, raw: Sequence[Path], workspace: "Workspace", ranks: Ranks) -> int:
    """Says what is to be done, and refuses if the disk is too small; returns the rows expected."""
    from dlrm.preprocess.parse import parse_block

    samples = [sample(path, config.rows) for path in raw]
    rows = sum(one.total_lines for one in samples)
    parse_block(samples[0].block, MAX_REJECTED_PER_BLOCK)  # once, so that what follows does not time a compiler
    started = time.perf_counter()
    parse_block(samples[0].block, MAX_REJECTED_PER_BLOCK)
    seconds_per_row = (time.perf_counter() - started) / samples[0].num_lines * _STAGES_OVER_PARSE
    workers = config.workers or available_cores()
    needed = rows * DISK_BYTES_PER_ROW
    there = next(folder for folder in (workspace.root, *workspace.root.parents) if folder.exists())
    used = sum(path.stat().st_size for path in workspace.root.rglob("*") if path.is_file())
    free = shutil.disk_usage(there).free + used
    if ranks.is_main:
        minutes = rows * seconds_per_row / workers / ranks.world_size / 60
        print(
            f"About {rows:,} rows in {_count(len(raw), 'file')}; {needed / 2**30:,.1f} GiB of disk while at work, "
            f"{rows * 160 / 2**30:,.1f} GiB in the end, {free / 2**30:,.1f} GiB free; roughly "
            f"{_count(max(1, round(minutes)), 'minute')} with "
            f"{_count(workers, 'worker')}.",
            flush=True,
        )
    if needed > free:
        raise DatasetError(
            f"--output {config.output}: about {needed / 2**30:,.1f} GiB of disk needed, {free / 2**30:,.1f} GiB free. "
            "Choose a folder on another disk, or take fewer --days or --rows."
        )
    return rows


def _conclude(config: PreprocessConfig, rows: int, seconds: float, stages: dict[str, float]) -> None:
    output = Path(config.output)
    manifest = read_manifest(output)
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    rejected = sum(day["rejected"] for day in manifest["days"].values())
    spent = ", ".join(f"{label.lower()} {spent:.1f}" for label, spent in stages.items())
    print(f"{rows:,} rows in {seconds:.1f} s ({rows / seconds:,.0f} rows/s): {spent}")
    if rejected:
        print(f"{rejected:,} lines were no rows; they are in {output / 'rejected.tsv'}")
    if manifest["integers"]["clamped"]:
        print(f"{manifest['integers']['clamped']:,} held-out integers were below the training rows' smallest")
    kaggle = " --dataset_name criteo_kaggle" if config.dataset_name == "criteo_kaggle" else ""
    table_rows = ",".join(str(manifest["columns"][name]["rows"]) for name in CATEGORICAL_NAMES)
    print(f"{config.output}: {size / 2**20:,.1f} MiB, with manifest.json. Train on it:")
    path = f"--in_memory_binary_criteo_path {shlex.quote(config.output)}"
    print(f"python dlrm_main.py --recipe debug_cpu {path}{kaggle} --num_embeddings_per_feature {table_rows}")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def main(argv: Sequence[str]) -> None:
    """`dlrm preprocess`."""
    config = parse_flags(PreprocessConfig, argv, "dlrm preprocess")
    config.validate()
    preprocess(config, Ranks.start())
