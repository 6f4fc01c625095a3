"""Flags of `dlrm preprocess`, and the memory and threads that it may use."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import psutil
import tyro

from dlrm.config.config import optional
from dlrm.dataset.manifest import check_vocabulary, read_manifest
from dlrm.dataset.name_order import order_files
from dlrm.errors import ConfigError, DatasetError
from dlrm.preprocess.raw import USUAL_WINDOW_BYTES
from dlrm.schema.criteo import CATEGORICAL_NAMES
from dlrm.system.console import plural, show_bytes
from dlrm.system.host import available_cores, available_memory_bytes

_MARGIN_BYTES = 192 << 20
_LEAST_BYTES_PER_WORKER = 200 << 20


@dataclass(frozen=True)
class PreprocessConfig:
    """Turns raw Criteo text into binary days that the trainer reads, in bounded memory.

    Ids are counted in the training days. Those seen often enough get indices from 2 on, the most frequent first; the
    others become 1. A missing id becomes 0: that an id is missing means something, and with an index of its own the
    model can learn what. The id 00000000 becomes 0 too, as in the public example. Integers become log(x - m + 2), with
    m the smallest integer of the training rows. Training rows are shuffled over all training days; held-out rows stay
    in order. Work is done in OUTPUT.partial; after a crash, `--resume` continues it."""

    FOREIGN_NAMES: ClassVar[Mapping[str, str]] = {"input_dir": "raw", "output_dir": "output"}

    raw: tyro.conf.Positional[tuple[str, ...]]
    """Tab-separated files (label, 13 integers, 26 hex ids; plain, .gz or .zst), in order of time: one a day for
    criteo_1t, of which the last is held out; one file for criteo_kaggle, of which the last seventh is. What a shell has
    sorted as text, day_10 before day_2, is put in the order of the numbers in the names."""

    output: Annotated[str, tyro.conf.arg(metavar="FOLDER")]
    """Folder to write; it must not exist yet."""

    dataset_name: Literal["criteo_1t", "criteo_kaggle"] = "criteo_1t"
    """criteo_1t writes day_0, day_1, ...; criteo_kaggle writes train, and with --vocabulary day_0."""

    resume: bool = False
    """Continue the unfinished run with the same flags, if there is one."""

    frequency_threshold: int = 3
    """Ids seen fewer times become 1. 0 counts as 1: every id that was counted has an index."""

    max_embeddings: Annotated[int | None, optional("no limit", "INT")] = None
    """Most table rows of a column; larger indices are reduced modulo it, as the trainer would."""

    vocabulary_days: Literal["train", "all"] = "train"
    """Rows whose ids are counted. With all, held-out rows help to decide what is frequent, as in the public example."""

    vocabulary: Annotated[str | None, optional("from these files", "FOLDER")] = None
    """Take the indices of ids and the minimum of integers from this folder, an earlier output, so that the rows suit a
    model trained on it. A single file is then held out as a whole."""

    missing_integers: Literal["zero", "apart"] = "zero"
    """What a missing integer becomes. zero: the same as 0. apart: 0.0, which no other integer becomes, so that a model
    can tell (dlrm_main.py --standardize_dense, --dense_buckets)."""

    seed: int = 0
    """Seed of the shuffle: the same seed, the same bytes, whatever the memory and the workers (dense values on CPUs of
    one kind: numpy's logarithm differs without AVX2)."""

    bad_rows: Literal["refuse", "skip"] = "refuse"
    """refuse ends at the first line that is not a row. skip leaves such lines out and lists them in rejected.tsv."""

    repeated_rows: Literal["refuse", "allow"] = "refuse"
    """refuse ends if a file is given twice, packed and unpacked, or has most of its rows in another one too: a model
    would train on what is held out."""

    days: Annotated[int | None, optional("all", "INT")] = None
    """Take only this number of files, the first ones in order of time; the last of them is held out."""

    rows: Annotated[int | None, optional("all", "INT")] = None
    """Take only this number of lines of each file, from its start."""

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
        """Whether to write what torchrec writes."""
        return self.compat is not None

    @property
    def is_split(self) -> bool:
        """Whether a single file has both the rows that train and those that are held out."""
        return self.dataset_name == "criteo_kaggle" and self.vocabulary is None

    @cached_property
    def ordered(self) -> tuple[list[str], str]:
        """The raw files in order of time, and a note on that order, which may be empty.

        Raises:
            ConfigError: if their names do not tell the order.
        """
        ordered, note = order_files(self.raw)
        return ordered[: self.days], note

    @cached_property
    def applied(self) -> dict[str, Any] | None:
        """Manifest of the folder whose vocabulary is applied; None without --vocabulary.

        Raises:
            DatasetError: if the folder has no vocabulary that can be applied.
        """
        if self.vocabulary is None:
            return None
        manifest = read_manifest(Path(self.vocabulary))
        try:
            numbers = [
                manifest["integers"]["minimum"],
                *(manifest["columns"][name]["kept"] for name in CATEGORICAL_NAMES),
            ]
            chosen = {"frequency_threshold", "vocabulary_days", "max_embeddings"} <= manifest["ids"].keys()
            most = manifest["ids"].get("max_embeddings")
            chosen = chosen and (most is None or (type(most) is int and 3 <= most < 2**31))
        except (KeyError, TypeError, AttributeError):
            numbers, chosen = [], False
        if not numbers or not chosen or not all(type(n) is int and -(2**31) <= n < 2**31 for n in numbers):
            raise DatasetError(
                f"--vocabulary {self.vocabulary}: holds no vocabulary that can be applied. Expected an output of "
                "`dlrm preprocess` without --compat."
            )
        check_vocabulary(Path(self.vocabulary), manifest)
        return manifest

    @property
    def most_embeddings(self) -> int | None:
        """Most table rows of a column. An applied vocabulary decides it."""
        return self.max_embeddings if self.applied is None else self.applied["ids"]["max_embeddings"]

    @property
    def tells_missing_integers(self) -> bool:
        """Whether missing integers become a value of their own. An applied vocabulary decides it."""
        chosen = self.missing_integers if self.applied is None else self.applied["integers"].get("missing", "zero")
        return chosen == "apart"

    def validate(self) -> None:
        """Refuses values out of range and combinations that make no sense.

        Raises:
            ConfigError: naming the flag.
        """
        least = {"frequency_threshold": 0, "max_embeddings": 3, "seed": 0, "days": 1, "rows": 1, "workers": 1}
        for name, low in least.items():
            if (value := getattr(self, name)) is not None and not low <= value < 2**63:
                raise ConfigError(f"--{name} {value}: expected {low} or more")
        if not 0 < self.memory_gib < 2**30:
            raise ConfigError(f"--memory_gib {self.memory_gib}: expected more than 0")
        if self.vocabulary is not None and not self.vocabulary.strip():
            raise ConfigError(f"--vocabulary {self.vocabulary!r}: expected a folder's name")
        if not self.output.strip():
            raise ConfigError(f"--output {self.output!r}: expected a folder's name")
        if self.is_compat:
            idle = {
                "max_embeddings": None,
                "vocabulary_days": "train",
                "vocabulary": None,
                "missing_integers": "zero",
            }
            for name, default in idle.items():
                if getattr(self, name) != default:
                    raise ConfigError(
                        f"--{name} with --compat torchrec: torchrec has no such choice. Drop one of them."
                    )
            if self.seed >= 2**32:
                raise ConfigError(f"--seed {self.seed} with --compat torchrec: expected less than 2**32, as numpy does")
        if self.vocabulary is not None:
            chosen = {
                "max_embeddings": None,
                "vocabulary_days": "train",
                "frequency_threshold": 3,
                "missing_integers": "zero",
            }
            for name, default in chosen.items():
                if getattr(self, name) != default:
                    raise ConfigError(f"--{name} with --vocabulary: the vocabulary has it already. Drop one of them.")
        count = len(self.raw) if self.days is None else min(self.days, len(self.raw))
        if self.days is not None and self.days > len(self.raw):
            raise ConfigError(f"--days {self.days}: got {len(self.raw)} files")
        if self.dataset_name == "criteo_kaggle" and len(self.raw) != 1:
            raise ConfigError(f"{len(self.raw)} files for criteo_kaggle: expected one, train.txt")
        if self.dataset_name == "criteo_1t" and count < 2 and self.vocabulary is None:
            raise ConfigError(
                f"{plural(count, 'file')} for criteo_1t: expected two or more, the last is held out. "
                "For a single file in time order give --dataset_name criteo_kaggle."
            )
        if count == 0:
            raise ConfigError("no files: expected raw Criteo text")


@dataclass(frozen=True)
class Resources:
    """Threads and memory that the stages may use.

    Attributes:
        bytes_per_worker: memory of each thread.
        blocks_ahead: blocks of text that may be read before they are parsed.
        window_bytes: largest window of the raw files' zstd frames.
    """

    workers: int
    bytes_per_worker: int
    blocks_ahead: int
    window_bytes: int = USUAL_WINDOW_BYTES

    @staticmethod
    def within(memory_gib: float, workers: int | None, window_bytes: int = USUAL_WINDOW_BYTES) -> "Resources":
        """Divides the memory that is allowed, less what the process already holds, among the workers.

        Args:
            memory_gib: most memory of the process. What the machine has free is a limit too.
            workers: threads; None for as many as cores and memory allow.
            window_bytes: largest window of the raw files' zstd frames.

        Raises:
            ConfigError: if that is too little memory.
        """
        window_bytes = max(window_bytes, USUAL_WINDOW_BYTES)
        large_window = window_bytes - USUAL_WINDOW_BYTES
        held = psutil.Process().memory_info().rss + _MARGIN_BYTES + large_window
        there = available_memory_bytes() - _MARGIN_BYTES - large_window
        free = min(int(memory_gib * 2**30) - held, there)
        most = max(1, free // _LEAST_BYTES_PER_WORKER)
        if there < (workers or 1) * _LEAST_BYTES_PER_WORKER:
            raise ConfigError(
                f"{show_bytes(max(0, there))} of memory free for {plural(workers or 1, 'worker')}: expected "
                f"{show_bytes((workers or 1) * _LEAST_BYTES_PER_WORKER)} or more. Free some, raise the limit (of the "
                "container, or ulimit -v), or use fewer --workers."
            )
        if free < _LEAST_BYTES_PER_WORKER or (workers or 1) > most:
            needed = (held + (workers or 1) * _LEAST_BYTES_PER_WORKER) / 2**30
            window = f" and a zstd window of {show_bytes(window_bytes)}" if large_window else ""
            remedy = ", or pack again: zstd -dc --long=31 OLD.zst | zstd > NEW.zst" if large_window else ""
            raise ConfigError(
                f"--memory_gib {memory_gib:g} is too little for {plural(workers or 1, 'worker')}{window}: expected "
                f"{needed:.1f} or more. Give more, or fewer --workers{remedy}."
            )
        count = workers or min(available_cores(), most)
        ahead = min(2 * count, max(1, free // (64 << 20) - count))
        return Resources(count, free // count, ahead, window_bytes)
