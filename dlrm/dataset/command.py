"""`dlrm verify`: checks a folder of training rows, and says what is in it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from dlrm.config.config import optional
from dlrm.config.flags import parse_flags
from dlrm.dataset.bare import verify_bare
from dlrm.dataset.days import KAGGLE_DAY, last_day
from dlrm.dataset.manifest import MANIFEST_NAME
from dlrm.dataset.name_order import order_files
from dlrm.dataset.sums import Sum, find_lists, read_lists
from dlrm.dataset.verify import verify
from dlrm.errors import ConfigError
from dlrm.system.console import plural


@dataclass(frozen=True)
class VerifyConfig:
    """Checks a folder that `dlrm preprocess` or `dlrm materialize` wrote against its manifest: files and their sizes,
    checksums, ranges of ids, labels and dense values, share of positives, a held-out day that is a copy. If there is no
    manifest, it checks types, shapes and all values. Says which day is held out. Exit code 2 at the first fault."""

    folder: tyro.conf.Positional[str]
    """Folder with manifest.json, or with day_0_dense.npy, ..."""

    sums: Annotated[str | None, optional("those in the folder", "FILE")] = None
    """List of checksums, as `md5sum` and `sha256sum` write it. Without it, files such as md5sums.txt in the folder
    count."""


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
    days = verify_bare(folder, sums)
    for day in days:
        labels = "no labels" if day.positives is None else f"{day.positives / max(1, day.rows):.2%} positive"
        held_out = _held_out(day.name, [one.name for one in days])
        print(f"{day.name}: {day.rows:,} rows, {labels}, ids up to {day.largest_F.max():,}{held_out}")
    rows = np.maximum.reduce([day.largest_F for day in days]) + 1
    print(f"{folder}: no {MANIFEST_NAME}; types, shapes and values are right. Tables for all ids have these rows:")
    print(f"--num_embeddings_per_feature {','.join(map(str, rows.tolist()))}")


def _held_out(name: str, days: Iterable[str]) -> str:
    """Words for a day that is held out, as a whole or in part; empty for any other day."""
    if name == KAGGLE_DAY:
        return ", the last seventh held out"
    return ", held out" if name == last_day(days) else ""


def _find_disorder(sources: Sequence[str]) -> str | None:
    """A warning if the days were made from files in the order in which a shell sorts names; None if not."""
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
