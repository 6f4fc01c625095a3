"""The sketch against scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from dlrm.metrics.auroc import AurocSketch


def sketch_auroc(scores: np.ndarray, labels: np.ndarray, pieces: int = 7, **sizes: int) -> float | None:
    sketch = AurocSketch(torch.device("cpu"), **sizes)
    for part_scores, part_labels in zip(np.array_split(scores, pieces), np.array_split(labels, pieces), strict=True):
        sketch.update(torch.from_numpy(part_scores), torch.from_numpy(part_labels))
    return sketch.compute()


def draw(kind: str, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Scores of one shape, and labels that follow them."""
    rng = np.random.default_rng(seed)
    signal = rng.normal(size=count)
    labels = (rng.random(count) < 1 / (1 + np.exp(3 - signal))).astype(np.float32)
    scores = {
        "normal": signal,
        "concentrated": 3.4 + 1e-4 * signal,
        "probabilities": 1 / (1 + np.exp(3 - signal)),
        "ties": np.round(signal, 1),
        "heavy tails": signal**9,
        "nearly constant": np.where(rng.random(count) < 0.99, 0.0, signal),
        "sorted": np.sort(signal),
    }[kind]
    return scores.astype(np.float32), labels


KINDS = ["normal", "concentrated", "probabilities", "ties", "heavy tails", "nearly constant", "sorted"]


@pytest.mark.parametrize("kind", KINDS)
def test_small_sets_are_exact(kind: str) -> None:
    scores, labels = draw(kind, 20_000)
    assert sketch_auroc(scores, labels) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_costs_less_than_its_bound(kind: str) -> None:
    scores, labels = draw(kind, 200_000)
    found = sketch_auroc(scores, labels, capacity=1 << 12, buffer=1 << 14)
    assert found == pytest.approx(roc_auc_score(labels, scores), abs=1 / (2 * (1 << 12)))


@pytest.mark.parametrize("kind", ["normal", "concentrated"])
def test_ten_million_scores_within_1e_5(kind: str) -> None:
    scores, labels = draw(kind, 10_000_000)
    assert sketch_auroc(scores, labels) == pytest.approx(roc_auc_score(labels, scores), abs=1e-5)


def test_memory_does_not_grow_with_the_set() -> None:
    sketch = AurocSketch(torch.device("cpu"), capacity=1 << 10, buffer=1 << 12)
    for seed in range(50):
        scores, labels = draw("normal", 5_000, seed)
        sketch.update(torch.from_numpy(scores), torch.from_numpy(labels))
        assert len(sketch._scores) <= 1 << 10


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_one_class_has_no_auroc(label: float) -> None:
    assert sketch_auroc(np.arange(10, dtype=np.float32), np.full(10, label, dtype=np.float32)) is None


def test_empty_updates_change_nothing() -> None:
    scores, labels = draw("normal", 100)
    assert sketch_auroc(scores, labels, pieces=300) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
