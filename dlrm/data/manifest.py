"""What the manifest beside some days promises."""

import json
from pathlib import Path
from typing import Any

from dlrm.artifacts import MANIFEST_NAME, MANIFEST_VERSION
from dlrm.errors import DatasetError


def check_manifest(folder: Path, needs_ids: bool = True) -> None:
    """Where there is a manifest, its files must be there with the sizes it states.

    Args:
        needs_ids: whether day_{i}_sparse.npy must be there too.
    """
    path = folder / MANIFEST_NAME
    if not path.exists():
        return
    manifest = load_manifest(path)
    try:
        sizes = {str(name): int(entry["bytes"]) for name, entry in manifest["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DatasetError(f"{path}: not a manifest ({error!r}). Remove it to read the folder without one.") from None
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
