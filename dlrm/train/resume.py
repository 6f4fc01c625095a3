"""Where a run begins: anew, or at a checkpoint."""

import dataclasses
import os
from functools import partial
from pathlib import Path

from dlrm.checkpoint.find import checkpoint_names, read_file
from dlrm.checkpoint.fit import differences, misfits
from dlrm.checkpoint.manifest import Manifest
from dlrm.checkpoint.position import Position
from dlrm.checkpoint.restore import MisfitError, Source, find_given, find_newest, restore
from dlrm.checkpoint.state import counts_of, fill_optimizer_states, restore_random_states
from dlrm.checkpoint.store import open_store
from dlrm.config import Config
from dlrm.data.fingerprint import fingerprint
from dlrm.errors import CheckpointError, ConfigError, DlrmError
from dlrm.metrics.sinks import reported
from dlrm.runtime import Runtime, on_main_rank
from dlrm.train.run_directory import Lock, RunDirectory
from dlrm.train.safety import state_of
from dlrm.train.trainer import Trainer

_SHOWN_DIFFERENCES = 6


class FinishedError(DlrmError):
    """A launcher has started a run again that had finished: a rank was lost after the last file was written."""


@dataclasses.dataclass(frozen=True)
class Start:
    """Where and from what a run begins.

    Attributes:
        lock: of the run directory, on rank 0, if it was there already.
        data: digest of the data; None for random data.
    """

    path: Path
    lock: Lock | None
    source: Source | None
    data: str | None


def find_start(config: Config, runtime: Runtime) -> Start:
    """Checks the run directory and finds the checkpoint to go on from. Collective. Writes nothing but a lock.

    Raises:
        RunDirectoryError: if the run directory can't be used.
        CheckpointError: if the checkpoint does not fit, or is damaged.
        DatasetError: if the data can't be read.
    """
    lock: list[Lock] = []
    # A restart goes on from its own checkpoints, whatever the run itself was started from.
    is_auto = config.checkpoint.resume == "auto" or _is_restart()

    def prepare() -> tuple[Path, bool, str | None]:
        path = RunDirectory.locate(config)
        if _is_restart() and (path / "summary.json").exists():
            raise FinishedError(f"{path}: the run has finished.")
        is_unfinished = RunDirectory.check(path, config, may_resume=is_auto)
        if is_unfinished:
            lock.append(reported(path, lambda: Lock.take(path)))
            RunDirectory.check(path, config, may_resume=is_auto)  # it may have finished while we waited
        return path, is_unfinished, fingerprint(config.data)

    path, is_unfinished, data = on_main_rank(runtime, prepare)
    check = partial(_check_fit, config, data)
    source = None
    if is_auto:
        source = find_newest(store_address(config, path), runtime, check, print)
    if source is None and config.checkpoint.resume not in ("auto", "never"):
        source = find_given(config.checkpoint.resume, runtime, check, print)
    if source is None and is_unfinished:
        on_main_rank(runtime, lambda: _check_elsewhere(config, path))
    if source is not None and config.output.mlperf_log:
        raise _everywhere(
            ConfigError("--mlperf_log: MLPerf times a run in one piece, and this one would be resumed. Leave it out.")
        )
    if runtime.is_main:
        if source is not None:
            _tell(source, config, runtime)
        elif is_unfinished:
            print(f"{path}: holds a run without a checkpoint. Starting anew; its files move to attempt-N.")
    return Start(path, lock[0] if lock else None, source, data)


def _everywhere(error: ConfigError) -> ConfigError:
    error.everywhere = True
    return error


def store_address(config: Config, path: Path) -> str:
    """Where the run's checkpoints go."""
    return config.checkpoint.checkpoint_dir or str(path / "checkpoints")


def _check_elsewhere(config: Config, path: Path) -> None:
    """Refuses to start anew where the run that is there has its checkpoints in another place.

    Raises:
        CheckpointError: naming the place.
    """
    try:
        elsewhere = store_address(Config.load(path / "config.json"), path)
        names = checkpoint_names(open_store(elsewhere)) if elsewhere != store_address(config, path) else []
    except (OSError, ValueError, DlrmError):  # a run that did not come to its first step
        return
    if names:
        raise CheckpointError(
            f"{path}: the checkpoints of this run are in {elsewhere}. Give --checkpoint_dir {elsewhere} to go on, or "
            "another --run_dir to start anew."
        )


def check_store(config: Config, start: Start) -> None:
    """Finds out whether checkpoints can be written where they are to go. Nothing is left there. On rank 0.

    Raises:
        CheckpointError: if they can't, or another training's are there.
    """
    address = store_address(config, start.path)
    store = open_store(address)
    others = checkpoint_names(store) if start.source is None or start.source.store != address else []
    if others and config.checkpoint.resume != "auto" and not _is_restart():
        raise CheckpointError(
            f"{address}: holds {others[0]} of another training. Choose another --checkpoint_dir, or go on from it with "
            "--resume auto."
        )
    try:
        store.check_writable()
    except OSError as error:
        raise CheckpointError(
            f"{address}: can't be written ({error.strerror or error}). Choose another --checkpoint_dir."
        ) from None


def _check_fit(config: Config, data: str | None, manifest: Manifest, saved: Config) -> None:
    """Raises MisfitError for a checkpoint of another training or other data."""
    if found := misfits(saved, config):
        shown = ", ".join(map(str, found[:_SHOWN_DIFFERENCES]))
        more = f" and {len(found) - _SHOWN_DIFFERENCES} more" if len(found) > _SHOWN_DIFFERENCES else ""
        raise MisfitError(
            f"it was written with {shown}{more}. Give the same flags, or start anew in another --run_dir, and another "
            "--checkpoint_dir where one is given"
        )
    if manifest.data != data and not config.checkpoint.allow_changed_data:
        raise MisfitError("the data has changed since. --allow_changed_data goes on all the same")
    if saved.training.epochs > config.training.epochs and manifest.position.get("epoch", 0) >= config.training.epochs:
        raise MisfitError(f"it is past --epochs {config.training.epochs}")


def _tell(source: Source, config: Config, runtime: Runtime) -> None:
    position = Position.from_json(source.manifest.position)
    where = f"step {position.step:,}, epoch {position.epoch}, row {position.row:,}"
    ranks = source.manifest.world_size
    then = "" if ranks == runtime.world_size else f", written by {ranks} ranks"
    print(f"Resuming from {source.address}: {where}{then}.")
    told = ("data", "training", "sharding")
    for difference in differences(source.config, config):
        if difference.section in told and difference.name != "seed":
            print(f"Changed since: --{difference.name} {difference.saved} to {difference.given}.")


def with_seed_of(config: Config, source: Source | None) -> Config:
    """The config with the checkpoint's seed."""
    if source is None:
        return config
    return dataclasses.replace(config, training=dataclasses.replace(config.training, seed=source.config.training.seed))


def resume_training(trainer: Trainer, source: Source, runtime: Runtime) -> bytes:
    """Brings a trainer to where a checkpoint was written; gives the metrics of its run up to there. Collective.

    Raises:
        CheckpointError: if its tensors are not this model's.
    """
    position = Position.from_json(source.manifest.position)
    fill_optimizer_states(trainer.optimizer, position.step)
    state = restore(source, state_of(trainer), runtime)
    restore_random_states(state, runtime)
    frequencies = trainer.splits["train"].frequencies
    if frequencies is not None and runtime.is_main:
        frequencies.add(counts_of(state))
    try:
        trainer.resume(position)
    except TypeError as error:
        raise CheckpointError(f"{source.address}: its validations have other metrics ({error})") from None
    return on_main_rank(runtime, lambda: read_file(source.open(), source.name, "metrics.jsonl"))


def _is_restart() -> bool:
    """Whether a launcher or a scheduler has started this run before."""
    return any(os.environ.get(name, "0") != "0" for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
