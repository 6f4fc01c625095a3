"""Multi-hot days, as `dlrm materialize` and MLPerf's script write them."""

import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dlrm.errors import DatasetError
from dlrm.schema import NUM_CATEGORICAL_FEATURES

_LOCAL_HEADER_BYTES = 30


def map_multi_hot(path: Path) -> Iterator[npt.NDArray[np.int32]]:
    """The members "0", "1", ... of a multi-hot day, mapped: int32 [rows, hotness] of each feature.

    Raises:
        DatasetError: if it is not such a file.
    """
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            for feature in range(NUM_CATEGORICAL_FEATURES):
                info = archive.getinfo(f"{feature}.npy")
                if info.compress_type != zipfile.ZIP_STORED:
                    raise DatasetError(
                        f"{path}: member {feature} is compressed. Expected np.savez, or dlrm materialize."
                    )
                file.seek(info.header_offset + 26)
                name_size, extra_size = np.frombuffer(file.read(4), "<u2").tolist()
                start = info.header_offset + _LOCAL_HEADER_BYTES + name_size + extra_size
                file.seek(start)
                np.lib.format.read_magic(file)
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
                if dtype != np.int32 or len(shape) != 2:
                    raise DatasetError(
                        f"{path}: member {feature} is {dtype} {list(shape)}, expected int32 [rows, hotness]."
                    )
                yield np.memmap(path, np.int32, "r", offset=file.tell(), shape=shape)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DatasetError(f"{path}: not a multi-hot day ({error}). Write it with dlrm materialize.") from None
