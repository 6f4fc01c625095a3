"""What a user sees of a mistake."""

import errno
import pickle

import pytest

from dlrm.errors import DatasetError, explain, reason_of, system_error_in


def test_an_error_is_one_line_in_which_paths_are_as_they_were():
    error = DatasetError("/data/two  spaces/day_0.npy: bad header\n  of its own.\r\nWrite it anew.")
    assert str(error) == "/data/two  spaces/day_0.npy: bad header   of its own. Write it anew."
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_reasons_that_a_user_understands():
    assert reason_of(OSError(errno.ENOSPC, "No space left on device")) == "the disk is full"
    assert reason_of(OSError(errno.EDQUOT, "Disk quota exceeded")) == "the disk quota is used up"
    assert reason_of(OSError(errno.EFBIG, "File too large")) == "its file system has no files of that size"
    assert reason_of(OSError(errno.EIO, "Input/output error")) == "Input/output error"
    assert reason_of(OSError("72 requested and 0 written")) == "72 requested and 0 written"


def test_errors_that_libraries_tell_as_text():
    found = system_error_in(RuntimeError("Io error: No space left on device (os error 28)"))
    assert found is not None
    assert found.errno == errno.ENOSPC
    assert system_error_in(RuntimeError("another")) is None


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(28, "No space left on device", "out"), "out: the disk is full"),
        (OSError(28, "No space left on device"), "the disk is full"),
        (OSError("a library's own"), "a library's own"),
        (
            FileNotFoundError(2, "No usable temporary directory found in ['/tmp']"),
            "TMPDIR: no folder for temporary files can be written. Set it to one that can.",
        ),
        (
            UnicodeEncodeError("ascii", "l\xe4ufe", 1, 2, "ordinal not in range(128)"),
            "'l\\xe4ufe': this locale's encoding, ascii, has no such name. Set LC_ALL=C.UTF-8, or PYTHONUTF8=1.",
        ),
    ],
)
def test_what_the_system_says_is_one_line(error, text):
    assert explain(error) == text
