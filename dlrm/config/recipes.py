"""Complete named runs. `dlrm_main.py --recipe NAME` starts one; other flags change single fields of it.

`batch_size` is the batch of one rank. The global batch is `batch_size` times the ranks, which the recipe's name or
docstring gives.
"""

from collections.abc import Callable, Mapping

from dlrm.config.config import Config, DataConfig, EvaluationConfig, ModelConfig, OptimizerConfig, TrainingConfig

# Table sizes of the three runs in the results table of the public TorchRec DLRM example. MLPerf caps the cardinalities
# at 40 million.
MLPERF_ROWS = (
    40000000, 39060, 17295, 7424, 20265, 3, 7122, 1543, 63, 40000000, 3067956, 405282, 10,
    2209, 11938, 155, 4, 976, 14, 40000000, 40000000, 40000000, 590152, 12973, 108, 36,
)  # fmt: skip
MLPERF_X2_ROWS = (
    80000000, 39060, 17295, 7424, 20265, 3, 7122, 1543, 63, 80000000, 3067956, 405282, 10,
    2209, 11938, 155, 4, 976, 14, 80000000, 40790948, 80000000, 590152, 12973, 108, 36,
)  # fmt: skip
FULL_SIZE_ROWS = (
    227605432, 39060, 17295, 7424, 20265, 3, 7122, 1543, 63, 130229467, 3067956, 405282, 10,
    2209, 11938, 155, 4, 976, 14, 292775614, 40790948, 187188510, 590152, 12973, 108, 36,
)  # fmt: skip
# Ids per sample of MLPerf's synthetic multi-hot Criteo data (MLCommons, recommendation_v2).
MLPERF_MULTI_HOT_SIZES = (3, 2, 1, 2, 6, 1, 1, 1, 1, 7, 3, 8, 1, 6, 9, 5, 1, 1, 1, 12, 100, 27, 10, 3, 1, 1)
CRITEO_1T_TRAINING_ROWS = 4_195_197_692


def debug_cpu() -> Config:
    """Small dot-product model that trains in seconds on a laptop's CPU."""
    return Config(
        recipe="debug_cpu",
        data=DataConfig(batch_size=256),
        model=ModelConfig(
            num_embeddings=10_000,
            embedding_dim=16,
            dense_arch_layer_sizes=(64, 16),
            over_arch_layer_sizes=(128, 64, 1),
        ),
        optimizer=OptimizerConfig(optimizer="adagrad", learning_rate=0.01),
        training=TrainingConfig(seed=0),
    )


def kaggle() -> Config:
    """Criteo Display Advertising Challenge, all 45,840,617 labelled rows, for 8 ranks; global batch 16,384."""
    return Config(
        recipe="kaggle",
        data=DataConfig(dataset_name="criteo_kaggle", batch_size=2048, test_batch_size=8192),
        model=ModelConfig(
            num_embeddings=2_000_000,
            embedding_dim=32,
            dense_arch_layer_sizes=(512, 256, 32),
            over_arch_layer_sizes=(512, 256, 1),
            interaction_type="dcn",
            dcn_low_rank_dim=64,
        ),
        optimizer=OptimizerConfig(optimizer="adagrad", learning_rate=0.01),
        evaluation=EvaluationConfig(validation_freq_within_epoch=500),
    )


def kaggle_sample() -> Config:
    """The first 120,000 rows of the Criteo Display Advertising Challenge, for one or two ranks; figures in LOG.md."""
    return Config(
        recipe="kaggle_sample",
        data=DataConfig(dataset_name="criteo_kaggle", batch_size=128, test_batch_size=4096),
        model=ModelConfig(
            num_embeddings=100_000,
            embedding_dim=64,
            standardize_dense=True,
            dense_buckets=32,
            dense_arch_layer_sizes=(64, 64),
            over_arch_layer_sizes=(512, 1),
        ),
        optimizer=OptimizerConfig(optimizer="adagrad", learning_rate=0.02),
    )


def _criteo_1t_model(rows: tuple[int, ...], *, dcn: bool = False) -> ModelConfig:
    return ModelConfig(
        num_embeddings_per_feature=rows,
        embedding_dim=128,
        dense_arch_layer_sizes=(512, 256, 128),
        over_arch_layer_sizes=(1024, 1024, 512, 256, 1),
        interaction_type="dcn" if dcn else "original",
    )


def mlperf_v1() -> Config:
    """MLPerf training v1: dot product, SGD 1.0, for 8 ranks; global batch 16,384, target AUROC 0.8025."""
    return Config(
        recipe="mlperf_v1",
        data=DataConfig(batch_size=2048, test_batch_size=8192),
        model=_criteo_1t_model(MLPERF_ROWS),
        optimizer=OptimizerConfig(learning_rate=1.0),
        evaluation=EvaluationConfig(
            validation_auroc=0.8025, validation_freq_within_epoch=CRITEO_1T_TRAINING_ROWS // (16_384 * 20)
        ),
    )


def mlperf_v2() -> Config:
    """MLPerf training v2: DCN v2, multi-hot, Adagrad 0.004, for 8 ranks; global batch 65,536, target AUROC 0.80275."""
    return Config(
        recipe="mlperf_v2",
        data=DataConfig(batch_size=8192, test_batch_size=16_384, multi_hot_sizes=MLPERF_MULTI_HOT_SIZES),
        model=_criteo_1t_model(MLPERF_ROWS, dcn=True),
        optimizer=OptimizerConfig(optimizer="adagrad", learning_rate=0.004),
        evaluation=EvaluationConfig(
            validation_auroc=0.80275, validation_freq_within_epoch=CRITEO_1T_TRAINING_ROWS // (65_536 * 20)
        ),
    )


def _spec(name: str, rows: tuple[int, ...], batch_size: int) -> Config:
    return Config(
        recipe=name,
        data=DataConfig(batch_size=batch_size),
        model=_criteo_1t_model(rows),
        optimizer=OptimizerConfig(learning_rate=15.0),
    )


def spec_mlperf_a100x8() -> Config:
    """The example's results table, row 1: 97.36 GiB of tables, global batch 65,536 on 8 A100s of 40 GB."""
    return _spec("spec_mlperf_a100x8", MLPERF_ROWS, 8192)


def spec_mlperf_x2_a100x16() -> Config:
    """The example's results table, row 2: 174.03 GiB of tables, global batch 65,536 on 16 A100s of 40 GB."""
    return _spec("spec_mlperf_x2_a100x16", MLPERF_X2_ROWS, 4096)


def spec_full_size_a100x80() -> Config:
    """The example's results table, row 3: 420.94 GiB of tables, global batch 65,520 on 80 A100s of 40 GB."""
    return _spec("spec_full_size_a100x80", FULL_SIZE_ROWS, 819)


RANKS: Mapping[str, int] = {
    "kaggle": 8,
    "mlperf_v1": 8,
    "mlperf_v2": 8,
    "spec_mlperf_a100x8": 8,
    "spec_mlperf_x2_a100x16": 16,
    "spec_full_size_a100x80": 80,
}
"""Ranks of each recipe that has a global batch."""

RECIPES: Mapping[str, Callable[[], Config]] = {
    recipe.__name__: recipe
    for recipe in (
        debug_cpu,
        kaggle,
        kaggle_sample,
        mlperf_v1,
        mlperf_v2,
        spec_mlperf_a100x8,
        spec_mlperf_x2_a100x16,
        spec_full_size_a100x80,
    )
}
