"""`dlrm synthesize`: writes raw Criteo text whose truth is known, as each click is drawn from a planted probability.

Shapes: R rows of a chunk, I integer features, F categorical features.
"""

import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import tyro

from dlrm.config.config import optional
from dlrm.config.flags import parse_flags
from dlrm.config.recipes import FULL_SIZE_ROWS
from dlrm.dataset.days import num_validation_rows
from dlrm.errors import ConfigError, DatasetError
from dlrm.schema.criteo import NUM_CATEGORICAL_FEATURES, NUM_INTEGER_FEATURES
from dlrm.system.console import Progress, show_bytes
from dlrm.system.files import sync, write_atomically, write_json, writing
from dlrm.system.host import available_cores

Floats = npt.NDArray[np.float64]

_IF_UNWRITABLE = "Fix that, or choose another folder, and start again: nothing was written."
_CHUNK_ROWS = 50_000
_PILOT_ROWS, _PILOT_BINS = 400_000, 20_000
_PILOT_STREAM, _FIRST_DAY_STREAM = 1, 2
_TEXT_BYTES_PER_ROW = 250
_LEAST_CARDINALITY = 100


@dataclass(frozen=True)
class SynthesizeConfig:
    """Writes day_0.tsv, day_1.tsv, ... and truth.json: AUROC, log loss and NE of the true click probabilities on the
    held-out day, which no model can beat.

    Ids follow power laws over the cardinalities of Criteo 1TB. Integers are skewed, with missing and negative values at
    the rates of the real log. A planted model gives each row its probability: an effect of each id, interactions of 13
    pairs of ids, and a function of each integer."""

    output: tyro.conf.Positional[str]
    """Folder to write; created if it is missing."""

    rows: int = 300_000
    """Rows over all days."""

    days: int = 3
    """Days, of equal size; the last is held out by the trainer."""

    click_rate: Annotated[float, tyro.conf.arg(metavar="SHARE")] = 0.032
    """Approximate share of positives. The default is that of Criteo 1TB."""

    auroc: float = 0.85
    """Approximate best AUROC that any model can reach. It decides how strong the planted effects are."""

    cardinality_scale: Annotated[float, tyro.conf.arg(metavar="SHARE")] = 0.001
    """Ids of each column, as a share of Criteo 1TB's (up to 292,775,614); at least 100, unless Criteo has fewer."""

    seed: int = 0
    """Same seed, same bytes."""

    workers: Annotated[int | None, optional("a thread a core", "INT")] = None
    """Threads."""

    def validate(self) -> None:
        """Refuses values out of range.

        Raises:
            ConfigError: naming the flag.
        """
        if self.days < 2 or self.rows < 4 * self.days:
            raise ConfigError(
                f"--rows {self.rows} --days {self.days}: expected 2 days or more, of at least 4 rows each"
            )
        if not 0 < self.click_rate < 1:
            raise ConfigError(f"--click_rate {self.click_rate}: expected a share between 0 and 1")
        if not 0.5 <= self.auroc <= 0.99:
            raise ConfigError(f"--auroc {self.auroc}: expected 0.5 to 0.99")
        if not 0 < self.cardinality_scale <= 1:
            raise ConfigError(f"--cardinality_scale {self.cardinality_scale}: expected more than 0, up to 1")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"--seed {self.seed}: expected 0 to 2**63 - 1")
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"--workers {self.workers}: expected 1 or more")

    @property
    def table_rows(self) -> npt.NDArray[np.int64]:
        """Ids of each column."""
        full = np.array(FULL_SIZE_ROWS, np.int64)
        return np.maximum(
            np.minimum(full, _LEAST_CARDINALITY), np.round(full * self.cardinality_scale).astype(np.int64)
        )

    @property
    def rows_of_day(self) -> list[int]:
        """Rows of each day."""
        bounds = [self.rows * day // self.days for day in range(self.days + 1)]
        return [stop - start for start, stop in pairwise(bounds)]


def synthesize(config: SynthesizeConfig) -> dict[str, float | None]:
    """Writes the days and returns what truth.json holds.

    Raises:
        ConfigError: if a size or share is out of range, or the folder is not empty.
        DatasetError: if the disk is too small.
    """
    config.validate()
    folder = Path(config.output).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: exists and is not an empty folder. Choose another one, or remove it.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: can't be made ({error.strerror}). Choose another one.") from None
    needed, free = config.rows * _TEXT_BYTES_PER_ROW, shutil.disk_usage(folder.parent).free
    if needed > free:
        raise DatasetError(
            f"{folder}: about {show_bytes(needed)} of disk needed, {show_bytes(free)} free. Take fewer --rows."
        )
    planted = Planted.calibrated(config)
    held_out: tuple[Floats, npt.NDArray[np.uint8]] = (np.empty(0), np.empty(0, np.uint8))
    progress = Progress("Synthesizing", config.rows, "rows")
    with (
        writing(folder, _IF_UNWRITABLE),
        tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch,
    ):
        finished = Path(scratch, "raw")
        finished.mkdir()
        workers = config.workers or available_cores()
        with ThreadPoolExecutor(workers) as pool:
            for day, rows in enumerate(config.rows_of_day):
                chunks = planted.draw_day(day, rows, pool, ahead=workers + 1)
                held_out = _write_day(finished / f"day_{day}.tsv", chunks, progress, keep=day == config.days - 1)
        truth = measure(*held_out)
        write_json(finished / "truth.json", truth)
        finished.replace(folder)
    sync(folder.parent)
    progress.close()
    return truth


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of a day: their logits, labels and text."""

    logits_R: Floats
    labels_R: npt.NDArray[np.uint8]
    text: npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Planted:
    """The planted model: logit = bias + strength * score, of which a click has the probability sigmoid(logit)."""

    config: SynthesizeConfig
    bias: float
    strength: float

    @staticmethod
    def calibrated(config: SynthesizeConfig) -> "Planted":
        """The model whose bias and strength give the wanted click rate and AUROC on a pilot sample."""
        scores_R = Planted(config, 0.0, 1.0).draw(_PILOT_STREAM, 0, _PILOT_ROWS).scores_R
        scores_R = np.sort(scores_R).reshape(_PILOT_BINS, -1).mean(1)
        low, high = 0.0, 20.0
        for _ in range(50):
            strength = (low + high) / 2
            auroc = expected_auroc(_sigmoid(_bias(scores_R, strength, config.click_rate) + strength * scores_R))
            low, high = (strength, high) if auroc < config.auroc else (low, strength)
        strength = strength if config.auroc > 0.5 else 0.0  # exactly 0, so that all rows have the same probability
        return Planted(config, _bias(scores_R, strength, config.click_rate), strength)

    def draw(self, stream: int, first_row: int, rows: int) -> "Drawn":
        """Draws rows of a stream, from `first_row` on."""
        from dlrm.synthesize.planted import draw_rows

        drawn = Drawn(
            np.empty((NUM_INTEGER_FEATURES, rows), np.int32),
            np.empty((NUM_CATEGORICAL_FEATURES, rows), np.int64),
            np.empty(rows),
            np.empty(rows),
        )
        seeds = np.random.SeedSequence([self.config.seed, 0]), np.random.SeedSequence([self.config.seed, stream])
        model, data = (seed.generate_state(1, np.uint64)[0] for seed in seeds)
        draw_rows(
            model,
            data,
            first_row,
            self.config.table_rows,
            drawn.integers_IR,
            drawn.ranks_FR,
            drawn.scores_R,
            drawn.luck_R,
        )
        return drawn

    def draw_day(self, day: int, rows: int, pool: ThreadPoolExecutor, ahead: int) -> Iterator[Chunk]:
        """Draws a day's rows on the pool's threads; yields chunks in order, and keeps `ahead` in the works."""
        from dlrm.system.threads import in_order

        for _, chunk in in_order(pool, range(0, rows, _CHUNK_ROWS), lambda first: self._chunk(day, first, rows), ahead):
            yield chunk

    def _chunk(self, day: int, first_row: int, rows: int) -> Chunk:
        from dlrm.synthesize.planted import MAX_ROW_BYTES, write_text

        drawn = self.draw(_FIRST_DAY_STREAM + day, first_row, min(_CHUNK_ROWS, rows - first_row))
        logits_R = self.bias + self.strength * drawn.scores_R
        labels_R = (drawn.luck_R < _sigmoid(logits_R)).astype(np.uint8)
        text = np.empty(len(labels_R) * MAX_ROW_BYTES, np.uint8)
        size = write_text(labels_R, drawn.integers_IR, drawn.ranks_FR, text)
        return Chunk(logits_R, labels_R, text[:size])


@dataclass(frozen=True)
class Drawn:
    """Rows as `planted.draw_rows` draws them."""

    integers_IR: npt.NDArray[np.int32]
    ranks_FR: npt.NDArray[np.int64]
    scores_R: Floats
    luck_R: Floats


def _write_day(
    path: Path, chunks: Iterator[Chunk], progress: Progress, keep: bool
) -> tuple[Floats, npt.NDArray[np.uint8]]:
    """Writes one file; returns the logits and labels of its rows, or empty arrays unless `keep`."""
    logits, labels = [np.empty(0)], [np.empty(0, np.uint8)]
    with_progress = (chunk.text for chunk in _watched(chunks, progress, logits if keep else [], labels if keep else []))
    write_atomically(path, lambda file: file.writelines(memoryview(text) for text in with_progress))  # type: ignore[arg-type]
    return np.concatenate(logits), np.concatenate(labels)


def _watched(
    chunks: Iterator[Chunk], progress: Progress, logits: list[Floats], labels: list[npt.NDArray[np.uint8]]
) -> Iterator[Chunk]:
    for chunk in chunks:
        logits.append(chunk.logits_R)
        labels.append(chunk.labels_R)
        yield chunk
        progress.advance(len(chunk.labels_R))


def _sigmoid(logits: Floats) -> Floats:
    return 1 / (1 + np.exp(-logits))


def _bias(scores_R: Floats, strength: float, click_rate: float) -> float:
    """The bias that gives the wanted click rate, found by bisection."""
    low, high = -60.0, 60.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _sigmoid(middle + strength * scores_R).mean() < click_rate else (low, middle)
    return middle


def expected_auroc(clicks_R: Floats) -> float:
    """The expected AUROC of probabilities, given in ascending order, if labels are drawn from them."""
    nones_R = 1 - clicks_R
    below_R = np.cumsum(nones_R) - nones_R
    return float((clicks_R * (below_R + nones_R / 2)).sum() / (clicks_R.sum() * nones_R.sum()))


def measure(logits_R: Floats, labels_R: npt.NDArray[np.uint8]) -> dict[str, float | None]:
    """Metrics of the true probabilities on the held-out day: on all rows, and on those that validate and test."""
    middle = num_validation_rows(len(labels_R))
    parts = {"": slice(None), "val_": slice(0, middle), "test_": slice(middle, None)}
    truth: dict[str, float | None] = {}
    for prefix, part in parts.items():
        logits, labels = logits_R[part], labels_R[part]
        rate = float(labels.mean())
        logloss = float(np.logaddexp(0, np.where(labels == 1, -1, 1) * logits).mean())
        entropy = -rate * math.log(rate) - (1 - rate) * math.log(1 - rate) if 0 < rate < 1 else None
        truth[f"{prefix}auroc"] = _auroc(logits, labels)
        truth[f"{prefix}logloss"] = logloss
        truth[f"{prefix}ne"] = logloss / entropy if entropy else None
    return {**truth, "click_rate": float(labels_R.mean())}


def _auroc(scores: Floats, labels: npt.NDArray[np.uint8]) -> float | None:
    """The Mann-Whitney statistic, in which ties count one half; None if there is only one class."""
    _, group = np.unique(scores, return_inverse=True)
    positives, negatives = np.bincount(group, weights=labels), np.bincount(group, weights=1.0 - labels)
    pairs = positives.sum() * negatives.sum()
    below = negatives.cumsum() - negatives
    return float((positives * (below + negatives / 2)).sum() / pairs) if pairs else None


def main(argv: Sequence[str]) -> None:
    """`dlrm synthesize`."""
    config = parse_flags(SynthesizeConfig, argv, "dlrm synthesize")
    truth = synthesize(config)
    print(f"{config.output}: {config.rows:,} rows in {config.days} days, click rate {truth['click_rate']:.4f}")
    best = [
        f"{stage} {'undefined' if (a := truth[f'{stage}_auroc']) is None else f'{a:.4f}'}" for stage in ("val", "test")
    ]
    print(f"Best AUROC that any model can have: {', '.join(best)} (truth.json)")
