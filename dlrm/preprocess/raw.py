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
from dlrm.preprocess.formats import HEAD_BYTES, check_kind, packing_of
from dlrm.system.console import show_bytes

BLOCK_BYTES = 16 << 20
USUAL_WINDOW_BYTES = 128 << 20
"""zstd's largest window without --long=28 or more."""
_MAX_WINDOW_BYTES = 1 << 31
_MOST_HEADER_BYTES = 18
PADDING = 16
"""Spare bytes behind the text in its buffer, so that the parser can read a whole id at once."""
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
    """Refuses a file that can't be raw text, before anything is read.

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
        raise DatasetError(f"{path}: no rows: it is an empty file. Fetch it again, or leave it out.")


def read_blocks(
    path: Path, max_lines: int | None = None, block_bytes: int = BLOCK_BYTES, window_bytes: int = USUAL_WINDOW_BYTES
) -> Iterator[TextBlock]:
    """Yields the file's lines, in blocks of about `block_bytes`, which are the same each time.

    Args:
        window_bytes: largest window of a zstd frame.

    Raises:
        DatasetError: if the file is cut short or damaged, or has a line that is too long to be a row.
    """
    lines_left = max_lines
    carry = b""
    with reading(path), path.open("rb") as packed, _unpack(packed, path, window_bytes) as file:
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
    """Reads whole lines into `text`, behind `carry`; returns their size, and the beginning of the next line."""
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
    """The head of a file, and an estimate of the lines in the whole file.

    Attributes:
        num_lines: lines of the head.
        total_lines: lines of the whole file, estimated.
        window_bytes: memory that unpacking its first zstd frame takes; 0 for other files.
    """

    block: TextBlock
    num_lines: int
    total_lines: int
    window_bytes: int = 0


def sample(path: Path, max_lines: int | None) -> Sample:
    """Reads the first 4 MiB of text, and estimates the number of lines in the whole file from them.

    Raises:
        DatasetError: as `read_blocks`, or if it is another kind of file.
    """
    text, size = np.empty(_SAMPLE_BYTES + 1 + PADDING, np.uint8), path.stat().st_size
    with reading(path), path.open("rb") as packed, _unpack(packed, path, _MAX_WINDOW_BYTES) as file:
        packing = packing_of(head := packed.peek(HEAD_BYTES), path.suffix)
        if packing is None:
            check_kind(path, head[:HEAD_BYTES], None)
        window = _window_of(head) if packing == "zstd" else 0
        filled, carry = _fill(file, text, b"", _SAMPLE_BYTES, path)
        is_whole = filled < _SAMPLE_BYTES and not carry
        share = 1.0 if is_whole else packed.tell() / size * filled / (filled + len(carry))
    check_kind(path, text[: min(filled, HEAD_BYTES)].tobytes(), packing)
    lines = int(np.count_nonzero(text[:filled] == _NEWLINE))
    if lines == 0:
        raise DatasetError(f"{path}: no rows. Expected raw Criteo text.")
    total = round(lines / share)
    return Sample(TextBlock(text, filled), lines, total if max_lines is None else min(total, max_lines), window)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns errors of reading `path` into DatasetError."""
    try:
        yield
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise  # the disk of the output is full; the input is not at fault
        raise DatasetError(
            f"{path}: can't be read to its end ({error}). It may be cut short: fetch it again, and continue with "
            "--resume."
        ) from None


def _unpack(packed: io.BufferedReader, path: Path, window_bytes: int) -> IO[bytes]:
    """Opens the text in a file that may be packed."""
    match packing_of(packed.peek(HEAD_BYTES)[:HEAD_BYTES], path.suffix):
        case "gzip":
            return io.BufferedReader(gzip.GzipFile(fileobj=packed), _READ_BYTES)  # type: ignore[arg-type]
        case "zstd":
            return io.BufferedReader(_ZstdFile(packed, path, window_bytes), _READ_BYTES)
    return packed


def _dictionary_of(head: bytes) -> int:
    """Number of the dictionary that a zstd frame needs; 0 if it needs none, or its header is incomplete."""
    try:
        return zstandard.get_frame_parameters(head).dict_id
    except zstandard.ZstdError:
        return 0


def _window_of(head: bytes) -> int:
    """Memory that unpacking a zstd frame takes, from its header; 0 if that is incomplete."""
    try:
        return zstandard.get_frame_parameters(head).window_size
    except zstandard.ZstdError:
        return 0


class _ZstdFile(io.RawIOBase):
    """Reads all frames of a .zst file; zeros behind them are ignored.

    Unlike zstandard's own reader, it raises an error if the last frame is cut short, and it reads frames with a window
    of more than 128 MiB, which `zstd --long=28` and above write.
    """

    def __init__(self, file: BinaryIO, path: Path, window_bytes: int) -> None:
        self._file, self._path = file, path
        self._window_bytes = max(window_bytes, USUAL_WINDOW_BYTES)
        self._begin_frame()
        self._ready = b""

    def _begin_frame(self) -> None:
        self._frame = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES).decompressobj()
        self._is_begun = False

    def readable(self) -> bool:
        return True

    def readinto(self, target: Buffer) -> int:  # type: ignore[override]
        while not self._ready:
            packed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._begin_frame()
            if not self._is_begun:
                packed = self._read_header(packed)
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

    def _read_header(self, packed: bytes) -> bytes:
        """Reads until `packed` holds the header of a frame, and checks it; empty at the end of the file."""
        packed = packed.lstrip(b"\0")
        while len(packed) < _MOST_HEADER_BYTES and (more := self._file.read(_READ_BYTES)):
            packed = packed + more if packed else more.lstrip(b"\0")
        window = _window_of(packed)
        if window > self._window_bytes:
            raise DatasetError(
                f"{self._path}: a zstd frame in it needs a window of {show_bytes(window)}, its first one less. Pack it "
                f"again: zstd -dc --long=31 OLD.zst | zstd > NEW.zst."
            )
        if packed.startswith(zstandard.FRAME_HEADER) and (number := _dictionary_of(packed)):
            raise DatasetError(
                f"{self._path}: is packed with zstd dictionary {number}. Unpack it with that: zstd -dc -D DICTIONARY."
            )
        return packed
