"""Files that are there whole or not at all, and what a finished one says of itself."""

import errno
import hashlib
import json
import os
import tempfile
import tokenize
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

# numpy parses a header as a Python literal.
_HEADER_ERRORS = (
    OSError, ValueError, TypeError, SyntaxError, MemoryError, RecursionError, OverflowError, tokenize.TokenError,
)  # fmt: skip
MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 1


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Calls `write` on a temporary file beside `path`, syncs it to disk, and renames it to `path`.

    A link to a file gives way to the new file; what it led to stays.

    Raises:
        OSError: if the disk is full, the folder can't be written, or `path` is a folder, a device or a pipe, or a link
            to one; `path` is then as it was.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "Is a folder, a device or a pipe, not a file", str(path))
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


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes `content` as indented JSON, whole or not at all."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def last_day(names: Iterable[str]) -> str:
    """The one of day_0, day_1, ... that is held out, in whatever order they stand."""
    return max(names, key=lambda name: (len(name), name))


def vocabulary_digest(manifest: Mapping[str, Any]) -> str | None:
    """Digest of what ids and integers of a manifest's days mean; None if it does not tell.

    That is the vocabulary, the largest index, and how integers were transformed. Days of one digest are for one model.
    """
    if manifest.get("kind") == "multi_hot_days":
        return manifest.get("vocabulary_sha256")
    try:
        ids, integers = manifest["ids"], manifest["integers"]
        files = {name: facts["sha256"] for name, facts in manifest["files"].items() if name.startswith("vocabulary/")}
        facts = {
            "files": files,
            "max_embeddings": ids["max_embeddings"],
            "minimum": integers["minimum"],
            "missing": integers.get("missing", "zero"),
            "transform": integers.get("transform"),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    except (KeyError, TypeError, AttributeError):  # days of somebody else's making
        return None


def sync(path: Path) -> None:
    """Has a file's content, or the names in a folder, reach the disk, so that they survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
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
