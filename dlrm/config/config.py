"""Every knob of a run. One owner per field; a field's docstring is its --help.

The names and defaults of the public TorchRec DLRM example hold. No torch here.
"""

import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
from annotated_types import Ge, Gt, Le, Lt

from dlrm.config.frozen import DENSE, frozen_parts, large_tables, read_frozen
from dlrm.config.table_rules import read_rules
from dlrm.errors import ConfigError
from dlrm.schema.criteo import NUM_CATEGORICAL_FEATURES, NUM_INTEGER_FEATURES

CONFIG_VERSION = 1
DEFAULT_RANDOM_BATCHES = 10
PROFILE_WARM_UP_STEPS = 5
MOST_LAYERS = 1000
"""Of one MLP, or cross layers."""
MOST_RANKS = 4096
"""Beyond it TorchRec's planner takes hours."""


def _parse_list(tokens: list[str]) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in tokens[0].split(","))
    except ValueError:
        raise ValueError(f"{tokens[0][:80]}: not integers with commas between them, as in 512,256,128") from None


def optional(meaning: str, metavar: str) -> object:
    """How --help shows a flag that may be left out: what happens then, in place of None."""
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

CommPrecision = Literal["fp32", "fp16", "bf16"]
OptimizerName = Literal["sgd", "adagrad", "rowwise_adagrad", "adam"]
Precision = Literal["fp32", "tf32", "bf16", "int16", "int8"]
DenseExecution = Literal["eager", "compile", "cuda_graph"]


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from and how they are batched."""

    in_memory_binary_criteo_path: Annotated[str | None, optional("random data", "FOLDER")] = None
    """Folder of binary Criteo days (day_{i}_dense.npy, day_{i}_sparse.npy, day_{i}_labels.npy). The last day is held
    out: its first half validates, its second half tests. Each rank loads only its own rows into memory."""

    synthetic_multi_hot_criteo_path: Annotated[str | None, optional("one id per feature", "FOLDER")] = None
    """Folder of day_{i}_sparse_multi_hot.npz as `dlrm materialize` writes them, several ids per feature. Dense values
    and labels come from in_memory_binary_criteo_path, or from this folder where that is not given."""

    dataset_name: Literal["criteo_1t", "criteo_kaggle"] = "criteo_1t"
    """Layout of the folder. criteo_kaggle: train_{dense,sparse,labels}.npy in time order; the first 6/7 of the rows
    train, of the rest the first half validates and the second tests."""

    mmap_mode: bool = False
    """Read rows from disk as they are needed instead of loading them first. Rows are then checked as they are read."""

    batch_size: Annotated[int, Gt(0), Lt(2**24)] = 32
    """Training samples per rank per step."""

    test_batch_size: Annotated[int | None, Gt(0), Lt(2**24), optional("batch_size", "INT")] = None
    """Validation and test samples per rank per step."""

    drop_last_training_batch: bool = False
    """Leave out the last training batch of an epoch where it is not full on every rank."""

    limit_train_batches: Annotated[int | None, Gt(0), optional("all; 10 of random data", "INT")] = None
    """Training steps per epoch at the most."""

    limit_val_batches: Annotated[int | None, Gt(0), optional("all; 10 of random data", "INT")] = None
    """Validation steps at the most."""

    limit_test_batches: Annotated[int | None, Gt(0), optional("all; 10 of random data", "INT")] = None
    """Test steps at the most."""

    shuffle_batches: bool = False
    """Permute the rows inside each rank's training batch. Needs binary days."""

    shuffle_training_set: bool = False
    """Train on the rows of all training days in another uniformly random order every epoch, the same for a seed and any
    number of ranks. Training rows are then read from disk as they are needed, as with mmap_mode: fast where they stay
    in the page cache. Needs binary days."""

    undersampling_rate: Annotated[float | None, Gt(0.0), Le(1.0), optional("all stay", "FLOAT")] = None
    """Share of the training rows with label 0 that is trained on; all rows with label 1 are. Validation and test sets
    stay whole, and for them log(undersampling_rate) is added to each logit: reported log loss, NE and calibration are
    those of the original click rate. Needs binary days."""

    pin_memory: bool = True
    """Build batches in page-locked memory, from which they are copied to a GPU while it computes. No effect without
    one."""

    num_generated_batches: Annotated[int | None, Gt(0), optional("fresh ones every step", "INT")] = None
    """Random data only: generate this many batches once and cycle through them."""

    zipf_exponent: Annotated[float, Ge(0.0), Lt(10.0)] = 0.0
    """Random data only: id k of a table is drawn with probability falling as (k + 1)^-exponent. 0 is uniform."""

    multi_hot_sizes: Annotated[IntList | None, optional("one each", "INT,INT,...")] = None
    """Ids per sample of each of the 26 features. On binary days each id brings the same random companions wherever it
    comes, as MLPerf's DLRM v2 defines and `dlrm materialize` writes them. Random data has independent ids instead, or
    the same companions where multi_hot_distribution_type is given."""

    multi_hot_distribution_type: Annotated[Literal["uniform", "pareto"] | None, optional("uniform", "KIND")] = None
    """How the companions of multi_hot_sizes are drawn: uniform, or pareto of shape 0.25, modulo the table's rows."""

    collect_multi_hot_freqs_stats: bool = False
    """Count how often each id of each feature is trained on, as a sample's first id of the feature and as any of them,
    and write the counts to multi_hot_freqs.npz in the run directory. Takes 16 bytes a table row on each rank."""

    @property
    def folder(self) -> str | None:
        """Folder of dense values and labels; None for random data."""
        if self.in_memory_binary_criteo_path is not None:
            return self.in_memory_binary_criteo_path
        return self.synthetic_multi_hot_criteo_path

    @property
    def logit_correction(self) -> float:
        """What to add to the logits of a model trained on these rows, for predictions at the original click rate.

        With a share w of the negatives left, a prediction p becomes p / (p + (1 - p) / w) (He et al., "Practical
        Lessons from Predicting Clicks on Ads at Facebook", ADKDD 2014, section 6.3): its logit grows by log(w).
        """
        return math.log(self.undersampling_rate or 1.0)


@dataclass(frozen=True)
class ModelConfig:
    """Embedding tables, dense arch, interaction, over arch."""

    num_embeddings: Annotated[int, Gt(0), Lt(2**31)] = 100_000
    """Rows of every embedding table. On the command line it replaces the table sizes of a recipe."""

    num_embeddings_per_feature: Annotated[IntList | None, optional("num_embeddings each", "INT,INT,...")] = None
    """Rows of each of the 26 embedding tables. Ids outside a table are reduced modulo its rows."""

    embedding_dim: Annotated[int, Gt(0), Lt(2**16)] = 64
    """Columns of every embedding table; a multiple of 4."""

    dense_arch_layer_sizes: IntList = (512, 256, 64)
    """Layers of the MLP over the 13 integers; the last is embedding_dim."""

    standardize_dense: bool = False
    """Give the MLP each integer less its mean over its deviation, both taken from the training rows, and beside it
    whether it is missing (where the days tell: dlrm preprocess --missing_integers apart)."""

    dense_buckets: Annotated[int, Ge(0), Lt(2**16)] = 0
    """Each integer also falls into one of so many buckets, cut at quantiles of the training rows, or into one for
    missing; each bucket has an embedding, which joins the interaction like a categorical feature's. 0: none."""

    over_arch_layer_sizes: IntList = (512, 512, 256, 1)
    """Layers of the MLP over the interaction; the last is 1, the logit."""

    interaction_type: Literal["original", "dcn", "projection"] = "original"
    """original: pairwise dot products. dcn: low-rank DCN v2. projection: product of two MLPs' outputs."""

    interaction_branch1_layer_sizes: IntList = (2048, 2048)
    """projection only: layers of the first branch; the last is a multiple of embedding_dim."""

    interaction_branch2_layer_sizes: IntList = (2048, 2048)
    """projection only: layers of the second branch; the last is a multiple of embedding_dim."""

    dcn_num_layers: Annotated[int, Gt(0), Le(MOST_LAYERS)] = 3
    """dcn only: number of cross layers."""

    dcn_low_rank_dim: Annotated[int, Gt(0), Lt(2**20)] = 512
    """dcn only: rank of each cross layer's weight."""

    @property
    def num_vectors(self) -> int:
        """Vectors that meet in the interaction: the MLP's, the tables', and the integers' where they have buckets."""
        return 1 + NUM_CATEGORICAL_FEATURES + (NUM_INTEGER_FEATURES if self.dense_buckets else 0)

    @property
    def needs_dense_statistics(self) -> bool:
        """Whether the model is built with statistics of the integers."""
        return self.standardize_dense or self.dense_buckets > 0

    @property
    def table_rows(self) -> tuple[int, ...]:
        """Rows of each of the 26 tables."""
        return self.num_embeddings_per_feature or (self.num_embeddings,) * NUM_CATEGORICAL_FEATURES


@dataclass(frozen=True)
class ShardingConfig:
    """Which rank holds which embedding table, and how embeddings travel."""

    table_constraints: Annotated[Rules, optional("as the planner sees fit", "RULES|FILE")] = None
    """Where tables may go: "large = row_wise; t_cat_0 t_cat_9 = table_wise ranks=0,1; t_cat_2 = fused_uvm_caching
    cache=0.2", or a file of such rules. Left of = names of tables, large or all; the most specific rule counts. Right
    of it a sharding type (table_wise, row_wise, column_wise, table_row_wise, table_column_wise, grid_shard,
    data_parallel), a kernel (dense, fused, fused_uvm, fused_uvm_caching), the share of rows in a cache, ranks."""

    large_table_gib: Annotated[float, Ge(0.0), Lt(1e9)] = 1.0
    """Tables of at least this many GiB of weights are `large` in --table_constraints."""

    device_memory_gib: Annotated[float | None, Ge(1e-3), Lt(1e9), optional("what there is", "FLOAT")] = None
    """Memory that a plan counts on, in GiB: of each GPU, or on a CPU of each rank's share of the host."""

    reserved_memory_share: Annotated[float, Ge(0.0), Lt(1.0)] = 0.15
    """Share of that memory that tables leave free for dense layers, activations and batches."""

    intra_host_bandwidth: Annotated[float, Ge(1e-3), Lt(1e9)] = 600.0
    """Bandwidth between two devices of a host, in GiB/s, that a plan reckons with."""

    inter_host_bandwidth: Annotated[float, Ge(1e-3), Lt(1e9)] = 12.5
    """Bandwidth between two hosts, in GiB/s, that a plan reckons with."""

    forward_comm_precision: CommPrecision = "fp32"
    """Precision in which pooled embeddings travel between ranks."""

    backward_comm_precision: CommPrecision = "fp32"
    """Precision in which their gradients travel back."""


@dataclass(frozen=True)
class OptimizerConfig:
    """How gradients become updates, of tables (fused into the backward pass) and MLPs alike."""

    optimizer: Annotated[OptimizerName | None, optional("sgd", "{sgd,adagrad,rowwise_adagrad,adam}")] = None
    """sgd. adagrad: a rate of its own for each weight. rowwise_adagrad: for each row of a table (dense parts: each
    weight), with next to no optimizer state. adam: of a batch's rows (Adam's lazy form); on a CPU needs data-parallel
    tables, all of whose rows it updates."""

    adagrad: bool = False
    """The same as --optimizer adagrad."""

    learning_rate: Annotated[float, Gt(0.0), Lt(1e38)] = 15.0
    """Step size of the embedding tables and the dense parts."""

    dense_learning_rate: Annotated[float | None, Gt(0.0), Lt(1e38), optional("learning_rate", "FLOAT")] = None
    """Step size of the dense parts (all but the embedding tables)."""

    eps: Annotated[float, Ge(1e-37), Lt(1e38)] = 1e-8
    """All but sgd: added to the root of the accumulated squares."""

    weight_decay: Annotated[float, Ge(0.0), Lt(1e38)] = 0.0
    """rowwise_adagrad and adam only, whose fused kernels have it on a GPU: pulls the rows of a batch, and dense
    parameters, towards 0. rowwise_adagrad adds weight_decay * weight to the gradient, adam takes learning_rate *
    weight_decay * weight off the weight. On a CPU needs data-parallel tables, all of whose rows it pulls."""

    lr_warmup_steps: Annotated[int, Ge(0), Lt(2**53)] = 0
    """Training steps in which the learning rate grows linearly to its full size."""

    lr_decay_start: Annotated[int, Ge(0), Lt(2**53)] = 0
    """Training step after which the learning rate decays; lr_warmup_steps or more."""

    lr_decay_steps: Annotated[int, Ge(0), Lt(2**53)] = 0
    """Training steps in which the learning rate falls, as the square of what is left of them, to 1e-7, where it stays.
    0 is no decay."""

    freeze: Annotated[Frozen, optional("none", "TABLES|dense")] = None
    """What training leaves as it is: names of tables (t_cat_0), large, all (tables) or dense (all parameters but the
    tables), with commas or spaces between them. What is frozen has no optimizer state."""

    @property
    def algorithm(self) -> OptimizerName:
        """What --optimizer and --adagrad say together."""
        return "adagrad" if self.adagrad else self.optimizer or "sgd"

    @property
    def dense_rate(self) -> float:
        """Step size of the dense parts."""
        return self.learning_rate if self.dense_learning_rate is None else self.dense_learning_rate


@dataclass(frozen=True)
class TrainingConfig:
    """Length, seed and arithmetic of a run."""

    epochs: Annotated[int, Gt(0), Lt(2**31)] = 1
    """Passes over the training set."""

    seed: Annotated[int | None, Ge(0), Lt(2**63), optional("drawn anew", "INT")] = None
    """Seed of weights, random data and shuffles: the same seed, machine and world size repeat a run bit for bit (on a
    CPU; not tried on a GPU). It is recorded in config.json."""

    pipeline: Literal["base", "sparse_dist", "prefetch"] = "sparse_dist"
    """How a step overlaps with the next ones. base: only the next batch's copy to the device. sparse_dist: also its
    input all-to-all. prefetch: also its cache lines, for tables in host memory that the GPU caches. The numbers are the
    same."""

    precision: Annotated[Precision | None, optional("fp32", "{fp32,tf32,bf16,int16,int8}")] = None
    """Arithmetic of matrix products. tf32: TensorFloat-32, on A100 or newer GPUs. bf16: bfloat16 by autocast, on CPUs
    and GPUs; weights, optimizer states, gradients' sums, the logit and the loss stay in fp32. int16, int8: for CPUs
    with AVX-512 VNNI, but without AMX. The MLPs' wider matrix products are of operands rounded to integers, in blocks
    with a scale each. All else is as in fp32 with int16, and as in bf16 with int8, which is the faster one."""

    allow_tf32: bool = False
    """The same as --precision tf32. No effect without a GPU."""

    dense_execution: DenseExecution = "eager"
    """How the MLPs run on full training batches. eager: operator by operator. compile: by torch.compile, which takes
    seconds to a minute at the first step. cuda_graph: compiled, and launched as one CUDA graph; pays with small
    batches, whose kernels are shorter than their launches."""

    @property
    def arithmetic(self) -> Precision:
        """What --precision and --allow_tf32 say together."""
        return "tf32" if self.allow_tf32 else self.precision or "fp32"

    @property
    def integers(self) -> Literal["int16", "int8"] | None:
        """What the MLPs' wider matrix products go through, if through integers."""
        asked = self.arithmetic
        return asked if asked == "int16" or asked == "int8" else None

    @property
    def activations(self) -> Literal["fp32", "bf16"]:
        """What activations are in, from the pooled rows on."""
        return "bf16" if self.arithmetic in ("bf16", "int8") else "fp32"


@dataclass(frozen=True)
class EvaluationConfig:
    """When the held-out sets are scored."""

    validation_freq_within_epoch: Annotated[int | None, Gt(0), optional("none within", "INT")] = None
    """Training steps between validations within an epoch."""

    validation_auroc: Annotated[float | None, Gt(0.5), Le(1.0), optional("train to the end", "FLOAT")] = None
    """Stop training once a validation reaches this AUROC, and report the samples and seconds it took."""

    evaluate_on_epoch_end: bool = True
    """Score the validation set after each epoch."""

    evaluate_on_training_end: bool = True
    """Score the test set after training."""

    def scores(self, stage: str) -> bool:
        """Whether a run scores a held-out set: val or test."""
        return {"val": self.validates, "test": self.evaluate_on_training_end}.get(stage, False)

    @property
    def validates(self) -> bool:
        """Whether the validation set is scored at all."""
        return self.evaluate_on_epoch_end or self.validation_freq_within_epoch is not None


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept of a training, and how it goes on from there."""

    checkpoint_every: Annotated[str | None, optional("30m; never for random data", "STEPS|MINUTESm|never")] = None
    """How often a checkpoint is written: 500 is training steps, 30m minutes. One more is written when a validation
    beats all before it, at the end of training, and when a signal ends the run (SIGTERM, SIGINT, SIGHUP, SIGUSR1,
    ...)."""

    checkpoint_dir: Annotated[str | None, optional("checkpoints in run_dir", "FOLDER|ADDRESS")] = None
    """Where: a folder that all hosts see, or an address that fsspec knows, such as s3://bucket/run."""

    keep: Annotated[int, Ge(1)] = 2
    """Checkpoints to keep: the newest ones, and beside them the one with the best validation AUROC."""

    checkpoint_mode: Literal["async", "sync"] = "async"
    """async: training goes on while a copy is written; the copy takes as much host memory as tables and optimizer
    state. sync: training waits."""

    resume: Annotated[str, tyro.conf.arg(metavar="auto|never|PATH")] = "auto"
    """auto: go on from the newest complete checkpoint of the run directory, where it holds one. PATH: from this
    checkpoint, or the newest one in this folder, into a new run directory. never: start anew."""

    allow_changed_data: bool = False
    """Resume although the data is not what the checkpoint was trained on. Epochs then begin at row 0 of this data;
    steps, samples, learning rates and optimizer state continue."""

    init_from: Annotated[str | None, optional("weights are drawn", "PATH")] = None
    """Start a new run with the weights of this checkpoint, or of the newest one in this folder: of tables, which may
    have grown, and of all dense layers that fit."""

    init_optimizer: bool = False
    """Take the optimizer's state too with --init_from; its algorithm must be the same."""

    allow_other_vocabulary: bool = False
    """Take days of another vocabulary than those that the checkpoint was trained on: ids are then rows of others."""

    hang_timeout: Annotated[float, Ge(1.0), Lt(1e9)] = 600.0
    """Seconds without a step on any rank after which a rank that hangs is named and the run ends."""

    @property
    def every_steps(self) -> int | None:
        """Training steps between checkpoints, where it is told in steps."""
        every = self.checkpoint_every
        return int(every) if every is not None and every.isdigit() else None

    @property
    def every_seconds(self) -> float | None:
        """Seconds between checkpoints, where it is told in minutes."""
        every = self.checkpoint_every
        return 60 * float(every.removesuffix("m")) if every is not None and every.endswith("m") else None


@dataclass(frozen=True)
class OutputConfig:
    """What a run shows and where it writes."""

    run_dir: Annotated[str | None, optional("runs/<time>-<recipe or dataset>", "FOLDER")] = None
    """Folder for config, plan, metrics and summary."""

    tensorboard: bool = False
    """Write what metrics.jsonl says as TensorBoard's event files too, in the run directory's folder tensorboard."""

    mlperf_log: bool = False
    """Print the lines that MLPerf training's rules ask of DLRM v2 (:::MLLOG ...), and write them to the run directory's
    mlperf_log.txt. Needs --validation_auroc, the target of the timed run."""

    log_every: Annotated[int | None, Gt(0), optional("a fiftieth of the epoch, at most 100", "INT")] = None
    """Steps between lines in metrics.jsonl. The screen is paced by time."""

    print_progress: bool = True
    """Show step, samples/s, time left, loss, learning rate and last AUROC while training."""

    print_lr: bool = False
    """Print the learning rates of the tables and of the dense parts at every step."""

    print_sharding_plan: bool = False
    """Print where each embedding table lives, and the GiB per rank. The plan is saved in any case."""

    profile: Annotated[int | None, Gt(0), Le(1000), optional("none", "STEPS")] = None
    """Training steps to trace on every rank, after 5 that warm up: trace_rank{r}.json.gz in the run directory, for
    Perfetto or chrome://tracing."""


@dataclass(frozen=True)
class Config:
    """A run, complete. `config_checks.check_config` says whether it makes sense."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    config: Annotated[str | None, optional("none", "FILE")] = None
    """config.json of a run, which starts the same run again in a new run directory. Other flags change single
    fields."""

    recipe: Annotated[str | None, optional("none", "NAME")] = None
    """A complete named run that the other flags change: debug_cpu, kaggle, kaggle_sample, mlperf_v1, mlperf_v2,
    spec_mlperf_a100x8, spec_mlperf_x2_a100x16, spec_full_size_a100x80. With --help beside it, its values stand as the
    defaults."""

    @property
    def is_random(self) -> bool:
        """Whether samples are generated rather than read."""
        return self.data.folder is None

    @property
    def frozen(self) -> tuple[str, ...]:
        """Tables, in order, and `dense`, that --freeze keeps as they are."""
        names = self.optimizer.freeze
        needs_large = names is not None and "large" in names.split(",")
        return frozen_parts(names, self.large_tables if needs_large else ())

    @property
    def frozen_tables(self) -> tuple[str, ...]:
        """Tables that --freeze keeps as they are."""
        return tuple(name for name in self.frozen if name != DENSE)

    @property
    def large_tables(self) -> list[str]:
        """Tables of --large_table_gib or more."""
        return large_tables(self.model.table_rows, self.model.embedding_dim, self.sharding.large_table_gib)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary from which `from_json` restores an equal config."""
        return {"config_version": CONFIG_VERSION, **dataclasses.asdict(self)}

    @staticmethod
    def from_json(content: dict[str, Any]) -> "Config":
        """The config that `to_json` wrote.

        Raises:
            ConfigError: if it was written by another version, or holds a field this one does not know.
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
            ValueError: if it is no JSON.
        """
        try:
            return Config.from_json(json.loads(text))
        except RecursionError:
            raise ValueError("too many levels") from None


_Section = TypeVar("_Section")


def _restore(section: type[_Section], content: dict[str, Any]) -> _Section:
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in content.items()}
    hints = typing.get_type_hints(section)
    for name, value in values.items():
        if name in hints and not _is_of(hints[name], value):
            raise TypeError(f"{name} is {value!r}")
    return section(**values)


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
