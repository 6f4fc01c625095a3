import ast
import dataclasses
import itertools
import json
import re
from pathlib import Path

import pytest

from dlrm.config import config as config_module
from dlrm.config.config import CONFIG_VERSION, CheckpointConfig, Config, OptimizerConfig, OutputConfig, TrainingConfig
from dlrm.config.flags import parse_args
from dlrm.config.interval import Interval
from dlrm.config.recipes import MLPERF_ROWS, RECIPES
from dlrm.errors import ConfigError

SECTIONS = {name: value for name, value in vars(Config()).items() if dataclasses.is_dataclass(value)}


def field_docstrings() -> dict[str, str]:
    """Docstring of every field that is a flag, as written in config.py."""
    docstrings = {}
    for owner in ast.parse(Path(config_module.__file__).read_text()).body:
        if isinstance(owner, ast.ClassDef):
            for field, following in itertools.pairwise([*owner.body, ast.Pass()]):
                if isinstance(field, ast.AnnAssign) and (owner.name != "Config" or field.target.id == "recipe"):
                    text = isinstance(following, ast.Expr) and ast.literal_eval(following.value)
                    docstrings[field.target.id] = " ".join((text or "").split())
    return docstrings


def test_no_flags_give_the_defaults():
    assert parse_args([]) == Config()


@pytest.mark.parametrize(
    "argv",
    [["--dense_arch_layer_sizes", "512,256,128"], ["--dense_arch_layer_sizes=512,256,128"]],
)
def test_lists(argv):
    config = parse_args([*argv, "--embedding_dim", "128", "--pin_memory"])
    assert config.model.dense_arch_layer_sizes == (512, 256, 128)
    assert config.data.pin_memory


def test_every_list_of_the_public_example():
    config = parse_args(
        [
            *("--num_embeddings_per_feature", ",".join(["5"] * 26), "--over_arch_layer_sizes=8,1"),
            *("--interaction_type", "projection", "--interaction_branch1_layer_sizes", "32,64"),
            "--interaction_branch2_layer_sizes=64",
        ]
    )
    assert config.model.num_embeddings_per_feature == (5,) * 26
    assert config.model.over_arch_layer_sizes == (8, 1)
    assert config.model.interaction_branch1_layer_sizes == (32, 64)
    assert config.model.interaction_branch2_layer_sizes == (64,)


@pytest.mark.parametrize(
    ("section", "field", "argv"),
    [
        ("data", "pin_memory", []),
        ("data", "mmap_mode", ["--in_memory_binary_criteo_path", "days"]),
        ("data", "shuffle_batches", ["--in_memory_binary_criteo_path", "days"]),
        ("data", "shuffle_training_set", ["--in_memory_binary_criteo_path", "days"]),
        ("data", "collect_multi_hot_freqs_stats", ["--synthetic_multi_hot_criteo_path", "days"]),
        ("data", "drop_last_training_batch", ["--in_memory_binary_criteo_path", "days"]),
        ("optimizer", "adagrad", []),
        ("training", "allow_tf32", []),
        ("evaluation", "evaluate_on_epoch_end", []),
        ("evaluation", "evaluate_on_training_end", []),
        ("output", "print_progress", []),
        ("output", "print_lr", []),
        ("output", "print_sharding_plan", []),
    ],
)
def test_bare_boolean_flags(section, field, argv):
    assert getattr(getattr(parse_args([*argv, f"--{field}"]), section), field) is True
    assert getattr(getattr(parse_args([*argv, f"--no_{field}"]), section), field) is False


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--batch_sise", "3"], "--batch_sise 3: not a flag; did you mean --batch_size"),
        (["--learning_rat=3"], "--learning_rat=3: not a flag; did you mean --learning_rate"),
        (["--batch_siz", "3"], "did you mean --batch_size"),
        (["stray"], "stray: not a flag"),
        (["--pin_memory", "True"], "True: not a flag"),
        (["--dense_arch_layer_sizes", "512", "256", "64"], "256 64: not a flag"),
        (["--batch_size"], "--batch_size: expected a value"),
        (["--batch_size", "many"], "--batch_size: .*'many'"),
        (["--batch_size=1.5"], "--batch_size: .*'1.5'"),
        (["--batch_size", "0"], "--batch_size 0: expected more than 0"),
        (["--seed", "x"], r"--seed: expected INT \(invalid literal for int\(\) with base 10: 'x'\)"),
        (["--undersampling_rate", "half"], "--undersampling_rate: expected FLOAT .*'half'"),
        (
            ["--multi_hot_distribution_type", "zipf"],
            "--multi_hot_distribution_type zipf: expected one of pareto, uniform",
        ),
        (["--learning_rate", "fast"], "--learning_rate: .*'fast'"),
        (["--dense_arch_layer_sizes", "512,x"], "--dense_arch_layer_sizes: .*512,x: not integers"),
        (["--dense_arch_layer_sizes", ""], "--dense_arch_layer_sizes: "),
        (["--interaction_type", "sum"], "--interaction_type sum: expected one of original, dcn, projection"),
        (["--dataset_name", "movielens"], "--dataset_name movielens: expected one of criteo_1t, criteo_kaggle"),
        (["--recipe", "mlperf_v9"], "--recipe mlperf_v9: expected one of .*mlperf_v1, mlperf_v2"),
        (["--recipe"], "--recipe .*expected one of"),
        (["--eps", "1e-6"], "--eps 1e-06 needs --optimizer adagrad, rowwise_adagrad or adam"),
    ],
)
def test_mistakes_are_one_line(argv, words):
    with pytest.raises(ConfigError, match=words) as caught:
        parse_args(argv)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spelling", [["--recipe", "debug_cpu"], ["--recipe=debug_cpu"]])
def test_flags_on_top_of_a_recipe(spelling):
    recipe = RECIPES["debug_cpu"]()
    config = parse_args([*spelling, "--batch_size", "7", "--no_adagrad"])
    assert (config.data.batch_size, config.optimizer.adagrad) == (7, False)
    assert config.model == recipe.model
    assert config.optimizer.learning_rate == recipe.optimizer.learning_rate
    assert config.training == recipe.training
    assert config.recipe == "debug_cpu"


@pytest.mark.parametrize("second", [["--recipe", "debug_cpu"], ["--recipe=debug_cpu"]])
def test_of_two_recipes_the_last_counts_alone(second):
    assert parse_args(["--recipe", "mlperf_v1", *second]) == RECIPES["debug_cpu"]()


def test_of_two_configs_the_last_counts_alone(tmp_path):
    paths = [str(tmp_path / f"{name}.json") for name in ("mlperf_v1", "debug_cpu")]
    for path in paths:
        Path(path).write_text(json.dumps(RECIPES[Path(path).stem]().to_json()))
    given = ["--config", paths[0], f"--config={paths[1]}"]
    assert parse_args(given) == dataclasses.replace(RECIPES["debug_cpu"](), config=paths[1])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[1]", f"has no config_version, expected {CONFIG_VERSION}"),
        ("{}", f"has no config_version, expected {CONFIG_VERSION}"),
        ('{"config_version": 99}', f"config_version 99: this dlrm reads version {CONFIG_VERSION}"),
        (f'{{"config_version": {CONFIG_VERSION}, "data": 3}}', "does not fit this dlrm: "),
        ("{", "is no JSON"),
        ("[" * 10**5, "is no JSON"),
    ],
)
def test_a_file_that_is_no_config_is_named(content, words, tmp_path):
    path = tmp_path / "arr.json"
    path.write_text(content)
    with pytest.raises(ConfigError) as refused:
        parse_args(["--config", str(path)])
    assert str(refused.value).startswith(f"--config {path}: {words}")
    assert str(refused.value).endswith(". Expected the config.json of a run.")


def test_a_run_is_repeated_without_what_belongs_to_it_alone(tmp_path):
    path = tmp_path / "config.json"
    checkpoint = CheckpointConfig(
        checkpoint_every=Interval("30m"),
        checkpoint_dir="old",
        resume="old/step_0000000001",
        allow_changed_data=True,
        init_from="other",
        allow_other_vocabulary=True,
    )
    saved = Config(checkpoint=checkpoint, output=OutputConfig(run_dir="old", print_lr=True))
    path.write_text(json.dumps(saved.to_json()))
    kept = CheckpointConfig(checkpoint_every=Interval("30m"), init_from="other")
    expected = Config(checkpoint=kept, output=OutputConfig(print_lr=True), config=str(path))
    assert parse_args(["--config", str(path)]) == expected


@pytest.mark.parametrize(
    ("saved", "argv", "said"),
    [
        (Config(optimizer=OptimizerConfig(optimizer="adam")), ["--adagrad"], "adagrad"),
        (Config(optimizer=OptimizerConfig(adagrad=True)), ["--optimizer", "adam"], "adam"),
        (Config(training=TrainingConfig(precision="bf16")), ["--allow_tf32"], "tf32"),
        (Config(training=TrainingConfig(allow_tf32=True)), ["--precision=bf16"], "bf16"),
    ],
)
def test_of_two_names_for_one_thing_the_one_that_is_given_counts(saved, argv, said, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(saved.to_json()))
    config = parse_args(["--config", str(path), *argv])
    assert said in (config.optimizer.algorithm, config.training.arithmetic)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--adagrad", "--optimizer", "adam"], "--adagrad with --optimizer adam: give one of the two"),
        (["--allow_tf32", "--precision", "bf16"], "--allow_tf32 with --precision bf16: give one of the two"),
    ],
)
def test_two_names_for_one_thing_must_agree(argv, words):
    with pytest.raises(ConfigError, match=words):
        parse_args(argv)


@pytest.mark.parametrize("spelling", [["--num_embeddings", "77"], ["--num_embeddings=77"], ["--num-embeddings", "77"]])
def test_num_embeddings_replaces_the_table_sizes_of_a_recipe(spelling):
    assert parse_args(["--recipe", "mlperf_v1"]).model.table_rows == MLPERF_ROWS
    assert parse_args(["--recipe", "mlperf_v1", *spelling]).model.table_rows == (77,) * 26


def test_table_sizes_replace_the_num_embeddings_of_a_recipe():
    config = parse_args(["--recipe", "debug_cpu", "--num_embeddings_per_feature", ",".join(["5"] * 26)])
    assert config.model.table_rows == (5,) * 26


@pytest.mark.parametrize("flag", ["--in_memory_binary_criteo_path", "--synthetic_multi_hot_criteo_path"])
def test_mlperf_v2_runs_on_days(flag):
    config = parse_args(["--recipe", "mlperf_v2", flag, "days"])
    assert config.data.folder == "days"
    assert config.data.multi_hot_sizes == RECIPES["mlperf_v2"]().data.multi_hot_sizes


def test_another_interaction_replaces_that_of_a_recipe():
    """The recipe's dcn_low_rank_dim falls away with the interaction that it belongs to: the user did not give it."""
    flags = ["--in_memory_binary_criteo_path", "days", "--interaction_type", "original"]
    assert parse_args(["--recipe", "kaggle", *flags]).model.interaction_type == "original"


@pytest.mark.parametrize("recipe", ["kaggle", "kaggle_sample"])
def test_a_recipe_for_a_data_set_is_not_run_on_random_data(recipe):
    with pytest.raises(ConfigError, match="--in_memory_binary_criteo_path"):
        parse_args(["--recipe", recipe])


def test_the_public_examples_command_line_is_the_recipe():
    argv = [
        *("--pin_memory", "--batch_size", "4096", "--epochs", "1", "--embedding_dim", "128"),
        *("--dense_arch_layer_sizes", "512,256,128", "--over_arch_layer_sizes", "1024,1024,512,256,1"),
        *("--in_memory_binary_criteo_path", "days", "--learning_rate", "15.0", "--batch_size", "8192"),
        *("--num_embeddings_per_feature", ",".join(map(str, MLPERF_ROWS))),
    ]
    recipe = parse_args(["--recipe", "spec_mlperf_a100x8", "--in_memory_binary_criteo_path", "days"])
    assert {**parse_args(argv).to_json(), "recipe": "spec_mlperf_a100x8"} == recipe.to_json()


def test_help_lists_every_field_with_its_docstring(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as caught:
        parse_args(["--help"])
    assert caught.value.code == 0
    shown = re.sub(r"[\s│]+", " ", re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out))
    fields = [field.name for section in SECTIONS.values() for field in dataclasses.fields(section)]
    docstrings = field_docstrings()
    assert list(docstrings) == [*fields, "recipe"]
    for name, docstring in docstrings.items():
        assert len(docstring) > 10, name
        assert re.search(rf"--{name}(, --no_{name})?( \S+)? {re.escape(docstring)} \(default: ", shown), name


def test_help_names_every_recipe():
    names = re.findall(r"\w+_\w+|kaggle", field_docstrings()["recipe"].split(":", 1)[1])
    assert names == list(RECIPES)


def test_help_beside_a_recipe_shows_its_values(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--recipe", "kaggle_sample", "--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "Training samples per rank per step. (default: 128)" in shown
    assert "Step size of the embedding tables and the dense parts. (default: 0.02)" in shown
