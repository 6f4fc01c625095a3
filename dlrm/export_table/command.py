"""`dlrm export-table`: an embedding table of a checkpoint as a file that other tools read. No torch here.

Shapes: R rows, D columns of a table.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, TypeVar

import numpy as np
import numpy.typing as npt
import tyro

from dlrm.checkpoint.checkpoint import Checkpoint
from dlrm.checkpoint.find import read_newest
from dlrm.checkpoint.saved_tables import Table, read_blocks, tables_of
from dlrm.config.flags import parse_flags
from dlrm.errors import CheckpointError, ConfigError, reason_of, system_error_in
from dlrm.system.console import Progress, show_bytes
from dlrm.system.files import write_atomically

T = TypeVar("T")

IF_INTERRUPTED = "Nothing was written."
_ID_BYTES = 8


@dataclass(frozen=True)
class ExportConfig:
    """Writes an embedding table's weights from a checkpoint, however it was sharded: row i is the embedding of id i. It
    reads blocks of rows, so a table may be larger than memory. The file is written whole or not at all.

    Example: `dlrm export-table runs/first t_cat_0 t_cat_0.parquet`."""

    path: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PATH")]
    """Checkpoint (step_...); or a run directory, folder of checkpoints or address, whose newest complete one is
    taken."""

    table: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TABLE")]
    """Name of the table, as `dlrm inspect` shows it: t_cat_0 to t_cat_25."""

    output: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT.parquet|OUT.npy")]
    """.parquet: columns id (int64) and embedding (list of a fixed size of float32), uncompressed. .npy: float32 [rows,
    dim], which numpy.load can map."""

    overwrite: bool = False
    """Replace the file if it is there."""

    verify: bool = True
    """First read the checkpoint's files that hold the table and compare their SHA-256. These files hold other tables
    too: of a large checkpoint, --no_verify after a `dlrm inspect --verify` saves most of the time."""


def export_table(config: ExportConfig) -> None:
    """Writes one table.

    Raises:
        ConfigError: if there is no such table, or the output can't be written.
        CheckpointError: if the checkpoint is not there or damaged.
    """
    write = _writer_of(config)
    print(read_newest(config.path, print, lambda checkpoint: _export(config, checkpoint, write)))


def _export(config: ExportConfig, checkpoint: Checkpoint, write: "Write") -> str:
    """Writes one table of a checkpoint; returns a line that says what was written."""
    output = Path(config.output)
    tables = tables_of(checkpoint.manifest.tensors)
    if config.table not in tables:
        raise ConfigError(f"{checkpoint.address}: no table {config.table}. Expected one of {', '.join(tables)}.")
    table = tables[config.table]
    _check_space(output, table)
    if config.verify:
        _verify(checkpoint, table)
    progress = Progress(f"Exporting {table.name}", table.rows, "rows")

    def blocks() -> Iterator[npt.NDArray[np.float32]]:
        for block_RD in read_blocks(checkpoint, table):
            yield block_RD
            progress.advance(len(block_RD))

    try:
        write_atomically(output, lambda file: write(file, table, blocks()))
    except OSError as error:
        raise ConfigError(
            f"{output}: can't be written ({reason_of(error)}), and nothing was. Fix that, or choose another folder."
        ) from None
    finally:
        progress.close()
    return (
        f"{output}: {table.rows:,} rows of {table.dim} float32, {show_bytes(output.stat().st_size)}, of {table.name} "
        f"in {checkpoint.address}"
    )


Write = Callable[[BinaryIO, Table, Iterator[npt.NDArray[np.float32]]], None]


def _writer_of(config: ExportConfig) -> Write:
    """The function that writes a file with such a name.

    Raises:
        ConfigError: if the name has another ending, or if the file is there already.
    """
    path = Path(config.output)
    writers: dict[str, Write] = {".npy": _write_npy, ".parquet": _write_parquet}
    if path.suffix not in writers:
        raise ConfigError(f"{path}: expected a name that ends in .parquet or .npy")
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"{path}: can't be written. Expected a file's name in a folder that is there.")
    if os.path.lexists(path) and not config.overwrite:
        raise ConfigError(f"{path}: is there already. Choose another name, or give --overwrite.")
    return writers[path.suffix]


def _check_space(output: Path, table: Table) -> None:
    """Refuses a table that does not fit on the disk.

    Raises:
        ConfigError: with the sizes.
    """
    needed = table.weight.num_bytes + (_ID_BYTES * table.rows if output.suffix == ".parquet" else 0)
    free = shutil.disk_usage(output.parent).free
    if needed > free:
        raise ConfigError(
            f"{output}: {show_bytes(needed)} of disk needed, {show_bytes(free)} free. Choose another folder."
        )


def _verify(checkpoint: Checkpoint, table: Table) -> None:
    """Compares the SHA-256 of the files that hold a table.

    Raises:
        CheckpointError: if one is damaged.
    """
    files = sorted(table.files)
    total = sum(checkpoint.manifest.files[name].num_bytes for name in files)
    with closing(Progress("Verifying", total, "bytes")) as progress:
        checkpoint.verify(files, progress.advance)


def _write_npy(file: BinaryIO, table: Table, blocks: Iterator[npt.NDArray[np.float32]]) -> None:
    header = {"descr": "<f4", "fortran_order": False, "shape": (table.rows, table.dim)}
    np.lib.format.write_array_header_1_0(file, header)
    file.writelines(block_RD.data for block_RD in blocks)


def _write_parquet(file: BinaryIO, table: Table, blocks: Iterator[npt.NDArray[np.float32]]) -> None:
    import polars as pl  # here, as it takes a while to load and --help should not
    from polars.io.plugins import register_io_source

    embedding = pl.Array(pl.Float32, table.dim)

    failures: list[CheckpointError] = []

    def frames(*_: Any) -> Iterator[pl.DataFrame]:
        start = 0
        for block_RD in _noting(blocks, failures):
            ids = np.arange(start, start + len(block_RD), dtype=np.int64)
            yield pl.DataFrame({"id": ids, "embedding": pl.Series(block_RD, dtype=embedding)})
            start += len(block_RD)

    # Trained weights are noise to a compressor: zstd takes a tenth off them and several times as long.
    frame = register_io_source(frames, schema={"id": pl.Int64, "embedding": embedding})
    try:
        frame.sink_parquet(file, compression="uncompressed", row_group_size=table.rows_at_once, maintain_order=True)
    except (pl.exceptions.PolarsError, OSError) as error:
        known = failures[0] if failures else system_error_in(error)
        raise known or ConfigError(f"parquet: {' '.join(str(error).split())}") from None


def _noting(blocks: Iterator[T], failures: list[CheckpointError]) -> Iterator[T]:
    """Yields the blocks and keeps an error that they raise, which polars would pass on only as text."""
    try:
        yield from blocks
    except CheckpointError as error:
        failures.append(error)
        raise


def main(argv: Sequence[str]) -> None:
    """`dlrm export-table`."""
    export_table(parse_flags(ExportConfig, argv, "dlrm export-table"))
