"""The list of raw files: whether one is there twice, and which ones train."""

from collections.abc import Sequence
from pathlib import Path

from dlrm.dataset.name_order import without_packing
from dlrm.errors import ConfigError
from dlrm.system.console import plural


def check_distinct(raw: Sequence[Path]) -> None:
    """Refuses a file that is given twice, be it through a link, or packed and unpacked.

    Raises:
        ConfigError: naming both.
    """
    remedy = "Leave one of them out, or allow it with --repeated_rows allow."
    by_node: dict[tuple[int, int], Path] = {}
    by_name: dict[str, Path] = {}
    for path in raw:
        stat = path.stat()
        other = by_node.setdefault((stat.st_dev, stat.st_ino), path)
        if other is not path:
            same = f"{path}: is given twice" if path == other else f"{path}: is the same file as {other}"
            raise ConfigError(f"{same}, so its rows would be there twice. {remedy}")
        other = by_name.setdefault(without_packing(str(path)), path)
        if other is not path:
            raise ConfigError(f"{path}: is {other.name} in another packing, so its rows would be there twice. {remedy}")


def describe_parts(names: Sequence[str], is_split: bool) -> str:
    """Says which files train, and which one is held out.

    Args:
        is_split: whether a single file has rows of both kinds, as that of criteo_kaggle.
    """
    *earlier, last = names
    if is_split:
        return f"Training: the first six sevenths of {last}. Held out: the last seventh."
    if not earlier:
        return f"Held out: all of {last}."
    span = earlier[0] if len(earlier) == 1 else f"{earlier[0]} to {earlier[-1]}"
    return f"Training: {span} ({plural(len(earlier), 'file')}). Held out: {last}."
