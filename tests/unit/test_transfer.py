"""What of a checkpoint another model takes."""

import dataclasses

import pytest

from dlrm.checkpoint.manifest import Tensor
from dlrm.checkpoint.position import Position
from dlrm.checkpoint.transfer import Transfer, check_tables
from dlrm.config.config import ModelConfig
from dlrm.config.flags import parse_args
from dlrm.errors import CheckpointError, ConfigError, MisfitError
from dlrm.schema.criteo import TABLE_NAMES

MODEL = ModelConfig(num_embeddings=100, embedding_dim=8)
TABLES = {f"tables.{table}.weight": (100, 8) for table in TABLE_NAMES}
DENSE = {
    "dense.dense_arch._mlp.0._linear.weight": (16, 13),
    "dense.dense_arch._mlp.0._linear.bias": (16,),
    "dense.over_arch.1.weight": (1, 16),
    "dense.over_arch.1.bias": (1,),
}
STATES = {
    "tables.t_cat_0.sum": (100, 8),
    "tables.t_cat_1.sum": (100,),
    "dense.over_arch.1.weight.sum": (1, 16),
    "dense.dense_arch._mlp.0._linear.bias.sum": (16,),
}
SAVED = {name: Tensor("float32", shape, ()) for name, shape in {**TABLES, **DENSE, **STATES}.items()}


def transfer_to(**changes: tuple[int, ...] | None) -> Transfer:
    wanted = {**TABLES, **DENSE, **{name.replace("__", "."): shape for name, shape in changes.items()}}
    return Transfer.of(SAVED, {name: (shape, "float32") for name, shape in wanted.items() if shape is not None})


def test_the_same_model_takes_all() -> None:
    transfer = transfer_to()
    assert transfer.weights == {*TABLES, *DENSE}
    assert (transfer.grown, transfer.layers_drawn, transfer.layers_left) == ({}, (), ())
    assert transfer.describe(None, "adagrad") == [
        "  taken: 26 tables, 2 of 2 dense layers",
        "  drawn: nothing",
        "  left: the optimizer's state (--init_optimizer takes it); its steps, validations and data",
    ]


def test_a_layer_is_taken_as_a_whole() -> None:
    """The bias of the last layer fits whatever comes before it."""
    transfer = transfer_to(**{"dense.over_arch.1.weight": (1, 32), "tables.t_cat_3.weight": (130, 8)})
    assert transfer.layers_taken == ("dense.dense_arch._mlp.0._linear",)
    assert "dense.over_arch.1.bias" not in transfer.weights
    assert transfer.describe(["tables.t_cat_0.sum"], "adagrad") == [
        "  taken: 26 tables, 1 of 2 dense layers, adagrad's state of 1 of 28 parameters",
        "  drawn: 30 new rows of 1 table (t_cat_3); 1 dense layer (over_arch.1)",
        "  left: 1 dense layer of other shapes (over_arch.1); its steps, validations and data",
    ]


def test_states_follow_their_weights() -> None:
    transfer = transfer_to(**{"dense.over_arch.1.weight": (1, 32), "tables.t_cat_0.weight": (130, 8)})
    assert transfer.takes_state("tables.t_cat_0.sum", SAVED, (130, 8), "float32")
    assert transfer.takes_state("tables.t_cat_1.sum", SAVED, (100,), "float32")
    assert not transfer.takes_state("tables.t_cat_2.sum", SAVED, (100, 8), "float32")  # was frozen there
    assert not transfer.takes_state("dense.over_arch.1.weight.sum", SAVED, (1, 32), "float32")
    assert transfer.takes_state("dense.dense_arch._mlp.0._linear.bias.sum", SAVED, (16,), "float32")


def test_tables_are_taken_though_no_dense_layer_fits() -> None:
    transfer = transfer_to(**{"dense.over_arch.1.weight": (1, 32), "dense.dense_arch._mlp.0._linear.weight": (32, 13)})
    assert len(transfer.weights) == 26
    assert transfer.describe(None, "adagrad")[0] == "  taken: 26 tables, 0 of 2 dense layers"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (dataclasses.replace(MODEL, num_embeddings=99), "t_cat_0 has 100 rows there and 99 here"),
        (
            dataclasses.replace(MODEL, num_embeddings_per_feature=(*(100,) * 5, 64, *(100,) * 20)),
            "t_cat_5 has 100 rows there and 64 here, and a table may grow, but not shrink. Give it 100 or more",
        ),
        (
            dataclasses.replace(MODEL, embedding_dim=16),
            "t_cat_0 has rows of 8 weights there, and --embedding_dim is 16",
        ),
    ],
)
def test_tables_that_shrink_or_have_other_columns_are_refused(model: ModelConfig, message: str) -> None:
    with pytest.raises(MisfitError) as refused:
        check_tables(SAVED, model)
    assert message in str(refused.value)


def test_tables_that_grow_are_taken() -> None:
    check_tables(SAVED, MODEL)
    check_tables(SAVED, dataclasses.replace(MODEL, num_embeddings_per_feature=(100, 101, *(1000,) * 24)))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--init_optimizer"], "--init_optimizer needs --init_from"),
        (["--init_from", "a", "--init_optimizer"], "--init_optimizer with --optimizer sgd, which has no state"),
        (["--init_from", "a", "--resume", "b"], "--init_from a with --resume b: the first takes weights into a new"),
        (["--init_from", "a", "--mlperf_log", "--validation_auroc", "0.8"], "--mlperf_log with --init_from"),
        (["--init_from", " "], "--init_from ' ': expected a folder's name"),
    ],
)
def test_flags_that_contradict_each_other(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_args(argv)
    assert message in str(refused.value)


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_flags_that_go_together(resume: str) -> None:
    assert parse_args(["--init_from", "a", "--resume", resume]).checkpoint.init_from == "a"


def test_a_position_on_other_data_is_the_start_of_an_epoch() -> None:
    position = Position(30, 2, 7, 56, 240, 28, 1.5, 2.5, (), ({"auroc": 0.9},))
    moved = position.in_new_run().on_new_data()
    assert (moved.epoch, moved.epoch_step, moved.row) == (0, 0, 0)
    assert (moved.step, moved.num_samples, moved.samples_before, moved.foreign_validations) == (30, 240, 240, 1)
    assert Position.from_json(moved.to_json()) == moved


def test_positions_of_earlier_versions_are_read() -> None:
    content = Position(30, 2, 7, 56, 240).to_json()
    new = ("foreign_validations", "samples_before", "optimizer_steps")
    assert Position.from_json({name: value for name, value in content.items() if name not in new}).optimizer_steps == 0
    with pytest.raises(CheckpointError, match="no whole number"):
        Position.from_json({**content, "samples_before": -1})
