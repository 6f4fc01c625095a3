"""Raw Criteo text, plain or compressed, in blocks of whole lines."""

import errno
import gzip
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np
import numpy.typing as npt
import zstandard
from typing_extensions import Buffer

from dlrm.errors import DatasetError

BLOCK_BYTES = 16 << 20
PADDING = 16
"""Bytes behind the text in its buffer, so that the parser may read a whole id at once."""
MAX_LINE_BYTES = 64 << 10
_SAMPLE_BYTES = 4 << 20
_READ_BYTES = 128 << 10
_NEWLINE = 10


@dataclass(frozen=True)
class TextBlock:
    """Whole lines: the first `size` bytes of `text`, the last of them a newline."""

    text: npt.NDArray[np.uint8]
    size: int


def check_raw(path: Path) -> None:
    """Refuses what can't be raw text, before anything is read.

    Raises:
        DatasetError: if there is no such regular file, it can't be opened, or is empty.
    """
    if not path.exists():
        raise DatasetError(f"{path}: no such file. Expected raw Criteo text.")
    if path.is_dir():
        raise DatasetError(f"{path}: a folder. Give the raw files in it, in order of time.")
    if not path.is_file():
        raise DatasetError(f"{path}: not a regular file. Expected raw Criteo text.")
    if not os.access(path, os.R_OK):
        raise DatasetError(f"{path}: no permission to read it. Change its mode, or run as its owner.")
    if path.stat().st_size == 0:
        raise DatasetError(f"{path}: no rows. Expected raw Criteo text.")


def read_blocks(path: Path, max_lines: int | None = None, block_bytes: int = BLOCK_BYTES) -> Iterator[TextBlock]:
    """The file's lines, in blocks of about `block_bytes`; the same blocks each time.

    Raises:
        DatasetError: if the file is cut short or damaged, or has a line that is too long to be a row.
    """
    lines_left = max_lines
    carry = b""
    with reading(path), path.open("rb") as packed, _unpack(packed, path.suffix) as file:
        while lines_left is None or lines_left > 0:
            text = np.empty(block_bytes + 1 + PADDING, np.uint8)
            size, carry = _fill(file, text, carry, block_bytes, path)
            if size == 0:
                return
            if lines_left is not None:
                ends = np.flatnonzero(text[:size] == _NEWLINE)
                size = int(ends[min(lines_left, len(ends)) - 1]) + 1
                lines_left -= len(ends)
            yield TextBlock(text, size)


def _fill(
    file: IO[bytes], text: npt.NDArray[np.uint8], carry: bytes, block_bytes: int, path: Path
) -> tuple[int, bytes]:
    """Reads whole lines into `text`, after `carry`; returns their size and what is left of the next line."""
    view = memoryview(text)  # type: ignore[arg-type]
    filled = len(carry)
    view[:filled] = carry
    while filled < block_bytes and (count := file.readinto(view[filled:block_bytes])):  # type: ignore[attr-defined]
        filled += count
    if filled < block_bytes:  # the end of the file
        if filled and text[filled - 1] != _NEWLINE:
            text[filled] = _NEWLINE
            filled += 1
        return filled, b""
    tail = view[max(0, filled - MAX_LINE_BYTES) : filled].tobytes()
    after_newline = tail.rfind(b"\n") + 1
    if after_newline == 0:
        raise DatasetError(f"{path}: a line of more than {MAX_LINE_BYTES >> 10} KiB. Expected raw Criteo text.")
    carry = tail[after_newline:]
    return filled - len(carry), carry


@dataclass(frozen=True)
class Sample:
    """The head of a file, and at a guess how many lines the whole has."""

    block: TextBlock
    num_lines: int
    total_lines: int


def sample(path: Path, max_lines: int | None) -> Sample:
    """The first 4 MiB of text, and from them the number of lines in the whole file.

    Raises:
        DatasetError: as `read_blocks`.
    """
    text, size = np.empty(_SAMPLE_BYTES + 1 + PADDING, np.uint8), path.stat().st_size
    with reading(path), path.open("rb") as packed, _unpack(packed, path.suffix) as file:
        filled, carry = _fill(file, text, b"", _SAMPLE_BYTES, path)
        is_whole = filled < _SAMPLE_BYTES and not carry
        share = 1.0 if is_whole else packed.tell() / size * filled / (filled + len(carry))
    lines = int(np.count_nonzero(text[:filled] == _NEWLINE))
    if lines == 0:
        raise DatasetError(f"{path}: no rows. Expected raw Criteo text.")
    total = round(lines / share)
    return Sample(TextBlock(text, filled), lines, total if max_lines is None else min(total, max_lines))


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Errors of reading `path` as DatasetError."""
    try:
        yield
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise  # the output's fault, not the input's
        raise DatasetError(
            f"{path}: can't be read to its end ({error}). It may be cut short: fetch it again."
        ) from None


def _unpack(packed: BinaryIO, suffix: str) -> IO[bytes]:
    """The text in an open file."""
    match suffix:
        case ".gz":
            return io.BufferedReader(gzip.GzipFile(fileobj=packed), _READ_BYTES)  # type: ignore[arg-type]
        case ".zst":
            return io.BufferedReader(_ZstdFile(packed), _READ_BYTES)
    return packed


class _ZstdFile(io.RawIOBase):
    """Reads all frames of a .zst file. Unlike zstandard's own reader it raises where the last frame is cut short."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
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
            packed = packed or self._file.read(_READ_BYTES)
            if not packed:
                if self._is_begun:
                    raise EOFError("the last frame is not complete")
                return 0
            self._ready, self._is_begun = self._frame.decompress(packed), True
        view = memoryview(target)
        size = min(len(view), len(self._ready))
        view[:size], self._ready = self._ready[:size], self._ready[size:]
        return size
