"""Multi-hot days: files of several ids for each feature, as `dlrm materialize` and MLPerf's script write them."""

import struct
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dlrm.dataset.manifest import MANIFEST_NAME, check_manifest, load_manifest
from dlrm.errors import DatasetError
from dlrm.schema.criteo import NUM_CATEGORICAL_FEATURES
from dlrm.system.files import read_npy_header, sha256_of

_LOCAL_HEADER_BYTES, _LOCAL_NAME_SIZE = 30, 26


def map_multi_hot(path: Path) -> Iterator[npt.NDArray[np.int32]]:
    """Maps the members "0", "1", ... of a multi-hot day into memory: int32 [rows, hotness] for each feature.

    Raises:
        DatasetError: if the file is not a multi-hot day.
    """
    written = "Write it with `dlrm materialize`, or np.savez."
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            members = {f"{feature}.npy" for feature in range(NUM_CATEGORICAL_FEATURES)}
            if more := sorted(set(archive.namelist()) - members):
                raise DatasetError(
                    f"{path}: has a member {more[0].removesuffix('.npy')!r}, expected 0 to "
                    f"{NUM_CATEGORICAL_FEATURES - 1} and no other. {written}"
                )
            # One mapping for all members, since each mapping holds a file open.
            mapped = np.memmap(path, np.uint8, "r")
            for feature in range(NUM_CATEGORICAL_FEATURES):
                info = archive.getinfo(f"{feature}.npy")
                if info.compress_type != zipfile.ZIP_STORED:
                    raise DatasetError(f"{path}: member {feature} is compressed, so it can't be mapped. {written}")
                # The array begins behind the member's own header, whose length is not in the archive's directory.
                file.seek(info.header_offset + _LOCAL_NAME_SIZE)
                name_size, extra_size = struct.unpack("<HH", file.read(4))
                start = info.header_offset + _LOCAL_HEADER_BYTES + name_size + extra_size
                file.seek(start)
                shape, fortran_order, dtype = read_npy_header(file)
                if dtype != np.int32 or len(shape) != 2 or min(shape[1:]) < 1 or fortran_order:
                    raise DatasetError(
                        f"{path}: member {feature} is {dtype!s:.40} {list(shape)}, expected int32 [rows, hotness] in "
                        f"row order. {written}"
                    )
                if start + info.file_size != file.tell() + 4 * shape[0] * shape[1]:
                    raise DatasetError(f"{path}: member {feature} has another size than its header states. {written}")
                if shape[0] == 0:
                    yield np.empty(shape, np.int32)
                else:
                    yield mapped[file.tell() : start + info.file_size].view(np.int32).reshape(shape)
    except FileNotFoundError:
        raise DatasetError(f"{path}: missing. {written}") from None
    except (OSError, ValueError, KeyError, struct.error, zipfile.BadZipFile, NotImplementedError) as error:
        raise DatasetError(f"{path}: not a multi-hot day ({error}). {written}") from None


def check_multi_hot_folder(folder: Path, table_rows: Sequence[int], days: Path, needs_training: bool = True) -> None:
    """Refuses a folder that does not exist, or whose ids were made from other days or for tables of other sizes.

    Args:
        days: folder of the dense values and labels.
        needs_training: whether all days must be there, and not only the held-out one.

    Raises:
        DatasetError: naming the folder or its manifest.
    """
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such folder. Expected one that `dlrm materialize` wrote.")
    if needs_training:
        check_manifest(folder)
    path = folder / MANIFEST_NAME
    if not path.exists():
        return
    manifest = load_manifest(path)
    source, of_days = manifest.get("source_manifest_sha256"), days / MANIFEST_NAME
    if source is not None and days != folder and of_days.exists() and sha256_of(of_days) != source:
        raise DatasetError(
            f"{path}: ids were made from other days than those in {days}. Give the folder that they were made from, or "
            "`dlrm materialize` these days."
        )
    stated = manifest.get("num_embeddings_per_feature")
    if stated is not None and stated != list(table_rows):
        raise DatasetError(
            f"{path}: ids were drawn for tables of {_show(stated)} rows, expected {_show(table_rows)}. Give "
            "--num_embeddings_per_feature as the manifest has it, or `dlrm materialize` the days again."
        )


def check_hotness(path: Path, found: Sequence[int], expected: Sequence[int], recipe: str | None) -> None:
    """Refuses a day whose numbers of ids per feature differ from those that the run asks for.

    Raises:
        DatasetError: naming both.
    """
    if tuple(found) != tuple(expected):
        asked = f"--multi_hot_sizes (or the recipe {recipe})" if recipe else "--multi_hot_sizes"
        raise DatasetError(
            f"{path}: {_show(found)} ids per feature, expected {_show(expected)} as {asked} says. Give the sizes that "
            "the files have, or `dlrm materialize` the days again."
        )


def _show(sizes: object) -> str:
    return ",".join(map(str, sizes)) if isinstance(sizes, list | tuple) else repr(sizes)
