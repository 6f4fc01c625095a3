"""A run from its command line to its summary."""

import logging
import os
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

from dlrm.allocator import tune_process
from dlrm.errors import EXIT_USER_ERROR, DlrmError, explain
from dlrm.flags import parse_args
from dlrm.launcher import adopt_launcher
from dlrm.shortage import check_room_for_libraries, shortage_as_error
from dlrm.signals import Ended, InterruptedRun, StopSignals, exit_code, say
from dlrm.streams import make_stdout_optional, safe_streams

T = TypeVar("T")

_SECONDS_FOR_LAUNCHER = 10


def main(argv: Sequence[str]) -> None:
    """Trains, validates and tests a DLRM as the flags say. Call it on every rank that the launcher started.

    In a process of its own, as a notebook is, it leaves nothing behind, however it ends, and can be called again.

    Args:
        argv: flags, without the program's name.

    Raises:
        SystemExit: with code 2 and one line on stderr for what the user can mend; with code 0 after --help; with 128
            and a signal's number if that has ended the run.
        KeyboardInterrupt: if SIGINT has, and there is no other rank.
    """
    with safe_streams():
        with errors_as_one_line():
            on_each_rank(adopt_launcher)  # which says whether there are other ranks
        train(argv, StopSignals(ends_process=_has_peers()))


def train(argv: Sequence[str], listener: StopSignals) -> None:
    """As `main`, with signals heard by `listener`."""
    started = time.time()
    tune_process()
    end_with_launcher()
    with errors_as_one_line():
        on_each_rank(adopt_launcher)
        config = on_each_rank(lambda: parse_args(argv))
        check_room_for_libraries()
        quieten_libraries()
        # Here and not above, so that --help and a mistyped flag answer without loading torch.
        from dlrm.runtime import start_runtime
        from dlrm.train.run import run
        from dlrm.train.safety import Stopped

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
                if _has_peers():
                    _exit_at_once(exit_code(ended.number))  # other ranks may be gone: no teardown
                _end_by(ended.number, ended)
            except RuntimeError as error:
                if listener.received is None or not _has_peers() or not _is_lost_peer(error):
                    raise
                _exit_at_once(exit_code(listener.received))  # the launcher ends this process for the rank that is lost


def _end_by(number: signal.Signals, error: BaseException) -> NoReturn:
    """Ends a run that a signal has ended, as its caller expects it."""
    traceback.clear_frames(error.__traceback__)  # in a notebook they would keep the model until the next error
    if number is signal.SIGINT and not _has_peers():
        raise InterruptedRun(str(error)) from None
    raise SystemExit(exit_code(number)) from None


def end_with_launcher() -> None:
    """Has ranks save and end when torchrun dies, rather than go on alone."""
    from dlrm.host import end_with_parent

    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(signal.SIGTERM)


def on_each_rank(parse: Callable[[], T]) -> T:
    """Calls what fails on every rank alike, if it does."""
    try:
        return parse()
    except DlrmError as error:
        raise error.raised_everywhere() from None


@contextmanager
def errors_as_one_line() -> Iterator[None]:
    """A user's mistake is one line and exit code 2. A rank that lost its peers leaves the word to the failed one."""
    try:
        with shortage_as_error():
            yield
    except DlrmError as error:
        traceback.clear_frames(error.__traceback__)
        if error.everywhere and os.environ.get("RANK", "0") != "0":
            # The launcher ends all ranks when the first one leaves: let that be rank 0, which says why.
            time.sleep(_SECONDS_FOR_LAUNCHER)
            raise SystemExit(EXIT_USER_ERROR) from None
        _end(str(error), EXIT_USER_ERROR, is_joint=error.everywhere)
    except (KeyboardInterrupt, Ended) as error:
        if not _has_peers():
            raise
        number = error.number if isinstance(error, Ended) else signal.SIGINT
        _end(f"{number.name}: ended", exit_code(number))
    except BrokenPipeError:  # the reader of our output has gone, as in `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:
        traceback.clear_frames(error.__traceback__)
        _end(explain(error), EXIT_USER_ERROR)
    except UnicodeEncodeError as error:
        _end(explain(error), EXIT_USER_ERROR)
    except RuntimeError as error:
        if not _has_peers() or not _is_lost_peer(error):
            raise
        # The launcher ends this process once it has seen the rank that failed; its error is the one to read.
        time.sleep(_SECONDS_FOR_LAUNCHER)
        last_line = traceback.format_exception_only(error)[-1].strip().splitlines()[0]
        _end(f"lost another rank or its host; its error, if there is one, says why ({last_line})", 1)


def _has_peers() -> bool:
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        return distributed.get_world_size() > 1
    return os.environ.get("WORLD_SIZE", "1") != "1"


def _end(text: str, code: int, *, is_joint: bool = False) -> NoReturn:
    """Says why it ends. With other ranks, unless all end alike, there is no teardown, in which they would take part."""
    is_alone = is_joint or not _has_peers()
    where = "" if is_alone else f" (rank {os.environ.get('RANK')})"
    print(f"dlrm: error{where}: {text}", file=sys.stderr, flush=True)
    if is_alone:
        raise SystemExit(code) from None
    _exit_at_once(code)


def _exit_at_once(code: int) -> NoReturn:
    sys.stdout.flush()
    os._exit(code)


def _is_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another process is gone."""
    gloo = "Connection closed by peer|Connection reset by peer|remote process exited"
    shared_memory = r"rank \d+ has (ended|left the group)"
    return re.search(f"{gloo}|{shared_memory}", str(error)) is not None


def quieten_libraries() -> None:
    """TorchRec and torch.fx log internals as warnings; errors still come through.

    FBGEMM registers its dense CPU lookup in a way that torch warns of; its gradients are right, as
    tests/distributed/test_parity.py holds (2026-11-23: fbgemm-gpu-cpu 1.8).
    """
    # 2026-11-23: torchrec 1.8 uses names that torch 2.13 is about to drop.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", "fbgemm::dense_embedding_codegen_lookup_function: an autograd kernel was not")
    for name in ("torchrec", "torch.fx._symbolic_trace"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger().addFilter(_knows_fbgemm)


def _knows_fbgemm(record: logging.LogRecord) -> bool:
    """False for what fbgemm-gpu 1.6 logs, once for each library that it loads: it does not know itself (2026-11-30)."""
    return "_fbgemm_torch_compat_table has no entry for" not in record.getMessage()
