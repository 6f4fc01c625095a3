"""`dlrm materialize`: turns one-hot days into the synthetic multi-hot days of MLPerf's DLRM v2.

`dlrm.dataset.companions` defines them.

Shapes: R rows of a block, H hotness.
"""

import shutil
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import tyro

from dlrm import __version__
from dlrm.config.config import IntList, optional
from dlrm.config.flags import parse_flags
from dlrm.config.recipes import MLPERF_MULTI_HOT_SIZES
from dlrm.dataset.companions import COMPANIONS_SEED, draw_table
from dlrm.dataset.days import KAGGLE_DAY, array_path, day_numbers, multi_hot_path
from dlrm.dataset.manifest import MANIFEST_NAME, MANIFEST_VERSION, read_manifest, vocabulary_digest
from dlrm.errors import ConfigError, DatasetError
from dlrm.schema.criteo import CATEGORICAL_NAMES, NUM_CATEGORICAL_FEATURES
from dlrm.system.console import Progress, show_bytes
from dlrm.system.files import naming, read_npy_header, sha256_of, sync, write_array, write_json, writing
from dlrm.system.host import available_cores, available_memory_bytes
from dlrm.system.threads import in_order

_IF_UNWRITABLE = "Fix that, or choose another folder, and start again: nothing was written."
_ALIGNMENT = 64
_LOCAL_HEADER_BYTES, _ZIP64_EXTRA_BYTES, _EXTRA_HEADER_BYTES = 30, 20, 4
_ALIGNMENT_EXTRA_ID = 0xD935
_BASE_BYTES = 512 << 20
_MAX_BLOCK_ROWS = 1 << 16


@dataclass(frozen=True)
class MaterializeConfig:
    """Turns binary days of one id per feature into days of several, as MLPerf's DLRM v2 trains on: an id gets the same
    random companions wherever it occurs. Writes day_{i}_sparse_multi_hot.npz: 26 members "0" to "25", int32 [rows,
    hotness], stored uncompressed, so that they can be mapped."""

    FOREIGN_NAMES: ClassVar[Mapping[str, str]] = {"in_memory_binary_criteo_path": "days", "output_path": "output"}

    days: tyro.conf.Positional[str]
    """Folder of binary days."""

    output: Annotated[str, tyro.conf.arg(metavar="FOLDER")]
    """Folder to write; it must not exist yet."""

    multi_hot_sizes: IntList = MLPERF_MULTI_HOT_SIZES
    """Ids per sample of each of the 26 features, the original one included."""

    num_embeddings_per_feature: Annotated[IntList | None, optional("as the manifest says", "INT,INT,...")] = None
    """Rows of each of the 26 tables: ids are reduced modulo them, and companions drawn from them."""

    multi_hot_distribution_type: Literal["uniform", "pareto"] = "uniform"
    """How companions are drawn: uniformly, or from a Pareto distribution of shape 0.25, modulo the rows."""

    seed: Annotated[int, tyro.conf.arg(metavar="INT")] = COMPANIONS_SEED
    """Seed of the companions. MLPerf's data has 0."""

    memory_gib: float = 4.0
    """Most RAM, in GiB. The tables of companions are kept on disk."""

    workers: Annotated[int | None, optional("a thread a core", "INT")] = None
    """Threads."""

    def validate(self) -> None:
        """Refuses values out of range.

        Raises:
            ConfigError: naming the flag.
        """
        for name in ("multi_hot_sizes", "num_embeddings_per_feature"):
            sizes = getattr(self, name)
            if sizes is None:
                continue
            if len(sizes) != NUM_CATEGORICAL_FEATURES:
                raise ConfigError(f"--{name}: got {len(sizes)} sizes, expected {NUM_CATEGORICAL_FEATURES}")
            if min(sizes) < 1 or max(sizes) >= 2**31:
                raise ConfigError(f"--{name}: got {min(sizes)} to {max(sizes)}, expected 1 to {2**31 - 1}")
        if max(self.multi_hot_sizes) > 2**16:
            raise ConfigError(f"--multi_hot_sizes: got {max(self.multi_hot_sizes)}, expected {2**16} or less")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"--seed {self.seed}: expected 0 to 2**32 - 1, as numpy does")
        if not _BASE_BYTES * 2 <= self.memory_gib * 2**30 < 2**63:
            raise ConfigError(f"--memory_gib {self.memory_gib}: expected {_BASE_BYTES * 2 / 2**30:g} or more")
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"--workers {self.workers}: expected 1 or more")


@dataclass(frozen=True)
class Feature:
    """A categorical feature.

    Attributes:
        rows: rows of its table.
        hotness: ids per sample, the original one included.
        companions: file with the companions of each row, int32 [rows, hotness - 1].
        block_rows: samples that are expanded at once.
        blocks_ahead: blocks that may be in the works.
    """

    rows: int
    hotness: int
    companions: Path
    block_rows: int
    blocks_ahead: int

    def expand(self, ids_R: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        """Each id, modulo the table's rows, followed by its companions: int32 [R, H]."""
        ids_R = ids_R % self.rows
        ids_RH = np.empty((len(ids_R), self.hotness), np.int32)
        ids_RH[:, 0] = ids_R
        if self.hotness > 1:
            # Mapped again for each block, so that only the pages that its ids touch are held in memory.
            table = np.memmap(self.companions, np.int32, "r", shape=(self.rows, self.hotness - 1))
            ids_RH[:, 1:] = table[ids_R]
        return ids_RH


def materialize(config: MaterializeConfig) -> dict[str, Any]:
    """Writes the days, whole or not at all; returns their manifest.

    Raises:
        ConfigError: if the output exists already, or a flag is out of range.
        DatasetError: if the days are missing or wrong, or the disk is too small.
    """
    config.validate()
    source, output = Path(config.days), Path.cwd() / config.output
    if output.exists() or output.is_symlink():
        raise ConfigError(f"--output {config.output}: is there already. Choose another folder, or remove it.")
    table_rows = config.num_embeddings_per_feature or _rows_of_manifest(source)
    has_manifest = (source / MANIFEST_NAME).exists()
    vocabulary = vocabulary_digest(read_manifest(source)) if has_manifest else None
    days = _find_days(source)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {config.output}: can't be made ({error.strerror}). Choose another.") from None
    _check_disk(config, table_rows, list(days.values()), output)
    with (
        writing(output, _IF_UNWRITABLE),
        tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as scratch,
    ):
        finished = Path(scratch, "days")
        finished.mkdir()
        workers = config.workers or available_cores()
        features = _draw_features(config, table_rows, Path(scratch), workers)
        samples = sum(days.values()) * NUM_CATEGORICAL_FEATURES
        progress = Progress("Materializing", samples, "samples of a feature")
        files = {}
        with ThreadPoolExecutor(workers) as pool:
            for name, rows in days.items():
                path = multi_hot_path(finished, name)
                columns = _split_columns(array_path(source, name, "sparse"), Path(scratch))
                _write_day(path, columns, rows, features, pool, progress)
                files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        progress.close()
        manifest = {
            "version": MANIFEST_VERSION,
            "kind": "multi_hot_days",
            "source_manifest_sha256": sha256_of(source / MANIFEST_NAME) if has_manifest else None,
            "vocabulary_sha256": vocabulary,
            "software": f"dlrm {__version__}",
            "days": {name: {"rows": rows} for name, rows in days.items()},
            "multi_hot_sizes": list(config.multi_hot_sizes),
            "num_embeddings_per_feature": list(table_rows),
            "multi_hot_distribution_type": config.multi_hot_distribution_type,
            "seed": config.seed,
            "files": files,
        }
        write_json(finished / MANIFEST_NAME, manifest)
        finished.rename(output)
        sync(output.parent)
    return manifest


def _rows_of_manifest(source: Path) -> tuple[int, ...]:
    if not (source / MANIFEST_NAME).exists():
        raise ConfigError(f"{source}: has no {MANIFEST_NAME}. Give the tables' rows by --num_embeddings_per_feature.")
    try:
        rows = tuple(int(read_manifest(source)["columns"][name]["rows"]) for name in CATEGORICAL_NAMES)
        if min(rows) < 1 or max(rows) >= 2**31:
            raise ValueError
        return rows
    except (KeyError, TypeError, ValueError):
        raise ConfigError(
            f"{source / MANIFEST_NAME}: says nothing of tables' rows. Give them by --num_embeddings_per_feature."
        ) from None


def _find_days(source: Path) -> dict[str, int]:
    """Rows of each day."""
    if not source.is_dir():
        raise DatasetError(f"{source}: no such folder. Expected binary days.")
    found = day_numbers((path.name for path in source.iterdir()), r"sparse\.npy")
    # A single day may have any number: a trained model is evaluated on it.
    names = [f"day_{i}" for i in (found if len(found) == 1 else range(len(found)))] or [KAGGLE_DAY]
    days = {}
    for name in names:
        path = array_path(source, name, "sparse")
        if not path.is_file():
            raise DatasetError(f"{path}: missing. Expected binary days, without a gap from 0.")
        try:
            with path.open("rb") as file:
                shape, fortran_order, dtype = read_npy_header(file)
                data = path.stat().st_size - file.tell()
        except (OSError, ValueError) as error:
            raise DatasetError(f"{path}: not a readable .npy file ({error}). Preprocess the logs again.") from None
        width = NUM_CATEGORICAL_FEATURES
        fits = len(shape) == 2 and shape[1] == width and dtype in (np.int32, np.int64) and not fortran_order
        if not fits or data != shape[0] * width * dtype.itemsize or shape[0] < 1:
            raise DatasetError(
                f"{path}: {dtype!s:.40} {list(shape)} in {data:,} bytes, expected int32 [rows, {width}]. Preprocess "
                "the logs again."
            )
        days[name] = shape[0]
    return days


def _check_disk(config: MaterializeConfig, table_rows: Sequence[int], day_rows: Sequence[int], output: Path) -> None:
    rows = sum(day_rows)
    needed = 4 * rows * sum(config.multi_hot_sizes) + 8 * NUM_CATEGORICAL_FEATURES * max(day_rows)
    needed += 4 * sum(size * (hot - 1) for size, hot in zip(table_rows, config.multi_hot_sizes, strict=True))
    free = shutil.disk_usage(output.parent).free
    ids = f"{rows:,} rows of {sum(config.multi_hot_sizes)} ids"
    print(f"{ids}; {show_bytes(needed)} of disk, {show_bytes(free)} free.", flush=True)
    if needed > free:
        raise DatasetError(
            f"--output {config.output}: {show_bytes(needed)} of disk needed, {show_bytes(free)} free. Choose a "
            "folder on another disk, or smaller --multi_hot_sizes."
        )


def _draw_features(config: MaterializeConfig, table_rows: Sequence[int], folder: Path, workers: int) -> list[Feature]:
    """Draws each feature's table of companions into a file, with numpy's legacy generator, feature by feature."""
    generator = np.random.RandomState(config.seed)
    total = sum(rows * (hot - 1) for rows, hot in zip(table_rows, config.multi_hot_sizes, strict=True))
    progress = Progress("Drawing", total, "ids")
    features = []
    for number, (rows, hot) in enumerate(zip(table_rows, config.multi_hot_sizes, strict=True)):
        path = folder / f"companions_{number}"
        with naming(path), path.open("wb") as file:
            for ids in draw_table(generator, config.multi_hot_distribution_type, rows, hot - 1):
                write_array(file, ids)
                progress.advance(len(ids))
        # Each thread needs memory for a block's ids, and for the page of the table that each of them may touch.
        free = min(int(config.memory_gib * 2**30), max(available_memory_bytes(), 2 * _BASE_BYTES)) - _BASE_BYTES
        block_rows = min(_MAX_BLOCK_ROWS, free // (2 * workers + 1) // (8 * hot + 4096))
        features.append(Feature(rows, hot, path, block_rows, workers))
    progress.close()
    return features


def _split_columns(source: Path, scratch: Path) -> list[Path]:
    """Writes each column of a day's ids to a file of its own, int64 [rows]. Reads a few rows at a time."""
    columns = [scratch / f"column_{number}" for number in range(NUM_CATEGORICAL_FEATURES)]
    with ExitStack() as stack:
        targets = [stack.enter_context(path.open("wb")) for path in columns]
        file = stack.enter_context(source.open("rb"))
        (rows, width), _, dtype = read_npy_header(file)
        for start in range(0, rows, _MAX_BLOCK_ROWS):
            count = min(_MAX_BLOCK_ROWS, rows - start)
            ids_RF = np.fromfile(file, dtype, count * width).reshape(count, width).astype(np.int64)
            if ids_RF.min() < 0:
                row, column = np.argwhere(ids_RF < 0)[0]
                raise DatasetError(
                    f"{source}: id {ids_RF[row, column]} at row {start + row}, column {column}, expected 0 or more. "
                    "Preprocess the logs again."
                )
            for number, target in enumerate(targets):
                with naming(columns[number]):
                    write_array(target, ids_RF[:, number])
    return columns


def _write_day(
    path: Path,
    columns: Sequence[Path],
    rows: int,
    features: Sequence[Feature],
    pool: ThreadPoolExecutor,
    progress: Progress,
) -> None:
    with naming(path), zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for number, (column, feature) in enumerate(zip(columns, features, strict=True)):
            with open_member(archive, str(number)) as member:
                header = {"descr": "<i4", "fortran_order": False, "shape": (rows, feature.hotness)}
                np.lib.format.write_array_header_1_0(member, header)
                starts = range(0, rows, feature.block_rows)
                for _, ids_RH in in_order(pool, starts, partial(_expand, column, feature), feature.blocks_ahead):
                    write_array(member, ids_RH)
                    progress.advance(len(ids_RH))
    sync(path)


def _expand(column: Path, feature: Feature, start: int) -> npt.NDArray[np.int32]:
    return feature.expand(np.fromfile(column, np.int64, feature.block_rows, offset=8 * start))


def open_member(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    """Opens a new .npy member for writing. It is uncompressed and aligned to 64 bytes, so that it can be mapped."""
    info = zipfile.ZipInfo(f"{name}.npy")  # with a fixed date, so that the same content has the same bytes
    assert archive.fp is not None
    fixed = archive.fp.tell() + _LOCAL_HEADER_BYTES + len(info.filename) + _ZIP64_EXTRA_BYTES + _EXTRA_HEADER_BYTES
    padding = -fixed % _ALIGNMENT
    info.extra = _ALIGNMENT_EXTRA_ID.to_bytes(2, "little") + padding.to_bytes(2, "little") + bytes(padding)
    return archive.open(info, "w", force_zip64=True)


def main(argv: Sequence[str]) -> None:
    """`dlrm materialize`."""
    config = parse_flags(MaterializeConfig, argv, "dlrm materialize")
    manifest = materialize(config)
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    rows = sum(day["rows"] for day in manifest["days"].values())
    print(f"{config.output}: {rows:,} rows in {len(manifest['days'])} days, {show_bytes(size)}, with {MANIFEST_NAME}")
