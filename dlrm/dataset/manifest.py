"""What the manifest beside some days promises."""

import json
from pathlib import Path
from typing import Any

from dlrm.errors import DatasetError
from dlrm.system.files import MANIFEST_NAME, MANIFEST_VERSION, last_day, vocabulary_digest


def check_manifest(folder: Path, needs_ids: bool = True, held_out: str | None = None) -> None:
    """Where there is a manifest, its files must be there with the sizes it states.

    Args:
        needs_ids: whether day_{i}_sparse.npy must be there too.
        held_out: the only day whose files are needed; None if all are.
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
        file = folder / name
        if not file.exists():
            if not needs_ids and name.endswith("_sparse.npy"):
                continue
            raise DatasetError(f"{file}: missing, though {MANIFEST_NAME} lists it. Copy or write the folder anew.")
        if file.stat().st_size != size:
            raise DatasetError(
                f"{file}: {file.stat().st_size:,} bytes, expected {size:,} as {MANIFEST_NAME} states. "
                "Copy or write the folder anew."
            )


def read_vocabulary(folder: Path) -> str | None:
    """Digest of what ids and integers of the days in a folder mean; None if no manifest there tells.

    Raises:
        DatasetError: if the manifest is none.
    """
    path = folder / MANIFEST_NAME
    return vocabulary_digest(load_manifest(path)) if path.is_file() else None


def load_manifest(path: Path) -> dict[str, Any]:
    """What a manifest says.

    Raises:
        DatasetError: if it is none, or of another version.
    """
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["version"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DatasetError(f"{path}: not a manifest ({error!r}). Remove it to read the folder without one.") from None
    if version != MANIFEST_VERSION:
        raise DatasetError(
            f"{path}: version {version}, this dlrm reads {MANIFEST_VERSION}. Use the dlrm that wrote it."
        )
    return manifest
