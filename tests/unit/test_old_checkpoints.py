"""A checkpoint whose bytes were written before: it is read as it was, and is still written in these very bytes.

Its text files are in tests/unit/old_run; `tensor_bytes` gives the rest.
"""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from dlrm.checkpoint.checkpointer import Checkpointer
from dlrm.checkpoint.find import locate
from dlrm.checkpoint.position import Position
from dlrm.checkpoint.restore import find_on_ranks, restore
from dlrm.checkpoint.store import open_store
from dlrm.checkpoint.tensors import Part, Parts, State
from dlrm.cli import main
from dlrm.config.config import Config
from dlrm.ranks.runtime import Runtime

RUNTIME = Runtime(0, 0, 1, 1, torch.device("cpu"))
TEXTS = Path(__file__).with_name("old_run")
DOCUMENTS = ("config.json", "environment.json", "plan.json", "metrics.jsonl")
STEP = "step_0000000020"
ARRAYS = {
    "tables.t_cat_0.weight": np.arange(20, dtype="<f4").reshape(5, 4) / np.float32(8),
    "tables.t_cat_0.sum": np.arange(5, dtype="<f4"),
    "dense.over_arch.bias": np.full(3, -0.5, "<f4"),
    "counts.train_cat_0": np.arange(5, dtype="<i8"),
    "random.cpu.rank_0": np.arange(16, dtype="u1"),
}
VALIDATION = {
    "auroc": 0.75, "logloss": 0.5, "ne": 0.9, "calibration": 1.25, "num_samples": 640, "num_positives": 160,
}  # fmt: skip
POSITION = Position(20, 0, 20, 1280, 1280, 20, 2.5, 3.0, ((1, 64, 0.5),), (VALIDATION,))


def tensor_bytes() -> bytes:
    """What rank_0.bin holds: each tensor from a multiple of 64 bytes on."""
    content = bytearray()
    for array in ARRAYS.values():
        content += bytes(-len(content) % 64) + array.tobytes()
    return bytes(content)


def state_of(arrays: dict[str, np.ndarray]) -> State:
    tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    return {
        name: Parts(tensor.size(), tensor.dtype, (Part((0,) * tensor.dim(), tensor),), 0)
        for name, tensor in tensors.items()
    }


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    """DCP warns without one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    """A run directory with that checkpoint."""
    checkpoint = tmp_path / "run" / "checkpoints" / STEP
    shutil.copytree(TEXTS, checkpoint)
    (checkpoint / "rank_0.bin").write_bytes(tensor_bytes())
    for name in DOCUMENTS:
        shutil.copy(TEXTS / name, tmp_path / "run")
    return tmp_path / "run"


def test_the_same_bytes_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "strftime", lambda *_: "2026-11-30T10:00:00+0000")
    documents = {name: (TEXTS / name).read_bytes() for name in DOCUMENTS}
    checkpointer = Checkpointer(open_store(str(tmp_path)), RUNTIME, 1, False, None, lambda: documents)
    checkpointer.save(state_of(ARRAYS), POSITION, 0.75)
    checkpointer.finish()
    written = {path.name: path.read_bytes() for path in (tmp_path / STEP).iterdir()}
    assert written == {**documents, "manifest.json": written["manifest.json"], "rank_0.bin": tensor_bytes()}
    assert written["manifest.json"] == (TEXTS / "manifest.json").read_bytes()


def test_a_training_continues_from_it(old_run: Path) -> None:
    found = find_on_ranks(locate(str(old_run)), RUNTIME, lambda *_: None, print)
    assert found.address == f"{old_run}/checkpoints/{STEP}"
    assert found.config == Config.load(old_run / "config.json")
    assert (found.config.training.seed, found.config.optimizer.algorithm) == (7, "adagrad")
    assert Position.from_json(found.manifest.position) == POSITION
    state = state_of({name: np.zeros_like(array) for name, array in ARRAYS.items()})
    restore(found, state, RUNTIME)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(state[name].parts[0].tensor.numpy(), array)


def test_commands_read_it(old_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(old_run), "--verify", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["checkpoint"]
    assert (facts["step"], facts["validation"], facts["num_files"]) == (20, VALIDATION, 5)
    assert main(["export-table", str(old_run), "t_cat_0", str(tmp_path / "table.npy")]) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "table.npy"), ARRAYS["tables.t_cat_0.weight"])
    capsys.readouterr()
    assert main(["compare", str(old_run), str(old_run / "checkpoints"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [facts[kind]["differing"] for kind in ("config", "environment", "plan")] == [{}, {}, {}]
    assert facts["metrics"]["val_auroc"] == [0.75, 0.75]
