"""How a process ends: what a user can fix is one line on stderr and exit code 2, on one process and on each of many.

No torch here: torch.distributed is asked only if somebody else has loaded it.
"""

import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

from dlrm.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, DlrmError, explain
from dlrm.system.host import end_with_parent
from dlrm.system.shortage import shortage_as_error
from dlrm.system.signals import Ended, InterruptedRun, ended_by_signals, exit_code

T = TypeVar("T")

_SECONDS_FOR_LAUNCHER = 10
_LOST_PEER = re.compile(
    "Connection closed by peer|Connection reset by peer|remote process exited|"  # gloo
    r"rank \d+ has (ended|left the group)"  # shared memory
)


def exit_code_of(program: str, run: Callable[[], int | None], module: str = "") -> int:
    """Runs a command of one process; gives its exit code.

    Args:
        program: its name, before the line.
        module: whose IF_INTERRUPTED is printed after an interruption.
    """

    def consequence() -> str:
        return getattr(sys.modules.get(module), "IF_INTERRUPTED", "")

    try:
        with ended_by_signals(), shortage_as_error():
            code = run() or 0
        sys.stdout.flush()
        return code
    except InterruptedRun:
        return EXIT_INTERRUPTED
    except KeyboardInterrupt:
        print(f"{program}: interrupted. {consequence()}".rstrip(), file=sys.stderr)
        return EXIT_INTERRUPTED
    except Ended as ended:
        print(f"{program}: {ended.number.name}: ended. {consequence()}".rstrip(), file=sys.stderr)
        return exit_code(ended.number)
    except BrokenPipeError:
        return _leave_lost_reader()
    except (DlrmError, OSError, UnicodeEncodeError) as error:
        print(f"{program}: error: {_line_of(error)}", file=sys.stderr)
        return EXIT_USER_ERROR


@contextmanager
def errors_as_one_line() -> Iterator[None]:
    """Ends a rank. One that only lost its peers stays quiet, so that the failed rank's message is the one shown.

    Raises:
        SystemExit: with the exit code, if no other rank waits for this one. Otherwise the process ends at once.
    """
    try:
        with shortage_as_error():
            yield
    except (KeyboardInterrupt, Ended) as error:
        if not has_peers():
            raise
        number = error.number if isinstance(error, Ended) else signal.SIGINT
        _end(f"{number.name}: ended", exit_code(number))
    except BrokenPipeError:
        raise SystemExit(_leave_lost_reader()) from None
    except (DlrmError, OSError, UnicodeEncodeError) as error:
        traceback.clear_frames(error.__traceback__)
        is_joint = isinstance(error, DlrmError) and error.everywhere
        if is_joint and os.environ.get("RANK", "0") != "0":
            # The launcher ends all ranks when the first one leaves: let that be rank 0, which says why.
            time.sleep(_SECONDS_FOR_LAUNCHER)
            raise SystemExit(EXIT_USER_ERROR) from None
        _end(_line_of(error), EXIT_USER_ERROR, is_joint=is_joint)
    except RuntimeError as error:
        if not has_peers() or not is_lost_peer(error):
            raise
        # The launcher ends this process once it has seen the rank that failed; its error is the one to read.
        time.sleep(_SECONDS_FOR_LAUNCHER)
        last_line = traceback.format_exception_only(error)[-1].strip().splitlines()[0]
        _end(f"lost another rank or its host; its error, if there is one, says why ({last_line})", 1)


def on_each_rank(parse: Callable[[], T]) -> T:
    """Runs `parse`, which gives the same result, or the same error, on every rank."""
    try:
        return parse()
    except DlrmError as error:
        raise error.raised_everywhere() from None


def end_with_launcher() -> None:
    """Has this rank save and end if torchrun dies, rather than continue alone."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(signal.SIGTERM)


def has_peers() -> bool:
    """Whether there are other ranks."""
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        return distributed.get_world_size() > 1
    return os.environ.get("WORLD_SIZE", "1") != "1"


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another process is gone."""
    return _LOST_PEER.search(str(error)) is not None


def exit_at_once(code: int) -> NoReturn:
    """Ends the process without teardown, in which other ranks would have to take part."""
    sys.stdout.flush()
    os._exit(code)


def _line_of(error: DlrmError | OSError | UnicodeEncodeError) -> str:
    return str(error) if isinstance(error, DlrmError) else f"{explain(error).rstrip('.')}."


def _leave_lost_reader() -> int:
    """The reader of our output has gone, as in `dlrm ... | head`: nothing more is written. Gives the exit code."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def _end(text: str, code: int, *, is_joint: bool = False) -> NoReturn:
    """Prints why the rank ends, and ends it. If all ranks end alike (`is_joint`), they tear down together."""
    is_alone = is_joint or not has_peers()
    where = "" if is_alone else f" (rank {os.environ.get('RANK')})"
    print(f"dlrm: error{where}: {text}", file=sys.stderr, flush=True)
    if is_alone:
        raise SystemExit(code) from None
    exit_at_once(code)
