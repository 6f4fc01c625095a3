import dataclasses
import json
import os
from pathlib import Path

import pytest

from dlrm.config.checks import check_config, check_output_file
from dlrm.config.config import CONFIG_VERSION, Config, DataConfig, ModelConfig, OutputConfig
from dlrm.config.recipes import MLPERF_ROWS, RECIPES
from dlrm.errors import ConfigError


def config_with(**fields: object) -> Config:
    """The default config with these fields of any section set."""
    sections = {}
    for section in dataclasses.fields(Config()):
        content = getattr(Config(), section.name)
        if dataclasses.is_dataclass(content):
            own = {field.name: fields.pop(field.name) for field in dataclasses.fields(content) if field.name in fields}
            sections[section.name] = dataclasses.replace(content, **own)
    return Config(**sections, **fields)


def test_defaults_are_those_of_the_public_example():
    expected = {
        "epochs": 1,
        "batch_size": 32,
        "drop_last_training_batch": False,
        "test_batch_size": None,
        "limit_train_batches": None,
        "limit_val_batches": None,
        "limit_test_batches": None,
        "dataset_name": "criteo_1t",
        "num_embeddings": 100_000,
        "num_embeddings_per_feature": None,
        "dense_arch_layer_sizes": (512, 256, 64),
        "over_arch_layer_sizes": (512, 512, 256, 1),
        "embedding_dim": 64,
        "interaction_branch1_layer_sizes": (2048, 2048),
        "interaction_branch2_layer_sizes": (2048, 2048),
        "dcn_num_layers": 3,
        "dcn_low_rank_dim": 512,
        "seed": None,
        "mmap_mode": False,
        "in_memory_binary_criteo_path": None,
        "learning_rate": 15.0,
        "eps": 1e-8,
        "shuffle_batches": False,
        "shuffle_training_set": False,
        "undersampling_rate": None,
        "synthetic_multi_hot_criteo_path": None,
        "multi_hot_sizes": None,
        "multi_hot_distribution_type": None,
        "collect_multi_hot_freqs_stats": False,
        "validation_freq_within_epoch": None,
        "validation_auroc": None,
        "adagrad": False,
        "interaction_type": "original",
        "allow_tf32": False,
        "print_lr": False,
        "print_sharding_plan": False,
    }
    sections = [value for value in dataclasses.asdict(Config()).values() if isinstance(value, dict)]
    defaults = {name: value for section in sections for name, value in section.items()}
    assert {name: defaults[name] for name in expected} == expected


def test_a_field_name_belongs_to_one_section():
    names = [name for value in dataclasses.asdict(Config()).values() if isinstance(value, dict) for name in value]
    assert len(names) == len(set(names))


def test_table_rows():
    assert config_with(num_embeddings=7).model.table_rows == (7,) * 26
    assert config_with(num_embeddings_per_feature=MLPERF_ROWS).model.table_rows == MLPERF_ROWS


@pytest.mark.parametrize("recipe", RECIPES)
def test_json_round_trip(recipe, tmp_path):
    config = RECIPES[recipe]()
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_json()))
    assert Config.load(path) == config
    assert json.loads(path.read_text())["config_version"] == CONFIG_VERSION


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"config_version": CONFIG_VERSION + 1}, f"reads version {CONFIG_VERSION}"),
        ({"config_version": None}, "config_version None"),
        ({"frobnicate": 1}, "frobnicate"),
        ({"data": {"frobnicate": 1}}, "frobnicate"),
    ],
)
def test_json_of_another_dlrm_is_refused(change, words):
    with pytest.raises(ConfigError, match=words):
        Config.from_json({**Config().to_json(), **change})


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("batch_size", 0, "expected more than 0"),
        ("test_batch_size", 0, "expected more than 0"),
        ("limit_train_batches", 0, "expected more than 0"),
        ("limit_val_batches", 0, "expected more than 0"),
        ("limit_test_batches", -1, "expected more than 0"),
        ("num_generated_batches", 0, "expected more than 0"),
        ("zipf_exponent", -0.1, "expected 0.0 or more"),
        ("zipf_exponent", 10.0, "expected less than 10.0"),
        ("zipf_exponent", float("nan"), "expected a finite number"),
        ("multi_hot_sizes", (0,) * 26, "expected positive integers"),
        ("multi_hot_sizes", (1,) * 25, "got 25 sizes, expected 26"),
        ("undersampling_rate", 0.0, "expected more than 0.0"),
        ("undersampling_rate", 1.01, "expected 1.0 or less"),
        ("undersampling_rate", float("nan"), "expected a finite number"),
        ("intra_host_bandwidth", 1e-320, "expected 0.001 or more"),
        ("inter_host_bandwidth", 1e-320, "expected 0.001 or more"),
        ("num_embeddings", 0, "expected more than 0"),
        ("num_embeddings", 2**31, "expected less than 2147483648"),
        ("num_embeddings_per_feature", (1,) * 25, "got 25 sizes, expected 26"),
        ("num_embeddings_per_feature", (1,) * 27, "got 27 sizes, expected 26"),
        ("num_embeddings_per_feature", (1,) * 25 + (0,), "expected positive integers"),
        ("num_embeddings_per_feature", (1,) * 25 + (2**31,), "expected less than 2147483648"),
        ("embedding_dim", 0, "expected more than 0"),
        ("embedding_dim", 62, "expected a multiple of 4.*Try 64"),
        ("dense_arch_layer_sizes", (512, 256, 32), "ends in 32, expected embedding_dim, which is 64"),
        ("dense_arch_layer_sizes", (), "expected positive integers"),
        ("dense_arch_layer_sizes", (-512, 64), "expected positive integers"),
        ("over_arch_layer_sizes", (512, 2), "the last of size 1"),
        ("over_arch_layer_sizes", (1,), "two or more layers"),
        ("dcn_num_layers", 0, "expected more than 0"),
        ("dcn_low_rank_dim", 0, "expected more than 0"),
        ("learning_rate", 0.0, "expected more than 0.0"),
        ("learning_rate", float("nan"), "expected a finite number"),
        ("learning_rate", float("inf"), "expected a finite number"),
        ("eps", 0.0, "expected 1e-37 or more"),
        ("epochs", 0, "expected more than 0"),
        ("seed", -1, "expected 0 or more"),
        ("seed", 2**63, "expected less than"),
        ("validation_freq_within_epoch", 0, "expected more than 0"),
        ("validation_auroc", 0.5, "expected more than 0.5"),
        ("validation_auroc", 1.01, "expected 1.0 or less"),
        ("log_every", 0, "expected more than 0"),
        ("profile", 0, "expected more than 0"),
        ("profile", 1001, "expected 1000 or less"),
    ],
)
def test_values_out_of_range_are_refused(field, value, words):
    with pytest.raises(ConfigError, match=f"--{field}\\b.*{words}"):
        check_config(config_with(**{field: value}))


@pytest.mark.parametrize("branch", ["interaction_branch1_layer_sizes", "interaction_branch2_layer_sizes"])
def test_projection_branches_end_in_a_multiple_of_the_embedding_dim(branch):
    check_config(config_with(interaction_type="projection", **{branch: (100, 128)}))
    with pytest.raises(ConfigError, match=f"--{branch} ends in 100, expected a multiple of embedding_dim.*64"):
        check_config(config_with(interaction_type="projection", **{branch: (128, 100)}))


PATH = {"in_memory_binary_criteo_path": "days"}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mmap_mode": True}, "--mmap_mode needs --in_memory_binary_criteo_path"),
        ({"shuffle_batches": True}, "--shuffle_batches needs --in_memory_binary_criteo_path"),
        ({"dataset_name": "criteo_kaggle"}, "--dataset_name criteo_kaggle needs --in_memory_binary_criteo_path"),
        ({"drop_last_training_batch": True}, "--drop_last_training_batch needs --in_memory_binary_criteo_path"),
        ({**PATH, "num_generated_batches": 3}, "--num_generated_batches 3 is for random data"),
        ({**PATH, "zipf_exponent": 1.1}, "--zipf_exponent 1.1 is for random data"),
        ({"shuffle_training_set": True}, "--shuffle_training_set needs --in_memory_binary_criteo_path"),
        ({"undersampling_rate": 0.5}, "--undersampling_rate 0.5 needs --in_memory_binary_criteo_path"),
        ({"multi_hot_distribution_type": "pareto"}, "--multi_hot_distribution_type pareto needs --multi_hot_sizes"),
        (
            {**PATH, "multi_hot_sizes": (1,) * 26, "multi_hot_distribution_type": "uniform"},
            "--multi_hot_distribution_type uniform needs --multi_hot_sizes of more than one id",
        ),
        ({**PATH, "multi_hot_distribution_type": "uniform"}, "--multi_hot_distribution_type uniform needs --multi_hot"),
        (
            {"synthetic_multi_hot_criteo_path": "d", "multi_hot_distribution_type": "uniform"},
            "--multi_hot_distribution_type uniform with --synthetic_multi_hot_criteo_path: its ids are drawn already",
        ),
        (
            {**PATH, "collect_multi_hot_freqs_stats": True},
            "--collect_multi_hot_freqs_stats needs --multi_hot_sizes or --synthetic_multi_hot_criteo_path",
        ),
        ({"synthetic_multi_hot_criteo_path": "d", "zipf_exponent": 1.1}, "--zipf_exponent 1.1 is for random data"),
        (
            {"num_embeddings": 7, "num_embeddings_per_feature": (3,) * 26},
            "--num_embeddings 7 has no effect beside --num_embeddings_per_feature",
        ),
        ({"dcn_num_layers": 2}, "--dcn_num_layers 2 needs --interaction_type dcn"),
        ({"dcn_low_rank_dim": 8, "interaction_type": "projection"}, "--dcn_low_rank_dim 8 needs --interaction_type"),
        ({"interaction_branch1_layer_sizes": (64,)}, "--interaction_branch1_layer_sizes 64 needs .* projection"),
        (
            {"interaction_branch2_layer_sizes": (64,), "interaction_type": "dcn"},
            "--interaction_branch2_layer_sizes 64 needs --interaction_type projection",
        ),
        ({"eps": 1e-6}, "--eps 1e-06 needs --optimizer adagrad, rowwise_adagrad or adam"),
        ({"mlperf_log": True}, "--mlperf_log needs --validation_auroc"),
        (
            {"validation_auroc": 0.8, "evaluate_on_epoch_end": False},
            "--validation_auroc 0.8 with --no_evaluate_on_epoch_end",
        ),
        (
            {"limit_val_batches": 2, "evaluate_on_epoch_end": False},
            "--limit_val_batches .*with --no_evaluate_on_epoch_e",
        ),
        (
            {"limit_test_batches": 2, "evaluate_on_training_end": False},
            "--limit_test_batches .*with --no_evaluate_on_training_end",
        ),
    ],
)
def test_flags_without_effect_are_refused(fields, words):
    with pytest.raises(ConfigError, match=words):
        check_config(config_with(**fields))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {**PATH, "mmap_mode": True, "shuffle_batches": True, "drop_last_training_batch": True},
        {**PATH, "dataset_name": "criteo_kaggle"},
        {**PATH, "shuffle_training_set": True, "shuffle_batches": True, "undersampling_rate": 0.1},
        {**PATH, "multi_hot_sizes": (2,) * 26, "multi_hot_distribution_type": "pareto"},
        {**PATH, "synthetic_multi_hot_criteo_path": "d", "collect_multi_hot_freqs_stats": True},
        {"synthetic_multi_hot_criteo_path": "d", "multi_hot_sizes": (2,) * 26, "dataset_name": "criteo_kaggle"},
        {"multi_hot_sizes": (2,) * 26, "multi_hot_distribution_type": "uniform", "collect_multi_hot_freqs_stats": True},
        {"num_generated_batches": 3, "zipf_exponent": 1.1, "multi_hot_sizes": (2,) * 26},
        {"num_embeddings_per_feature": (2**31 - 1,) * 26},
        {"interaction_type": "dcn", "dcn_num_layers": 2, "dcn_low_rank_dim": 8},
        {"adagrad": True, "eps": 1e-6},
        {"validation_auroc": 1.0, "evaluate_on_epoch_end": False, "validation_freq_within_epoch": 5},
        {"limit_val_batches": 2, "evaluate_on_epoch_end": False, "validation_freq_within_epoch": 5},
        {"seed": 0},
        {"seed": 2**63 - 1},
    ],
)
def test_what_makes_sense_is_accepted(fields):
    config = config_with(**fields)
    check_config(config)
    assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_folder_name_is_refused(name):
    with pytest.raises(ConfigError, match=r"--run_dir .*expected a folder's name"):
        check_config(Config(output=OutputConfig(run_dir=name)))
    with pytest.raises(ConfigError, match=r"--in_memory_binary_criteo_path .*expected a folder's name"):
        check_config(Config(data=DataConfig(in_memory_binary_criteo_path=name)))


def test_sizes_beyond_any_machine_are_refused():
    with pytest.raises(ConfigError, match=r"--dense_arch_layer_sizes: got 99999999999, expected sizes of less than"):
        check_config(Config(model=ModelConfig(dense_arch_layer_sizes=(99999999999, 64))))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("folder", "is a folder"),
        ("", "is a folder"),
        ("pipe", "is a device or a pipe"),
        ("link", "is a link"),
        ("nowhere", "is a link"),
        ("device", "is a link"),
        ("nowhere/result.json", "No such file or directory"),
        ("file/result.json", "Not a directory"),
        ("/proc/result.json", "No such file or directory"),
        ("/proc/folder/result.json", "No such file or directory"),
        (250 * "x", "File name too long"),
        (f"{256 * 'x'}/result.json", "File name too long"),
    ],
)
def test_files_that_cannot_be_written_are_refused(name: str, why: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("file").write_text("mine")
    os.mkfifo("pipe")
    Path("link").symlink_to("file")
    Path("nowhere").symlink_to("gone")
    Path("device").symlink_to("/dev/null")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=rf"^--json {name}: can't be written \({why}\)\. Expected a file in a folder"):
        check_output_file("json", name)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["new.json", "file", "new/folder/result.json", 240 * "x"])
def test_a_file_that_can_be_written_is_not_made_yet(name: str, tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    check_output_file("json", tmp_path / name)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "mine")]


@pytest.mark.parametrize("name", ["-", "/dev/stdout", "/dev/fd/1", "/dev/stderr", "/dev/fd/63"])
def test_open_files_are_taken_for_a_result(name: str):
    check_output_file("json", name, may_be_stream=True)
    if name != "-":
        with pytest.raises(ConfigError, match="can't be written"):
            check_output_file("plot", name)
