"""Checks that a folder of training rows is what its manifest says."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dlrm.dataset.arrays import PARTS, measure_file, rows_of
from dlrm.dataset.days import last_day
from dlrm.dataset.manifest import MANIFEST_NAME, check_size, read_manifest
from dlrm.dataset.sums import Sum
from dlrm.errors import DatasetError
from dlrm.schema.criteo import CATEGORICAL_NAMES
from dlrm.system.console import Progress
from dlrm.system.host import available_cores
from dlrm.system.threads import in_order


def verify(folder: Path, sums: Mapping[str, Sum] = MappingProxyType({})) -> dict[str, Any]:
    """Checks every file of the folder, and every value; returns the folder's manifest.

    Args:
        sums: checksums of files by name, in addition to those in the manifest.

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
            f"{folder / MANIFEST_NAME}: not a manifest ({error!r}). Copy or write the folder again."
        ) from None
    for name, size in sizes.items():
        check_size(folder / name, size)
    for day in rows if manifest.get("kind") == "binary_days" else ():
        if missing := [name for part in PARTS if (name := f"{day}_{part}.npy") not in sizes]:
            raise DatasetError(f"{folder / MANIFEST_NAME}: lists no {missing[0]}. Preprocess the logs again.")
    progress = Progress("Verifying", sum(sizes.values()), "bytes")

    def check(name: str) -> None:
        path = folder / name
        algorithms = ("sha256", *((sums[name].algorithm,) if name in sums else ()))
        facts = measure_file(path, rows_of(name, rows), table_rows, progress, name not in unlabelled, algorithms)
        if facts["sha256"] != digests[name]:
            raise DatasetError(
                f"{path}: sha256 {facts['sha256'][:16]}..., expected {digests[name][:16]}...: its bytes have changed. "
                "Copy or write the folder again."
            )
        if name in sums:
            sums[name].check(path, facts[sums[name].algorithm])
        expected = positives.get(name.removesuffix("_labels.npy"))
        if name.endswith("_labels.npy") and facts.get("positives") != expected:
            raise DatasetError(
                f"{path}: {facts.get('positives')} positives, expected {expected} as {MANIFEST_NAME} states. "
                "Copy or write the folder again."
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


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{value!r:.40} is not a count")
    return value


def _table_rows(manifest: Mapping[str, Any]) -> list[int] | None:
    """Rows of each column's table; None for multi-hot days, whose manifest has no columns."""
    if manifest.get("kind") == "multi_hot_days":
        return None
    return [_count(manifest["columns"][name]["rows"]) for name in CATEGORICAL_NAMES]


def _check_copies(folder: Path, digests: Mapping[str, str], days: Sequence[str]) -> None:
    """Refuses a held-out day whose files are the same as those of a day that trains.

    Raises:
        DatasetError: naming both.
    """
    of_days = {day: [digests.get(f"{day}_{part}.npy") for part in PARTS] for day in days}
    held_out = last_day(days)
    for day in sorted({*days} - {held_out}):
        if None not in of_days[day] and of_days[day] == of_days[held_out]:
            raise DatasetError(
                f"{folder}: {held_out}, which is held out, has the same rows as {day}, which trains: its scores say "
                "nothing about new rows. Write the folder again without one of them."
            )
