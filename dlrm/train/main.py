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
from typing import NoReturn, TypeVar

from dlrm.allocator import keep_freed_memory
from dlrm.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, DlrmError
from dlrm.flags import parse_args

T = TypeVar("T")

_SECONDS_FOR_LAUNCHER = 10


def main(argv: Sequence[str]) -> None:
    """Trains, validates and tests a DLRM as the flags say. Call it on every rank that the launcher started.

    Args:
        argv: flags, without the program's name.

    Raises:
        SystemExit: with code 2 and one line on stderr for what the user can mend; with code 0 after --help.
    """
    started = time.time()
    keep_freed_memory()
    end_with_launcher()
    with errors_as_one_line():
        config = on_each_rank(lambda: parse_args(argv))
        quieten_libraries()
        # Here and not above, so that --help and a mistyped flag answer without loading torch.
        from dlrm.runtime import start_runtime
        from dlrm.train.control import Ended, StopSignals, exit_code
        from dlrm.train.run import run
        from dlrm.train.safety import Stopped

        with StopSignals().installed() as signals:
            try:
                with start_runtime() as runtime:
                    run(config, runtime, started, signals)
            except Stopped as stopped:
                if os.environ.get("RANK", "0") == "0":
                    print(
                        f"dlrm: {stopped.number.name}: stopped after step {stopped.step:,}, which is saved. The same "
                        "command with the same --run_dir goes on from there.",
                        file=sys.stderr,
                        flush=True,
                    )
                raise SystemExit(exit_code(stopped.number)) from None
            except Ended as ended:
                sys.stdout.flush()
                os._exit(exit_code(ended.number))  # other ranks may be gone: no teardown
            except RuntimeError as error:
                if signals.received is None or not _has_peers() or not _is_lost_peer(error):
                    raise
                os._exit(exit_code(signals.received))  # the launcher ends this process for the rank that is lost


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
        yield
    except DlrmError as error:
        if error.everywhere or not _has_peers():
            if os.environ.get("RANK", "0") == "0" or not _has_peers():
                print(f"dlrm: error: {error}", file=sys.stderr, flush=True)
            else:
                # The launcher ends all ranks when the first one leaves: let that be rank 0, which says why.
                time.sleep(_SECONDS_FOR_LAUNCHER)
            raise SystemExit(EXIT_USER_ERROR) from None
        _leave_alone(str(error), EXIT_USER_ERROR)
    except KeyboardInterrupt:
        _leave_alone("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:  # the reader of our output has gone, as in `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _leave_alone(f"{where}{error.strerror or error}", EXIT_USER_ERROR)
    except RuntimeError as error:
        if not _has_peers() or not _is_lost_peer(error):
            raise
        # The launcher ends this process once it has seen the rank that failed; its error is the one to read.
        time.sleep(_SECONDS_FOR_LAUNCHER)
        last_line = traceback.format_exception_only(error)[-1].strip().splitlines()[0]
        _leave_alone(f"lost another rank or its host; its error, if there is one, says why ({last_line})", 1)


def _has_peers() -> bool:
    return os.environ.get("WORLD_SIZE", "1") != "1"


def _leave_alone(text: str, code: int) -> NoReturn:
    """Ends this process without a teardown in which other ranks would have to take part."""
    where = f" (rank {os.environ.get('RANK')})" if _has_peers() else ""
    print(f"dlrm: error{where}: {text}", file=sys.stderr, flush=True)
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
    # 2026-11-30: torchrec 1.6 on CPUs asks torch 2.11 for a group's device by a name that was about to go.
    warnings.filterwarnings("ignore", "`_get_pg_default_device` will be deprecated|Multiple backends are registered")
    for name in ("torchrec", "torch.fx._symbolic_trace"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger().addFilter(_knows_fbgemm)


def _knows_fbgemm(record: logging.LogRecord) -> bool:
    """False for what fbgemm-gpu 1.6 logs, once for each library that it loads: it does not know itself (2026-11-30)."""
    return "_fbgemm_torch_compat_table has no entry for" not in record.getMessage()
