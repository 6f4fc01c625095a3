from dataclasses import replace
from pathlib import Path

import pytest

from dlrm.cli import main
from dlrm.config.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    OutputConfig,
    ShardingConfig,
    TrainingConfig,
)
from dlrm.config.interval import Interval
from dlrm.errors import ConfigError
from dlrm.evaluate.config import config_on_top, parse_evaluate
from tests.unit.checkpoint_folders import write_checkpoint

USER_ERROR = 2
SAVED = Config(
    data=DataConfig(
        in_memory_binary_criteo_path="days",
        batch_size=64,
        limit_train_batches=7,
        limit_val_batches=5,
        shuffle_training_set=True,
        undersampling_rate=0.5,
    ),
    model=ModelConfig(num_embeddings=50, embedding_dim=8, dense_arch_layer_sizes=(16, 8), standardize_dense=True),
    sharding=ShardingConfig(table_constraints="all = row_wise", backward_comm_precision="bf16"),
    optimizer=OptimizerConfig(optimizer="adam", weight_decay=0.1, lr_warmup_steps=5),
    training=TrainingConfig(epochs=3, seed=11, precision="bf16", dense_execution="compile"),
    evaluation=EvaluationConfig(validation_freq_within_epoch=3, validation_auroc=0.7, evaluate_on_epoch_end=False),
    checkpoint=CheckpointConfig(checkpoint_every=Interval("5"), keep=4, hang_timeout=99.0),
    output=OutputConfig(run_dir="old", tensorboard=True, mlperf_log=True, print_progress=False),
    recipe="debug_cpu",
)


def on_top(*flags: str, saved: Config = SAVED) -> Config:
    return config_on_top(saved, ["--checkpoint", "x", *flags])


def test_what_scoring_takes_over_from_the_run():
    assert on_top() == Config(
        data=DataConfig(
            in_memory_binary_criteo_path="days", batch_size=64, limit_val_batches=5, undersampling_rate=0.5
        ),
        model=SAVED.model,
        sharding=ShardingConfig(table_constraints="all = row_wise"),
        training=TrainingConfig(seed=11, precision="bf16"),
        checkpoint=CheckpointConfig(hang_timeout=99.0),
        output=OutputConfig(print_progress=False),
        recipe="debug_cpu",
    )


def test_flags_on_top():
    flags = "--in_memory_binary_criteo_path other --test_batch_size 9 --mmap_mode --table_constraints all=table_wise"
    config = on_top(*flags.split(), "--precision", "fp32", "--print_sharding_plan")
    assert config.data.folder == "other"
    assert config.data.mmap_mode
    assert (config.data.batch_size, config.data.test_batch_size) == (9, None)
    assert config.sharding.table_constraints == "all=table_wise"
    assert config.training.precision == "fp32"
    assert config.output.print_sharding_plan
    assert not config.output.print_progress


def test_the_batch_size_is_that_of_the_held_out_sets():
    saved = replace(SAVED, data=replace(SAVED.data, test_batch_size=128))
    assert on_top(saved=saved).data.batch_size == 128
    assert on_top("--batch_size", "32").data.batch_size == 32
    with pytest.raises(ConfigError, match="--batch_size: the run has --test_batch_size 128"):
        on_top("--batch_size", "32", saved=saved)


@pytest.mark.parametrize(
    ("saved", "flag", "arithmetic"),
    [
        (TrainingConfig(allow_tf32=True, seed=1), ["--precision", "bf16"], "bf16"),
        (TrainingConfig(precision="bf16", seed=1), ["--allow_tf32"], "tf32"),
        (TrainingConfig(allow_tf32=True, seed=1), ["--no_allow_tf32"], "fp32"),
    ],
)
def test_two_ways_to_say_the_arithmetic(saved, flag, arithmetic):
    assert on_top(*flag, saved=replace(SAVED, training=saved)).training.arithmetic == arithmetic


def test_days_in_place_of_random_data():
    saved = Config(data=DataConfig(zipf_exponent=1.1, num_generated_batches=3), training=TrainingConfig(seed=1))
    assert on_top("--seed", "2", saved=saved).training.seed == 2
    data = on_top("--in_memory_binary_criteo_path", "days", saved=saved).data
    assert data == DataConfig(in_memory_binary_criteo_path="days")
    with pytest.raises(ConfigError, match=r"--zipf_exponent 2\.0 is for random data"):
        on_top("--in_memory_binary_criteo_path", "days", "--zipf_exponent", "2", saved=saved)


def test_flags_that_would_make_another_model():
    with pytest.raises(
        ConfigError, match=r"written with --num_embeddings 50 \(here 70\), --embedding_dim 8 \(here 16\)"
    ):
        on_top("--num_embeddings", "70", "--embedding_dim", "16")
    with pytest.raises(ConfigError, match=r"written with --standardize_dense True \(here False\)"):
        on_top("--no_standardize_dense")
    with pytest.raises(ConfigError, match=r"written with --undersampling_rate 0.5 \(here 0.25\)"):
        on_top("--undersampling_rate", "0.25")


@pytest.mark.parametrize(
    "flags",
    [
        ["--epochs", "2"],
        ["--learning_rate", "0.3"],
        ["--seed", "3"],
        ["--no_shuffle_training_set"],
        ["--limit_train_batches=3"],
        ["--backward_comm_precision", "fp16"],
        ["--dense_execution", "eager"],
        ["--validation_auroc", "0.9"],
        ["--evaluate_on_epoch_end"],
        ["--run_dir", "new"],
        ["--checkpoint_every", "9"],
        ["--resume", "never"],
    ],
)
def test_flags_that_change_nothing(flags):
    name = flags[0].split("=")[0].replace("--no_", "--")
    with pytest.raises(ConfigError, match=f"{name}: changes nothing when a checkpoint is scored"):
        on_top(*flags)


def test_flags_of_the_run_may_be_said_again():
    flags = "--epochs 3 --optimizer adam --embedding_dim 8 --seed 11 --shuffle_training_set --run_dir old"
    assert on_top(*flags.split()) == on_top()


@pytest.mark.parametrize(("split", "flag"), [("test", "limit_val_batches"), ("val", "limit_test_batches")])
def test_limits_of_a_set_that_is_not_scored(split, flag):
    with pytest.raises(ConfigError, match=f"--{flag} with --split {split}: that set is not scored"):
        on_top("--split", split, f"--{flag}", "2")
    assert on_top("--split", split).data.limit_val_batches == 5


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "missing: --checkpoint"),
        (["--checkpoint", "gone"], "'gone': no such folder"),
        (["--checkpoint", "{path}", "--recipe", "kaggle"], "--recipe: a checkpoint has its own config"),
        (["--checkpoint", "{path}", "--config", "c.json"], "--config: a checkpoint has its own config"),
        (["--checkpoint", "{path}", "--split", "train"], "--split train: expected one of val, test, both"),
        (["--checkpoint", "{path}", "--test_batch_sise", "3"], "did you mean --test_batch_size"),
        (["--checkpoint", "{path}", "--test_batch_size", "0"], "--test_batch_size 0: expected more than 0"),
        (["--checkpoint", "{path}", "--json", "{folder}"], "can't be written (is a folder). Expected a file in"),
        (["--checkpoint", "{path}", "--embedding_dim", "16"], "--embedding_dim 64 (here 16)"),
        (["--checkpoint", "{path}", "--epochs", "2"], "--epochs: changes nothing"),
        (["--checkpoint", "{link}"], "is a link, which is not followed"),
    ],
)
def test_mistakes_are_one_line(flags, words, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    path = write_checkpoint(tmp_path)
    (tmp_path / "latest").symlink_to(path)
    filled = [flag.format(path=path, folder=tmp_path, link=tmp_path / "latest") for flag in flags]
    assert main(["evaluate", *filled]) == USER_ERROR
    captured = capsys.readouterr()
    assert captured.err.startswith("dlrm: error: ")
    assert words in captured.err
    assert captured.err.count("\n") == 1


def test_what_a_damaged_config_says_is_left_to_the_ranks(tmp_path):
    path = write_checkpoint(tmp_path)
    Path(path, "config.json").write_text("{")
    assert parse_evaluate(["--checkpoint", str(path), "--split", "val"]).split == "val"


def test_help_shows_what_counts(capsys, tmp_path):
    assert main(["evaluate", "--help"]) == 0
    shown = capsys.readouterr().out
    for flag in ("--checkpoint PATH", "--split {val,test,both}", "--test_batch_size INT", "--table_constraints"):
        assert flag in shown
    for flag in ("--epochs", "--learning_rate", "--embedding_dim", "--run_dir", "--recipe", "--resume"):
        assert flag not in shown
    path = write_checkpoint(tmp_path, config=SAVED)
    assert main(["evaluate", "--checkpoint", str(path), "--help"]) == 0
    assert "Training samples per rank per step. (default: 64)" in " ".join(capsys.readouterr().out.split())
