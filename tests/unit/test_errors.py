"""What a user sees of a mistake."""

import pickle

import pytest

from dlrm.errors import DatasetError, explain


def test_an_error_is_one_line_in_which_paths_are_as_they_were():
    error = DatasetError("/data/two  spaces/day_0.npy: bad header\n  of its own.\r\nWrite it anew.")
    assert str(error) == "/data/two  spaces/day_0.npy: bad header   of its own. Write it anew."
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(28, "No space left on device", "out"), "out: No space left on device"),
        (OSError(28, "No space left on device"), "No space left on device"),
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
