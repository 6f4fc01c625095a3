"""The kind of a raw file, as told by its first bytes and not by its name."""

import re
from pathlib import Path
from typing import Literal

from dlrm.errors import DatasetError
from dlrm.schema.criteo import NUM_COLUMNS

HEAD_BYTES = 4096
Packing = Literal["gzip", "zstd"]

_PACKINGS: tuple[tuple[bytes, Packing], ...] = (
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    *((bytes([number]) + b"\x2a\x4d\x18", "zstd") for number in range(0x50, 0x60)),  # skippable frames, as pzstd's
)
_SUFFIXES: dict[str, Packing] = {".gz": "gzip", ".zst": "zstd"}

_UNPACK = "Unpack it, and give the files in it: as they are, or packed by gzip or zstd"
_PACK_AGAIN = "Unpack it; plain text, gzip and zstd are read"
_EXPORT = "Write its rows as tab-separated text (docs/guides/own_data.md)"
_LOOK = "Look into it: a server sends such a page in place of a file. Fetch the file again"
_KINDS: tuple[tuple[bytes, str, str], ...] = (
    (b"PK\x03\x04", "a .zip archive", _UNPACK),
    (b"PK\x05\x06", "a .zip archive with nothing in it", "Fetch it again"),
    (b"7z\xbc\xaf\x27\x1c", "a .7z archive", _UNPACK),
    (b"Rar!\x1a\x07", "a .rar archive", _UNPACK),
    (b"BZh", "packed by bzip2", _PACK_AGAIN),
    (b"\xfd7zXZ\x00", "packed by xz", _PACK_AGAIN),
    (b"\x5d\x00\x00", "packed by lzma", _PACK_AGAIN),
    (b"LZIP", "packed by lzip", _PACK_AGAIN),
    (b"\x04\x22\x4d\x18", "packed by lz4", _PACK_AGAIN),
    (b"\x02\x21\x4c\x18", "packed by lz4", _PACK_AGAIN),
    (b"\xff\x06\x00\x00sNaPpY", "packed by snappy", _PACK_AGAIN),
    (b"\x89LZO", "packed by lzop", _PACK_AGAIN),
    (b"\x1f\x9d", "packed by compress", _PACK_AGAIN),
    (b"PAR1", "a Parquet file", _EXPORT),
    (b"PARE", "an encrypted Parquet file", _EXPORT),
    (b"ARROW1", "an Arrow (Feather) file", _EXPORT),
    (b"FEA1", "a Feather file", _EXPORT),
    (b"ORC", "an ORC file", _EXPORT),
    (b"Obj\x01", "an Avro file", _EXPORT),
    (b"\x93NUMPY", "a .npy array", "Binary days need no `dlrm preprocess`: give the folder to the trainer"),
    (b"\x89HDF\r\n", "an HDF5 file", _EXPORT),
    (b"SQLite format 3", "an SQLite database", _EXPORT),
    (b"SEQ\x06", "a Hadoop sequence file", _EXPORT),
    (b"\xff\xfe", "text in UTF-16", "Convert it: iconv -f UTF-16 -t UTF-8 OLD > NEW"),
    (b"\xfe\xff", "text in UTF-16", "Convert it: iconv -f UTF-16 -t UTF-8 OLD > NEW"),
    (b"\xef\xbb\xbf", "text that begins with a byte order mark", "Remove the mark: tail -c +4 OLD > NEW"),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself", "Fetch the file: git lfs pull"),
)
_TAR_AT, _TAR = 257, b"ustar"
_OTHER_SEPARATORS = {
    b",": "commas",
    b";": "semicolons",
    b"|": "bars",
    b" ": "spaces",
    b"\x01": "Hive's bytes 1",
}
_NO_TEXT = ("no text", "Fetch it again, or give another file")
_CONTROLS = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f]")


def packing_of(head: bytes, suffix: str) -> Packing | None:
    """The packing of a file, as told by its first bytes; None if it is plain.

    Args:
        suffix: that of its name. It decides if the bytes look neither like text nor like a known kind.
    """
    for magic, packing in _PACKINGS:
        if head and magic.startswith(head[: len(magic)]):
            return packing
    is_unknown = _CONTROLS.search(head) is not None and _kind_of(head) in (None, _NO_TEXT)
    return _SUFFIXES.get(suffix) if is_unknown else None


def check_kind(path: Path, head: bytes, packing: Packing | None) -> None:
    """Refuses a file that is not tab-separated text.

    Args:
        head: the file's first bytes, unpacked.

    Raises:
        DatasetError: saying what it is instead, and what to do.
    """
    if (found := _kind_of(head)) is not None:
        kind, remedy = found
        within = f"packed by {packing}, and in it " if packing else ""
        raise DatasetError(f"{path}: is {within}{kind}. Expected raw Criteo text. {remedy}.")


def _kind_of(head: bytes) -> tuple[str, str] | None:
    """The kind of a file that is not tab-separated text, and what to do with it; None for text."""
    for magic, kind, remedy in _KINDS:
        if head.startswith(magic):
            return kind, remedy
    if head[_TAR_AT:].startswith(_TAR):
        return "a tar archive", _UNPACK
    if any(head.startswith(magic) for magic, _ in _PACKINGS):
        return "packed twice", "Unpack it once"
    start = head.lstrip()[:1]
    if start == b"<":
        return "a page in HTML or XML", _LOOK
    if start and start in b"{[":
        return "JSON", f"{_LOOK}; rows in JSON can be written as tab-separated text (docs/guides/own_data.md)"
    if b"\0" in head[1::2] and b"\0" not in head[::2]:
        return "text in UTF-16", "Convert it: iconv -f UTF-16LE -t UTF-8 OLD > NEW"
    if b"\n" not in head and b"\r" in head:
        return r"text whose lines end in \r alone", r"Convert it: tr '\r' '\n' < OLD > NEW"
    return _other_separator(head)


def _other_separator(head: bytes) -> tuple[str, str] | None:
    line, _, _ = head.partition(b"\n")
    if b"\t" in line:
        return None
    for separator, name in _OTHER_SEPARATORS.items():
        if line.count(separator) >= NUM_COLUMNS // 2:
            shown = r"\001" if separator == b"\x01" else separator.decode()
            return f"text with {name} between columns", rf"Put tabs there: tr '{shown}' '\t' < OLD > NEW"
    return _NO_TEXT if _CONTROLS.search(line) else None
