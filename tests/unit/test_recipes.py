import re
from pathlib import Path

import pytest
from torchrec.datasets.criteo import TOTAL_TRAINING_SAMPLES

from dlrm.config.flags import parse_args
from dlrm.config.recipes import CRITEO_1T_TRAINING_ROWS, RANKS, RECIPES

SPEC = Path(__file__).parents[3] / "shared" / "spec" / "torchrec_dlrm_example.md"
ON_KAGGLE = ("kaggle", "kaggle_sample")
# recipe: GiB of tables, GPUs, batch size of each, of all
RESULTS_TABLE = {
    "spec_mlperf_a100x8": ("97.36", 8, 8192, 65536),
    "spec_mlperf_x2_a100x16": ("174.03", 16, 4096, 65536),
    "spec_full_size_a100x80": ("420.94", 80, 819, 65520),
}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_resolves(name):
    path = ["--in_memory_binary_criteo_path", "days"] if name in ON_KAGGLE else []
    config = parse_args(["--recipe", name, *path])
    recipe = RECIPES[name]()
    assert config.recipe == recipe.recipe == name
    assert config.model == recipe.model
    assert RECIPES[name].__doc__


@pytest.mark.parametrize("name", RESULTS_TABLE)
def test_recipes_of_the_results_table(name):
    config = RECIPES[name]()
    gib, num_gpus, batch_size, global_batch_size = RESULTS_TABLE[name]
    assert f"{sum(config.model.table_rows) * 128 * 4 / 2**30:.2f}" == gib
    assert config.data.batch_size == batch_size
    assert config.data.batch_size * num_gpus == global_batch_size
    assert config.model.embedding_dim == 128
    assert config.model.dense_arch_layer_sizes == (512, 256, 128)
    assert config.model.over_arch_layer_sizes == (1024, 1024, 512, 256, 1)
    assert config.model.interaction_type == "original"
    assert (config.optimizer.learning_rate, config.optimizer.adagrad) == (15.0, False)
    assert config.training.epochs == 1
    assert config.data.pin_memory
    assert gib in RECIPES[name].__doc__


@pytest.mark.skipif(not SPEC.exists(), reason=f"{SPEC} is absent")
def test_recipes_are_the_rows_of_the_published_table():
    rows = re.findall(
        r"^\|[^|]+\|([\d.]+)\|(\d+)\|(\d+)\|(\d+)\|.*--num_embeddings_per_feature \"([\d,]+)\"",
        SPEC.read_text(),
        re.MULTILINE,
    )
    published = [(gib, int(gpus), int(batch), int(total)) for gib, gpus, batch, total, _ in rows]
    assert published == list(RESULTS_TABLE.values())
    tables = [tuple(map(int, sizes.split(","))) for *_, sizes in rows]
    assert tables == [RECIPES[name]().model.num_embeddings_per_feature for name in RESULTS_TABLE]


def test_ranks_of_a_recipe_make_its_global_batch():
    batches = {name: re.search(r"global batch ([\d,]*\d)", recipe.__doc__) for name, recipe in RECIPES.items()}
    assert {name: batch[1] for name, batch in batches.items() if batch} == {
        name: f"{ranks * RECIPES[name]().data.batch_size:,}" for name, ranks in RANKS.items()
    }


def test_mlperf_v1():
    config = RECIPES["mlperf_v1"]()
    assert config.model.interaction_type == "original"
    assert (config.optimizer.algorithm, config.optimizer.learning_rate) == ("sgd", 1.0)
    assert config.data.batch_size * 8 == 16_384
    assert config.data.multi_hot_sizes is None
    assert config.evaluation.validation_auroc == 0.8025


def test_mlperf_v2():
    config = RECIPES["mlperf_v2"]()
    assert config.model.interaction_type == "dcn"
    assert (config.model.dcn_num_layers, config.model.dcn_low_rank_dim) == (3, 512)
    assert (config.optimizer.algorithm, config.optimizer.learning_rate) == ("adagrad", 0.004)
    assert config.data.batch_size * 8 == 65_536
    assert len(config.data.multi_hot_sizes) == 26
    assert sum(config.data.multi_hot_sizes) == 214
    assert config.evaluation.validation_auroc == 0.80275
    assert config.model.table_rows == RECIPES["mlperf_v1"]().model.table_rows
    assert max(config.model.table_rows) == 40_000_000


@pytest.mark.parametrize(("name", "world_size"), [("mlperf_v1", 8), ("mlperf_v2", 8)])
def test_mlperf_recipes_validate_20_times_an_epoch(name, world_size):
    config = RECIPES[name]()
    steps = CRITEO_1T_TRAINING_ROWS / (config.data.batch_size * world_size)
    assert steps / 20 - 1 < config.evaluation.validation_freq_within_epoch <= steps / 20


def test_training_rows_of_criteo_1t():
    assert CRITEO_1T_TRAINING_ROWS == TOTAL_TRAINING_SAMPLES
