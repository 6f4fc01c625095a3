import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dlrm.config.checks import check_profile
from dlrm.config.config import PROFILE_WARM_UP_STEPS, Config, OutputConfig, TrainingConfig
from dlrm.errors import ConfigError, RunDirectoryError
from dlrm.ranks.runtime import Runtime
from dlrm.train.profiling import StepProfiler

RUNTIME = Runtime(0, 0, 1, 1, torch.device("cpu"))


def take_steps(profiler: StepProfiler, count: int) -> None:
    for _ in range(count):
        with torch.profiler.record_function("## step ##"):
            torch.ones(8).sum()
        profiler.advance()


def count_steps(path: Path) -> int:
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return sum(event.get("name") == "## step ##" and event["ph"] == "X" for event in events)


@pytest.mark.parametrize(
    ("finished", "traced", "words"),
    [
        (20, 3, "Trace of 3 training steps: "),
        (PROFILE_WARM_UP_STEPS + 3, 3, "Trace of 3 training steps: "),
        (PROFILE_WARM_UP_STEPS + 2, 2, "Trace of 2 training steps (not 3: the run ended before): "),
        (PROFILE_WARM_UP_STEPS, None, "No trace: the run ended after 5 steps, while warming up."),
        (1, None, "No trace: the run ended after 1 step, while warming up."),
    ],
)
def test_a_run_of_any_length_says_what_was_traced(tmp_path, finished, traced, words):
    profiler = StepProfiler(3, tmp_path / "run", RUNTIME)
    take_steps(profiler, finished)
    assert profiler.close().startswith(words)
    paths = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert paths == ([] if traced is None else [tmp_path / "run" / "trace_rank0.json.gz"])
    assert [count_steps(path) for path in paths] == ([] if traced is None else [traced])


def test_a_trace_that_can_not_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    profiler = StepProfiler(1, tmp_path / "file", RUNTIME)
    with pytest.raises(RunDirectoryError, match=r"trace_rank0.json.gz: can't be written \(.*\)\. Choose another"):
        take_steps(profiler, PROFILE_WARM_UP_STEPS + 1)


def test_more_steps_than_the_run_has_are_refused():
    config = Config(training=TrainingConfig(epochs=2), output=OutputConfig(profile=15))
    check_profile(config, steps_per_epoch=10)
    check_profile(replace(config, output=OutputConfig()), steps_per_epoch=1)
    with pytest.raises(
        ConfigError, match=r"--profile 15: the run has 18 training steps, of which 5 warm up.*13 or les"
    ):
        check_profile(config, steps_per_epoch=9)
    with pytest.raises(ConfigError, match=r"--profile 15: the run has 4 training steps.*Leave it out, or train longer"):
        check_profile(config, steps_per_epoch=2)
