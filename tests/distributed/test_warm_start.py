"""Weights of one training in another, frozen parameters, and training that continues on other data."""

import os
import shutil
import threading
import time
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dlrm.assembly.foundation import lay_foundation
from dlrm.checkpoint.checkpointer import Checkpointer
from dlrm.checkpoint.position import Position
from dlrm.checkpoint.store import open_store
from dlrm.config.config import Config, OptimizerConfig
from dlrm.config.frozen import DENSE
from dlrm.config.interval import Interval
from dlrm.kernels import native
from dlrm.ranks.runtime import Runtime, start_runtime
from dlrm.schema.criteo import TABLE_NAMES
from dlrm.system.lock import Locks
from dlrm.system.signals import StopSignals
from dlrm.train.initial import take_weights
from dlrm.train.resume import find_start
from dlrm.train.run import run
from tests.distributed.test_faults import write_days
from tests.distributed.test_resume import ROWS, After, Case, CrashError, digests, measured, tensors_of
from tests.launching import launch, read_metrics, read_summary

FROZEN = {
    "sgd": ("t_cat_0,t_cat_1,t_cat_3", "t_cat_0 t_cat_1 = table_wise ranks=0; all = table_wise ranks=-1"),
    "adagrad": ("t_cat_0,t_cat_9,dense", "t_cat_0 t_cat_1 = row_wise; t_cat_9 t_cat_10 = column_wise"),
    "rowwise_adagrad": ("t_cat_3,dense", "all = data_parallel"),
    "adam": ("t_cat_3,t_cat_7", "t_cat_7 = table_wise; all = data_parallel"),
    "adagrad all": ("all", None),
}
"""By optimizer: what is frozen, and where tables lie. With ranks=-1 the first rank has frozen tables alone."""


def settled(case: Case, days: Path, run_dir: Path, runtime: Runtime) -> Config:
    """A run of one epoch, with the checkpoint at its end."""
    config = case.config(days, run_dir, runtime.world_size)
    return replace(
        config,
        training=replace(config.training, epochs=1),
        checkpoint=replace(config.checkpoint, checkpoint_every=Interval("1000")),
    )


def frozen_config(kind: str, folder: Path, runtime: Runtime) -> Config:
    optimizer = kind.split()[0]
    names, rules = FROZEN[kind]
    last = runtime.world_size - 1
    rules = rules and rules.replace("ranks=-1", f"ranks={last}")
    if runtime.world_size == 1 and rules is not None:
        rules = rules.replace("column_wise", "table_wise")
    config = settled(Case(optimizer), folder / "days", folder / f"frozen-{kind}", runtime)
    return replace(
        config,
        sharding=replace(config.sharding, table_constraints=rules),
        optimizer=OptimizerConfig(
            optimizer=config.optimizer.optimizer,
            learning_rate=0.3,
            weight_decay=0.1 if optimizer in ("rowwise_adagrad", "adam") else 0.0,
            lr_warmup_steps=5,
            lr_decay_start=8,
            lr_decay_steps=20,
            freeze=names,
        ),
        checkpoint=replace(config.checkpoint, init_from=str(folder / "source")),
    )


def train_frozen(folder: Path, kernels: str) -> None:
    """Runs in a worker."""
    os.environ["DLRM_KERNELS"] = kernels
    native.load_native.cache_clear()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "fbgemm..dense_embedding_codegen_lookup_function")
    with start_runtime() as runtime:
        assert native.has_native() == (kernels == "")
        run(settled(Case(), folder / "days", folder / "source", runtime), runtime, time.time(), StopSignals())
        for kind in FROZEN:
            run(frozen_config(kind, folder, runtime), runtime, time.time(), StopSignals())


@pytest.mark.parametrize("kernels", ["", "none"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_frozen_parameters_stay_bit_for_bit_and_the_others_do_not(ranks: int, kernels: str, tmp_path: Path) -> None:
    write_days(tmp_path / "days", (203, 60))
    launch(train_frozen, ranks, tmp_path, kernels, folder=tmp_path)
    first = tensors_of(tmp_path / "source")
    for kind, (names, _) in FROZEN.items():
        frozen = set(TABLE_NAMES if names == "all" else names.split(","))
        last = tensors_of(tmp_path / f"frozen-{kind}")
        for name, array in first.items():
            owner = name.split(".")[1] if name.startswith("tables.") else DENSE
            assert (last[name].tobytes() == array.tobytes()) == (owner in frozen), f"{kind} {name}"
        states = {name.split(".")[1] if name.startswith("tables.") else DENSE for name in set(last) - set(first)}
        assert not states & frozen, kind


GROWN = tuple(rows + (index % 3) * 7 for index, rows in enumerate(ROWS))
SHARDINGS = ("table_wise", "row_wise", "column_wise", "data_parallel")


def begin(config: Config, runtime: Runtime, folder: Path) -> list[str]:
    """Saves what a run begins with; gives what it says of that."""
    with Locks() as locks:
        start = find_start(config, runtime, locks)
    base = lay_foundation(replace(config, training=replace(config.training, seed=8)), runtime)
    position, lines = take_weights(base, start.initial) if start.initial is not None else (Position(), [])
    copy = Checkpointer(open_store(str(folder / "checkpoints")), runtime, 1, False, None, dict)
    copy.save(base.state(), position, None, wait=True)
    return lines


def begin_with_others(folder: Path, source_ranks: int) -> dict[str, list[str]]:
    """Runs in a worker: the source on so many ranks, and what is begun with it in each sharding."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "fbgemm..dense_embedding_codegen_lookup_function")
    said = {}
    with start_runtime() as runtime:
        if runtime.world_size == source_ranks:
            source = settled(Case("adagrad", "row_wise"), folder / "days", folder / "source", runtime)
            run(source, runtime, time.time(), StopSignals())
        for sharding in SHARDINGS:
            config = settled(Case("adagrad", sharding), folder / "days", folder / f"new-{sharding}", runtime)
            grown = replace(config.model, num_embeddings_per_feature=GROWN, over_arch_layer_sizes=(16, 12, 1))
            config = replace(config, model=grown, training=replace(config.training, seed=None))
            asked = replace(config.checkpoint, init_from=str(folder / "source"), init_optimizer=True)
            fresh, warm = (folder / f"{kind}-{sharding}-{runtime.world_size}" for kind in ("fresh", "warm"))
            begin(config, runtime, fresh)
            said[sharding] = begin(replace(config, checkpoint=asked), runtime, warm)
    return said


def test_grown_tables_keep_their_rows_in_any_sharding_and_draw_the_new_ones(tmp_path: Path) -> None:
    write_days(tmp_path / "days", (203, 60))
    for ranks in (2, 1, 4):
        (said, *_) = launch(begin_with_others, ranks, tmp_path, 2, folder=tmp_path).values()
        saved = tensors_of(tmp_path / "source")
        for sharding in SHARDINGS:
            fresh, warm = (tensors_of(tmp_path / f"{kind}-{sharding}-{ranks}") for kind in ("fresh", "warm"))
            assert_taken(saved, fresh, warm)
            assert said[sharding][1:] == [
                "  taken: 26 tables, 3 of 5 dense layers, adagrad's state of 32 of 32 parameters",
                "  drawn: 175 new rows of 17 tables (t_cat_1, t_cat_2, t_cat_4, 14 more); "
                "2 dense layers (over_arch.0.1, over_arch.1)",
                "  left: 1 dense layer of other shapes (over_arch.1); its steps, validations and data",
            ]


def assert_taken(
    saved: Mapping[str, np.ndarray], fresh: Mapping[str, np.ndarray], warm: Mapping[str, np.ndarray]
) -> None:
    assert set(fresh) == set(warm)
    for name, array in warm.items():
        is_drawn = "over_arch.1" in name or "over_arch.0._mlp.1" in name
        old = array[:0] if is_drawn else saved[name]
        rows = len(old)
        np.testing.assert_array_equal(array[:rows], old, err_msg=name)
        np.testing.assert_array_equal(array[rows:], fresh[name][rows:], err_msg=name)


CONTINUED = ("resumed", "warm", "in place")


def train_on(folder: Path) -> None:
    """Runs in a worker: trainings that continue, or begin warm, on other days; undisturbed, and cut off."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "fbgemm..dense_embedding_codegen_lookup_function")
    with start_runtime() as runtime:
        base = Case("adam", shuffle="set", schedule=True)
        first = base.config(folder / "days", folder / "first", runtime.world_size)
        with pytest.raises(CrashError):
            run(first, runtime, time.time(), After(30, is_crash=True))
        _join()
        for kind in CONTINUED:
            source = str(folder / "first")
            changed = {
                "resumed": {"resume": source, "allow_changed_data": True},
                "warm": {"init_from": source, "init_optimizer": True},
                "in place": {"allow_changed_data": True},
            }[kind]
            for way in ("undisturbed", "cut"):
                if kind == "in place" and runtime.rank == 0:
                    shutil.copytree(folder / "first", folder / f"{kind}-{way}")
                torch.distributed.barrier()
                config = base.config(folder / "new_days", folder / f"{kind}-{way}", runtime.world_size)
                config = replace(config, checkpoint=replace(config.checkpoint, **changed))
                for looks in (3, 9, 16) if way == "cut" else ():
                    with pytest.raises(CrashError):
                        run(again(config, folder), runtime, time.time(), After(looks, is_crash=True))
                    _join()
                run(again(config, folder), runtime, time.time(), StopSignals())


def again(config: Config, folder: Path) -> Config:
    """As a launcher's restart: from the run's own checkpoints, if it has some."""
    run_dir = Path(config.output.run_dir or "")
    is_restart = any((run_dir / "checkpoints").glob("step_*/manifest.json"))
    return replace(config, checkpoint=replace(config.checkpoint, resume="auto")) if is_restart else cleared(config)


def cleared(config: Config) -> Config:
    run_dir = Path(config.output.run_dir or "")
    if config.checkpoint.init_from is None and int(os.environ["RANK"]) == 0 and run_dir.exists():
        run_dir.rename(run_dir.with_name(f"{run_dir.name}-{time.monotonic_ns()}"))
    torch.distributed.barrier()
    return config


def _join() -> None:
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()


def test_a_training_that_continues_on_other_data_is_exact_when_it_is_cut_off(tmp_path: Path) -> None:
    write_days(tmp_path / "days", (403, 60))
    write_days(tmp_path / "new_days", (301, 40))
    launch(train_on, 2, tmp_path, folder=tmp_path)
    for kind in CONTINUED:
        undisturbed, cut = tmp_path / f"{kind}-undisturbed", tmp_path / f"{kind}-cut"
        assert digests(cut) == digests(undisturbed), kind
        assert measured(cut) == measured(undisturbed), kind
    lines = read_metrics(tmp_path / "resumed-undisturbed")
    begun = next(line for line in lines if line["kind"] == "resume")
    assert (begun["epoch"], begun["row"], begun["has_new_data"]) == (0, 0, True)
    before = begun["num_train_samples"]
    assert before > 0
    summary = read_summary(tmp_path / "resumed-cut")
    assert (summary["num_train_samples"], summary["num_train_samples_before"]) == (before + 2 * 301, before)
    assert read_summary(tmp_path / "warm-cut")["num_train_samples"] == 2 * 301
