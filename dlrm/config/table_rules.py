"""The value of --table_constraints: rules of where tables may go. No torch here.

A rule is TABLES = WORDS. A semicolon or the end of a line ends a rule, # begins a comment:

    large = row_wise; t_cat_0 t_cat_9 = table_wise ranks=0,1; t_cat_2 = fused_uvm_caching cache=0.2

TABLES are names of tables, `large` (tables of --large_table_gib or more) or `all`. WORDS are a sharding type, a compute
kernel, cache=SHARE of the rows to keep in the GPU's memory, and ranks=R,R,... that may hold the table. A table follows
one rule, the most specific one: that of its name, else of `large`, else of `all`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dlrm.errors import ConfigError
from dlrm.schema.criteo import TABLE_NAMES

SHARDING_TYPES = (
    "table_wise",
    "row_wise",
    "column_wise",
    "table_row_wise",
    "table_column_wise",
    "grid_shard",
    "data_parallel",
)
"""TorchRec's sharding types, the simplest first."""
ROW_SPLITS = ("row_wise", "table_row_wise", "grid_shard")
COMPUTE_KERNELS = ("dense", "fused", "fused_uvm", "fused_uvm_caching")
_GROUPS = ("large", "all")


@dataclass(frozen=True)
class TableConstraint:
    """What a rule asks for. The planner chooses what is None.

    Attributes:
        sharding_type: one of `SHARDING_TYPES`.
        compute_kernel: one of `COMPUTE_KERNELS`.
        cache_ratio: share of the table's rows, above 0 and at most 1, that a cache in GPU memory holds.
        ranks: the ranks that may hold the table.
    """

    sharding_type: str | None = None
    compute_kernel: str | None = None
    cache_ratio: float | None = None
    ranks: tuple[int, ...] | None = None


def read_rules(value: str) -> str:
    """Rules on one line, without comments.

    Args:
        value: the rules; or, if it has no = in it, the name of a file of rules.

    Raises:
        ConfigError: if the file can't be read, or a rule makes no sense.
    """
    text = value
    if "=" not in value:
        try:
            text = Path(value).read_text(encoding="utf-8-sig")
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"--table_constraints {value[:80]!r}: neither rules, as in 'large = row_wise', nor a file of them "
                f"({getattr(error, 'strerror', None) or 'not UTF-8'})"
            ) from None
    rules = [rule for line in text.splitlines() for rule in line.split("#", 1)[0].split(";")]
    shortened = "; ".join(" ".join(rule.split()) for rule in rules if rule.strip())
    if not shortened:
        raise ConfigError(f"--table_constraints {value[:80]!r}: holds no rule. Expected one, as in 'large = row_wise'")
    parse_rules(shortened)
    return shortened


def parse_rules(text: str) -> dict[str, TableConstraint]:
    """The constraint of each name that the rules have on their left: of a table, `large` or `all`.

    Raises:
        ConfigError: if a rule makes no sense, or two rules have the same name.
    """
    constraints: dict[str, TableConstraint] = {}
    for rule in text.split(";"):
        names, separator, words = rule.partition("=")
        if not (separator and names.split() and words.split()):
            raise _refusal(rule, "expected TABLES = WORDS, as in t_cat_0 = row_wise")
        constraint = _parse_words(rule, re.sub(r"\s*([=,])\s*", r"\1", words).split())
        for name in names.split():
            if name not in (*TABLE_NAMES, *_GROUPS):
                raise _refusal(rule, f"no table {name}. Expected {TABLE_NAMES[0]} to {TABLE_NAMES[-1]}, large or all")
            if name in constraints:
                raise _refusal(rule, f"a second rule of {name}. Expected one")
            constraints[name] = constraint
    return constraints


def _parse_words(rule: str, words: Sequence[str]) -> TableConstraint:
    found: dict[str, object] = {}

    def add(kind: str, value: object) -> None:
        if kind in found:
            raise _refusal(rule, f"{value} is a second {kind.replace('_', ' ')}. Expected one")
        found[kind] = value

    for word in words:
        if word in SHARDING_TYPES:
            add("sharding_type", word)
        elif word in COMPUTE_KERNELS:
            add("compute_kernel", word)
        elif re.fullmatch(r"cache=(0?\.\d+|1(\.0*)?)", word) and float(word[6:]) > 0:
            add("cache_ratio", float(word[6:]))
        elif re.fullmatch(r"ranks=\d{1,9}(,\d{1,9})*", word):
            add("ranks", tuple(sorted({int(rank) for rank in word[6:].split(",")})))
        else:
            raise _refusal(rule, f"{word[:40]}: expected {_expected_instead(word)}")
    if found.get("compute_kernel") == "dense":
        found.setdefault("sharding_type", "data_parallel")  # no other sharding type has this kernel
    constraint = TableConstraint(**found)  # type: ignore[arg-type]
    _check(rule, constraint)
    return constraint


def _expected_instead(word: str) -> str:
    if word.startswith("ranks="):
        return "numbers of ranks with commas between them, as in ranks=0,1"
    if word.startswith("cache="):
        return "a share above 0 and up to 1, as in cache=0.2"
    return (
        f"a sharding type ({', '.join(SHARDING_TYPES)}), a kernel ({', '.join(COMPUTE_KERNELS)}), cache=SHARE or "
        "ranks=RANK,RANK,..."
    )


def _check(rule: str, constraint: TableConstraint) -> None:
    is_replicated = constraint.sharding_type == "data_parallel"
    is_dense = constraint.compute_kernel == "dense"
    if is_dense and constraint.sharding_type not in (None, "data_parallel"):
        raise _refusal(rule, "the dense kernel is for data_parallel. Use fused")
    if is_replicated and constraint.compute_kernel not in (None, "dense"):
        raise _refusal(rule, "data_parallel has the dense kernel only. Leave the kernel out")
    if constraint.cache_ratio is not None and constraint.compute_kernel != "fused_uvm_caching":
        raise _refusal(rule, "cache= needs fused_uvm_caching")
    if constraint.ranks is not None and constraint.sharding_type not in ("table_wise", "column_wise"):
        raise _refusal(rule, "ranks= needs table_wise (one of the ranks) or column_wise (a slice on each)")


def _refusal(rule: str, why: str) -> ConfigError:
    return ConfigError(f"--table_constraints '{rule.strip()[:120]}': {why}.")


def constraints_of_tables(
    constraints: Mapping[str, TableConstraint], large_tables: Sequence[str]
) -> dict[str, TableConstraint]:
    """The constraint of each table that a rule is about, by table name.

    Args:
        constraints: what `parse_rules` returned.
        large_tables: the tables that `large` stands for.
    """
    chosen = {}
    for name in TABLE_NAMES:
        selectors = (name, "large", "all") if name in large_tables else (name, "all")
        rule = next((constraints[selector] for selector in selectors if selector in constraints), None)
        if rule is not None:
            chosen[name] = rule
    return chosen
