"""torchrec's preprocessing, as its scripts call it: python -m dlrm.bench.cases.torchrec_preprocess FOLDER RAW..."""

import contextlib
import io
import json
import sys
import time
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from torchrec.datasets.criteo import BinaryCriteoUtils

_PARTS = ("dense", "sparse", "labels")


def preprocess(raw: Sequence[Path], folder: Path) -> dict[str, float]:
    """Seconds of each of its functions."""
    npy, contiguous, shuffled = folders = [folder / name for name in ("npy", "contiguous", "shuffled")]
    for made in folders:
        made.mkdir(parents=True)
    ends = [time.perf_counter()]
    for day, path in enumerate(raw):
        BinaryCriteoUtils.tsv_to_npys(str(path), *(str(npy / f"day_{day}_{part}.npy") for part in _PARTS))
    ends.append(time.perf_counter())
    sparse = [str(npy / f"day_{day}_sparse.npy") for day in range(len(raw))]
    BinaryCriteoUtils.sparse_to_contiguous(sparse, str(contiguous), output_file_suffix=".npy")
    ends.append(time.perf_counter())
    rows = {day: len(np.load(npy / f"day_{day}_labels.npy")) for day in range(len(raw) - 1)}
    BinaryCriteoUtils.shuffle(str(npy), str(contiguous), str(shuffled), rows, days=len(raw))
    ends.append(time.perf_counter())
    names = ("tsv_to_npys", "sparse_to_contiguous", "shuffle")
    return {name: stop - start for name, (start, stop) in zip(names, pairwise(ends), strict=True)}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(io.StringIO()):
        stages = preprocess([Path(path) for path in sys.argv[2:]], Path(sys.argv[1]))
    print(json.dumps(stages))
