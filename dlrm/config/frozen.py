"""The value of --freeze: names of the parts of the model that training leaves as they are. No torch here.

    t_cat_0 t_cat_9, large, dense

A name is that of a table, or `large` (tables of --large_table_gib or more), `all` (tables) or `dense` (all parameters
that are not in tables).
"""

import difflib
from collections.abc import Sequence

from dlrm.errors import ConfigError
from dlrm.schema.criteo import TABLE_NAMES

DENSE = "dense"
_NAMES = (*TABLE_NAMES, "large", "all", DENSE)
_GIB = 1 << 30
_BYTES_PER_WEIGHT = 4


def read_frozen(tokens: Sequence[str]) -> str | None:
    """The names, each once, with commas between them; None for the single word `none`.

    Raises:
        ConfigError: if no name is given, or one that does not exist.
    """
    names = list(dict.fromkeys(name for token in tokens for name in token.replace(",", " ").split()))
    if names == ["none"]:
        return None
    if not names:
        raise ConfigError(f"--freeze {' '.join(tokens)!r}: no name. Expected {_expected()}")
    for name in names:
        if name not in _NAMES:
            near = difflib.get_close_matches(name, _NAMES, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise ConfigError(f"--freeze {name[:40]}: not a part of the model{hint} Expected {_expected()}")
    return ",".join(names)


def _expected() -> str:
    return f"{TABLE_NAMES[0]} to {TABLE_NAMES[-1]}, large, all, dense, or none."


def frozen_parts(names: str | None, large: Sequence[str]) -> tuple[str, ...]:
    """The tables, in order, and `dense`, that the names of --freeze stand for.

    Args:
        names: what `read_frozen` returned.
        large: the tables that `large` stands for.
    """
    named = set() if names is None else set(names.split(","))
    if "large" in named:
        named |= set(large)
    if "all" in named:
        named |= set(TABLE_NAMES)
    return tuple(name for name in (*TABLE_NAMES, DENSE) if name in named)


def large_tables(table_rows: Sequence[int], dim: int, least_gib: float) -> list[str]:
    """Tables with at least `least_gib` GiB of fp32 weights."""
    bytes_per_row = dim * _BYTES_PER_WEIGHT
    return [
        name for name, rows in zip(TABLE_NAMES, table_rows, strict=True) if rows * bytes_per_row >= least_gib * _GIB
    ]
