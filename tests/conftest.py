"""Warnings are errors in tests; what the libraries warn of while they load is theirs (2026-11-22: torch 2.13, torchrec
1.8, fbgemm-gpu 1.8 on a CPU name modules that only the CUDA build has)."""

import importlib
import warnings
from pathlib import Path

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for module in ("torch.distributed.optim", "torchrec.datasets.criteo", "torchrec.models.dlrm", "torchmetrics"):
        importlib.import_module(module)

CRITEO = Path(__file__).parent.parent.parent / "shared" / "criteo"


@pytest.fixture(scope="session")
def criteo_folder() -> Path:
    """Real Criteo rows; skips where they are not at hand."""
    if not CRITEO.is_dir():
        pytest.skip(f"{CRITEO} is absent: real Criteo rows can't be redistributed")
    return CRITEO
