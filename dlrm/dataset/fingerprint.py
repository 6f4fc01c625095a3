"""A digest of a run's data that is cheap, however large the data is."""

import hashlib
from pathlib import Path

from dlrm.config.config import DataConfig
from dlrm.dataset.manifest import MANIFEST_NAME
from dlrm.errors import DatasetError

_BLOCK = 1 << 16
_BLOCKS_OF_FILE = 16


def fingerprint(data: DataConfig) -> str | None:
    """Digest of names, sizes, manifests, and of 16 blocks of 64 KiB spread over each file; None for random data.

    Other days, other rows and another preprocessing have other digests. A change inside a file between those blocks
    stays unnoticed: only `dlrm verify` reads whole files. The digest does not depend on where the folder lies.

    Raises:
        DatasetError: if a file can't be read.
    """
    folders = [path for path in (data.in_memory_binary_criteo_path, data.synthetic_multi_hot_criteo_path) if path]
    if not folders:
        return None
    digest = hashlib.sha256()
    for folder in map(Path, folders):
        if not folder.is_dir():
            continue  # opening the data reports it
        try:
            for path in sorted(path for path in folder.iterdir() if path.suffix in (".npy", ".npz")):
                size = path.stat().st_size
                digest.update(f"{path.name} {size}\n".encode())
                with path.open("rb") as file:
                    for number in range(_BLOCKS_OF_FILE):
                        file.seek(max(0, size - _BLOCK) * number // (_BLOCKS_OF_FILE - 1))
                        digest.update(file.read(_BLOCK))
            manifest = folder / MANIFEST_NAME
            digest.update(manifest.read_bytes() if manifest.exists() else b"")
        except OSError as error:
            raise DatasetError(f"{error.filename}: {error.strerror}") from None
    return digest.hexdigest()
