"""Memory, threads or open files that ran out, as one line."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from dlrm.errors import ShortageError
from dlrm.system.console import show_bytes
from dlrm.system.host import available_memory_bytes
from dlrm.system.limits import free_memory_of_process, is_address_space_limited, open_files_limit

_ASKED = re.compile(r"you tried to allocate (\d+) bytes|unable to mmap (\d+) bytes")
_ASKED_WITH_UNIT = re.compile(r"(?:Unable to allocate|Tried to allocate) ([\d.]+ [KMGTPE]?i?B|[\d.]+ bytes)")
_MEMORY = re.compile(
    r"can't allocate memory|Cannot allocate memory|std::bad_alloc|CUDA out of memory|failed to map segment|"
    r"Unable to allocate"
)
_THREADS = re.compile(r"can't start new thread|thread constructor failed|[Tt]hread creation failed|pthread_create")
_LIBRARIES_BYTES = 1 << 30
"""Address space that PyTorch, numba and what they bring take. With less, OpenBLAS 0.3 tries for ever while it loads."""
_FILES = (errno.EMFILE, errno.ENFILE)


@contextmanager
def shortage_as_error() -> Iterator[None]:
    """Has an error of an allocator, of the thread library or of the kernel's limits be one that is told in one line.

    Raises:
        ShortageError: in its place.
    """
    try:
        yield
    except (MemoryError, OSError, RuntimeError, ImportError, SystemError) as error:
        if (explained := explain_shortage(error)) is None:
            raise
        raise ShortageError(explained) from None


def check_room_for_libraries() -> None:
    """Refuses to load libraries into less memory than they take.

    Raises:
        ShortageError: if a ulimit leaves less.
    """
    free = free_memory_of_process()
    if free is not None and free < _LIBRARIES_BYTES:
        raise ShortageError(
            f"{show_bytes(free)} of address space free (ulimit -v, ulimit -d), and the libraries alone take up to "
            f"{show_bytes(_LIBRARIES_BYTES)}. Raise that limit."
        )


def explain_shortage(error: BaseException) -> str | None:
    """What ran out, how much was asked for, and what helps; None for an error of another kind."""
    text = str(error)
    number = error.errno if isinstance(error, OSError) else None
    if number in _FILES:
        what = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        return f"{what}too many open files: this process may open {open_files_limit():,} (ulimit -n). Raise that limit."
    if number == errno.EAGAIN or (isinstance(error, RuntimeError) and _THREADS.search(text)):
        return (
            "no more threads or processes can be started: the limit of processes (ulimit -u, or pids.max of the "
            "container) or of address space (ulimit -v) is reached. Raise it, or use fewer ranks, --workers or "
            "OMP_NUM_THREADS."
        )
    # Some extension modules fail in an allocation, or while they are loaded, without saying why.
    is_silent = isinstance(error, SystemError) or "load shared object" in text
    is_memory = isinstance(error, MemoryError) or (is_silent and is_address_space_limited())
    if number != errno.ENOMEM and not is_memory and not _MEMORY.search(text):
        return None
    if "CUDA" in text:
        return (
            f"out of memory on the GPU{_asked(text)}. Use a smaller --batch_size, or a larger --reserved_memory_share."
        )
    return (
        f"out of memory{_asked(text)}, {show_bytes(_free_bytes())} free. Raise the limit (of the container, "
        "or ulimit -v), or take less: a smaller --batch_size, --memory_gib or model, fewer ranks or --workers, "
        "--mmap_mode."
    )


def _free_bytes() -> int:
    """Memory that is free; none if even looking for it fails."""
    with suppress(MemoryError):
        return available_memory_bytes()
    return 0


def _asked(text: str) -> str:
    """How much was asked for, as far as the error says."""
    if (found := _ASKED.search(text)) is not None:
        return f": {show_bytes(int(found[1] or found[2]))} asked for"
    if (found := _ASKED_WITH_UNIT.search(text)) is not None:
        return f": {found[1]} asked for"
    return ""
