"""Whether a folder of binary days is what its manifest says."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, BinaryIO

import numpy as np
import numpy.typing as npt
import tyro

from dlrm.artifacts import MANIFEST_NAME, MANIFEST_VERSION, last_day, read_npy_header, sha256_of
from dlrm.config import optional
from dlrm.console import Progress, plural
from dlrm.errors import ConfigError, DatasetError
from dlrm.flags import parse_flags
from dlrm.host import available_cores
from dlrm.preprocess.files import order_files
from dlrm.preprocess.sums import Sum, find_lists, read_lists
from dlrm.preprocess.threads import in_order
from dlrm.schema import CATEGORICAL_NAMES, NUM_CATEGORICAL_FEATURES, NUM_INTEGER_FEATURES

_CHUNK_BYTES = 4 << 20
_DTYPES = {
    "dense": (np.dtype("<f4"),),
    "sparse": (np.dtype("<i4"), np.dtype("<i8")),
    "labels": (np.dtype("<i4"),),
}
PARTS = {"dense": NUM_INTEGER_FEATURES, "sparse": NUM_CATEGORICAL_FEATURES, "labels": 1}
"""The arrays of a day, and their columns."""


@dataclass(frozen=True)
class VerifyConfig:
    """Checks a folder that `dlrm preprocess` or `dlrm materialize` wrote against its manifest: files and their sizes,
    checksums, ranges of ids, labels and dense values, share of positives, a held-out day that is a copy. Of binary days
    without a manifest it checks types, shapes and all values. Says which day is held out. Exit code 2 at the first
    fault."""

    folder: tyro.conf.Positional[str]
    """Folder with manifest.json, or with day_0_dense.npy, ..."""

    sums: Annotated[str | None, optional("those in the folder", "FILE")] = None
    """List of checksums, as `md5sum` and `sha256sum` write it. Without it, files such as md5sums.txt in the folder
    count."""


def read_manifest(folder: Path) -> dict[str, Any]:
    """The folder's manifest.

    Raises:
        DatasetError: if there is none, or it can't be read by this version.
    """
    path = folder / MANIFEST_NAME
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such folder. Expected one that `dlrm preprocess` wrote.")
    if not path.is_file():
        raise DatasetError(f"{path}: missing. Expected a folder that `dlrm preprocess` wrote.")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
        version = manifest["version"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DatasetError(f"{path}: not a manifest ({error!r}). Copy or write the folder anew.") from None
    if type(version) is not int or version != MANIFEST_VERSION:
        raise DatasetError(
            f"{path}: version {version}, this dlrm reads {MANIFEST_VERSION}. Use the dlrm that wrote it."
        )
    return manifest


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def verify(folder: Path, sums: Mapping[str, Sum] = MappingProxyType({})) -> dict[str, Any]:
    """Checks the folder; returns its manifest.

    Args:
        sums: checksums of files, beside those that the manifest has.

    Raises:
        DatasetError: naming the file, what was found and what was expected.
    """
    manifest = read_manifest(folder)
    try:
        days = manifest["days"]
        table_rows = _table_rows(manifest)
        sizes = {name: _count(entry["bytes"]) for name, entry in manifest["files"].items()}
        digests = {name: str(entry["sha256"]) for name, entry in manifest["files"].items()}
        rows = {name: _count(day["rows"]) for name, day in days.items()}
        positives = {name: _count(day["positives"]) for name, day in days.items() if "positives" in day}
        unlabelled = {f"{name}_labels.npy" for name, day in days.items() if day.get("labels") is False}
        outside = [name for name in sizes if Path(name).is_absolute() or ".." in Path(name).parts]
        if outside or not rows:
            raise ValueError(f"a file outside the folder: {outside[0]}" if outside else "no days")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DatasetError(
            f"{folder / MANIFEST_NAME}: not a manifest ({error!r}). Copy or write the folder anew."
        ) from None
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            raise DatasetError(f"{path}: missing, though {MANIFEST_NAME} lists it. Copy or write the folder anew.")
        if path.stat().st_size != size:
            raise DatasetError(
                f"{path}: {path.stat().st_size:,} bytes, expected {size:,} as {MANIFEST_NAME} states. "
                "Copy or write the folder anew."
            )
    for day in rows if manifest.get("kind") == "binary_days" else ():
        if missing := [name for part in PARTS if (name := f"{day}_{part}.npy") not in sizes]:
            raise DatasetError(f"{folder / MANIFEST_NAME}: lists no {missing[0]}. Preprocess the logs anew.")
    progress = Progress("Verifying", sum(sizes.values()), "bytes")

    def check(name: str) -> None:
        path = folder / name
        algorithms = ("sha256", *((sums[name].algorithm,) if name in sums else ()))
        facts = measure_file(path, rows_of(name, rows), table_rows, progress, name not in unlabelled, algorithms)
        if facts["sha256"] != digests[name]:
            raise DatasetError(
                f"{path}: sha256 {facts['sha256'][:16]}..., expected {digests[name][:16]}...: its bytes have changed. "
                "Copy or write the folder anew."
            )
        if name in sums:
            sums[name].check(path, facts[sums[name].algorithm])
        expected = positives.get(name.removesuffix("_labels.npy"))
        if name.endswith("_labels.npy") and facts.get("positives") != expected:
            raise DatasetError(
                f"{path}: {facts.get('positives')} positives, expected {expected} as {MANIFEST_NAME} states. "
                "Copy or write the folder anew."
            )

    with ThreadPoolExecutor(available_cores()) as pool:
        for _ in in_order(pool, sorted(sizes), check, available_cores()):
            pass
    progress.close()
    for name in sorted(sums.keys() - sizes.keys()):
        facts = measure_file(folder / name, None, None, digests=(sums[name].algorithm,))
        sums[name].check(folder / name, facts[sums[name].algorithm])
    _check_copies(folder, digests, list(rows))
    return manifest


def check_vocabulary(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Refuses a vocabulary whose files are not those of its manifest.

    Raises:
        DatasetError: naming the file.
    """
    listed = {name: entry for name, entry in manifest["files"].items() if name.startswith("vocabulary/")}
    found = {path.relative_to(folder).as_posix() for path in (folder / "vocabulary").glob("*.parquet")}
    for name in sorted(listed.keys() | found):
        path = folder / name
        if name not in listed or not path.is_file() or sha256_of(path) != listed[name]["sha256"]:
            raise DatasetError(f"{path}: not as {MANIFEST_NAME} states. Copy or write the folder anew.")


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{value!r:.40} is no count")
    return value


def _table_rows(manifest: Mapping[str, Any]) -> list[int] | None:
    """Rows of each column's table; None for multi-hot days."""
    if manifest.get("kind") == "multi_hot_days":
        return None
    return [_count(manifest["columns"][name]["rows"]) for name in CATEGORICAL_NAMES]


def rows_of(name: str, rows: Mapping[str, int]) -> int | None:
    """Rows of an array file; None for a file of another kind."""
    return next((rows[day] for day in rows for part in PARTS if name == f"{day}_{part}.npy"), None)


def measure_file(
    path: Path,
    rows: int | None,
    table_rows: Sequence[int] | None,
    progress: Progress | None = None,
    has_labels: bool = True,
    digests: Sequence[str] = ("sha256",),
) -> dict[str, Any]:
    """Size and checksums of a file in one pass, and, of an array of a day, checks of its values.

    Args:
        rows: rows of the day; None for a file that is not an array.
        table_rows: ids of column c are below table_rows[c]; None where there is no such bound.
        has_labels: whether labels are 0 and 1; all are -1 otherwise.
        digests: algorithms of hashlib.

    Raises:
        DatasetError: at a header that does not fit, or a value that can't be.
    """
    facts: dict[str, Any] = {"bytes": path.stat().st_size}
    sums = {algorithm: hashlib.new(algorithm, usedforsecurity=False) for algorithm in digests}
    with path.open("rb") as file:
        checker = None
        if rows is not None:
            part = path.stem.rsplit("_", 1)[1]
            dtype = _read_header(path, file, part, rows)
            header = file.tell()
            file.seek(0)
            for one in sums.values():
                one.update(file.read(header))
                file.seek(0)
            file.seek(header)
            checker = _ArrayChecker(path, part, dtype, table_rows, has_labels)
        width = checker.row_bytes if checker else 1
        while chunk := file.read(_CHUNK_BYTES // width * width):
            for one in sums.values():
                one.update(chunk)
            if checker:
                checker.add(chunk)
            if progress:
                progress.advance(len(chunk))
    if checker and checker.part == "labels" and has_labels:
        facts["positives"] = checker.positives
    if checker and checker.part == "sparse" and table_rows is None:
        facts["largest"] = checker.largest_F
    return {**facts, **{algorithm: one.hexdigest() for algorithm, one in sums.items()}}


def _read_header(path: Path, file: BinaryIO, part: str, rows: int) -> np.dtype[Any]:
    try:
        shape, fortran_order, dtype = read_npy_header(file)
    except ValueError as error:
        raise DatasetError(f"{path}: not a readable .npy file ({error}). Copy or write the folder anew.") from None
    expected = (rows, PARTS[part])
    if shape != expected or fortran_order or dtype not in _DTYPES[part]:
        raise DatasetError(
            f"{path}: {dtype!s:.40} {list(shape)}, expected {_DTYPES[part][0]} {list(expected)}. Copy or write the "
            "folder anew."
        )
    size = file.tell() + rows * PARTS[part] * dtype.itemsize
    if path.stat().st_size != size:
        raise DatasetError(
            f"{path}: {path.stat().st_size:,} bytes, expected {size:,} by its header. Copy or write the folder anew."
        )
    return dtype


class _ArrayChecker:
    """Values of one array, a chunk of whole rows at a time."""

    def __init__(
        self, path: Path, part: str, dtype: np.dtype[Any], table_rows: Iterable[int] | None, has_labels: bool
    ) -> None:
        self.path, self.part, self.positives = path, part, 0
        self._has_labels = has_labels
        self.largest_F = np.full(PARTS[part], -1, np.int64)
        self.row_bytes = PARTS[part] * dtype.itemsize
        self._dtype = dtype
        self._limits = None if table_rows is None else np.array(list(table_rows))
        self._row = 0

    def add(self, chunk: bytes) -> None:
        """Checks some rows."""
        values = np.frombuffer(chunk, self._dtype).reshape(-1, PARTS[self.part])
        bad, expected = self._find_bad(values)
        if bad is not None:
            row, column = np.argwhere(bad)[0]
            raise DatasetError(
                f"{self.path}: {values[row, column]} at row {self._row + row}, column {column}, expected {expected}. "
                "Preprocess the logs anew."
            )
        self._row += len(values)

    def _find_bad(self, values: npt.NDArray[Any]) -> tuple[npt.NDArray[np.bool_] | None, str]:
        """Which values can't be, None for none, and what was expected."""
        if self.part == "dense":
            return None if np.isfinite(values).all() else ~np.isfinite(values), "a finite number"
        if self.part == "labels" and not self._has_labels:
            return (values != -1) if (values != -1).any() else None, "-1 in rows without labels"
        if self.part == "labels":
            self.positives += int(values.sum())
            return (values < 0) | (values > 1) if values.min() < 0 or values.max() > 1 else None, "0 or 1"
        limits = np.full(values.shape[1], np.iinfo(values.dtype).max) if self._limits is None else self._limits
        self.largest_F = np.maximum(self.largest_F, values.max(axis=0))
        if values.min() >= 0 and (values.max(axis=0) < limits).all():
            return None, ""
        return (values < 0) | (values >= limits), "0 or more, and less than its table's rows"


def _held_out(name: str, days: Iterable[str]) -> str:
    """What to say of a day that is held out, or of which some rows are."""
    if name == "train":
        return ", the last seventh held out"
    return ", held out" if name == last_day(days) else ""


def _find_disorder(sources: Sequence[str]) -> str | None:
    """A warning if days were made from files that a shell had sorted as text."""
    try:
        ordered, _ = order_files(sources)
    except ConfigError:
        return None
    if ordered == list(sources):
        return None
    return (
        "Warning: the raw files were not taken in the order of the numbers in their names, in which "
        f"{ordered[-1]} is the last one: {sources[-1]} is held out. Preprocess them again."
    )


def _check_copies(folder: Path, digests: Mapping[str, str], days: Sequence[str]) -> None:
    """Refuses days of which the held-out one has the files of one that trains.

    Raises:
        DatasetError: naming both.
    """
    of_days = {day: [digests.get(f"{day}_{part}.npy") for part in PARTS] for day in days}
    held_out = last_day(days)
    for day in sorted({*days} - {held_out}):
        if None not in of_days[day] and of_days[day] == of_days[held_out]:
            raise DatasetError(
                f"{folder}: {held_out}, which is held out, has the same rows as {day}, which trains: its scores say "
                "nothing of new rows. Write the folder again without one of them."
            )


def main(argv: Sequence[str]) -> None:
    """`dlrm verify`."""
    config = parse_flags(VerifyConfig, argv, "dlrm verify")
    folder = Path(config.folder)
    lists = [Path(config.sums)] if config.sums is not None else find_lists(folder) if folder.is_dir() else []
    sums = read_lists(lists, folder)
    if folder.is_dir() and not (folder / MANIFEST_NAME).exists():
        _tell_bare(folder, sums)
    else:
        _tell(folder, verify(folder, sums))
    if sums:
        print(f"{config.folder}: {plural(len(sums), 'file')} as in {', '.join(map(str, lists))}")


def _tell(folder: Path, manifest: Mapping[str, Any]) -> None:
    days = manifest["days"]
    for name, day in days.items():
        positive = f", {day['positives'] / max(1, day['rows']):.2%} positive" if "positives" in day else ""
        positive += ", without labels" if day.get("labels") is False else ""
        source = f", from {day['source']}" if "source" in day else ""
        print(f"{name}: {day['rows']:,} rows{positive}{source}{_held_out(name, days)}")
    if (warning := _find_disorder([str(day.get("source", "")) for day in days.values()])) is not None:
        print(warning)
    print(f"{folder}: {len(manifest['files'])} files as in {MANIFEST_NAME}")


def _tell_bare(folder: Path, sums: Mapping[str, Sum]) -> None:
    from dlrm.preprocess.bare import verify_bare

    days = verify_bare(folder, sums)
    for day in days:
        labels = "no labels" if day.positives is None else f"{day.positives / max(1, day.rows):.2%} positive"
        held_out = _held_out(day.name, [one.name for one in days])
        print(f"{day.name}: {day.rows:,} rows, {labels}, ids up to {day.largest_F.max():,}{held_out}")
    rows = np.maximum.reduce([day.largest_F for day in days]) + 1
    print(f"{folder}: no {MANIFEST_NAME}; types, shapes and values are right. Tables for all ids have these rows:")
    print(f"--num_embeddings_per_feature {','.join(map(str, rows.tolist()))}")
