"""A thread that looks at all frames, as debuggers and sampling profilers do, changes nothing in a training."""

import gc
import sys
import threading
import time
from pathlib import Path

import pytest
from typing_extensions import Self

from tests.distributed.test_faults import write_days
from tests.launching import TINY, launch, read_losses, read_summary

STEPS = 160
_LOOKS_A_SECOND = 1000


class Onlooker:
    """Walks the frames of all threads and holds their locals for a moment, again and again."""

    def __init__(self) -> None:
        self.looks = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.5 / _LOOKS_A_SECOND):
            gc.disable()  # below Python 3.11.9 a collection within this call deadlocks
            frames = list(sys._current_frames().values())
            gc.enable()
            held = []
            for frame in frames:
                while frame is not None:
                    held.append(frame.f_locals)
                    frame = frame.f_back
            time.sleep(0.5 / _LOOKS_A_SECOND)
            self.looks += len(held) > 0


def train(flags: list[str], is_watched: bool) -> int:
    """Runs on every rank; gives how often it was looked at."""
    from dlrm.train.command import train as main

    if not is_watched:
        main(flags)
        return 0
    with Onlooker() as onlooker:
        main(flags)
    return onlooker.looks


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_frames_that_are_held_end_no_run_and_change_no_number(tmp_path: Path, ranks: int) -> None:
    days = tmp_path / "days"
    write_days(days, (16 * STEPS, 480))
    results = []
    for is_watched in (False, True):
        run_dir = tmp_path / f"run-{is_watched}"
        flags = [*TINY, "--in_memory_binary_criteo_path", str(days), "--batch_size", str(16 // ranks), "--seed", "1"]
        flags += ["--checkpoint_every", "10", "--validation_freq_within_epoch", "20", "--log_every", "1"]
        flags += ["--run_dir", str(run_dir)]
        looks = launch(train, ranks, flags, is_watched, folder=tmp_path)
        assert all((looks[rank] > STEPS) is is_watched for rank in range(ranks))
        results.append((read_losses(run_dir), read_summary(run_dir)["val_auroc"]))
    assert len(results[0][0]) == STEPS
    assert results[0] == results[1]
