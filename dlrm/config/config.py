"""Every knob of a run. A flag is one field: its docstring is its --help, its type has its bounds and rules.

Names and defaults are those of the public TorchRec DLRM example. No torch here.
"""

import dataclasses
import json
import math
import secrets
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
from annotated_types import Ge, Gt, Le, Lt

from dlrm.config.field_rules import AliasOf, NoEffect, Repeat, Resume, Scoring, needs
from dlrm.config.frozen import DENSE, frozen_parts, large_tables, read_frozen
from dlrm.config.interval import Interval
from dlrm.config.table_rules import parse_rules, read_rules
from dlrm.errors import ConfigError
from dlrm.schema.criteo import NUM_CATEGORICAL_FEATURES, NUM_INTEGER_FEATURES

CONFIG_VERSION = 1
DEFAULT_RANDOM_BATCHES = 10
PROFILE_WARM_UP_STEPS = 5
MOST_LAYERS = 1000
"""Layers of one MLP, or cross layers."""
MOST_RANKS = 4096
"""With more ranks TorchRec's planner takes hours."""


def _parse_list(tokens: list[str]) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in tokens[0].split(","))
    except ValueError:
        raise ValueError(f"{tokens[0][:80]}: not integers with commas between them, as in 512,256,128") from None


def optional(meaning: str, metavar: str) -> object:
    """How --help shows a flag that may be left out: in place of None it says what happens then."""
    return tyro.conf.arg(
        metavar=metavar, help_behavior_hint=lambda shown: f"(default: {meaning if shown == 'None' else shown})"
    )


IntList = Annotated[
    tuple[int, ...],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT,INT,...",
        instance_from_str=_parse_list,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda sizes: [",".join(map(str, sizes))],
    ),
]

Rules = Annotated[
    str | None,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="RULES|FILE",
        instance_from_str=lambda tokens: read_rules(tokens[0]),
        is_instance=lambda value: value is None or isinstance(value, str),
        str_from_instance=lambda rules: [str(rules)],
    ),
]

Frozen = Annotated[
    str | None,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="TABLES|dense",
        instance_from_str=read_frozen,
        is_instance=lambda value: value is None or isinstance(value, str),
        str_from_instance=lambda names: [str(names)],
    ),
]

Every = Annotated[
    Interval | None,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="STEPS|MINUTESm|never",
        instance_from_str=lambda tokens: Interval(tokens[0]),
        is_instance=lambda value: value is None or isinstance(value, Interval),
        str_from_instance=lambda every: [str(every)],
    ),
]

CommPrecision = Literal["fp32", "fp16", "bf16"]
OptimizerName = Literal["sgd", "adagrad", "rowwise_adagrad", "adam"]
Precision = Literal["fp32", "tf32", "bf16", "int16", "int8"]
DenseExecution = Literal["eager", "compile", "cuda_graph"]


_NEEDS_DAYS = NoEffect(lambda run: run.is_random, "needs --in_memory_binary_criteo_path; data is random without it")
_NEEDS_RANDOM_DATA = NoEffect(
    lambda run: not run.is_random, "is for random data; leave out --in_memory_binary_criteo_path"
)
_NEEDS_VALIDATION = NoEffect(
    lambda run: not run.evaluation.validates,
    "with --no_evaluate_on_epoch_end: nothing validates. Give --validation_freq_within_epoch, or drop one",
)
_NEEDS_TEST = NoEffect(
    lambda run: not run.evaluation.evaluate_on_training_end,
    "with --no_evaluate_on_training_end: nothing tests. Drop one of them",
)
_NEEDS_IDS_TO_DRAW = NoEffect(
    lambda run: run.data.synthetic_multi_hot_criteo_path is not None,
    "with --synthetic_multi_hot_criteo_path: its ids are drawn already. Drop one of them",
)
_NEEDS_SEVERAL_IDS = NoEffect(
    lambda run: max(run.data.multi_hot_sizes or (1,)) <= 1, "needs --multi_hot_sizes of more than one id"
)
_NEEDS_MULTI_HOT = NoEffect(
    lambda run: run.data.multi_hot_sizes is None and run.data.synthetic_multi_hot_criteo_path is None,
    "needs --multi_hot_sizes or --synthetic_multi_hot_criteo_path",
)


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from and how they are batched."""

    in_memory_binary_criteo_path: Annotated[
        str | None, Resume.FREE, Scoring.COUNTS, optional("random data", "FOLDER")
    ] = None
    """Folder of binary Criteo days (day_{i}_dense.npy, day_{i}_sparse.npy, day_{i}_labels.npy). The last day is held
    out: its first half validates, its second half tests. Each rank loads only its own rows into memory."""

    synthetic_multi_hot_criteo_path: Annotated[
        str | None, Resume.FREE, Scoring.COUNTS, optional("one id per feature", "FOLDER")
    ] = None
    """Folder of day_{i}_sparse_multi_hot.npz as `dlrm materialize` writes them, several ids per feature. Dense values
    and labels come from in_memory_binary_criteo_path, or from this folder if that is not given."""

    dataset_name: Annotated[Literal["criteo_1t", "criteo_kaggle"], Resume.FIXED, Scoring.COUNTS, _NEEDS_DAYS] = (
        "criteo_1t"
    )
    """Layout of the folder. criteo_kaggle: train_{dense,sparse,labels}.npy in time order; the first 6/7 of the rows
    train, of the rest the first half validates and the second tests."""

    mmap_mode: Annotated[bool, Resume.FREE, Scoring.COUNTS, _NEEDS_DAYS] = False
    """Read rows from disk when they are needed, not all of them first. They are then checked as they are read."""

    batch_size: Annotated[int, Gt(0), Lt(2**24), Resume.FREE, Scoring.COUNTS] = 32
    """Training samples per rank per step."""

    test_batch_size: Annotated[
        int | None, Gt(0), Lt(2**24), Resume.FREE, Scoring.COUNTS, optional("batch_size", "INT")
    ] = None
    """Validation and test samples per rank per step."""

    drop_last_training_batch: Annotated[bool, Resume.FIXED, Scoring.IDLE, _NEEDS_DAYS] = False
    """Leave out the last training batch of an epoch if it is not full on every rank."""

    limit_train_batches: Annotated[
        int | None, Gt(0), Resume.FIXED, Scoring.IDLE, optional("all; 10 of random data", "INT")
    ] = None
    """Train at most this many steps per epoch."""

    limit_val_batches: Annotated[
        int | None, Gt(0), Resume.FREE, Scoring.COUNTS, _NEEDS_VALIDATION, optional("all; 10 of random data", "INT")
    ] = None
    """Validate with at most this many steps."""

    limit_test_batches: Annotated[
        int | None, Gt(0), Resume.FREE, Scoring.COUNTS, _NEEDS_TEST, optional("all; 10 of random data", "INT")
    ] = None
    """Test with at most this many steps."""

    shuffle_batches: Annotated[bool, Resume.FIXED, Scoring.IDLE, _NEEDS_DAYS] = False
    """Permute the rows inside each rank's training batch. Needs binary days."""

    shuffle_training_set: Annotated[bool, Resume.FIXED, Scoring.IDLE, _NEEDS_DAYS] = False
    """Train on the rows of all training days in a new uniformly random order every epoch. The order depends on the
    seed, not on the number of ranks. Training rows are then read from disk when they are needed, as with mmap_mode:
    this is fast if they stay in the page cache. Needs binary days."""

    undersampling_rate: Annotated[
        float | None, Gt(0.0), Le(1.0), Resume.FIXED, Scoring.FIXED, _NEEDS_DAYS, optional("all stay", "FLOAT")
    ] = None
    """Share of the training rows with label 0 to train on; all rows with label 1 are trained on. Validation and test
    sets stay whole, and for them log(undersampling_rate) is added to each logit: reported log loss, NE and calibration
    are those of the original click rate. Needs binary days."""

    pin_memory: Annotated[bool, Resume.FREE, Scoring.COUNTS] = True
    """Build batches in page-locked memory, from which they are copied to a GPU while it computes. No effect without
    one."""

    num_generated_batches: Annotated[
        int | None, Gt(0), Resume.FIXED, Scoring.COUNTS, _NEEDS_RANDOM_DATA, optional("fresh ones every step", "INT")
    ] = None
    """Random data only: generate this many batches once and cycle through them."""

    zipf_exponent: Annotated[float, Ge(0.0), Lt(10.0), Resume.FIXED, Scoring.COUNTS, _NEEDS_RANDOM_DATA] = 0.0
    """Random data only: id k of a table is drawn with probability falling as (k + 1)^-exponent. 0 is uniform."""

    multi_hot_sizes: Annotated[IntList | None, Resume.FIXED, Scoring.COUNTS, optional("one each", "INT,INT,...")] = None
    """Ids per sample of each of the 26 features. On binary days an id brings the same random companions each time it
    occurs, as MLPerf's DLRM v2 defines and `dlrm materialize` writes them. Random data has independent ids instead, or
    such companions if multi_hot_distribution_type is given."""

    multi_hot_distribution_type: Annotated[
        Literal["uniform", "pareto"] | None,
        Resume.FIXED,
        Scoring.COUNTS,
        _NEEDS_IDS_TO_DRAW,
        _NEEDS_SEVERAL_IDS,
        optional("uniform", "KIND"),
    ] = None
    """How the companions of multi_hot_sizes are drawn: uniform, or pareto of shape 0.25, modulo the table's rows."""

    collect_multi_hot_freqs_stats: Annotated[bool, Resume.FIXED, Scoring.IDLE, _NEEDS_MULTI_HOT] = False
    """Count how often each id of each feature is trained on, as a sample's first id of the feature and as any of them,
    and write the counts to multi_hot_freqs.npz in the run directory. Takes 16 bytes a table row on each rank."""

    @property
    def evaluation_batch_size(self) -> int:
        """Validation and test samples per rank per step."""
        return self.test_batch_size or self.batch_size

    @property
    def largest_batch_size(self) -> int:
        """Samples per rank of the largest batch, of training or evaluation."""
        return max(self.batch_size, self.evaluation_batch_size)

    @property
    def folder(self) -> str | None:
        """Folder of dense values and labels; None for random data."""
        if self.in_memory_binary_criteo_path is not None:
            return self.in_memory_binary_criteo_path
        return self.synthetic_multi_hot_criteo_path

    @property
    def logit_correction(self) -> float:
        """The number to add to logits of a model trained on these rows, for predictions at the original click rate.

        With a share w of the negatives left, a prediction p becomes p / (p + (1 - p) / w) (He et al., "Practical
        Lessons from Predicting Clicks on Ads at Facebook", ADKDD 2014, section 6.3): its logit grows by log(w).
        """
        return math.log(self.undersampling_rate or 1.0)


_NEEDS_ONE_SIZE = NoEffect(
    lambda run: run.model.num_embeddings_per_feature is not None,
    "has no effect beside --num_embeddings_per_feature; give one of the two",
)
_NEEDS_DCN = needs("interaction_type", "dcn")
_NEEDS_PROJECTION = needs("interaction_type", "projection")


@dataclass(frozen=True)
class ModelConfig:
    """Embedding tables, dense arch, interaction, over arch."""

    num_embeddings: Annotated[int, Gt(0), Lt(2**31), Resume.FIXED, Scoring.FIXED, _NEEDS_ONE_SIZE] = 100_000
    """Rows of every embedding table. On the command line it replaces the table sizes of a recipe."""

    num_embeddings_per_feature: Annotated[
        IntList | None, Resume.FIXED, Scoring.FIXED, optional("num_embeddings each", "INT,INT,...")
    ] = None
    """Rows of each of the 26 embedding tables. Ids outside a table are reduced modulo its rows."""

    embedding_dim: Annotated[int, Gt(0), Lt(2**16), Resume.FIXED, Scoring.FIXED] = 64
    """Columns of every embedding table; a multiple of 4."""

    dense_arch_layer_sizes: Annotated[IntList, Resume.FIXED, Scoring.FIXED] = (512, 256, 64)
    """Layers of the MLP over the 13 integers; the last is embedding_dim."""

    standardize_dense: Annotated[bool, Resume.FIXED, Scoring.FIXED] = False
    """Standardize each integer before the MLP, with mean and deviation of the training rows, and also tell the MLP
    whether it is missing (if the days say so: dlrm preprocess --missing_integers apart)."""

    dense_buckets: Annotated[int, Ge(0), Lt(2**16), Resume.FIXED, Scoring.FIXED] = 0
    """Each integer also falls into one of this many buckets, cut at quantiles of the training rows, or into one for
    missing values. Each bucket has an embedding, which joins the interaction like a categorical feature's. 0: none."""

    over_arch_layer_sizes: Annotated[IntList, Resume.FIXED, Scoring.FIXED] = (512, 512, 256, 1)
    """Layers of the MLP over the interaction; the last is 1, the logit."""

    interaction_type: Annotated[Literal["original", "dcn", "projection"], Resume.FIXED, Scoring.FIXED] = "original"
    """original: pairwise dot products. dcn: low-rank DCN v2. projection: product of two MLPs' outputs."""

    interaction_branch1_layer_sizes: Annotated[IntList, Resume.FIXED, Scoring.FIXED, _NEEDS_PROJECTION] = (2048, 2048)
    """projection only: layers of the first branch; the last is a multiple of embedding_dim."""

    interaction_branch2_layer_sizes: Annotated[IntList, Resume.FIXED, Scoring.FIXED, _NEEDS_PROJECTION] = (2048, 2048)
    """projection only: layers of the second branch; the last is a multiple of embedding_dim."""

    dcn_num_layers: Annotated[int, Gt(0), Le(MOST_LAYERS), Resume.FIXED, Scoring.FIXED, _NEEDS_DCN] = 3
    """dcn only: number of cross layers."""

    dcn_low_rank_dim: Annotated[int, Gt(0), Lt(2**20), Resume.FIXED, Scoring.FIXED, _NEEDS_DCN] = 512
    """dcn only: rank of each cross layer's weight."""

    @property
    def num_vectors(self) -> int:
        """Vectors that meet in the interaction: the MLP's, the tables', and the integers' if they have buckets."""
        return 1 + NUM_CATEGORICAL_FEATURES + (NUM_INTEGER_FEATURES if self.dense_buckets else 0)

    @property
    def needs_dense_statistics(self) -> bool:
        """Whether the model is built with statistics of the integers."""
        return self.standardize_dense or self.dense_buckets > 0

    @property
    def table_rows(self) -> tuple[int, ...]:
        """Rows of each of the 26 tables."""
        return self.num_embeddings_per_feature or (self.num_embeddings,) * NUM_CATEGORICAL_FEATURES


_NEEDS_LARGE = NoEffect(
    lambda run: not run.names_large_tables, "needs a rule of `large` in --table_constraints, or --freeze large"
)


@dataclass(frozen=True)
class ShardingConfig:
    """Which rank holds which embedding table, and how embeddings travel."""

    table_constraints: Annotated[
        Rules, Resume.FREE, Scoring.COUNTS, optional("as the planner sees fit", "RULES|FILE")
    ] = None
    """Where tables may go: "large = row_wise; t_cat_0 t_cat_9 = table_wise ranks=0,1; t_cat_2 = fused_uvm_caching
    cache=0.2", or a file of such rules. Left of = names of tables, large or all; the most specific rule counts. Right
    of it a sharding type (table_wise, row_wise, column_wise, table_row_wise, table_column_wise, grid_shard,
    data_parallel), a kernel (dense, fused, fused_uvm, fused_uvm_caching), the share of rows in a cache, ranks."""

    large_table_gib: Annotated[float, Ge(0.0), Lt(1e9), Resume.FREE, Scoring.COUNTS, _NEEDS_LARGE] = 1.0
    """Tables of at least this many GiB of weights are `large` in --table_constraints."""

    device_memory_gib: Annotated[
        float | None, Ge(1e-3), Lt(1e9), Resume.FREE, Scoring.COUNTS, optional("what there is", "FLOAT")
    ] = None
    """Memory in GiB that a plan counts on: of each GPU, or on CPUs of each rank's share of the host."""

    reserved_memory_share: Annotated[float, Ge(0.0), Lt(1.0), Resume.FREE, Scoring.COUNTS] = 0.15
    """Share of that memory that tables leave free for dense layers, activations and batches."""

    intra_host_bandwidth: Annotated[float, Ge(1e-3), Lt(1e9), Resume.FREE, Scoring.COUNTS] = 600.0
    """Bandwidth between two devices of a host, in GiB/s, that a plan assumes."""

    inter_host_bandwidth: Annotated[float, Ge(1e-3), Lt(1e9), Resume.FREE, Scoring.COUNTS] = 12.5
    """Bandwidth between two hosts, in GiB/s, that a plan assumes."""

    forward_comm_precision: Annotated[CommPrecision, Resume.FREE, Scoring.COUNTS] = "fp32"
    """Precision in which pooled embeddings travel between ranks."""

    backward_comm_precision: Annotated[CommPrecision, Resume.FREE, Scoring.IDLE] = "fp32"
    """Precision in which their gradients travel back."""


_NEEDS_EPS = NoEffect(
    lambda run: run.optimizer.algorithm == "sgd", "needs --optimizer adagrad, rowwise_adagrad or adam"
)
_NEEDS_DECAY = NoEffect(
    lambda run: run.optimizer.algorithm in ("sgd", "adagrad"),
    "needs --optimizer rowwise_adagrad or adam: no other fused kernel has weight decay",
)


@dataclass(frozen=True)
class OptimizerConfig:
    """How gradients become updates, of tables (fused into the backward pass) and MLPs alike."""

    optimizer: Annotated[
        OptimizerName | None, Resume.FIXED, Scoring.IDLE, optional("sgd", "{sgd,adagrad,rowwise_adagrad,adam}")
    ] = None
    """sgd. adagrad: each weight has its own rate. rowwise_adagrad: each row of a table has one (in the dense parts each
    weight), with next to no optimizer state. adam: updates only the rows of a batch (lazy Adam); on a CPU it needs
    data-parallel tables, and updates all of their rows."""

    adagrad: Annotated[bool, Resume.FIXED, Scoring.IDLE, AliasOf("optimizer", "adagrad")] = False
    """The same as --optimizer adagrad."""

    learning_rate: Annotated[float, Gt(0.0), Lt(1e38), Resume.FIXED, Scoring.IDLE] = 15.0
    """Step size of the embedding tables and the dense parts."""

    dense_learning_rate: Annotated[
        float | None, Gt(0.0), Lt(1e38), Resume.FIXED, Scoring.IDLE, optional("learning_rate", "FLOAT")
    ] = None
    """Step size of the dense parts (all but the embedding tables)."""

    eps: Annotated[float, Ge(1e-37), Lt(1e38), Resume.FIXED, Scoring.IDLE, _NEEDS_EPS] = 1e-8
    """All but sgd: added to the root of the accumulated squares."""

    weight_decay: Annotated[float, Ge(0.0), Lt(1e38), Resume.FIXED, Scoring.IDLE, _NEEDS_DECAY] = 0.0
    """rowwise_adagrad and adam only, whose fused kernels have it on a GPU: pulls the rows of a batch, and dense
    parameters, towards 0. rowwise_adagrad adds weight_decay * weight to the gradient, adam subtracts learning_rate *
    weight_decay * weight from the weight. On a CPU it needs data-parallel tables, and pulls all of their rows."""

    lr_warmup_steps: Annotated[int, Ge(0), Lt(2**53), Resume.FIXED, Scoring.IDLE] = 0
    """Training steps over which the learning rate grows linearly to its full size."""

    lr_decay_start: Annotated[int, Ge(0), Lt(2**53), Resume.FIXED, Scoring.IDLE, needs("lr_decay_steps")] = 0
    """Training step after which the learning rate decays; lr_warmup_steps or more."""

    lr_decay_steps: Annotated[int, Ge(0), Lt(2**53), Resume.FIXED, Scoring.IDLE] = 0
    """Training steps over which the learning rate falls to 1e-7, with the square of the steps that are left. It stays
    there. 0: no decay."""

    freeze: Annotated[Frozen, Resume.FIXED, Scoring.IDLE, optional("none", "TABLES|dense")] = None
    """Parts of the model that training leaves as they are: names of tables (t_cat_0), large, all (tables) or dense (all
    parameters that are not in tables), with commas or spaces between them. Frozen parts have no optimizer state."""

    @property
    def algorithm(self) -> OptimizerName:
        """The optimizer that --optimizer and --adagrad ask for together."""
        return "adagrad" if self.adagrad else self.optimizer or "sgd"

    @property
    def dense_rate(self) -> float:
        """Step size of the dense parts."""
        return self.learning_rate if self.dense_learning_rate is None else self.dense_learning_rate


@dataclass(frozen=True)
class TrainingConfig:
    """Length, seed and arithmetic of a run."""

    epochs: Annotated[int, Gt(0), Lt(2**31), Resume.FREE, Scoring.IDLE] = 1
    """Passes over the training set."""

    seed: Annotated[
        int | None, Ge(0), Lt(2**63), Resume.TAKEN_OVER, Scoring.COUNTS, optional("drawn at random", "INT")
    ] = None
    """Seed of weights, random data and shuffles: the same seed, machine and world size repeat a run bit for bit (on a
    CPU; not tried on a GPU). It is recorded in config.json."""

    pipeline: Annotated[Literal["base", "sparse_dist", "prefetch"], Resume.FREE, Scoring.COUNTS] = "sparse_dist"
    """How a step overlaps with the next ones. base: only the next batch's copy to the device. sparse_dist: also its
    input all-to-all. prefetch: also its cache lines, for tables in host memory that the GPU caches. The results are the
    same."""

    precision: Annotated[
        Precision | None, Resume.FREE, Scoring.COUNTS, optional("fp32", "{fp32,tf32,bf16,int16,int8}")
    ] = None
    """Arithmetic of matrix products. tf32: TensorFloat-32, on A100 or newer GPUs. bf16: bfloat16 by autocast, on CPUs
    and GPUs; weights, optimizer states, gradients' sums, the logit and the loss stay in fp32. int16, int8: for CPUs
    with AVX-512 VNNI, but without AMX. The MLPs' wider matrix products have operands rounded to integers, in blocks
    with a scale each. All else is as in fp32 with int16, and as in bf16 with int8, which is the faster one."""

    allow_tf32: Annotated[bool, Resume.FREE, Scoring.COUNTS, AliasOf("precision", "tf32")] = False
    """The same as --precision tf32. No effect without a GPU."""

    dense_execution: Annotated[DenseExecution, Resume.FREE, Scoring.IDLE] = "eager"
    """How the MLPs run on full training batches. eager: operator by operator. compile: by torch.compile, which takes
    seconds to a minute at the first step. cuda_graph: compiled, and launched as one CUDA graph; pays with small
    batches, whose kernels are shorter than their launches."""

    @property
    def arithmetic(self) -> Precision:
        """The arithmetic that --precision and --allow_tf32 ask for together."""
        return "tf32" if self.allow_tf32 else self.precision or "fp32"

    @property
    def integers(self) -> Literal["int16", "int8"] | None:
        """The integers of the MLPs' wider matrix products; None if these are of floats."""
        asked = self.arithmetic
        return asked if asked == "int16" or asked == "int8" else None

    @property
    def activations(self) -> Literal["fp32", "bf16"]:
        """Precision of activations, from the pooled rows on."""
        return "bf16" if self.arithmetic in ("bf16", "int8") else "fp32"


@dataclass(frozen=True)
class EvaluationConfig:
    """When the held-out sets are scored."""

    validation_freq_within_epoch: Annotated[
        int | None, Gt(0), Resume.FREE, Scoring.IDLE, optional("none within", "INT")
    ] = None
    """Training steps between validations within an epoch."""

    validation_auroc: Annotated[
        float | None,
        Gt(0.5),
        Le(1.0),
        Resume.FREE,
        Scoring.IDLE,
        _NEEDS_VALIDATION,
        optional("train to the end", "FLOAT"),
    ] = None
    """Stop training once a validation reaches this AUROC, and report the samples and seconds it took."""

    evaluate_on_epoch_end: Annotated[bool, Resume.FREE, Scoring.IDLE] = True
    """Score the validation set after each epoch."""

    evaluate_on_training_end: Annotated[bool, Resume.FREE, Scoring.IDLE] = True
    """Score the test set after training."""

    def scores(self, stage: str) -> bool:
        """Whether a run scores a held-out set: val or test."""
        return {"val": self.validates, "test": self.evaluate_on_training_end}.get(stage, False)

    @property
    def validates(self) -> bool:
        """Whether the validation set is scored at all."""
        return self.evaluate_on_epoch_end or self.validation_freq_within_epoch is not None


_NEEDS_CHECKPOINTS = NoEffect(
    lambda run: run.checkpoint.checkpoint_every == "never",
    "with --checkpoint_every never: no checkpoint is written. Drop one of them",
)
_NEEDS_RESUME = NoEffect(
    lambda run: run.checkpoint.resume == "never", "with --resume never: nothing is resumed. Drop one of them"
)
_NEEDS_RESUME_OR_INIT = NoEffect(
    lambda run: run.checkpoint.resume == "never" and run.checkpoint.init_from is None,
    "with --resume never: nothing is resumed",
)
_NEEDS_STATE = NoEffect(
    lambda run: run.optimizer.algorithm == "sgd", "with --optimizer sgd, which has no state. Drop it"
)


@dataclass(frozen=True)
class CheckpointConfig:
    """When a training is saved, and what a training begins with."""

    checkpoint_every: Annotated[
        Every, Resume.FREE, Scoring.IDLE, optional("30m; never for random data", "STEPS|MINUTESm|never")
    ] = None
    """How often a checkpoint is written: 500 is training steps, 30m minutes. One more is written when a validation
    beats all before it, at the end of training, and when a signal ends the run (SIGTERM, SIGINT, SIGHUP, SIGUSR1,
    ...)."""

    checkpoint_dir: Annotated[
        str | None, Resume.FREE, Scoring.IDLE, Repeat.LEFT_OUT, optional("checkpoints in run_dir", "FOLDER|ADDRESS")
    ] = None
    """Where checkpoints are written: a folder that all hosts see, or an address that fsspec knows, such as
    s3://bucket/run."""

    keep: Annotated[int, Ge(1), Resume.FREE, Scoring.IDLE, _NEEDS_CHECKPOINTS] = 2
    """How many of the newest checkpoints to keep. The one with the best validation AUROC is kept in addition."""

    checkpoint_mode: Annotated[Literal["async", "sync"], Resume.FREE, Scoring.IDLE, _NEEDS_CHECKPOINTS] = "async"
    """async: training continues while a copy is written; the copy takes as much host memory as tables and optimizer
    state. sync: training waits."""

    resume: Annotated[str, Resume.FREE, Scoring.IDLE, Repeat.LEFT_OUT, tyro.conf.arg(metavar="auto|never|PATH")] = (
        "auto"
    )
    """auto: continue from the newest complete checkpoint of the run directory, if it holds one. PATH: continue from
    this checkpoint, or the newest one in this folder, in a new run directory. never: start from the beginning."""

    allow_changed_data: Annotated[bool, Resume.FREE, Scoring.IDLE, _NEEDS_RESUME, Repeat.LEFT_OUT] = False
    """Resume although the data is not that which the checkpoint was trained on. Epochs then begin at row 0 of this
    data; steps, samples, learning rates and optimizer state continue."""

    init_from: Annotated[str | None, Resume.FREE, Scoring.IDLE, optional("weights are drawn", "PATH")] = None
    """Start a new run with the weights of this checkpoint, or of the newest one in this folder: of tables, which may
    have grown, and of all dense layers that fit."""

    init_optimizer: Annotated[bool, Resume.FREE, Scoring.IDLE, needs("init_from"), _NEEDS_STATE] = False
    """Also take the optimizer's state with --init_from; the optimizer must be the same."""

    allow_other_vocabulary: Annotated[bool, Resume.FREE, Scoring.COUNTS, _NEEDS_RESUME_OR_INIT, Repeat.LEFT_OUT] = False
    """Accept days of another vocabulary than the checkpoint was trained on: an id then stands for another value than
    its row has learned."""

    hang_timeout: Annotated[float, Ge(1.0), Lt(1e9), Resume.FREE, Scoring.COUNTS] = 600.0
    """Seconds without a step on any rank after which a rank that hangs is named and the run ends."""


_NEEDS_TARGET = NoEffect(
    lambda run: run.evaluation.validation_auroc is None,
    "needs --validation_auroc: MLPerf times a run to its target",
)
_NEEDS_FIRST_STEP = NoEffect(
    lambda run: run.checkpoint.init_from is not None, "with --init_from: MLPerf times a run from its first step"
)


@dataclass(frozen=True)
class OutputConfig:
    """What a run shows and where it writes."""

    run_dir: Annotated[
        str | None, Resume.FREE, Scoring.IDLE, Repeat.LEFT_OUT, optional("runs/<time>-<recipe or dataset>", "FOLDER")
    ] = None
    """Folder that gets config, plan, metrics and summary."""

    tensorboard: Annotated[bool, Resume.FREE, Scoring.IDLE] = False
    """Also write the content of metrics.jsonl as TensorBoard's event files, to the run directory's folder
    tensorboard."""

    mlperf_log: Annotated[bool, Resume.FREE, Scoring.IDLE, _NEEDS_TARGET, _NEEDS_FIRST_STEP] = False
    """Print the lines that the rules of MLPerf training require of DLRM v2 (:::MLLOG ...), and write them to the run
    directory's mlperf_log.txt. Needs --validation_auroc, the target of the timed run."""

    log_every: Annotated[
        int | None, Gt(0), Resume.FREE, Scoring.IDLE, optional("a fiftieth of the epoch, at most 100", "INT")
    ] = None
    """Steps between lines in metrics.jsonl. The screen is paced by time."""

    print_progress: Annotated[bool, Resume.FREE, Scoring.COUNTS] = True
    """Show step, samples/s, time left, loss, learning rate and last AUROC while training."""

    print_lr: Annotated[bool, Resume.FREE, Scoring.IDLE] = False
    """Print the learning rates of the tables and of the dense parts at every step."""

    print_sharding_plan: Annotated[bool, Resume.FREE, Scoring.COUNTS] = False
    """Print where each embedding table lives, and the GiB per rank. plan.json has the plan in any case."""

    profile: Annotated[int | None, Gt(0), Le(1000), Resume.FREE, Scoring.IDLE, optional("none", "STEPS")] = None
    """Training steps to trace on every rank, after 5 that warm up: trace_rank{r}.json.gz in the run directory, for
    Perfetto or chrome://tracing."""


@dataclass(frozen=True)
class Config:
    """All flags of a run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    config: Annotated[str | None, Resume.FREE, Scoring.IDLE, optional("none", "FILE")] = None
    """config.json of a run. The same run starts again in a new run directory; other flags change single fields of
    it."""

    recipe: Annotated[str | None, Resume.FREE, Scoring.FIXED, optional("none", "NAME")] = None
    """A complete named run; other flags change single fields of it: debug_cpu, kaggle, kaggle_sample, mlperf_v1,
    mlperf_v2, spec_mlperf_a100x8, spec_mlperf_x2_a100x16, spec_full_size_a100x80. --help beside it shows its values as
    the defaults."""

    @property
    def is_random(self) -> bool:
        """Whether samples are generated rather than read."""
        return self.data.folder is None

    @property
    def frozen(self) -> tuple[str, ...]:
        """Tables, in order, and `dense`, that --freeze leaves as they are."""
        names = self.optimizer.freeze
        needs_large = names is not None and "large" in names.split(",")
        return frozen_parts(names, self.large_tables if needs_large else ())

    @property
    def frozen_tables(self) -> tuple[str, ...]:
        """Tables that --freeze leaves as they are."""
        return tuple(name for name in self.frozen if name != DENSE)

    @property
    def large_tables(self) -> list[str]:
        """Tables of --large_table_gib or more."""
        return large_tables(self.model.table_rows, self.model.embedding_dim, self.sharding.large_table_gib)

    @property
    def names_large_tables(self) -> bool:
        """Whether --table_constraints or --freeze speaks of `large` tables.

        Raises:
            ConfigError: if a rule of --table_constraints makes no sense.
        """
        rules, frozen = self.sharding.table_constraints, self.optimizer.freeze or ""
        return "large" in frozen.split(",") or (rules is not None and "large" in parse_rules(rules))

    @property
    def checkpoint_interval(self) -> Interval:
        """How often a checkpoint is written: as --checkpoint_every says; if it does not, every 30 minutes, but never of
        random data."""
        return self.checkpoint.checkpoint_every or Interval("never" if self.is_random else "30m")

    def resolve(self, saved: "Config | None") -> "Config":
        """The config that a training runs with: what the flags leave open is filled in.

        Args:
            saved: the config of the checkpoint that the training is resumed from, which has the seed. Without it the
                seed is that of the flags, or a random one.
        """
        seed = self.training.seed if saved is None else saved.training.seed
        return dataclasses.replace(
            self,
            training=dataclasses.replace(self.training, seed=secrets.randbits(31) if seed is None else seed),
            checkpoint=dataclasses.replace(self.checkpoint, checkpoint_every=self.checkpoint_interval),
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary from which `from_json` restores an equal config."""
        return {"config_version": CONFIG_VERSION, **dataclasses.asdict(self)}

    @staticmethod
    def from_json(content: dict[str, Any]) -> "Config":
        """The config that `to_json` wrote.

        Raises:
            ConfigError: if another version wrote it, it has an unknown field, or a value is not of its field's type.
        """
        if not isinstance(content, dict) or "config_version" not in content:
            raise ConfigError(f"has no config_version, expected {CONFIG_VERSION}")
        version = content["config_version"]
        if version != CONFIG_VERSION:
            raise ConfigError(f"config_version {version}: this dlrm reads version {CONFIG_VERSION}")
        hints = typing.get_type_hints(Config)
        try:
            return Config(
                **{
                    name: _restore(hints[name], value) if dataclasses.is_dataclass(hints[name]) else value
                    for name, value in content.items()
                    if name != "config_version"
                }
            )
        except (AttributeError, KeyError, TypeError) as error:
            raise ConfigError(f"does not fit this dlrm: {error}") from None

    @staticmethod
    def load(path: Path) -> "Config":
        """The config in a run directory's config.json."""
        return Config.from_text(path.read_text(encoding="utf-8"))

    @staticmethod
    def from_text(text: str) -> "Config":
        """The config in the text of a config.json.

        Raises:
            ConfigError: as `from_json` does.
            ValueError: if the text is not JSON.
        """
        try:
            return Config.from_json(json.loads(text))
        except RecursionError:
            raise ValueError("too many levels") from None


_Section = TypeVar("_Section")


def _restore(section: type[_Section], content: dict[str, Any]) -> _Section:
    hints = typing.get_type_hints(section)
    values = {name: _from_json(hints.get(name), value) for name, value in content.items()}
    for name, value in values.items():
        if name in hints and not _is_of(hints[name], value):
            raise TypeError(f"{name} is {value!r}")
    return section(**values)


def _from_json(hint: Any, value: object) -> object:
    """A value as its field has it: JSON has lists in place of tuples, and an Interval's text."""
    if isinstance(value, str) and Interval in _alternatives(hint):
        return Interval(value)
    return tuple(value) if isinstance(value, list) else value


def _is_of(hint: Any, value: object) -> bool:
    """Whether a value from JSON is of a field's type."""
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if isinstance(value, tuple):
        return all(type(size) is int for size in value) and tuple in map(typing.get_origin, _alternatives(hint))
    return any(type(value) is kind or (kind is float and type(value) is int) for kind in _alternatives(hint)) or any(
        value in typing.get_args(kind) for kind in _alternatives(hint) if typing.get_origin(kind) is Literal
    )


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
