"""Where a run begins: at its start, with weights that are drawn or another run's, or at a checkpoint."""

import dataclasses
from functools import partial
from pathlib import Path

from dlrm.assembly.foundation import Foundation
from dlrm.checkpoint import run_files
from dlrm.checkpoint.checkpoint import Checkpoint, UnfinishedError
from dlrm.checkpoint.compatibility import differences, misfits
from dlrm.checkpoint.find import Location, checkpoint_names, locate, names_to_leave
from dlrm.checkpoint.manifest import Manifest
from dlrm.checkpoint.position import Position
from dlrm.checkpoint.restore import Check, find_on_ranks, restore
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
    """A launcher has restarted a run that had finished: a rank was lost after the last file was written."""


@dataclasses.dataclass(frozen=True)
class Start:
    """Where and from what a run begins.

    Attributes:
        path: the run directory.
        data: the data's digest; None for random data.
        source: the checkpoint that it is resumed from.
        is_own: whether `source` is of this very run.
        left_out: names of checkpoints beside `source` that this run does not continue from, if `source` is its own.
        initial: the checkpoint that a new training takes its first weights from.
    """

    path: Path
    data: str | None
    source: Checkpoint | None = None
    is_own: bool = False
    left_out: tuple[str, ...] = ()
    initial: Checkpoint | None = None

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


@dataclasses.dataclass(frozen=True)
class _Place:
    """What rank 0 has found before any checkpoint is looked at.

    Attributes:
        path: the run directory.
        data: the data's digest; None for random data.
        resumes_own: whether the run continues from its own newest checkpoint, if there is one.
        holds_run: whether the run directory holds a run that has not finished.
    """

    path: Path
    data: str | None
    resumes_own: bool
    holds_run: bool


def find_start(config: Config, runtime: Runtime, locks: Locks) -> Start:
    """Checks the run directory and finds the checkpoint to continue from. Collective.

    Writes nothing but locks and, without --run_dir, an empty folder.

    Args:
        locks: on rank 0, they take the run directory if it is there, and the folder of checkpoints.

    Raises:
        FinishedError: if this process is a restart of a run that has finished.
        RunDirectoryError: if the run directory can't be used.
        CheckpointError: if the checkpoint does not fit, or is damaged.
        DatasetError: if the data can't be read, or has another vocabulary.
    """
    place = on_main_rank(runtime, lambda: _prepare(config, locks))
    start = _choose(place, config, runtime)
    notes = on_main_rank(runtime, lambda: _check_start(start, place, config))
    if runtime.is_main:
        if start.source is not None:
            _tell(start.source, start, config, runtime)
        print("".join(f"{note}\n" for note in notes), end="")
    return start


def _prepare(config: Config, locks: Locks) -> _Place:
    """Chooses, checks and locks the run directory and the folder of checkpoints, on rank 0."""
    path = RunDirectory.claim(RunDirectory.locate(config), config, locks)
    directory = RunDirectory(path)
    is_restart = directory.is_of_this_launch()
    if is_restart and directory.is_finished():
        raise FinishedError(f"{path}: the run has finished.")
    # A restart continues from its own checkpoints, whatever the run itself was started from.
    resumes_own = is_restart or config.checkpoint.resume == "auto"
    directory.check(config, may_resume=resumes_own)
    if holds_run := directory.holds_run():
        reported(path, lambda: locks.take(path, f"--run_dir {path}"))
        directory.check(config, may_resume=resumes_own)  # it may have finished while we waited
    _prepare_store(config, path, locks, may_resume=resumes_own)
    return _Place(path, fingerprint(config.data), resumes_own, holds_run)


def _choose(place: _Place, config: Config, runtime: Runtime) -> Start:
    """Begins at the run's own newest checkpoint, else with --resume, else with --init_from, else new. Collective."""
    check = partial(_check_fit, config, place.data)
    if place.resumes_own and (own := _find_own(place, config, runtime, check)) is not None:
        left_out = on_main_rank(runtime, lambda: names_to_leave(own, lambda one: check(one.manifest, one.config)))
        return Start(place.path, place.data, own, is_own=True, left_out=left_out)
    if config.checkpoint.resume not in ("auto", "never"):
        location = on_main_rank(runtime, lambda: locate(config.checkpoint.resume))
        return Start(place.path, place.data, find_on_ranks(location, runtime, check, print))
    if config.checkpoint.init_from is not None:
        return Start(place.path, place.data, initial=find_initial(config, runtime))
    return Start(place.path, place.data)


def _find_own(place: _Place, config: Config, runtime: Runtime, check: Check) -> Checkpoint | None:
    """The newest sound checkpoint of this run; None if it has finished none. Collective."""
    try:
        return find_on_ranks(Location(store_address(config, place.path)), runtime, check, print)
    except UnfinishedError:
        return None


def _check_start(start: Start, place: _Place, config: Config) -> list[str]:
    """Refuses a start that would lose or spoil something; returns notes for the user.

    Raises:
        CheckpointError: if the run's checkpoints are elsewhere, or the learning rate has decayed.
        ConfigError: if MLPerf's log is asked of a run that is resumed.
        DatasetError: if the data has another vocabulary.
    """
    notes = []
    if start.source is None and place.holds_run:
        _check_elsewhere(config, start.path)
        notes.append(f"{start.path}: holds a run without a checkpoint. Starting again; its files move to attempt-N.")
    if (taken := start.source or start.initial) is not None:
        notes.append(compare_vocabulary(taken, config, start.data).text)
    if start.source is not None and config.output.mlperf_log:
        raise ConfigError("--mlperf_log: MLPerf times a run in one piece, and this one would be resumed. Leave it out.")
    _check_schedule(start, config.optimizer)
    return [note for note in notes if note]


def store_address(config: Config, path: Path) -> str:
    """The address of the folder that the run's checkpoints are written to."""
    return config.checkpoint.checkpoint_dir or str(path / run_files.CHECKPOINTS)


def _check_elsewhere(config: Config, path: Path) -> None:
    """Refuses to start again if the run in this run directory has its checkpoints in another place.

    Raises:
        CheckpointError: naming the place.
    """
    try:
        elsewhere = store_address(Config.load(path / run_files.CONFIG), path)
        names = checkpoint_names(open_store(elsewhere)) if elsewhere != store_address(config, path) else []
    except (OSError, ValueError, DlrmError):  # a run that did not come to its first step
        return
    if names:
        raise CheckpointError(
            f"{path}: the checkpoints of this run are in {elsewhere}. Give --checkpoint_dir {elsewhere} to continue, "
            "or another --run_dir to start a new training."
        )


def _prepare_store(config: Config, path: Path, locks: Locks, *, may_resume: bool) -> None:
    """Checks that checkpoints can be written, and locks the folder of --checkpoint_dir.

    Raises:
        CheckpointError: if they can't, or if another training's are there.
        RunDirectoryError: if another run is using the folder.
    """
    if config.checkpoint_interval.is_never:
        return
    address = store_address(config, path)
    store = open_store(address)
    if isinstance(store, LocalStore) and RunDirectory(path).has_file(store.root):
        raise CheckpointError(f"--checkpoint_dir {address}: is where the run writes a file. Choose another folder.")
    others = checkpoint_names(store)
    if others and not may_resume:
        raise CheckpointError(
            f"{address}: holds {others[0]} of another training. Choose another --checkpoint_dir, or continue from it "
            "with --resume auto."
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
            f"it was written with {shown}{more}. Give the same flags, or start a new training in another --run_dir, "
            "and another --checkpoint_dir if one is given"
        )
    if manifest.data != data and not config.checkpoint.allow_changed_data:
        raise MisfitError(
            f"it was trained on other data than {config.data.folder or 'random samples'}. --allow_changed_data "
            "continues all the same, from row 0 of this data"
        )


def _check_schedule(start: Start, optimizer: OptimizerConfig) -> None:
    """Refuses new data if the learning rate has decayed to its end: training would change next to nothing.

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


def _tell(source: Checkpoint, start: Start, config: Config, runtime: Runtime) -> None:
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

    A run that continues from its own last checkpoint is completed all the same: its test or its summary may be missing.

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


def restore_training(foundation: Foundation, source: Checkpoint, position: Position) -> bytes:
    """Fills the model and the optimizer from a checkpoint; returns its metrics.jsonl. Collective.

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
    return on_main_rank(runtime, lambda: source.read(run_files.METRICS))
