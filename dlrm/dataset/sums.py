"""Lists of checksums as `md5sum` and `sha256sum` write them, and as data sets are published with."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dlrm.dataset.days import day_numbers
from dlrm.errors import DatasetError

_NAMES = re.compile(r".*(md5|sha1|sha256|sha512)sums?.*|.*\.(md5|sha1|sha256|sha512)|checksums?(\..*)?", re.IGNORECASE)
_ALGORITHMS = {32: "md5", 40: "sha1", 64: "sha256", 128: "sha512"}
_COREUTILS = re.compile(r"\\?(?P<digest>[0-9a-fA-F]{32,128}) [ *](?P<name>.+)")
_BSD = re.compile(r"[A-Z0-9-]+ \((?P<name>.+)\) = (?P<digest>[0-9a-fA-F]{32,128})")


@dataclass(frozen=True)
class Sum:
    """The checksum of a file, from a list."""

    algorithm: str
    digest: str
    listed_in: Path

    def check(self, path: Path, found: str) -> None:
        """Refuses a file with another checksum.

        Raises:
            DatasetError: naming both.
        """
        if found != self.digest:
            raise DatasetError(
                f"{path}: {self.algorithm} {found[:16]}..., expected {self.digest[:16]}... as {self.listed_in} "
                "lists it. Copy or fetch the file again."
            )


def find_lists(folder: Path) -> list[Path]:
    """Files in a folder that are lists of checksums by their names, as md5sums.txt."""
    return sorted(path for path in folder.iterdir() if path.is_file() and _NAMES.fullmatch(path.name))


def read_lists(lists: Iterable[Path], folder: Path) -> dict[str, Sum]:
    """Checksums by the file's name in `folder`.

    A list may name files of days before the folder's first day, which are not there: the last day alone is enough to
    score a model.

    Raises:
        DatasetError: if a file is not a list of checksums, or lists any other file that is not in the folder.
    """
    sums = {}
    first = min(day_numbers(path.name for path in folder.glob("day_*")), default=0)
    for path in lists:
        for name, one in _read_list(path).items():
            # Lists are also made from the folder above, or with ./ before the names.
            candidates = (name, Path(name).name)
            found = next((candidate for candidate in candidates if (folder / candidate).is_file()), None)
            if found is None and any(number < first for number in day_numbers([candidates[-1]])):
                continue
            if found is None or ".." in Path(found).parts or Path(found).is_absolute():
                raise DatasetError(f"{folder / Path(name).name}: missing, though {path} lists it. Fetch it again.")
            sums[Path(found).as_posix()] = one
    return sums


def _read_list(path: Path) -> Mapping[str, Sum]:
    try:
        lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError as error:
        raise DatasetError(f"{path}: can't be read ({error.strerror}). Expected a list of checksums.") from None
    sums = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _COREUTILS.fullmatch(line) or _BSD.fullmatch(line)
        if match is None or len(match["digest"]) not in _ALGORITHMS:
            raise DatasetError(f"{path}: line {number} is not a checksum and a name, as sha256sum writes them.")
        digest = match["digest"].lower()
        sums[match["name"]] = Sum(_ALGORITHMS[len(digest)], digest, path)
    if not sums:
        raise DatasetError(f"{path}: lists no file. Expected what md5sum or sha256sum write.")
    return sums
