"""The manifest of a folder of days: what it says, and whether the files beside it are as it says."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dlrm.dataset.days import last_day
from dlrm.errors import DatasetError
from dlrm.system.files import sha256_of

MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 1


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder that must have one.

    Raises:
        DatasetError: if there is none, or this version can't read it.
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
        raise DatasetError(f"{path}: not a manifest ({error!r}). Copy or write the folder again.") from None
    if type(version) is not int or version != MANIFEST_VERSION:
        raise _other_version(path, version)
    return manifest


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def load_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a folder that can be read without one.

    Raises:
        DatasetError: if the file is not a manifest, or is one of another version.
    """
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["version"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DatasetError(f"{path}: not a manifest ({error!r}). Remove it to read the folder without one.") from None
    if version != MANIFEST_VERSION:
        raise _other_version(path, version)
    return manifest


def _other_version(path: Path, version: object) -> DatasetError:
    return DatasetError(f"{path}: version {version}, this dlrm reads {MANIFEST_VERSION}. Use the dlrm that wrote it.")


def check_manifest(folder: Path, needs_ids: bool = True, held_out: str | None = None) -> None:
    """Refuses a folder without the files that its manifest lists, or with files of other sizes.

    A folder without a manifest passes.

    Args:
        needs_ids: whether day_{i}_sparse.npy must be there too.
        held_out: the only day whose files are needed; None if all are.

    Raises:
        DatasetError: naming the file.
    """
    path = folder / MANIFEST_NAME
    if not path.exists():
        return
    manifest = load_manifest(path)
    try:
        sizes = {str(name): int(entry["bytes"]) for name, entry in manifest["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DatasetError(f"{path}: not a manifest ({error!r}). Remove it to read the folder without one.") from None
    if held_out is not None:
        days = manifest.get("days")
        if isinstance(days, dict) and days and held_out != (last := last_day(days)):
            raise DatasetError(
                f"{folder}: the last day there is {held_out}, and {MANIFEST_NAME} says that {last} is held out. Copy "
                "its files too, or remove the manifest."
            )
        sizes = {name: size for name, size in sizes.items() if name.startswith(f"{held_out}_")}
    for name, size in sizes.items():
        if needs_ids or not name.endswith("_sparse.npy") or (folder / name).exists():
            check_size(folder / name, size)


def check_size(path: Path, size: int) -> None:
    """Refuses a file that is missing, or has another size than its manifest states.

    Raises:
        DatasetError: naming the file.
    """
    if not path.is_file():
        raise DatasetError(f"{path}: missing, though {MANIFEST_NAME} lists it. Copy or write the folder again.")
    if path.stat().st_size != size:
        raise DatasetError(
            f"{path}: {path.stat().st_size:,} bytes, expected {size:,} as {MANIFEST_NAME} states. "
            "Copy or write the folder again."
        )


def check_vocabulary(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Refuses a folder whose vocabulary files are not those of its manifest.

    Raises:
        DatasetError: naming the file.
    """
    listed = {name: entry for name, entry in manifest["files"].items() if name.startswith("vocabulary/")}
    found = {path.relative_to(folder).as_posix() for path in (folder / "vocabulary").glob("*.parquet")}
    for name in sorted(listed.keys() | found):
        path = folder / name
        if name not in listed or not path.is_file() or sha256_of(path) != listed[name]["sha256"]:
            raise DatasetError(f"{path}: not as {MANIFEST_NAME} states. Copy or write the folder again.")


def read_vocabulary(folder: Path) -> str | None:
    """`vocabulary_digest` of the days in a folder; None without a manifest.

    Raises:
        DatasetError: if the file is not a manifest.
    """
    path = folder / MANIFEST_NAME
    return vocabulary_digest(load_manifest(path)) if path.is_file() else None


def vocabulary_digest(manifest: Mapping[str, Any]) -> str | None:
    """Digest of what the ids and integers of some days mean; None if their manifest does not tell.

    It covers the vocabulary, the largest index, and how integers were transformed. Days with the same digest suit the
    same model.
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
    except (KeyError, TypeError, AttributeError):  # days that another program wrote
        return None
