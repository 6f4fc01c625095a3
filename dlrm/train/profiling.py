"""A trace of some training steps: what each thread of each rank did, and when."""

import gzip
import tempfile
from pathlib import Path

from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile, schedule

from dlrm.checkpoint.run_files import trace_of
from dlrm.config.config import PROFILE_WARM_UP_STEPS
from dlrm.errors import RunDirectoryError, reason_of
from dlrm.ranks.runtime import Runtime
from dlrm.system.console import plural
from dlrm.system.files import write_atomically


class StepProfiler:
    """Traces training steps of this rank, of all its threads, on CPU and GPU.

    Writes `trace_rank{r}.json.gz`, in Chrome's trace format, to `folder` after the last of them.
    """

    def __init__(self, num_steps: int, folder: Path, runtime: Runtime) -> None:
        self.num_steps = num_steps
        self.path = folder / trace_of(runtime.rank)
        self._num_finished = 0
        activities = [ProfilerActivity.CPU]
        if runtime.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(
            activities=activities,
            schedule=schedule(skip_first=PROFILE_WARM_UP_STEPS - 1, wait=0, warmup=1, active=num_steps, repeat=1),
            on_trace_ready=self._write,
            # Without it only the calling thread is traced, and batches are built on another one.
            experimental_config=_ExperimentalConfig(profile_all_threads=True),
        )
        self._profile.start()

    def advance(self) -> None:
        """Call after each training step.

        Raises:
            RunDirectoryError: if the trace is due and can't be written.
        """
        self._num_finished += 1
        self._profile.step()

    def close(self) -> str:
        """Writes what there is if the run has ended early; says where the trace is.

        Raises:
            RunDirectoryError: if it can't be written.
        """
        self._profile.stop()
        traced = self._num_traced
        if not traced:
            return f"No trace: the run ended after {plural(self._num_finished, 'step')}, while warming up."
        wanted = "" if traced == self.num_steps else f" (not {self.num_steps}: the run ended before)"
        return (
            f"Trace of {plural(traced, 'training step')}{wanted}: {self.path}, one a rank. "
            "Open it in https://ui.perfetto.dev or chrome://tracing."
        )

    @property
    def _num_traced(self) -> int:
        return max(0, min(self.num_steps, self._num_finished - PROFILE_WARM_UP_STEPS))

    def _write(self, finished: profile) -> None:
        if not self._num_traced:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)  # on another host than rank 0's
            with tempfile.TemporaryDirectory() as scratch:
                plain = Path(scratch, "trace.json")
                finished.export_chrome_trace(str(plain))
                packed = gzip.compress(plain.read_bytes(), compresslevel=6)
            write_atomically(self.path, lambda file: file.write(packed))
        except OSError as error:
            raise RunDirectoryError(
                f"{self.path}: can't be written ({reason_of(error)}). Choose another --run_dir, or leave out --profile."
            ) from None
