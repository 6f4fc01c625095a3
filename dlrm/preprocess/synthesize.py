"""Raw Criteo text whose truth is known: each row's click is drawn from a probability that this module planted.

Shapes: B rows of a chunk.
"""

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import polars as pl
import tyro

from dlrm.artifacts import sync_folder, write_atomically, write_json
from dlrm.console import Progress
from dlrm.errors import ConfigError
from dlrm.flags import parse_flags
from dlrm.schema import NUM_CATEGORICAL_FEATURES, NUM_INTEGER_FEATURES

_CHUNK_ROWS = 100_000
_CARDINALITIES = tuple(int(10 * 1.32**i) for i in range(NUM_CATEGORICAL_FEATURES))  # 10 to 10,337


@dataclass(frozen=True)
class SynthesizeConfig:
    """Writes day_0.tsv, day_1.tsv, ... and truth.json: the best AUROC that any model can have on the held-out day."""

    output: tyro.conf.Positional[str]
    """Folder to write; made where it is missing."""

    rows: int = 300_000
    """Rows over all days."""

    days: int = 3
    """Days, of equal size; the last is held out by the trainer."""

    click_rate: Annotated[float, tyro.conf.arg(metavar="SHARE")] = 0.25
    """Share of positives, about."""

    strength: float = 0.35
    """Spread of each feature's effect on the logit. More is easier to predict: 0.35 gives a best AUROC near 0.86."""

    seed: int = 0
    """Same seed, same bytes."""


def synthesize(config: SynthesizeConfig) -> dict[str, float | None]:
    """Writes the days and returns what truth.json holds.

    The logit is a sum: one effect per id, drawn for each id of each of the 26 columns, a saturating function of each
    integer, and a bias that sets the click rate. Ids fall off as a power law.

    Raises:
        ConfigError: on a size or share out of range, or a folder that holds something.
    """
    if config.days < 2 or config.rows < 4 * config.days:
        raise ConfigError(
            f"--rows {config.rows} --days {config.days}: expected 2 days or more, of at least 4 rows each"
        )
    if not 0 < config.click_rate < 1:
        raise ConfigError(f"--click_rate {config.click_rate}: expected a share between 0 and 1")
    if not 0 <= config.strength < 100:
        raise ConfigError(f"--strength {config.strength}: expected 0 or more, and less than 100")
    if config.seed < 0:
        raise ConfigError(f"--seed {config.seed}: expected 0 or more")
    folder = Path(config.output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: is there and not an empty folder. Choose another one, or remove it.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: can't be made ({error.strerror}). Choose another one.") from None
    planted = _Planted(config)
    rows_of_day = [
        config.rows * (day + 1) // config.days - config.rows * day // config.days for day in range(config.days)
    ]
    held_out: tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]] = (np.empty(0), np.empty(0, np.int64))
    progress = Progress("Synthesizing", config.rows, "rows")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        finished = Path(scratch, "raw")
        finished.mkdir()
        for day, rows in enumerate(rows_of_day):
            held_out = planted.write_day(finished / f"day_{day}.tsv", day, rows, progress)
        truth = _measure(*held_out)
        write_json(finished / "truth.json", truth)
        finished.replace(folder)
    sync_folder(folder.parent)
    progress.close()
    return truth


class _Planted:
    """The effects, and rows drawn from them."""

    def __init__(self, config: SynthesizeConfig) -> None:
        self.config = config
        rng = np.random.default_rng([config.seed, 0])
        self.effects = [rng.normal(0, config.strength, size) for size in _CARDINALITIES]
        self.slopes = rng.normal(0, config.strength, NUM_INTEGER_FEATURES)
        self.names = []
        for size in _CARDINALITIES:
            hashes = (
                rng.choice(2**32, size, replace=False) if size < 64 else np.unique(rng.integers(1, 2**32, 2 * size))
            )
            self.names.append(pl.Series([f"{h:08x}" for h in rng.permutation(hashes)[:size].tolist()]))
        variance = config.strength**2 * (NUM_CATEGORICAL_FEATURES + NUM_INTEGER_FEATURES / 2)
        # E[sigmoid(b + e)] of a normal e: the bias that keeps the click rate (probit approximation, MacKay 1992).
        self.bias = math.log(config.click_rate / (1 - config.click_rate)) * math.sqrt(1 + math.pi * variance / 8)

    def write_day(
        self, path: Path, day: int, rows: int, progress: Progress
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
        """Writes one file; returns logits and labels of its rows."""
        rng = np.random.default_rng([self.config.seed, 1, day])
        logits, labels, texts = [], [], []
        for start in range(0, rows, _CHUNK_ROWS):
            logits_B, labels_B, text = self._draw(rng, min(_CHUNK_ROWS, rows - start))
            logits.append(logits_B)
            labels.append(labels_B)
            texts.append(text)
            progress.advance(len(labels_B))
        write_atomically(path, lambda file: file.writelines(texts))
        return np.concatenate(logits), np.concatenate(labels)

    def _draw(
        self, rng: np.random.Generator, count: int
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64], bytes]:
        logits_B = np.full(count, self.bias)
        columns: dict[str, pl.Series] = {}
        for i in range(NUM_INTEGER_FEATURES):
            normal_B = rng.normal(0, 1, count)
            values_B = np.floor(np.exp(1.5 * normal_B + 1)).astype(np.int64) - 1
            missing_B = rng.random(count) < 0.1
            logits_B += np.where(missing_B, 0.0, self.slopes[i] * np.tanh(normal_B))
            columns[f"int_{i}"] = pl.Series(values_B).set(pl.Series(missing_B), None)
        for i, size in enumerate(_CARDINALITIES):
            ids_B = np.floor(np.exp(rng.random(count) * math.log(size + 1)) - 1).astype(np.int64).clip(0, size - 1)
            logits_B += self.effects[i][ids_B]
            columns[f"cat_{i}"] = self.names[i].gather(ids_B)
        labels_B = (rng.random(count) < 1 / (1 + np.exp(-logits_B))).astype(np.int64)
        frame = pl.DataFrame({"label": labels_B, **columns})
        return logits_B, labels_B, frame.write_csv(separator="\t", include_header=False).encode()


def _measure(logits: npt.NDArray[np.float64], labels: npt.NDArray[np.int64]) -> dict[str, float | None]:
    """Metrics of the true probabilities on the held-out day, split as the trainer does: first half val, then test."""
    middle = -(-len(labels) // 2)
    halves = {"val": slice(0, middle), "test": slice(middle, None)}
    truth: dict[str, float | None] = {}
    for stage, half in halves.items():
        truth[f"{stage}_auroc"] = _auroc(logits[half], labels[half])
        truth[f"{stage}_logloss"] = float(np.logaddexp(0, np.where(labels[half] == 1, -1, 1) * logits[half]).mean())
    truth["click_rate"] = float(labels.mean())
    return truth


def _auroc(scores: npt.NDArray[np.float64], labels: npt.NDArray[np.int64]) -> float | None:
    """The Mann-Whitney statistic, ties counting one half; None where there is one class only."""
    _, group = np.unique(scores, return_inverse=True)
    positives, negatives = np.bincount(group, weights=labels), np.bincount(group, weights=1 - labels)
    pairs = positives.sum() * negatives.sum()
    below = negatives.cumsum() - negatives
    return float((positives * (below + negatives / 2)).sum() / pairs) if pairs else None


def main(argv: Sequence[str]) -> None:
    """`dlrm synthesize`."""
    config = parse_flags(SynthesizeConfig, argv, "dlrm synthesize")
    truth = synthesize(config)
    print(f"{config.output}: {config.rows:,} rows in {config.days} days, click rate {truth['click_rate']:.3f}")
    print(
        f"Best AUROC that any model can have: val {truth['val_auroc']:.4f}, test {truth['test_auroc']:.4f} (truth.json)"
    )
