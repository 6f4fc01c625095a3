"""Rules of where tables may go: read, shortened, refused."""

from pathlib import Path

import pytest

from dlrm.config.flags import parse_args
from dlrm.config.table_rules import TableConstraint, constraints_of_tables, parse_rules, read_rules
from dlrm.errors import ConfigError


def test_the_most_specific_rule_counts() -> None:
    rules = parse_rules("all = fused; large = row_wise fused_uvm_caching cache=0.25; t_cat_3 = table_wise ranks=4, 1")
    chosen = constraints_of_tables(rules, large_tables=["t_cat_2", "t_cat_3"])
    assert chosen["t_cat_0"] == TableConstraint(compute_kernel="fused")
    assert chosen["t_cat_2"] == TableConstraint("row_wise", "fused_uvm_caching", 0.25)
    assert chosen["t_cat_3"] == TableConstraint("table_wise", ranks=(1, 4))
    assert list(constraints_of_tables(parse_rules("t_cat_7 = fused"), [])) == ["t_cat_7"]


def test_a_file_says_the_same_as_a_line(tmp_path: Path) -> None:
    file = tmp_path / "rules of tables.txt"
    file.write_text("# for two hosts\nlarge =  row_wise  # in host memory\n\nt_cat_0 = table_wise ranks=0\n")
    config = parse_args(["--table_constraints", str(file)])
    assert config.sharding.table_constraints == "large = row_wise; t_cat_0 = table_wise ranks=0"
    assert read_rules("large=row_wise;t_cat_0=table_wise ranks=0") == "large=row_wise; t_cat_0=table_wise ranks=0"


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("no_such_file", "neither rules, as in 'large = row_wise', nor a file"),
        ("t_cat_0 =", "expected TABLES = WORDS"),
        ("= row_wise", "expected TABLES = WORDS"),
        ("t_cat_26 = row_wise", "no table t_cat_26"),
        ("t_cat_0 = rowwise", "rowwise: expected a sharding type"),
        ("t_cat_0 = row_wise table_wise", "table_wise is a second sharding type"),
        ("t_cat_0 = fused; t_cat_0 = row_wise", "a second rule of t_cat_0"),
        ("t_cat_0 = fused_uvm_caching cache=0", "cache=0: expected"),
        ("t_cat_0 = fused_uvm_caching cache=1.5", "cache=1.5: expected a share above 0 and up to 1"),
        ("t_cat_0 = fused cache=0.5", "cache= needs fused_uvm_caching"),
        ("t_cat_0 = ranks=-1", "ranks=-1: expected numbers of ranks"),
        (
            "t_cat_0 = table_wise ranks=a",
            "ranks=a: expected numbers of ranks with commas between them, as in ranks=0,1",
        ),
        ("t_cat_0 = row_wise ranks=0", "ranks= needs table_wise"),
        ("t_cat_0 = row_wise dense", "the dense kernel is for data_parallel"),
        ("t_cat_0 = data_parallel fused", "data_parallel has the dense kernel only"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(rules: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_args(["--table_constraints", rules])
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("--table_constraints")


def test_large_needs_a_rule() -> None:
    with pytest.raises(ConfigError, match=r"--large_table_gib 2.0 needs a rule of `large`"):
        parse_args(["--large_table_gib", "2"])
