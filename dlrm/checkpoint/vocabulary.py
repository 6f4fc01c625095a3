"""Whether days have the vocabulary that a checkpoint was trained with. In another one, an id means another value."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dlrm.checkpoint.checkpoint import Checkpoint
from dlrm.config.config import Config
from dlrm.dataset.cautions import LEAST_ROWS, Folded
from dlrm.dataset.manifest import MANIFEST_NAME, load_manifest, read_vocabulary
from dlrm.errors import CheckpointError, DatasetError
from dlrm.system.files import sha256_of


@dataclass(frozen=True)
class Vocabulary:
    """How the vocabulary of days compares with a checkpoint's.

    Attributes:
        is_as_trained: whether it is the same; None if that can't be told.
        text: a note for the user; empty if the data is the same.
    """

    is_as_trained: bool | None
    text: str


def compare_vocabulary(checkpoint: Checkpoint, config: Config, data: str | None) -> Vocabulary:
    """Compares the vocabulary of a run's days with a checkpoint's.

    Args:
        data: digest of the run's data; None for random data.

    Raises:
        DatasetError: if it is another one, without --allow_other_vocabulary.
    """
    if data == checkpoint.manifest.data:
        return Vocabulary(True, "")
    if data is None or checkpoint.manifest.data is None or config.data.folder is None:
        return Vocabulary(None, "The data is not what the checkpoint was trained on.")
    folder = Path(config.data.folder)
    trained, given = trained_vocabulary(checkpoint), read_vocabulary(folder)
    if trained is None or given is None:
        unknown = f"{folder} has no manifest.json" if given is None else "that of the checkpoint is not known"
        return Vocabulary(
            None,
            "The data is not what the checkpoint was trained on: its digest differs. Whether its vocabulary is the "
            f"same can't be told: {unknown}.",
        )
    if trained == given:
        if source := _trained_source(folder):
            return Vocabulary(
                True,
                f"WARNING: same vocabulary, but the held-out rows are those of {source}, on which models of this "
                "vocabulary were trained: scores on them say nothing of new rows.",
            )
        rows = "later rows" if _applies_a_vocabulary(folder) else "other rows"
        return Vocabulary(True, f"Same vocabulary, {rows}: the data is not what the checkpoint was trained on.")
    if not config.checkpoint.allow_other_vocabulary:
        raise DatasetError(
            f"{folder}: its days have another vocabulary than those that {checkpoint.address} was trained on, so its "
            "ids are other rows of the tables. Write the days with `dlrm preprocess --vocabulary` and the folder of "
            "the training days, or give --allow_other_vocabulary."
        )
    return Vocabulary(
        False,
        "WARNING: the days have another vocabulary than those that the checkpoint was trained on: their ids are other "
        "rows of the tables.",
    )


def trained_vocabulary(checkpoint: Checkpoint) -> str | None:
    """Digest of the vocabulary that a checkpoint was trained with; None if neither its files nor its days tell."""
    try:
        environment = checkpoint.read_environment()
        if "vocabulary_sha256" in environment:
            return environment["vocabulary_sha256"]
        folder = Path(checkpoint.config.data.folder or "")
        known = environment.get("data_manifest_sha256") or environment.get("multi_hot_manifest_sha256")
        if known is None or sha256_of(folder / MANIFEST_NAME) != known:
            return None
        return read_vocabulary(folder)
    except (CheckpointError, DatasetError, OSError, ValueError, AttributeError):
        return None


def _trained_source(folder: Path) -> str | None:
    """The raw file that models of the folder's vocabulary were trained on, and that its held-out day was made from.

    None if there is none, or the folder's manifest has no digests of raw files.
    """
    manifest = load_manifest(folder / MANIFEST_NAME)
    raw, trained = manifest.get("raw_digests"), manifest.get("trained_digests")
    if not isinstance(raw, dict) or not isinstance(trained, dict) or not raw or not _applies_a_vocabulary(folder):
        return None
    held_out = list(raw.values())[-1]
    return next((name for name, digest in trained.items() if digest == held_out), None)


def _applies_a_vocabulary(folder: Path) -> bool:
    ids = load_manifest(folder / MANIFEST_NAME).get("ids")
    return isinstance(ids, dict) and ids.get("vocabulary") is not None


def recorded_folding(checkpoint: Checkpoint) -> list[Folded] | None:
    """The shares of ids beyond their tables in the days that a checkpoint was trained on; None if not recorded."""
    try:
        parts = checkpoint.read_environment()["folded_ids"]
        shares_of = {name: np.array(shares, float) for name, shares in parts.items() if name not in ("val", "test")}
        return [Folded(f"{name} of the training", LEAST_ROWS, shares_F) for name, shares_F in shares_of.items()]
    except (CheckpointError, ValueError, KeyError, TypeError, AttributeError):
        return None
