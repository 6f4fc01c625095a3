"""Which parts of a model --freeze names."""

import json
from pathlib import Path

import pytest

from dlrm.assembly.optimizers import allowed_sharding_types
from dlrm.checkpoint.compatibility import misfits
from dlrm.config.config import Config
from dlrm.config.flags import parse_args
from dlrm.cost.optimizer_state import table_state_floats
from dlrm.errors import ConfigError, PlanError
from dlrm.schema.criteo import TABLE_NAMES

LARGE = ["--num_embeddings_per_feature", ",".join(["1000", "2000000", *["1000"] * 24]), "--large_table_gib", "0.1"]


@pytest.mark.parametrize(
    ("argv", "names", "frozen"),
    [
        ([], None, ()),
        (["--freeze", "t_cat_9,t_cat_0"], "t_cat_9,t_cat_0", ("t_cat_0", "t_cat_9")),
        (["--freeze", "t_cat_9", "t_cat_0", "t_cat_9", "--adagrad"], "t_cat_9,t_cat_0", ("t_cat_0", "t_cat_9")),
        (["--freeze", " t_cat_9  dense, "], "t_cat_9,dense", ("t_cat_9", "dense")),
        (["--freeze=all"], "all", TABLE_NAMES),
        (["--freeze", "dense"], "dense", ("dense",)),
        (["--freeze", "none"], None, ()),
        (["--freeze", "large,t_cat_3", *LARGE], "large,t_cat_3", ("t_cat_1", "t_cat_3")),
    ],
)
def test_names_stand_apart_by_commas_or_spaces(argv: list[str], names: str | None, frozen: tuple[str, ...]) -> None:
    config = parse_args(argv)
    assert (config.optimizer.freeze, config.frozen) == (names, frozen)
    assert Config.from_json(json.loads(json.dumps(config.to_json()))).frozen == frozen


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--freeze", "t_cat_99"], "--freeze t_cat_99: not a part of the model; did you mean t_cat_9?"),
        (["--freeze", "t_cat_1", "dence"], "--freeze dence: not a part of the model; did you mean dense?"),
        (["--freeze", "cat_3"], "did you mean t_cat_3?"),
        (["--freeze", "?"], "--freeze ?: not a part of the model. Expected t_cat_0 to t_cat_25, large, all, dense"),
        (["--freeze", "none,t_cat_1"], "--freeze none: not a part of the model"),
        (["--freeze", ","], "--freeze ',': no name. Expected t_cat_0"),
        (["--freeze"], "--freeze '': no name"),
        (["--freeze", "all", "dense"], "--freeze all,dense: leaves nothing to train"),
        (["--freeze", ",".join((*TABLE_NAMES, "dense"))], "leaves nothing to train"),
        (["--freeze", "large"], "--freeze large: no table has the 1 GiB of --large_table_gib"),
        (["--freeze", "t_cat_1", "--pipeline", "prefetch"], "--freeze t_cat_1 with --pipeline prefetch"),
        (
            ["--freeze", "dense", "--large_table_gib", "2"],
            "needs a rule of `large` in --table_constraints, or --freeze",
        ),
    ],
)
def test_what_can_not_be_frozen_is_one_line(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_args(argv)
    assert message in str(refused.value)


def test_a_config_that_was_edited_is_checked_too(tmp_path: Path) -> None:
    content = parse_args(["--freeze", "dense"]).to_json()
    content["optimizer"]["freeze"] = "t_cat_77"
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="--freeze t_cat_77: not a part of the model"):
        parse_args(["--config", str(tmp_path / "config.json")])


def test_a_training_is_resumed_with_the_same_parts_frozen_however_they_are_named() -> None:
    saved = parse_args(["--freeze", "all"])
    assert misfits(saved, parse_args(["--freeze", ",".join(reversed(TABLE_NAMES))])) == []
    assert [str(found) for found in misfits(saved, parse_args([]))] == ["--freeze all (here not given)"]
    large = parse_args(["--freeze", "large", *LARGE])
    assert misfits(large, parse_args(["--freeze", "large", *LARGE[:-1], "0.2"])) == []
    smaller = parse_args(["--freeze", "large", *LARGE[:-1], "0.0001"])
    assert [found.name for found in misfits(large, smaller)] == ["large_table_gib"]


def test_frozen_tables_have_no_state_and_need_no_rule() -> None:
    config = parse_args(["--freeze", "t_cat_3,dense", "--optimizer", "adagrad"])
    assert [table_state_floats(config, table, 64) for table in ("t_cat_2", "t_cat_3")] == [64, 0]
    adam = parse_args(["--optimizer", "adam", "--freeze", "all"])
    with pytest.raises(PlanError, match="FBGEMM has no fused Adam on a CPU"):
        allowed_sharding_types(adam.optimizer, {}, "cpu")
    assert "table_wise" in allowed_sharding_types(adam.optimizer, {}, "cpu", adam.frozen)
