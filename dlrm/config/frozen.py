"""Parts of the model that training leaves as they are, as a user names them. No torch here.

    t_cat_0 t_cat_9, large, dense

Names of tables, `large` (those of --large_table_gib or more), `all` tables, `dense` (all parameters but the tables).
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
    """Names, each once, with a comma between them; None for the single word `none`.

    Raises:
        ConfigError: if there is no name, or one that does not exist.
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
    """Tables, in order, and `dense`, that such names stand for."""
    named = set() if names is None else set(names.split(","))
    if "large" in named:
        named |= set(large)
    if "all" in named:
        named |= set(TABLE_NAMES)
    return tuple(name for name in (*TABLE_NAMES, DENSE) if name in named)


def large_tables(table_rows: Sequence[int], dim: int, least_gib: float) -> list[str]:
    """Tables with at least so many GiB of weights."""
    bytes_per_row = dim * _BYTES_PER_WEIGHT
    return [
        name for name, rows in zip(TABLE_NAMES, table_rows, strict=True) if rows * bytes_per_row >= least_gib * _GIB
    ]
