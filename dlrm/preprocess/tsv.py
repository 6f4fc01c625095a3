"""Raw Criteo text to binary days, through TorchRec's own function."""

import csv
import errno
import gzip
import io
import os
import tempfile
import time
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import numpy as np
import tyro
import zstandard
from typing_extensions import Buffer

from dlrm import __version__
from dlrm.artifacts import MANIFEST_VERSION, sha256_of, sync_folder, write_json
from dlrm.errors import ConfigError, DatasetError
from dlrm.flags import parse_flags
from dlrm.host import available_memory_bytes
from dlrm.schema import NUM_COLUMNS

TAB = b"\t"
_PARTS = ("dense", "sparse", "labels")
BYTES_PER_ROW = 3_000
"""RAM that torchrec's tsv_to_npys takes for a row."""


@dataclass(frozen=True)
class PreprocessConfig:
    """Turns raw Criteo text into binary days with TorchRec's tsv_to_npys, which holds a whole file in RAM (about 3 kB a
    row): for samples, not for Criteo 1TB. Ids stay 32-bit hashes, stored in 64 bits; the trainer reduces them modulo
    the table's rows. Integers become log(x - m + 2), m being the smallest in the file: days whose smallest integers
    differ are scaled differently."""

    raw: tyro.conf.Positional[tuple[str, ...]]
    """Tab-separated files (label, 13 integers, 26 hex ids; plain, .gz or .zst), in order of time: one a day for
    criteo_1t, one for criteo_kaggle."""

    output: str
    """Folder to write; it must not be there yet."""

    dataset_name: Literal["criteo_1t", "criteo_kaggle"] = "criteo_1t"
    """criteo_1t writes day_0, day_1, ...; criteo_kaggle writes train."""


def preprocess(config: PreprocessConfig) -> int:
    """Writes arrays and manifest, whole or not at all; returns the number of rows.

    Raises:
        ConfigError: if the output is there already, or the number of files does not fit the data set.
        DatasetError: if a file is missing, damaged or not Criteo text, or needs more RAM than there is.
    """
    output = Path(config.output)
    if output.exists():
        raise ConfigError(f"--output {output}: is there already. Choose another folder, or remove it.")
    if config.dataset_name == "criteo_kaggle" and len(config.raw) != 1:
        raise ConfigError(f"{len(config.raw)} files for criteo_kaggle: expected one, train.txt")
    if config.dataset_name == "criteo_1t" and len(config.raw) < 2:
        raise ConfigError(
            "one file for criteo_1t: expected two or more, the last is held out. For a single file in time order give "
            "--dataset_name criteo_kaggle."
        )
    names = ["train"] if config.dataset_name == "criteo_kaggle" else [f"day_{i}" for i in range(len(config.raw))]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {output}: can't be made ({error.strerror}). Choose another folder.") from None
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as scratch:
        finished = Path(scratch, "days")
        finished.mkdir()
        rows = [_convert(Path(raw), finished, name, Path(scratch)) for raw, name in zip(config.raw, names, strict=True)]
        for path in finished.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in sorted(finished.iterdir())
        }
        days = {
            name: {"rows": count, "source": Path(raw).name}
            for name, count, raw in zip(names, rows, config.raw, strict=True)
        }
        transform = "torchrec.datasets.criteo.BinaryCriteoUtils.tsv_to_npys"
        write_json(
            finished / "manifest.json",
            {
                "version": MANIFEST_VERSION,
                "kind": "binary_days",
                "software": f"dlrm {__version__}",
                "transform": transform,
                "days": days,
                "files": files,
            },
        )
        finished.rename(output)
        sync_folder(output.parent)
    return sum(rows)


def _convert(raw: Path, folder: Path, name: str, scratch: Path) -> int:
    # Here and not above: it loads torch, and is gone once encoding is our own.
    from torchrec.datasets.criteo import BinaryCriteoUtils

    started = time.monotonic()
    text = scratch / "day.tsv"
    rows = _unpack(raw, text)
    needed, available = rows * BYTES_PER_ROW, available_memory_bytes()
    if needed > available:
        raise DatasetError(
            f"{raw}: {rows:,} rows need about {needed / 2**30:.1f} GiB of RAM, {available / 2**30:.1f} are free. "
            "Split the file, or use a larger machine."
        )
    dense = folder / f"{name}_dense.npy"
    try:
        with warnings.catch_warnings():
            # TorchRec hands a local function to a pipe that could pickle it; nothing here does. It takes the logarithm
            # of integers that have wrapped around; that shows below.
            warnings.filterwarnings("ignore", "Local function is not supported by pickle", UserWarning)
            warnings.filterwarnings("ignore", "(invalid value|overflow) encountered", RuntimeWarning)
            BinaryCriteoUtils.tsv_to_npys(str(text), *(str(folder / f"{name}_{part}.npy") for part in _PARTS))
    except (ValueError, IndexError, OverflowError, csv.Error) as error:
        words = " ".join(str(error).split())
        raise DatasetError(
            f"{raw}: not Criteo text ({words}). Expected label, 13 integers, 26 hexadecimal ids."
        ) from None
    if not np.isfinite(np.load(dense, mmap_mode="r")).all():
        raise DatasetError(f"{raw}: integers too far apart for 32 bits. Expected a range of less than 2**31.")
    text.unlink()
    print(f"{raw}: {rows:,} rows in {time.monotonic() - started:.1f} s", flush=True)
    return rows


def _unpack(raw: Path, text: Path) -> int:
    """Writes the plain text and counts its rows, each of which must have all columns and a label of 0 or 1."""
    rows = 0
    try:
        with _open(raw) as source, text.open("wb") as target:
            for line in source:
                rows += 1
                if line.count(TAB) != NUM_COLUMNS - 1:
                    raise DatasetError(
                        f"{raw}: {line.count(TAB) + 1} columns in row {rows}, expected {NUM_COLUMNS}: label, 13 "
                        "integers, 26 ids, separated by tabs."
                    )
                if (label := line.split(TAB, 1)[0]) not in (b"0", b"1"):
                    raise DatasetError(
                        f"{raw}: label {label.decode(errors='replace')!r} in row {rows}, expected 0 or 1."
                    )
                target.write(line)
    except FileNotFoundError:
        raise DatasetError(f"{raw}: no such file. Expected raw Criteo text.") from None
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise  # the output's fault, not the input's
        raise DatasetError(f"{raw}: can't be read to its end ({error}). It may be cut short: fetch it again.") from None
    if rows == 0:
        raise DatasetError(f"{raw}: no rows. Expected raw Criteo text.")
    return rows


def _open(raw: Path) -> IO[bytes]:
    match raw.suffix:
        case ".gz":
            return io.BufferedReader(gzip.open(raw, "rb"))
        case ".zst":
            return io.BufferedReader(_ZstdFile(raw), 1 << 20)
    return raw.open("rb")


class _ZstdFile(io.RawIOBase):
    """Reads all frames of a .zst file. Unlike zstandard's own reader it raises where the last frame is cut short."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._is_begun = False
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, target: Buffer) -> int:  # type: ignore[override]
        while not self._ready:
            packed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._is_begun = zstandard.ZstdDecompressor().decompressobj(), False
            packed = packed or self._file.read(1 << 20)
            if not packed:
                if self._is_begun:
                    raise EOFError("the last frame is not complete")
                return 0
            self._ready, self._is_begun = self._frame.decompress(packed), True
        view = memoryview(target)
        size = min(len(view), len(self._ready))
        view[:size], self._ready = self._ready[:size], self._ready[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


def main(argv: Sequence[str]) -> None:
    """`dlrm preprocess`."""
    config = parse_flags(PreprocessConfig, argv, "dlrm preprocess")
    rows = preprocess(config)
    size = sum(path.stat().st_size for path in Path(config.output).iterdir())
    print(f"{config.output}: {rows:,} rows, {size / 2**20:.1f} MiB, with manifest.json")
