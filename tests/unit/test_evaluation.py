"""Metrics of a pass against scikit-learn and their definitions."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sklearn.metrics import log_loss, roc_auc_score

from dlrm.config.config import DataConfig
from dlrm.errors import DivergedError
from dlrm.metrics.evaluation import EvaluationMeter
from dlrm.metrics.training import TrainingMeter


@pytest.fixture(autouse=True)
def _process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_metrics_follow_their_definitions() -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(-1, 2, 1000).astype(np.float32)
    labels = (rng.random(1000) < 0.2).astype(np.float32)
    meter = EvaluationMeter(torch.device("cpu"))
    for start in range(0, 1000, 300):
        meter.update(torch.from_numpy(logits[start : start + 300]), torch.from_numpy(labels[start : start + 300]))
    result = meter.compute("val")
    probabilities = 1 / (1 + np.exp(-logits.astype(np.float64)))
    share = labels.mean()
    entropy = -(share * np.log(share) + (1 - share) * np.log(1 - share))
    expected_loss = log_loss(labels, probabilities)
    assert result.auroc == pytest.approx(roc_auc_score(labels, logits), abs=1e-12)
    assert result.logloss == pytest.approx(expected_loss, rel=1e-6)
    assert result.ne == pytest.approx(expected_loss / entropy, rel=1e-6)
    assert result.calibration == pytest.approx(probabilities.mean() / share, rel=1e-6)
    assert (result.num_samples, result.num_positives) == (1000, labels.sum())


def test_the_correction_is_that_of_undersampled_negatives() -> None:
    """He et al., ADKDD 2014, section 6.3: q = p / (p + (1 - p) / w)."""
    rng = np.random.default_rng(2)
    share = 0.05
    logits = rng.normal(0, 2, 1000)
    labels = (rng.random(1000) < 0.1).astype(np.float32)
    correction = DataConfig(undersampling_rate=share).logit_correction
    plain, corrected = EvaluationMeter(torch.device("cpu")), EvaluationMeter(torch.device("cpu"), correction)
    for meter in (plain, corrected):
        meter.update(torch.from_numpy(logits).float(), torch.from_numpy(labels))
    p = 1 / (1 + np.exp(-logits))
    q = p / (p + (1 - p) / share)
    result = corrected.compute("val")
    assert result.logloss == pytest.approx(log_loss(labels, q), rel=1e-5)
    assert result.calibration == pytest.approx(q.mean() / labels.mean(), rel=1e-5)
    assert result.auroc == plain.compute("val").auroc
    assert DataConfig().logit_correction == DataConfig(undersampling_rate=1.0).logit_correction == 0.0


def test_one_class_leaves_metrics_undefined() -> None:
    meter = EvaluationMeter(torch.device("cpu"))
    meter.update(torch.zeros(4), torch.zeros(4))
    result = meter.compute("test")
    assert (result.auroc, result.ne, result.calibration) == (None, None, None)
    assert "undefined" in result.describe()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_an_error(bad: float) -> None:
    meter = EvaluationMeter(torch.device("cpu"))
    meter.update(torch.tensor([0.0, bad]), torch.tensor([0.0, 0.0]))
    with pytest.raises(DivergedError, match="val set"):
        meter.compute("val")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_its_step(bad: float) -> None:
    meter = TrainingMeter(4, torch.device("cpu"), world_size=1)
    for step, loss in ((11, 0.5), (12, bad), (13, 0.5)):
        meter.update(step, torch.tensor(loss), 32)
    with pytest.raises(DivergedError, match="step 12"):
        meter.drain()


def test_reported_loss_weighs_samples_alike() -> None:
    meter = TrainingMeter(4, torch.device("cpu"), world_size=1)
    meter.update(1, torch.tensor(1.0), 30)
    meter.update(2, torch.tensor(4.0), 10)
    report = meter.drain()
    assert (report.loss, report.step) == (pytest.approx(1.75), 2)
