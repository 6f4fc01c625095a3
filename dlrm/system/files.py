"""Files that are there whole or not at all, and headers and digests of finished ones."""

import errno
import hashlib
import json
import os
import re
import tempfile
import tokenize
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from dlrm.errors import DatasetError, reason_of
from dlrm.system.console import is_stdout, print_result

# numpy parses a header as a Python literal.
_HEADER_ERRORS = (
    OSError, ValueError, TypeError, SyntaxError, MemoryError, RecursionError, OverflowError, tokenize.TokenError,
)  # fmt: skip


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Calls `write` on a temporary file beside `path`, syncs it to disk, and renames it to `path`.

    A link to a file gives way to the new file; what it led to stays.

    Raises:
        OSError: naming `path`, if the disk is full, the folder can't be written, or `path` is a folder, a device or a
            pipe, or a link to one; `path` is then as it was.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "Is a folder, a device or a pipe, not a file", str(path))
    with naming(path):
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).chmod(0o644)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        sync(path.parent)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Has the system's errors of writing `path` name it, as those of an open file do not."""
    try:
        yield
    except OSError as error:
        if error.filename is None or Path(os.fsdecode(error.filename)).name.startswith(f".{path.name}."):
            error.filename, error.filename2 = str(path), None
        raise


@contextmanager
def writing(output: Path, remedy: str) -> Iterator[None]:
    """Has the system's errors of writing `output`, or the files of work beside it, end in one line with a remedy.

    Raises:
        DatasetError: naming what can't be written, and why.
    """
    try:
        yield
    except OSError as error:
        file = Path(os.fsdecode(error.filename or "")).absolute()
        beside = file.relative_to(output.parent).parts[0] if output.parent in file.parents else ""
        if output.name not in beside:
            raise
        where = output if beside.startswith(".") else file  # a hidden folder of work is gone by now
        raise DatasetError(f"{where}: can't be written ({reason_of(error)}). {remedy}") from None


def write_array(file: IO[bytes], array: npt.NDArray[Any]) -> None:
    """Writes an array's bytes. Unlike those of numpy's tofile, its errors say why, as `the disk is full`."""
    file.write(np.ascontiguousarray(array).data)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes `content` as indented JSON, whole or not at all."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def write_result(path: str | Path, content: Mapping[str, Any]) -> None:
    """Writes `content` as JSON to a file, whole or not at all, to standard output, or to an open pipe as /dev/fd/63."""
    if is_stdout(path):
        print_result(json.dumps(content, indent=2, allow_nan=False))
    elif is_stream(path):
        Path(path).write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    else:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(path), content)


def is_stream(path: str | Path) -> bool:
    """Whether a name stands for standard output, standard error or another open file of this process."""
    return is_stdout(path) or re.fullmatch(r"/dev/stderr|(/dev|/proc/self)/fd/\d+", str(path)) is not None


def sync(path: Path) -> None:
    """Has a file's content, or the names in a folder, reach the disk, so that they survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(handle)
    finally:
        os.close(handle)


def read_npy_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, Any]:
    """Shape, whether in column order, and dtype, from the header of a .npy file, whose data come next.

    Raises:
        ValueError: with one line, if there is no such header.
    """
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return read(file)
    except _HEADER_ERRORS as error:
        raise ValueError(" ".join(str(error).split())[:200]) from None


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
