"""`dlrm train` and `dlrm_main.py`: a run from its command line to its summary."""

import signal
import time
import traceback
from collections.abc import Sequence
from typing import NoReturn

from dlrm.config.flags import parse_args
from dlrm.ranks.launcher import adopt_launcher
from dlrm.system.allocator import tune_process
from dlrm.system.ending import (
    end_with_launcher,
    errors_as_one_line,
    exit_at_once,
    has_peers,
    is_lost_peer,
    on_each_rank,
)
from dlrm.system.quiet import quieten_libraries
from dlrm.system.shortage import check_room_for_libraries
from dlrm.system.signals import Ended, InterruptedRun, StopSignals, exit_code, say
from dlrm.system.streams import make_stdout_optional, safe_streams


def main(argv: Sequence[str]) -> None:
    """The command line. As `train`, in a process that has nothing else to do: a second signal may end it."""
    _train(argv, StopSignals())


def train(argv: Sequence[str]) -> None:
    """Trains, validates and tests a DLRM as the flags say. Call it on every rank that the launcher started.

    In a process of its own, as a notebook is, it leaves nothing behind, however it ends, and can be called again.

    Args:
        argv: flags, without the program's name.

    Raises:
        SystemExit: with code 2 and one line on stderr for what the user can fix; with code 0 after --help; with 128
            and a signal's number if that has ended the run.
        KeyboardInterrupt: if SIGINT has, and there is no other rank.
    """
    with safe_streams():
        with errors_as_one_line():
            on_each_rank(adopt_launcher)  # which says whether there are other ranks
        _train(argv, StopSignals(ends_process=has_peers()))


def _train(argv: Sequence[str], listener: StopSignals) -> None:
    started = time.time()
    tune_process()
    end_with_launcher()
    with errors_as_one_line():
        on_each_rank(adopt_launcher)
        config = on_each_rank(lambda: parse_args(argv))
        check_room_for_libraries()
        quieten_libraries()
        # Here and not above, so that --help and a mistyped flag answer without loading torch.
        from dlrm.fault_tolerance.hooks import Stopped
        from dlrm.ranks.runtime import start_runtime
        from dlrm.train.run import run

        make_stdout_optional()
        with listener.installed():
            try:
                with start_runtime() as runtime:
                    run(config, runtime, started, listener)
            except Stopped as stopped:
                say(
                    f"{stopped.number.name}: stopped after step {stopped.step:,}, which is saved. The same command "
                    "with the same --run_dir goes on from there."
                )
                _end_by(stopped.number, stopped)
            except Ended as ended:
                if has_peers():
                    exit_at_once(exit_code(ended.number))  # other ranks may be gone: no teardown
                _end_by(ended.number, ended)
            except RuntimeError as error:
                if listener.received is None or not has_peers() or not is_lost_peer(error):
                    raise
                exit_at_once(exit_code(listener.received))  # the launcher ends this process for the rank that is lost


def _end_by(number: signal.Signals, error: BaseException) -> NoReturn:
    """Ends a run that a signal has ended, as its caller expects it."""
    traceback.clear_frames(error.__traceback__)  # in a notebook they would keep the model until the next error
    if number is signal.SIGINT and not has_peers():
        raise InterruptedRun(str(error)) from None
    raise SystemExit(exit_code(number)) from None
