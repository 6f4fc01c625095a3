"""Flags of the cases of `dlrm bench`. No torch here."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from dlrm.config.checks import check_output_file, check_ranges
from dlrm.config.config import optional
from dlrm.errors import ConfigError
from dlrm.system.host import available_cores, cpu_flags

DEFAULT_NUM_EMBEDDINGS = 100_000
DEFAULT_EMBEDDING_DIM = 128
MLPERF_ZIPF_EXPONENT = 1.1
_SAMPLES_PER_TURN = 80_000

WARM_UP_STEPS = 5
"""Steps at the start of a turn that are not timed: the pipeline fills, caches hold the other side's data."""

Stored = Literal["fp32", "bf16"]
"""Precision of activations."""

Arithmetic = Literal["fp32", "bf16", "int16", "int8"]
"""Of matrix products. Activations of int16 are fp32, those of int8 bf16."""


def best_storage() -> Stored:
    """bf16 where this CPU multiplies matrices in it."""
    return "bf16" if {"amx_bf16", "avx512_bf16"} & cpu_flags() else "fp32"


def best_precision() -> Arithmetic:
    """What training was fastest in on such a CPU, as far as it was measured; with AMX it was not."""
    if "amx_bf16" in cpu_flags():
        return "bf16"
    if "avx512_vnni" not in cpu_flags():
        return best_storage()
    return "int8" if best_storage() == "bf16" else "int16"


@dataclass(frozen=True)
class Rounds:
    """How often, and where the result goes."""

    rounds: Annotated[int, Gt(0), Le(1000)] = 5
    """Times that each side has its turn. The ratio is the median over rounds."""

    json: Annotated[str | None, optional("not written", "FILE")] = None
    """File to write: every step's time, resolved config, commit, machine, versions. - is standard output."""

    def validate(self) -> None:
        """Refuses a file that could not be written once all is measured.

        Raises:
            ConfigError: naming the flag.
        """
        check_ranges(self)
        if self.json is not None:
            check_output_file("json", self.json, may_be_stream=True)


_BF16_UNITS = "bf16 where the CPU has AMX or AVX-512 BF16"
StoredFlag = Annotated[Stored | None, optional(_BF16_UNITS, "{fp32,bf16}")]
ArithmeticFlag = Annotated[
    Arithmetic | None,
    optional("as fast as the CPU can", "{fp32,bf16,int16,int8}"),
]


@dataclass(frozen=True)
class Workload:
    """A batch, and the tables that its ids point into."""

    batch_size: Annotated[int, Gt(0), Lt(2**24)] = 4096
    """Samples per step over all ranks."""

    optimizer: Literal["sgd", "rowwise_adagrad", "adagrad"] = "sgd"
    """Of the tables; dense parts have sgd, or else Adagrad."""

    rows: Literal["uniform100k", "mlperf"] = "uniform100k"
    """uniform100k: num_embeddings rows in every table. mlperf: the cardinalities of MLPerf's data set (the largest
    capped at 40 million), scaled by one factor so that tables and optimizer state fill tables_gib."""

    num_embeddings: Annotated[int, Gt(0), Lt(2**31)] = DEFAULT_NUM_EMBEDDINGS
    """uniform100k only: rows of every table."""

    tables_gib: Annotated[float, Gt(0.0), Lt(1e6)] = 12.0
    """mlperf only: GiB of tables with optimizer state, over all ranks."""

    zipf_exponent: Annotated[float | None, Ge(0.0), Lt(10.0), optional("0; 1.1 with mlperf", "FLOAT")] = None
    """Id k of a table is drawn with probability falling as (k + 1)^-exponent. Each side cycles ten batches; at 0,
    uniform, the reference's are of torchrec's random data set, as in the public example, otherwise they are ours."""

    @property
    def exponent(self) -> float:
        """Of the power law that ids follow."""
        if self.zipf_exponent is not None:
            return self.zipf_exponent
        return MLPERF_ZIPF_EXPONENT if self.rows == "mlperf" else 0.0

    @property
    def steps_per_turn(self) -> int:
        """Timed steps where --steps does not say: a fair number of samples, in 5 to 100 steps."""
        return min(100, max(5, _SAMPLES_PER_TURN // self.batch_size))

    def validate(self) -> None:
        """Refuses what makes no sense.

        Raises:
            ConfigError: naming the flag.
        """
        check_ranges(self)
        for name, owner, default in (
            ("num_embeddings", "uniform100k", DEFAULT_NUM_EMBEDDINGS),
            ("tables_gib", "mlperf", Workload.tables_gib),
        ):
            if self.rows != owner and getattr(self, name) != default:
                raise ConfigError(f"--{name} with --rows {self.rows}: no effect. Drop it, or give --rows {owner}.")


@dataclass(frozen=True)
class Shape(Workload):
    """Ranks, batch and ids. The layers are those of the public example's results table: 26 tables of dimension 128,
    dense arch 13-512-256-128, over arch 1024-1024-512-256-1."""

    ranks: Annotated[int, Gt(0), Le(1024)] = 2
    """Processes of each side, which share the cores; a divisor of batch_size."""

    precision: ArithmeticFlag = None
    """Matrix products of our side, and in bf16 and int8 activations too. By default bf16 where the CPU has AMX, else
    int8 where it has AVX-512 BF16, else int16 where it has AVX-512 VNNI, else fp32. The reference always computes in
    fp32."""

    @property
    def arithmetic(self) -> Arithmetic:
        """Of our side's matrix products."""
        return self.precision or best_precision()

    def validate(self) -> None:
        """See `Workload`."""
        super().validate()
        if self.batch_size % self.ranks:
            raise ConfigError(f"--batch_size {self.batch_size}: expected a multiple of --ranks, which is {self.ranks}")
        if self.ranks > available_cores():
            raise ConfigError(f"--ranks {self.ranks}: this machine has {available_cores()} cores. Give fewer.")


StepsFlag = Annotated[int | None, Gt(0), Lt(2**20), optional("about 80,000 samples; 5 to 100 steps", "INT")]


@dataclass(frozen=True)
class TrainBench:
    """Training speed: batches to updated weights, our trainer against a plain TorchRec loop.

    The reference is torchrec.models.dlrm in fp32 with FBGEMM's kernels, TorchRec's planner and sparse-dist pipeline,
    gloo between ranks, and the C library's own memory allocator. Where both sides together do not fit into memory,
    each turn starts its processes anew."""

    repetition: Rounds = field(default_factory=Rounds)
    shape: Shape = field(default_factory=Shape)

    steps: StepsFlag = None
    """Timed steps of a turn, after 5 that warm up."""

    def validate(self) -> None:
        """See `Rounds` and `Shape`."""
        _validate(self, self.repetition, self.shape)


@dataclass(frozen=True)
class LoaderBench:
    """Rows from memory-mapped binary days to batches, nothing else: our reader against
    torchrec.datasets.criteo.InMemoryBinaryCriteoIterDataPipe with mmap_mode, and against our training on the same rows.

    Days are made up in a temporary folder, 160 bytes a row, and stay in the page cache."""

    repetition: Rounds = field(default_factory=Rounds)
    shape: Shape = field(default_factory=Shape)

    num_rows: Annotated[int, Gt(0), Lt(2**31)] = 2_000_000
    """Training rows on disk; each turn of a reader reads them once."""

    shuffle_training_set: bool = False
    """Another order of all rows every epoch. TorchRec's reader then copies its share of the rows into memory before
    each pass, and is timed with that."""

    scratch: Annotated[str | None, optional("a temporary one", "FOLDER")] = None
    """Existing folder to put the days in, on the disk to be measured."""

    def validate(self) -> None:
        """See `Rounds` and `Shape`."""
        _validate(self, self.repetition, self.shape)
        _check_folder("scratch", self.scratch)
        if self.num_rows < (least := (WARM_UP_STEPS + 1) * self.shape.batch_size):
            raise ConfigError(
                f"--num_rows {self.num_rows}: expected {least:,} or more, {WARM_UP_STEPS + 1} times --batch_size"
            )


@dataclass(frozen=True)
class EvaluateBench:
    """An evaluation pass: forward, AUROC, log loss, NE and calibration, our trainer against a TorchRec pipeline with
    torchmetrics' AUROC, and against our training in the same call."""

    repetition: Rounds = field(default_factory=Rounds)
    shape: Shape = field(default_factory=Shape)

    steps: StepsFlag = None
    """Batches of a pass, and timed training steps, after 5 that warm up."""

    def validate(self) -> None:
        """See `Rounds` and `Shape`."""
        _validate(self, self.repetition, self.shape)


CallsFlag = Annotated[int, Gt(0), Lt(2**20)]


@dataclass(frozen=True)
class InteractionBench:
    """The pairwise dots of 27 vectors of dimension 128, forward and backward: our fused kernel against its plain
    PyTorch twin and torchrec.models.dlrm.InteractionArch. One process with all cores."""

    repetition: Rounds = field(default_factory=Rounds)

    batch_size: Annotated[int, Gt(0), Lt(2**24)] = 4096
    """Samples of a call."""

    precision: StoredFlag = None
    """Of our kernel and its twin. TorchRec's module computes in fp32."""

    steps: CallsFlag = 20
    """Timed calls of a turn, after 5 that warm up."""

    @property
    def arithmetic(self) -> Stored:
        """Of our side."""
        return self.precision or best_storage()

    def validate(self) -> None:
        """See `Rounds`."""
        _validate(self, self.repetition)


@dataclass(frozen=True)
class ProductsBench:
    """Matrix products of the MLPs' layers, forward with bias and ReLU, and both gradients: through integers against
    torch.mm in fp32, layer by layer in turn. One process with all cores; needs a CPU with AVX-512 VNNI."""

    repetition: Rounds = field(default_factory=Rounds)

    batch_size: Annotated[int, Gt(0), Lt(2**24)] = 4096
    """Samples of a call."""

    precision: Literal["int16", "int8"] = "int8"
    """Integers of our side: of fp32 activations in int16, of bf16 ones in int8."""

    steps: CallsFlag = 10
    """Timed calls of a turn, after 5 that warm up."""

    def validate(self) -> None:
        """See `Rounds`."""
        _validate(self, self.repetition)


@dataclass(frozen=True)
class EmbeddingBench:
    """26 lookups in tables of dimension 128, their backward, and the rows' update: our kernel on 32-bit ids, as our
    batches have them, against FBGEMM's on 64-bit ones, as torchrec's random data set has them. One process with all
    cores."""

    repetition: Rounds = field(default_factory=Rounds)
    workload: Workload = field(default_factory=Workload)

    steps: CallsFlag = 20
    """Timed calls of a turn, after 5 that warm up. They cycle ten batches of ids."""

    precision: StoredFlag = None
    """Of our side's pooled rows and their gradients. FBGEMM's are fp32."""

    @property
    def arithmetic(self) -> Stored:
        """Of our side."""
        return self.precision or best_storage()

    def validate(self) -> None:
        """See `Rounds` and `Workload`."""
        _validate(self, self.repetition, self.workload)


@dataclass(frozen=True)
class PreprocessBench:
    """Raw text to shuffled binary days: `dlrm preprocess` against torchrec's tsv_to_npys, sparse_to_contiguous and
    shuffle, in processes of their own, on the same planted rows."""

    repetition: Rounds = field(default_factory=lambda: Rounds(rounds=3))

    num_rows: Annotated[int, Gt(0), Lt(2**31)] = 2_000_000
    """Rows of raw text, over three days."""

    scratch: Annotated[str | None, optional("a temporary one", "FOLDER")] = None
    """Existing folder for rows and outputs, about 1.5 kB a row."""

    def validate(self) -> None:
        """See `Rounds`."""
        _validate(self, self.repetition)
        _check_folder("scratch", self.scratch)


def _default_checkpoint_shape() -> Shape:
    return Shape(ranks=1, batch_size=1024, optimizer="rowwise_adagrad")


@dataclass(frozen=True)
class CheckpointBench:
    """Saving and loading a training: our checkpoints against torch.save and torch.load of the same tensors (weights,
    optimizer states, generators), in the same folder. Both sides replace what they saved the round before.

    Ours are timed until they are complete: SHA-256 and fsync of every file included. torch.save is timed without and
    with fsync of its file; it has no digest. With several ranks each writes a file of its own on both sides. Loading is
    warm: what is read was just written and is in the page cache, which only root can drop."""

    repetition: Rounds = field(default_factory=lambda: Rounds(rounds=3))
    shape: Shape = field(default_factory=_default_checkpoint_shape)

    embedding_dim: Annotated[int, Gt(0), Lt(2**16)] = DEFAULT_EMBEDDING_DIM
    """Weights of a table's row, a multiple of 4. By default 26 tables and their optimizer state are 1.25 GiB."""

    steps: CallsFlag = 20
    """Training steps timed without a checkpoint being written, after 5 that warm up. As many as it takes follow while
    one is."""

    folder: Annotated[str | None, optional("a temporary one", "FOLDER")] = None
    """Existing folder on the disk to be measured, with room for three times what is saved. What is written is removed
    at the end."""

    def validate(self) -> None:
        """See `Rounds` and `Shape`."""
        _validate(self, self.repetition, self.shape)
        _check_folder("folder", self.folder)
        if self.embedding_dim % 4:
            raise ConfigError(f"--embedding_dim {self.embedding_dim}: expected a multiple of 4")


def _validate(case: object, *sections: Rounds | Workload) -> None:
    check_ranges(case)
    for section in sections:
        section.validate()


def _check_folder(flag: str, folder: str | None) -> None:
    if folder is not None and not (Path(folder).is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        raise ConfigError(f"--{flag} {folder}: expected an existing folder that can be written")
