"""Three small days of raw text, and what `dlrm preprocess` makes of them."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from dlrm.errors import DatasetError
from dlrm.preprocess.command import preprocess
from dlrm.preprocess.config import PreprocessConfig
from dlrm.preprocess.ranks import Ranks
from tests.launching import BIN

PARTS = ("dense", "sparse", "labels")
ROWS = (700, 500, 300)


def config_of(raw: Path, *names: str, output: str = "days", **fields) -> PreprocessConfig:
    names = names or ("day_0.tsv", "day_1.tsv", "day_2.tsv")
    return PreprocessConfig(tuple(str(raw / name) for name in names), str(raw.parent / output), **fields)


def write(raw: Path, *names: str, **fields) -> Path:
    config = config_of(raw, *names, **fields)
    config.validate()
    preprocess(config, Ranks())
    return Path(config.output)


def load(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return tuple(np.load(folder / f"{name}_{part}.npy") for part in PARTS)


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def arrays_of(digests_of_files: dict[str, str]) -> dict[str, str]:
    """All but the manifest, which has the raw files' names."""
    return {name: digest for name, digest in digests_of_files.items() if name != "manifest.json"}


def fields_of(lines: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Integers, ids and labels; 0 where missing."""
    fields = [line.rstrip("\r\n").split("\t") for line in lines]
    integers = np.array([[int(value or 0) for value in line[1:14]] for line in fields])
    ids = np.array([[int(value or "0", 16) for value in line[14:]] for line in fields])
    return integers, ids, np.array([int(line[0]) for line in fields])


def command(raw: Path, output: str, *flags: str) -> list[str]:
    files = [str(raw / f"day_{day}.tsv") for day in range(3)]
    return [str(BIN / "dlrm"), "preprocess", *files, "--output", str(raw.parent / output), *flags]


def assert_refused(raw: Path, words: str, *names: str, error: type[Exception] = DatasetError, **fields) -> None:
    """One line that names what is wrong, and no output."""
    with pytest.raises(error, match=words) as caught:
        write(raw, *names, **fields)
    assert "\n" not in str(caught.value)
    assert not (raw.parent / "days").exists()
