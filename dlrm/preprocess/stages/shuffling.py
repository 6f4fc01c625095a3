"""The shuffle stage: columns become rows. Held-out rows keep their order, and training rows get random places.

Shapes: R rows of a block, I integer features, F categorical features.
"""

from collections.abc import Iterator
from functools import partial

import numpy as np
import numpy.typing as npt

from dlrm.preprocess.buckets import (
    GATHER_BYTES_PER_ROW,
    ArrayFiles,
    Buckets,
    GivenKeys,
    KeysInOrder,
    KeySource,
    RandomKeys,
    count_buckets,
    write_rows,
)
from dlrm.preprocess.columns import read_integers, read_labels, read_missing
from dlrm.preprocess.kernels import bucket_sizes
from dlrm.preprocess.layout import Block, Layout
from dlrm.preprocess.logarithm import transform_integers
from dlrm.preprocess.run import Run
from dlrm.preprocess.torchrec_compat import numpy_shuffle_positions, round_to_float32
from dlrm.schema.criteo import CATEGORICAL_NAMES, NUM_CATEGORICAL_FEATURES

_BUCKET_ROWS, _MAX_BUCKETS = 1 << 17, 1 << 10
_SHUFFLE_PURPOSE = 0x53485546464C45  # "SHUFFLE"

Work = tuple[Block, npt.NDArray[np.uint64], npt.NDArray[np.int64]]
"""A block, the keys of its training rows, and the number of rows in each bucket before them."""


def shuffle(run: Run, layout: Layout) -> list[ArrayFiles]:
    """Writes the arrays of the days, by way of buckets. Collective."""
    days = _create_days(run, layout)
    buckets = _scatter(run, layout, days)
    _gather(run, layout, days, buckets)
    return days


def _create_days(run: Run, layout: Layout) -> list[ArrayFiles]:
    # torchrec.shuffle copies the last day as sparse_to_contiguous left it, in 64 bits.
    wide = len(run.names) - 1 if run.config.is_compat else None
    days = [
        ArrayFiles(run.workspace.days, name, rows, np.dtype("<i8" if day == wide else "<i4"))
        for day, (name, rows) in enumerate(zip(run.names, layout.day_rows, strict=True))
    ]
    if run.ranks.is_main and run.workspace.facts("create", "days") is None:
        for day in days:
            day.create()
        run.workspace.finish("create", "days", {}, [path for day in days for path in day.paths])
    run.meet()
    return days


def _keys(run: Run, layout: Layout) -> KeySource:
    if run.mimics_shuffle:
        folder = run.workspace.folder("positions", str(run.ranks.rank))
        memory = run.resources.bytes_per_worker * run.resources.workers
        return GivenKeys(numpy_shuffle_positions(layout.num_train_rows, run.config.seed, folder, memory))
    if run.config.is_compat:
        return KeysInOrder(layout.num_train_rows)
    seed = np.random.SeedSequence([run.config.seed, _SHUFFLE_PURPOSE]).generate_state(1, np.uint64)[0]
    return RandomKeys(int(seed))


def _scatter(run: Run, layout: Layout, days: list[ArrayFiles]) -> Buckets:
    """Writes held-out rows to their places in the days, and training rows to buckets."""
    with run.stage("Scattering", "rows", layout.num_rows) as progress:
        keys = _keys(run, layout)
        buckets = _plan_buckets(run, layout, keys)
        minima = _find_minima(run, layout)
        own = set(run.ranks.share(run.names))
        places = np.zeros(len(buckets.sizes), np.int64)
        for day, name in enumerate(run.names):
            work = _work(layout, day, keys, places)
            if name not in own or run.workspace.facts("scatter", name) is not None:
                for _ in work:  # only to count the day's rows into `places`
                    pass
                continue
            clamped = 0
            scatter = partial(_scatter_block, run, days, buckets, minima)
            for (block, _, _), clamped_in_block in run.in_order(work, scatter):
                clamped += clamped_in_block
                progress.advance(block.rows)
            files = [*buckets.folder.iterdir(), *days[day].paths]
            run.workspace.finish("scatter", name, {"clamped": clamped}, files)
            run.workspace.drop("parsed", name)
            run.workspace.drop("encoded", name)
    run.workspace.drop("positions", str(run.ranks.rank))
    return buckets


def _work(layout: Layout, day: int, keys: KeySource, places: npt.NDArray[np.int64]) -> Iterator[Work]:
    """Yields the work of a day, block by block, and counts the rows of each bucket into `places`."""
    for block in layout.days[day]:
        keys_R = keys.keys(block.first_row, layout.train_rows_of(block))
        before = places.copy()
        bucket_sizes(keys_R, places)
        yield block, keys_R, before


def _plan_buckets(run: Run, layout: Layout, keys: KeySource) -> Buckets:
    """Buckets as large as `Resources` allows. Their sizes are recorded: a resumed run may have other resources."""
    if run.ranks.is_main and run.workspace.facts("plan", "buckets") is None:
        rows = max(_BUCKET_ROWS, layout.num_train_rows // _MAX_BUCKETS)
        rows = min(rows, run.resources.bytes_per_worker // GATHER_BYTES_PER_ROW)
        sizes = count_buckets(keys, layout.num_train_rows, max(1, -(-layout.num_train_rows // rows)))
        run.workspace.finish("plan", "buckets", {"sizes": sizes})
    run.meet()
    return Buckets(run.workspace.folder("buckets"), tuple(run.recorded("plan", "buckets")["sizes"]))


def _find_minima(run: Run, layout: Layout) -> list[int]:
    """The minimum that each day's integers are measured from.

    The minima are recorded, since the columns of a day are removed once they are scattered.
    """
    if run.ranks.is_main and run.workspace.facts("plan", "minima") is None:
        if run.config.is_compat:
            minima = [min(block.minimum for block in day) for day in layout.days]
        elif run.config.applied is not None:
            minima = [run.config.applied["integers"]["minimum"]] * len(run.names)
        else:
            minima = [_train_minimum(run, layout)] * len(run.names)
        run.workspace.finish("plan", "minima", {"minima": minima})
    run.meet()
    return run.recorded("plan", "minima")["minima"]


def _train_minimum(run: Run, layout: Layout) -> int:
    minimum = 2**31 - 1
    for block in layout.blocks:
        rows = layout.train_rows_of(block)
        if 0 < rows < block.rows:
            integers_IR = read_integers(run.parsed_path(block), block.rows)
            minimum = min(minimum, int(integers_IR[:, :rows].min()))
        elif rows:
            minimum = min(minimum, block.minimum)
    return minimum


def _scatter_block(run: Run, days: list[ArrayFiles], buckets: Buckets, minima: list[int], work: Work) -> int:
    """Scatters a block; returns how many integers were below the minimum."""
    block, keys_R, places = work
    path, rows, train = run.parsed_path(block), block.rows, len(keys_R)
    integers_IR = read_integers(path, rows)
    missing_IR = read_missing(path, rows) if run.config.tells_missing_integers else None
    dense_IR = transform_integers(integers_IR, minima[block.day], missing_IR)
    indices_FR = np.empty((NUM_CATEGORICAL_FEATURES, rows), np.int32)
    for column, name in enumerate(CATEGORICAL_NAMES):
        encoded = run.encoded_path(block.day, name)
        indices_FR[column] = np.fromfile(encoded, np.int32, rows, offset=4 * block.day_row)
    labels_R = read_labels(path, rows)
    if train:
        indices = indices_FR[:, :train]
        if run.mimics_shuffle:
            indices = round_to_float32(indices)
        buckets.scatter(keys_R, places, dense_IR[:, :train], indices, labels_R[:train])
    if train < rows:
        held_out_labels = labels_R[train:].view(np.int8)  # NO_LABEL if rows have none
        write_rows(days, block.first_row + train, dense_IR[:, train:].T, indices_FR[:, train:].T, held_out_labels)
    return int((integers_IR < minima[block.day]).sum())


def _gather(run: Run, layout: Layout, days: list[ArrayFiles], buckets: Buckets) -> None:
    with run.stage("Shuffling", "rows", layout.num_train_rows) as progress:

        def one(bucket: int) -> None:
            if run.workspace.facts("gather", str(bucket)) is None:
                touched = buckets.gather(bucket, days)
                run.workspace.finish("gather", str(bucket), {}, [path for day in touched for path in day.paths])
            run.workspace.remove(buckets.path(bucket))

        for bucket, _ in run.in_order(run.ranks.share(range(len(buckets.sizes))), one):
            progress.advance(buckets.sizes[bucket])
