"""Whether days have the vocabulary that a checkpoint was trained with: with another one, ids are rows of other ids."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dlrm.checkpoint.find import read_file
from dlrm.checkpoint.restore import Source
from dlrm.config.config import Config
from dlrm.dataset.cautions import LEAST_ROWS, Folded
from dlrm.dataset.manifest import MANIFEST_NAME, load_manifest, read_vocabulary
from dlrm.errors import CheckpointError, DatasetError
from dlrm.system.files import sha256_of


@dataclass(frozen=True)
class Vocabulary:
    """What is known of the days' vocabulary.

    Attributes:
        is_as_trained: None if that can't be told.
        text: the same in words.
    """

    is_as_trained: bool | None
    text: str


def compare_vocabulary(source: Source, config: Config, data: str | None) -> Vocabulary:
    """Holds the vocabulary of a run's days against that of a checkpoint.

    Args:
        data: digest of the run's data; None for random data.

    Raises:
        DatasetError: if it is another one, and that is not allowed.
    """
    if data == source.manifest.data:
        return Vocabulary(True, "")
    if data is None or source.manifest.data is None or config.data.folder is None:
        return Vocabulary(None, "The data is not what the checkpoint was trained on.")
    folder = Path(config.data.folder)
    trained, given = trained_vocabulary(source), read_vocabulary(folder)
    if trained is None or given is None:
        unknown = f"{folder} has no manifest.json" if given is None else "that of the checkpoint is not known"
        return Vocabulary(
            None,
            "The data is not what the checkpoint was trained on: its digest differs. Whether its vocabulary is the "
            f"same can't be told: {unknown}.",
        )
    if trained == given:
        rows = "later rows" if _applies_a_vocabulary(folder) else "other rows"
        return Vocabulary(True, f"Same vocabulary, {rows}: the data is not what the checkpoint was trained on.")
    if not config.checkpoint.allow_other_vocabulary:
        raise DatasetError(
            f"{folder}: its days have another vocabulary than those that {source.address} was trained on, so its ids "
            "are other rows of the tables. Write the days with `dlrm preprocess --vocabulary` and the folder of the "
            "training days, or give --allow_other_vocabulary."
        )
    return Vocabulary(
        False,
        "WARNING: the days have another vocabulary than those that the checkpoint was trained on: their ids are other "
        "rows of the tables.",
    )


def trained_vocabulary(source: Source) -> str | None:
    """Digest of the vocabulary that a checkpoint was trained with; None if neither it nor its days tell."""
    try:
        environment = json.loads(read_file(source.open(), source.name, "environment.json"))
        if "vocabulary_sha256" in environment:
            return environment["vocabulary_sha256"]
        folder = Path(source.config.data.folder or "")
        known = environment.get("data_manifest_sha256") or environment.get("multi_hot_manifest_sha256")
        if known is None or sha256_of(folder / MANIFEST_NAME) != known:
            return None
        return read_vocabulary(folder)
    except (CheckpointError, DatasetError, OSError, ValueError, AttributeError):
        return None


def _applies_a_vocabulary(folder: Path) -> bool:
    ids = load_manifest(folder / MANIFEST_NAME).get("ids")
    return isinstance(ids, dict) and ids.get("vocabulary") is not None


def recorded_folding(source: Source) -> list[Folded] | None:
    """The shares of ids beyond their tables in the days that a checkpoint was trained on; None if not recorded."""
    try:
        parts = json.loads(read_file(source.open(), source.name, "environment.json"))["folded_ids"]
        shares_of = {name: np.array(shares, float) for name, shares in parts.items() if name not in ("val", "test")}
        return [Folded(f"{name} of the training", LEAST_ROWS, shares_F) for name, shares_F in shares_of.items()]
    except (CheckpointError, ValueError, KeyError, TypeError, AttributeError):
        return None
