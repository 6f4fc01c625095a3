"""Scores held-out sets with the weights of a checkpoint."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from dlrm.assembly.foundation import Foundation, lay_foundation
from dlrm.checkpoint.checkpoint import Checkpoint, RemovedError
from dlrm.checkpoint.compatibility import model_misfits
from dlrm.checkpoint.find import Location, locate
from dlrm.checkpoint.manifest import Manifest
from dlrm.checkpoint.position import Position
from dlrm.checkpoint.restore import find_on_ranks, restore
from dlrm.checkpoint.tensors import model_state
from dlrm.checkpoint.vocabulary import Vocabulary, compare_vocabulary, recorded_folding
from dlrm.config.config import DEFAULT_RANDOM_BATCHES, Config
from dlrm.dataset.binary_days import Stage
from dlrm.dataset.cautions import Folded, compare_folded, note_unknown_folding
from dlrm.dataset.fingerprint import fingerprint
from dlrm.errors import ConfigError, MisfitError, reason_of
from dlrm.evaluate.config import EvaluateConfig, config_on_top
from dlrm.evaluate.scorer import Scorer
from dlrm.fault_tolerance.watchdog import Watchdog
from dlrm.metrics.evaluation import EvaluationResult
from dlrm.ranks.runtime import Runtime, on_main_rank
from dlrm.system.console import plural
from dlrm.system.files import write_result


def score_checkpoint(asked: EvaluateConfig, argv: Sequence[str], runtime: Runtime) -> None:
    """Restores the model, on whatever ranks there are, scores, prints, and writes --json. Collective.

    Raises:
        DlrmError: if the user can fix it.
    """
    location = on_main_rank(runtime, lambda: locate(asked.checkpoint))
    source = find_on_ranks(location, runtime, _take, print)
    config = on_main_rank(runtime, lambda: config_on_top(source.config, argv))
    stages: tuple[Stage, ...] = ("val", "test") if asked.split == "both" else (asked.split,)
    data = on_main_rank(runtime, lambda: fingerprint(config.data))
    vocabulary = on_main_rank(runtime, lambda: compare_vocabulary(source, config, data))
    base = lay_foundation(config, runtime, stages, is_restored=True)
    if runtime.is_main:
        _tell(source, config, base, vocabulary)
    source = _restore(source, location, base)
    results = _score(base, stages)
    if asked.json is not None:
        path, facts = asked.json, _describe(source, config, runtime, data, vocabulary, results)
        on_main_rank(runtime, lambda: _write(path, facts))


def _take(manifest: Manifest, saved: Config) -> None:
    """Whatever run wrote it: the model is built as its config says."""


def _restore(source: Checkpoint, location: Location, base: Foundation) -> Checkpoint:
    """Fills the model from a checkpoint; gives the one that was taken. Collective.

    A run that trains removes its older checkpoints: if this one goes meanwhile, and was not named, another is taken.

    Raises:
        CheckpointError: if it was named and is gone, or can't be read.
    """
    state = model_state(base.model, base.runtime.world_size)
    while True:
        try:
            restore(source, state, base.runtime)
        except RemovedError:
            if location.name is not None:
                raise
        else:
            return source
        gone, source = source, find_on_ranks(location, base.runtime, partial(_check_model, source.config), print)
        if base.runtime.is_main:
            print(f"{gone.address} was removed while it was read. Scoring with {source.address}.", flush=True)


def _check_model(expected: Config, manifest: Manifest, saved: Config) -> None:
    del manifest
    if misfits := model_misfits(saved, expected):
        raise MisfitError(f"it was written with {', '.join(map(str, misfits))}")


def _score(base: Foundation, stages: Sequence[Stage]) -> dict[Stage, EvaluationResult]:
    runtime, scorer = base.runtime, Scorer(base)
    watchdog = Watchdog(runtime, base.config.checkpoint.hang_timeout).start()
    results = {}
    try:
        for stage in stages:
            batches = base.splits[stage].batches()
            results[stage] = scorer.score(stage, batches, lambda: watchdog.beat("evaluating"))
            if runtime.is_main:
                print(f"AUROC over {stage} set: {results[stage].describe()}", flush=True)
    finally:
        watchdog.stop()
    return results


def _tell(source: Checkpoint, config: Config, base: Foundation, vocabulary: Vocabulary) -> None:
    manifest = source.manifest
    position = Position.from_json(manifest.position)
    print(
        f"Scoring with {source.address}: step {position.step:,}, trained on {position.num_samples:,} samples, written "
        f"by {plural(manifest.world_size, 'rank')}."
    )
    if vocabulary.text:
        print(vocabulary.text)
    if note := _compare_with_training(source, base.folded):
        print(note)
    if config.is_random:
        print("Random data: nothing in it can be learned, so expect an AUROC of about 0.5.")
    for stage, split in base.splits.items():
        before, now = _limited_rows(source, stage), split.partition.num_used_rows
        if _limit(config, stage) is not None and before is not None and before != now:
            print(f"Limits are in steps: {now:,} {stage} rows here, where the run had up to {before:,}.")
    if config.output.print_sharding_plan:
        print(base.placement.to_text())
    print(base.placement.summary(), flush=True)


def _compare_with_training(source: Checkpoint, folded: Sequence[Folded]) -> str:
    """A note if ids lie beyond their tables in another share than in training; empty otherwise."""
    trained = recorded_folding(source)
    return note_unknown_folding(folded) if trained is None else compare_folded([*trained, *folded])


def _limit(config: Config, stage: Stage) -> int | None:
    """Steps of a held-out set at the most."""
    limit = config.data.limit_val_batches if stage == "val" else config.data.limit_test_batches
    return limit or (DEFAULT_RANDOM_BATCHES if config.is_random else None)


def _limited_rows(source: Checkpoint, stage: Stage) -> int | None:
    """Rows that the limit of the run that wrote the checkpoint stood for."""
    data, limit = source.config.data, _limit(source.config, stage)
    return None if limit is None else limit * data.evaluation_batch_size * source.manifest.world_size


def _describe(
    source: Checkpoint,
    config: Config,
    runtime: Runtime,
    data: str | None,
    vocabulary: Vocabulary,
    results: Mapping[Stage, EvaluationResult],
) -> dict[str, Any]:
    return {
        "checkpoint": source.address,
        "step": source.manifest.step,
        "num_train_samples": Position.from_json(source.manifest.position).num_samples,
        "data_fingerprint": data,
        "data_is_as_trained": data == source.manifest.data,
        "vocabulary_is_as_trained": vocabulary.is_as_trained,
        "world_size": runtime.world_size,
        "device": runtime.device_name,
        "precision": config.training.arithmetic,
        **{stage: asdict(result) for stage, result in results.items()},
    }


def _write(path: str, facts: Mapping[str, Any]) -> None:
    try:
        write_result(path, facts)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise ConfigError(f"--json {path}: can't be written ({reason_of(error)}).") from None
