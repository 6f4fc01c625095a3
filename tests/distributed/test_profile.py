"""A traced run: valid, with every phase, on every rank and on the thread where it happens."""

import gzip
import json
import re
from collections import defaultdict
from pathlib import Path

import pytest

from dlrm.kernels.native import has_native
from tests.launching import TINY, run_main

PHASES = {
    "sparse_dist": (
        *("next_batch", "copy_batch_to_gpu", "start_sparse_data_dist", "wait_sparse_data_dist"),
        *("wait_for_batch", "runtime_forward_assemble_KJT", "forward", "backward", "optimizer", "zero_grad"),
    ),
    "base": ("load batch", "copy_batch_to_gpu", "wait_for_batch", "forward", "backward", "optimizer", "zero_grad"),
}


def read_spans(path: Path) -> dict[str, list[int]]:
    """Threads of the spans of each name, batch numbers left out."""
    spans = defaultdict(list)
    for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]:
        if event["ph"] == "X":
            name = re.sub(r"^## (.*?)(?: \d+)?(?: from .*)? ##$", r"\1", event["name"])
            spans[name].append(event["tid"])
    return spans


@pytest.mark.parametrize("pipeline", PHASES)
def test_every_phase_is_in_the_trace_of_every_rank(tmp_path: Path, pipeline: str) -> None:
    flags = ["--profile", "4", "--limit_train_batches", "40", "--pipeline", pipeline]
    done = run_main(*TINY, *flags, "--run_dir", str(tmp_path / "run"), ranks=2)
    assert done.returncode == 0, done.stderr
    assert f"Trace of 4 training steps: {tmp_path}/run/trace_rank0.json.gz, one a rank. Open it in" in done.stdout
    for rank in range(2):
        spans = read_spans(tmp_path / "run" / f"trace_rank{rank}.json.gz")
        assert {phase: len(spans[phase]) for phase in PHASES[pipeline]} == dict.fromkeys(PHASES[pipeline], 4)
        training_thread = spans["forward"][0]
        assert set(spans["forward"] + spans["optimizer"]) == {training_thread}
        assert spans["build_batch"]
        assert training_thread not in spans["build_batch"]
        link = "shared_memory" if has_native() else "gloo"
        for collective in (f"{link}:all_to_all", f"{link}:all_reduce"):  # which threads of their own carry out
            assert spans[collective]
            assert training_thread not in spans[collective]


def test_more_steps_than_the_run_has_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    done = run_main(*TINY, "--profile", "6", "--limit_train_batches", "10", "--run_dir", str(tmp_path / "run"))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "dlrm: error: --profile 6: the run has 10 training steps, of which 5 warm up. Expected 5 or less."
    )
    assert not (tmp_path / "run").exists()


def test_an_evaluation_within_the_traced_steps_has_a_name(tmp_path: Path) -> None:
    flags = ["--profile", "4", "--limit_train_batches", "40", "--validation_freq_within_epoch", "7"]
    done = run_main(*TINY, *flags, "--run_dir", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    spans = read_spans(tmp_path / "run" / "trace_rank0.json.gz")
    assert (len(spans["evaluate"]), len(spans["backward"])) == (1, 4)
