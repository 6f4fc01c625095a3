"""Where a run begins: at its start, with weights that are drawn or another's, or at a checkpoint."""

import dataclasses
from functools import partial
from pathlib import Path

from dlrm.assembly.foundation import Foundation
from dlrm.checkpoint.compatibility import differences, misfits
from dlrm.checkpoint.find import checkpoint_names, read_file
from dlrm.checkpoint.manifest import Manifest
from dlrm.checkpoint.position import Position
from dlrm.checkpoint.restore import Source, find_given, find_newest, restore
from dlrm.checkpoint.store import LocalStore, make_folder, open_store
from dlrm.checkpoint.tensors import counts_of, fill_optimizer_states, restore_random_states
from dlrm.checkpoint.vocabulary import compare_vocabulary
from dlrm.config.config import Config, OptimizerConfig
from dlrm.dataset.fingerprint import fingerprint
from dlrm.errors import CheckpointError, ConfigError, DlrmError, MisfitError, reason_of
from dlrm.metrics.evaluation import EvaluationResult
from dlrm.metrics.sinks import reported
from dlrm.ranks.runtime import Runtime, on_every_rank, on_main_rank
from dlrm.system.console import plural
from dlrm.system.lock import Locks
from dlrm.train.initial import find_initial
from dlrm.train.run_directory import RunDirectory

_SHOWN_DIFFERENCES = 6


class FinishedError(DlrmError):
    """A launcher has started a run again that had finished: a rank was lost after the last file was written."""


@dataclasses.dataclass(frozen=True)
class Start:
    """Where and from what a run begins.

    Attributes:
        source: the checkpoint that it is resumed from.
        data: the data's digest; None for random data.
        is_own: whether `source` is of this very run.
        initial: the checkpoint that a new training has its first weights from.
    """

    path: Path
    source: Source | None
    data: str | None
    is_own: bool = False
    initial: Source | None = None

    @property
    def position(self) -> Position:
        """Where training begins."""
        if self.source is None:
            return Position()
        position = Position.from_json(self.source.manifest.position)
        if not self.is_own:
            position = position.in_new_run()
        return position.on_new_data() if self.has_new_data else position

    @property
    def has_new_data(self) -> bool:
        """Whether `source` was trained on other data."""
        return self.source is not None and self.source.manifest.data != self.data


def find_start(config: Config, runtime: Runtime, locks: Locks) -> Start:
    """Checks the run directory and finds the checkpoint to go on from. Collective.

    Writes nothing but locks and, without --run_dir, an empty folder.

    Args:
        locks: on rank 0, they take the run directory if it is there, and the folder of checkpoints.

    Raises:
        RunDirectoryError: if the run directory can't be used.
        CheckpointError: if the checkpoint does not fit, or is damaged.
        DatasetError: if the data can't be read, or has another vocabulary.
    """

    def prepare() -> tuple[Path, bool, bool, str | None]:
        path = RunDirectory.claim(RunDirectory.locate(config), config, locks)
        is_restart = RunDirectory(path).is_of_this_launch()
        if is_restart and (path / "summary.json").exists():
            raise FinishedError(f"{path}: the run has finished.")
        # A restart goes on from its own checkpoints, whatever the run itself was started from.
        is_auto = is_restart or config.checkpoint.resume == "auto"
        is_unfinished = RunDirectory.check(path, config, may_resume=is_auto)
        if is_unfinished:
            reported(path, lambda: locks.take(path, f"--run_dir {path}"))
            RunDirectory.check(path, config, may_resume=is_auto)  # it may have finished while we waited
        _prepare_store(config, path, locks, is_auto=is_auto)
        return path, is_auto, is_unfinished, fingerprint(config.data)

    path, is_auto, is_unfinished, data = on_main_rank(runtime, prepare)
    check = partial(_check_fit, config, data)
    source = initial = None
    if is_auto:
        source = find_newest(store_address(config, path), runtime, check, print)
    is_own = source is not None
    if source is None and config.checkpoint.resume not in ("auto", "never"):
        source = find_given(config.checkpoint.resume, runtime, check, print)
    if source is None and config.checkpoint.init_from is not None:
        initial = find_initial(config, runtime)
    if source is None and is_unfinished:
        on_main_rank(runtime, lambda: _check_elsewhere(config, path))
    note = ""
    if (taken := source or initial) is not None:
        note = on_main_rank(runtime, lambda: compare_vocabulary(taken, config, data)).text
    if source is not None and config.output.mlperf_log:
        raise ConfigError(
            "--mlperf_log: MLPerf times a run in one piece, and this one would be resumed. Leave it out."
        ).raised_everywhere()
    start = Start(path, source, data, is_own, initial)
    on_main_rank(runtime, lambda: _check_schedule(start, config.optimizer))
    if runtime.is_main:
        if source is not None:
            _tell(source, start, config, runtime)
        elif is_unfinished:
            print(f"{path}: holds a run without a checkpoint. Starting anew; its files move to attempt-N.")
        if note:
            print(note)
    return start


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


def _prepare_store(config: Config, path: Path, locks: Locks, *, is_auto: bool) -> None:
    """Finds out whether checkpoints can be written where they are to go, and takes a folder that has been named.

    Raises:
        CheckpointError: if they can't, or another training's are there.
        RunDirectoryError: if another run is using the folder.
    """
    if config.checkpoint_interval.is_never:
        return
    address = store_address(config, path)
    store = open_store(address)
    if isinstance(store, LocalStore) and RunDirectory(path).has_file(store.root):
        raise CheckpointError(f"--checkpoint_dir {address}: is where the run writes a file. Choose another folder.")
    others = checkpoint_names(store)
    if others and not is_auto:
        raise CheckpointError(
            f"{address}: holds {others[0]} of another training. Choose another --checkpoint_dir, or go on from it with "
            "--resume auto."
        )
    try:
        store.check_writable()
        if config.checkpoint.checkpoint_dir is not None and isinstance(store, LocalStore):
            make_folder(store.root)
            locks.take(store.root, f"--checkpoint_dir {address}")
    except OSError as error:
        raise CheckpointError(
            f"{address}: can't be written ({reason_of(error)}). Choose another --checkpoint_dir."
        ) from None


def _check_fit(config: Config, data: str | None, manifest: Manifest, saved: Config) -> None:
    """Raises MisfitError for a checkpoint of another training or other data."""
    begun = config.checkpoint.init_from
    if begun is not None and begun != saved.checkpoint.init_from:
        raise MisfitError(
            f"it is of a training that did not begin with --init_from {begun}. Choose another --run_dir, and another "
            "--checkpoint_dir if one is given"
        )
    if found := misfits(saved, config):
        shown = ", ".join(map(str, found[:_SHOWN_DIFFERENCES]))
        more = f" and {len(found) - _SHOWN_DIFFERENCES} more" if len(found) > _SHOWN_DIFFERENCES else ""
        raise MisfitError(
            f"it was written with {shown}{more}. Give the same flags, or start anew in another --run_dir, and another "
            "--checkpoint_dir where one is given"
        )
    if manifest.data != data and not config.checkpoint.allow_changed_data:
        raise MisfitError(
            f"it was trained on other data than {config.data.folder or 'random samples'}. --allow_changed_data "
            "continues all the same, from row 0 of this data"
        )


def _check_schedule(start: Start, optimizer: OptimizerConfig) -> None:
    """Refuses new data for a training whose learning rate has decayed to its end: it would change next to nothing.

    Raises:
        CheckpointError: with the step at which the decay ended.
    """
    end = optimizer.lr_decay_start + optimizer.lr_decay_steps
    if start.has_new_data and optimizer.lr_decay_steps and start.position.step >= end:
        raise CheckpointError(
            f"--resume: the training is at step {start.position.step:,}, and its learning rate's decay ended at step "
            f"{end:,} (--lr_decay_start and --lr_decay_steps), so it would learn next to nothing of the new data. "
            "Begin a new training with its weights: --init_from."
        )


def _tell(source: Source, start: Start, config: Config, runtime: Runtime) -> None:
    position = start.position
    where = f"step {position.step:,}, epoch {position.epoch}, row {position.row:,}"
    new = ""
    if start.has_new_data:
        before, now = _show_digest(source.manifest.data), _show_digest(start.data)
        where = f"step {position.step:,}"
        new = f" The data was {before} and now is {now}: epochs begin at 0, row 0 of it."
    ranks = source.manifest.world_size
    then = "" if ranks == runtime.world_size else f", written by {plural(ranks, 'rank')}"
    print(f"Resuming from {source.address}: {where}{then}.{new}")
    before, now = source.config.data.batch_size * ranks, config.data.batch_size * runtime.world_size
    if before != now:
        same, left = divmod(before, runtime.world_size)
        advice = "" if left else f" --batch_size {same:,} keeps what it was."
        print(f"A step had {before:,} samples over all ranks and now has {now:,}, at the same learning rate.{advice}")
    told = ("data", "training", "sharding")
    for difference in differences(source.config, config):
        if difference.section in told and difference.name != "seed":
            print(f"Changed since: {difference}.")


def _show_digest(data: str | None) -> str:
    return "random samples" if data is None else f"digest {data[:12]}"


def check_left(foundation: Foundation, start: Start) -> None:
    """Refuses a checkpoint after which nothing is left to train.

    A run whose own training had ended is completed all the same: its test or its summary may be missing.

    Raises:
        CheckpointError: saying why.
    """
    source, position = start.source, start.position
    if source is None:
        return
    config = foundation.config
    epochs = config.training.epochs
    if start.is_own and source.config.training.epochs <= epochs:
        return
    rest = foundation.splits["train"].partition.resumed(position.row, position.epoch_step)
    done = position.epoch + (rest.num_steps == position.epoch_step)
    target = config.evaluation.validation_auroc
    if done >= epochs:
        why = f"it has trained for {plural(done, 'epoch')}, and --epochs is {epochs}. Give a larger one"
    elif not start.is_own and position.reaches(target):
        best = max(auroc or 0.0 for auroc in position.own_aurocs)
        why = f"a validation AUROC of {best:.6f} has reached --validation_auroc {target:g}. Give a higher one"
    else:
        return
    raise CheckpointError(
        f"{source.address}: nothing is left to train: {why}, or begin a new training with its weights: --init_from."
    ).raised_everywhere()


def restore_training(foundation: Foundation, source: Source, position: Position) -> bytes:
    """Fills the model and the optimizer from a checkpoint; gives the metrics of its run up to there. Collective.

    Raises:
        CheckpointError: if its tensors are not this model's, or its validations have other metrics.
    """
    runtime = foundation.runtime
    fill_optimizer_states(foundation.optimizer, position.step + position.optimizer_steps)
    state = restore(source, foundation.state(), runtime)
    on_every_rank(runtime, lambda: restore_random_states(state, runtime))
    frequencies = foundation.splits["train"].frequencies
    if frequencies is not None and runtime.is_main:
        frequencies.add(counts_of(state))
    try:
        for validation in position.validations:
            EvaluationResult(**validation)
    except TypeError as error:
        raise CheckpointError(f"{source.address}: its validations have other metrics ({error})") from None
    return on_main_rank(runtime, lambda: read_file(source.open(), source.name, "metrics.jsonl"))
