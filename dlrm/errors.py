"""Errors that a user can cause and fix. They are shown as one line, without a traceback, with exit code 2."""

import errno
import os
import re
import resource

from typing_extensions import Self

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_HANGS = 3


class DlrmError(Exception):
    """A mistake or a condition that the user can fix: what, got, expected, remedy, on one line.

    Attributes:
        everywhere: every rank raises this same error, so that one of them is enough to show it.
    """

    everywhere: bool = False

    def raised_everywhere(self) -> Self:
        """This error, which every rank raises."""
        self.everywhere = True
        return self

    def __str__(self) -> str:
        """The message, newlines as spaces. All else stays, so that a path can be copied from it."""
        return " ".join(super().__str__().splitlines())


class ConfigError(DlrmError):
    """A flag, or a combination of flags, that makes no sense."""


class DatasetError(DlrmError):
    """Input data that is missing, damaged, or not what its name promises."""


class PlanError(DlrmError):
    """Embedding tables that can't be placed on the available devices."""


class DoesNotFitError(PlanError):
    """Embedding tables that need more memory than there is.

    Attributes:
        missing_gib_per_rank: how much more would do.
    """

    def __init__(self, message: str, missing_gib_per_rank: float) -> None:
        super().__init__(message)
        self.missing_gib_per_rank = missing_gib_per_rank


class RunDirectoryError(DlrmError):
    """A run directory that can't be written, or already holds a run."""


class CheckpointError(DlrmError):
    """A checkpoint that can't be written or read, or does not fit."""


class MisfitError(CheckpointError):
    """A sound checkpoint of another training, or whose weights are not this model's."""


class LaunchError(DlrmError):
    """A process group that can't be formed."""


class DivergedError(DlrmError):
    """A loss or a score that is not a finite number."""


class ShortageError(DlrmError):
    """Memory, threads or open files that have run out."""


def reason_of(error: OSError) -> str:
    """A system's error in words that a user understands: the disk is full, rather than `No space left on device`."""
    if error.errno == errno.ENOSPC:
        return "the disk is full"
    if error.errno == errno.EDQUOT:
        return "the disk quota is used up"
    if error.errno == errno.EFBIG:
        limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
        return (
            "its file system has no files of that size"
            if limit == resource.RLIM_INFINITY
            else (f"the file-size limit of {limit:,} bytes, `ulimit -f`, is reached")
        )
    return error.strerror or str(error) or type(error).__name__


def explain(error: OSError | UnicodeEncodeError) -> str:
    """A system's error with the file that it is about, on one line."""
    if isinstance(error, UnicodeEncodeError):
        return (
            f"{error.object[:200]!a}: this locale's encoding, {error.encoding}, has no such name. "
            "Set LC_ALL=C.UTF-8, or PYTHONUTF8=1."
        )
    if (error.strerror or "").startswith("No usable temporary directory"):
        return "TMPDIR: no folder for temporary files can be written. Set it to one that can."
    return f"{error.filename}: {reason_of(error)}" if error.filename else reason_of(error)


def system_error_in(error: Exception) -> OSError | None:
    """The system's error that a library written in Rust, as polars is, tells of as text; None if there is none."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    found = re.search(r"\(os error (\d+)\)", str(error))
    return None if found is None else OSError(int(found[1]), os.strerror(int(found[1])))
