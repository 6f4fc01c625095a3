"""What a user sees of a mistake."""

import pickle

from dlrm.errors import DatasetError


def test_an_error_is_one_line_in_which_paths_are_as_they_were():
    error = DatasetError("/data/two  spaces/day_0.npy: bad header\n  of its own.\r\nWrite it anew.")
    assert str(error) == "/data/two  spaces/day_0.npy: bad header   of its own. Write it anew."
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
