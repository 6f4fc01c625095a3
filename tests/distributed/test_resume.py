"""A training that is cut off and resumed comes to the same weights, at any world size and with any sharding."""

import json
import signal
import threading
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dlrm.assembly.foundation import lay_foundation
from dlrm.checkpoint.checkpointer import Checkpointer
from dlrm.checkpoint.find import complete_checkpoints
from dlrm.checkpoint.manifest import Manifest
from dlrm.checkpoint.store import open_store
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
from dlrm.fault_tolerance import agreement as control
from dlrm.fault_tolerance.hooks import Stopped
from dlrm.metrics.journal import Journal
from dlrm.metrics.sinks import Sinks
from dlrm.ranks.runtime import Runtime, start_runtime
from dlrm.system.lock import Locks
from dlrm.system.signals import StopSignals
from dlrm.train.resume import find_start, restore_training
from dlrm.train.run import run
from dlrm.train.trainer import Trainer
from tests.distributed.test_faults import write_days
from tests.launching import launch, read_metrics

ROWS = tuple(range(20, 46))
TRAIN_ROWS, VAL_ROWS = 1003, 60
GLOBAL_BATCH = 24


class CrashError(Exception):
    pass


class After(StopSignals):
    """Cuts a run off when it has looked for signals so many times, once a step or batch of an evaluation."""

    def __init__(self, looks: int, *, is_crash: bool) -> None:
        self._looks_left = looks
        self._is_crash = is_crash
        super().__init__()

    @property
    def received(self) -> signal.Signals | None:
        self._looks_left -= 1
        if self._looks_left > 0:
            return None
        if self._is_crash:
            raise CrashError
        return signal.SIGTERM

    @received.setter
    def received(self, value: signal.Signals | None) -> None:
        pass


@dataclass(frozen=True)
class Case:
    """What is trained."""

    optimizer: str = "sgd"
    sharding: str | None = None
    pipeline: str = "sparse_dist"
    mode: str = "async"
    shuffle: str | None = None
    mapped: bool = False
    schedule: bool = False
    cached: bool = False

    def config(self, days: Path, run_dir: Path, ranks: int) -> Config:
        sharding = "data_parallel" if self.optimizer == "adam" else self.sharding
        return Config(
            data=DataConfig(
                in_memory_binary_criteo_path=None if self.cached else str(days),
                batch_size=GLOBAL_BATCH // ranks,
                test_batch_size=GLOBAL_BATCH // ranks,
                num_generated_batches=3 if self.cached else DataConfig().num_generated_batches,
                limit_train_batches=20 if self.cached else None,
                limit_val_batches=3 if self.cached else None,
                limit_test_batches=3,
                shuffle_batches=self.shuffle == "batches",
                shuffle_training_set=self.shuffle == "set",
                mmap_mode=self.mapped,
            ),
            model=ModelConfig(
                num_embeddings_per_feature=ROWS,
                embedding_dim=8,
                dense_arch_layer_sizes=(16, 8),
                over_arch_layer_sizes=(16, 1),
            ),
            sharding=ShardingConfig(
                table_constraints=f"all = {sharding}" if sharding and (ranks > 1 or self.optimizer == "adam") else None
            ),
            optimizer=OptimizerConfig(
                learning_rate=0.05,
                optimizer=self.optimizer,
                lr_warmup_steps=20 if self.schedule else 0,
                lr_decay_start=30 if self.schedule else 0,
                lr_decay_steps=40 if self.schedule else 0,
            ),
            training=TrainingConfig(seed=5, pipeline=self.pipeline, epochs=2),
            evaluation=EvaluationConfig(validation_freq_within_epoch=17),
            checkpoint=CheckpointConfig(checkpoint_every=Interval("5"), checkpoint_mode=self.mode, keep=1),
            output=OutputConfig(run_dir=str(run_dir), log_every=7, print_progress=False),
        )


CUTS = ((3, 12, 14, 30), (7, 16, 21))
"""Looks from one cut to the next: before the first checkpoint, in an epoch, in a validation, in the second epoch."""
CASES = [
    Case(),
    Case("adagrad", "row_wise", mode="sync", schedule=True),
    Case("rowwise_adagrad", "table_wise", shuffle="set"),
    Case("adam", shuffle="batches", pipeline="base"),
    Case("adagrad", "column_wise", mapped=True, shuffle="set"),
    Case("adagrad", cached=True),
]


def cut_off_and_resume(folder: Path, days: Path) -> None:
    """Runs in a worker: every case undisturbed, and cut off again and again."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "fbgemm..dense_embedding_codegen_lookup_function")
    with start_runtime() as runtime:
        for number, case in enumerate(CASES):
            config = case.config(days, folder / f"{number}-undisturbed", runtime.world_size)
            run(config, runtime, time.time(), StopSignals())
            config = replace(config, output=replace(config.output, run_dir=str(folder / f"{number}-cut")))
            for looks in CUTS[number % 2]:
                with pytest.raises(CrashError):
                    run(config, runtime, time.time(), After(looks, is_crash=True))
                for thread in threading.enumerate():
                    if thread.name == "checkpoint":
                        thread.join()
            run(config, runtime, time.time(), StopSignals())


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(ranks: int, tmp_path: Path) -> None:
    write_days(tmp_path / "days", (TRAIN_ROWS, VAL_ROWS))
    launch(cut_off_and_resume, ranks, tmp_path, tmp_path / "days", folder=tmp_path)
    for number, case in enumerate(CASES):
        undisturbed, cut = tmp_path / f"{number}-undisturbed", tmp_path / f"{number}-cut"
        assert any(line["kind"] == "resume" for line in read_metrics(cut)), case
        assert digests(cut) == digests(undisturbed), case
        assert measured(cut) == measured(undisturbed), case


def digests(run_dir: Path) -> dict[str, str]:
    """Of all tensors at the end of a run, rank by rank."""
    return {name: file.sha256 for name, file in newest(run_dir).files.items() if name.endswith(".bin")}


def newest(run_dir: Path) -> Manifest:
    store = open_store(str(run_dir / "checkpoints"))
    found = complete_checkpoints(store)[0]
    found.verify(found.manifest.files)
    return found.manifest


def measured(run_dir: Path) -> list[dict[str, Any]]:
    """Every line that measures something, without what depends on the clock."""
    clock = ("elapsed_seconds", "samples_per_second", "seconds")
    return [
        {name: value for name, value in line.items() if name not in clock}
        for line in read_metrics(run_dir)
        if line["kind"] in ("train", "val", "test")
    ]


CHAIN = (2, 1, 3, 4, 2)
"""World sizes that a training goes through."""
TRACKS = {
    "sgd": ("table_wise", None, "row_wise", "column_wise", "table_row_wise"),
    "adagrad": ("row_wise", None, "column_wise", "table_wise", "data_parallel"),
    "rowwise_adagrad": ("table_wise", None, "row_wise", "table_row_wise", "data_parallel"),
    "adam": ("data_parallel",) * 5,
}


def link_config(optimizer: str, link: int, folder: Path, ranks: int) -> Config:
    case = Case(optimizer, TRACKS[optimizer][link], shuffle="set", mapped=link % 2 == 1)
    config = case.config(folder / "days", folder / optimizer, ranks)
    return replace(
        config,
        data=replace(config.data, multi_hot_sizes=(2, *(1,) * 25), collect_multi_hot_freqs_stats=True),
        training=replace(config.training, epochs=1),
        checkpoint=replace(config.checkpoint, checkpoint_every=Interval("1000")),
    )


def train_a_link(folder: Path, link: int) -> dict[str, tuple[float, float]]:
    """Runs in a worker: loads what the link before saved, and goes on from there for some steps.

    Gives AUROC and log loss of what was loaded.
    """
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "fbgemm..dense_embedding_codegen_lookup_function")
    control._SECONDS_BETWEEN = 0.0  # ranks agree at every step, so that a stop is where it is asked for
    scores = {}
    with start_runtime() as runtime:
        for optimizer in TRACKS:
            config = link_config(optimizer, link, folder, runtime.world_size)
            if link > 0:
                scores[optimizer] = load_and_save_again(config, runtime, folder / f"{optimizer}-{link}")
            if link == len(CHAIN) - 1:
                run(config, runtime, time.time(), StopSignals())
            else:
                with pytest.raises(Stopped):
                    run(config, runtime, time.time(), After(7, is_crash=False))
    return scores


def load_and_save_again(config: Config, runtime: Runtime, folder: Path) -> tuple[float, float]:
    with Locks() as locks:
        start = find_start(config, runtime, locks)
    assert start.source is not None
    base = lay_foundation(replace(config, training=start.source.config.training), runtime)
    restore_training(base, start.source, start.position)
    trainer = Trainer(base, Journal(Sinks([])), start.position)
    documents = {"config.json": json.dumps(config.to_json()).encode(), "metrics.jsonl": b""}
    copy = Checkpointer(open_store(str(folder / "checkpoints")), runtime, 1, False, start.data, lambda: documents)
    copy.save(*trainer.snapshot(), None, wait=True)
    result = trainer.evaluate("val")
    assert result.auroc is not None
    return result.auroc, result.logloss


def train_in_one_piece(folder: Path) -> dict[str, tuple[float, float]]:
    """Runs in a worker: each track undisturbed; and the scores, on one rank, of all that was loaded in between."""
    torch.set_num_threads(1)
    scores = {}
    with start_runtime() as runtime:
        for optimizer in TRACKS:
            config = link_config(optimizer, 1, folder, 1)
            for link in range(1, len(CHAIN)):
                loaded = replace(config, output=replace(config.output, run_dir=str(folder / f"{optimizer}-{link}")))
                scores[f"{optimizer}-{link}"] = load_and_save_again(loaded, runtime, folder / "unused" / str(link))
            whole = replace(config, output=replace(config.output, run_dir=str(folder / f"{optimizer}-whole")))
            run(whole, runtime, time.time(), StopSignals())
    return scores


def test_any_world_size_and_sharding_goes_on_from_any_other(tmp_path: Path) -> None:
    """2 ranks, 1, 3, 4 and 2 again, tables split in another way each time."""
    write_days(tmp_path / "days", (TRAIN_ROWS, VAL_ROWS))
    saved: dict[str, dict[str, np.ndarray]] = {}
    scores: dict[str, tuple[float, float]] = {}
    for link, ranks in enumerate(CHAIN):
        (scores_of_link, *_) = launch(train_a_link, ranks, tmp_path, link, folder=tmp_path).values()
        for optimizer in TRACKS:
            if link > 0:  # loading and saving changed no bit
                scores[f"{optimizer}-{link}"] = scores_of_link[optimizer]
                again = tensors_of(tmp_path / f"{optimizer}-{link}")
                assert set(saved[optimizer]) ^ set(again) == set(), optimizer
                for name, array in again.items():
                    np.testing.assert_array_equal(array, saved[optimizer][name], err_msg=f"{optimizer} {link} {name}")
            saved[optimizer] = tensors_of(tmp_path / optimizer)
    (on_one_rank,) = launch(train_in_one_piece, 1, tmp_path, folder=tmp_path).values()
    for name, values in scores.items():
        assert values == pytest.approx(on_one_rank[name], abs=1e-6), name
    ids = np.load(tmp_path / "days" / "day_0_sparse.npy")
    for optimizer in TRACKS:
        assert newest(tmp_path / optimizer).position["num_samples"] == TRAIN_ROWS
        counts = np.load(tmp_path / optimizer / "multi_hot_freqs.npz")
        for feature, rows in enumerate(ROWS):  # each row was trained on once
            expected = np.bincount(ids[:, feature] % rows, minlength=rows)
            np.testing.assert_array_equal(counts[f"before_cat_{feature}"], expected)
        in_pieces, whole = measured(tmp_path / optimizer), measured(tmp_path / f"{optimizer}-whole")
        assert [line["step"] for line in in_pieces] == [line["step"] for line in whole]
        for name in ("loss", "logloss"):
            values = [[line[name] for line in lines if name in line] for lines in (in_pieces, whole)]
            assert values[0] == pytest.approx(values[1], abs=1e-5), optimizer


def tensors_of(run_dir: Path) -> dict[str, np.ndarray]:
    """All tensors of the newest checkpoint but the random states, which each rank has its own of."""
    manifest, arrays = newest(run_dir), {}
    folder = max((run_dir / "checkpoints").glob("step_*"))
    for name, tensor in manifest.tensors.items():
        if name.startswith("random."):
            continue
        array = arrays[name] = np.full(tensor.shape, 77, tensor.dtype)
        for chunk in tensor.chunks:
            stored = np.fromfile(folder / chunk.file, tensor.dtype, int(np.prod(chunk.shape)), offset=chunk.start)
            block = tuple(
                slice(start, start + length) for start, length in zip(chunk.offsets, chunk.shape, strict=True)
            )
            array[block] = stored.reshape(chunk.shape)
    return arrays
