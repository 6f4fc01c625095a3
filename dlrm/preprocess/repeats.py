"""Finds rows that are in two raw files, or are held out and train too, by hashes of the parsed rows.

A file's digest is the sum of its rows' hashes. It does not depend on packing, line ends, or the order of rows. A sample
of a file is its rows with the smallest hashes. A row has the same hash in every file, so samples of files that share
rows share rows too.
"""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dlrm.errors import DatasetError
from dlrm.preprocess.columns import Columns
from dlrm.preprocess.kernels import hash_rows
from dlrm.preprocess.layout import Layout
from dlrm.preprocess.run import Run

_SAMPLE, _SAMPLE_OF_FIRST, _FIRST_BLOCKS = 64, 512, 8
_MOST_SAMPLED, _LEAST_SAMPLED = 200_000, 8
_SHARE_OF_COPIES, _SHARE_TO_TELL = 0.5, 0.1
_ENTRY = np.dtype([("hash", "<u8"), ("row", "<u4")])

Hashes = npt.NDArray[np.uint64]


def digest_block(columns: Columns, number: int) -> dict[str, Any]:
    """What is recorded about a block's rows: the sum of their hashes, and a sample.

    Args:
        number: number of the block in its file. The first blocks get larger samples, for the sake of small files.
    """
    hashes_R = np.empty(columns.num_rows, np.uint64)
    total = hash_rows(columns.labels_R, columns.integers_IR, columns.ids_FR, columns.missing_R, hashes_R)
    size = _SAMPLE_OF_FIRST if number < _FIRST_BLOCKS else _SAMPLE
    rows = np.argpartition(hashes_R, size)[:size] if len(hashes_R) > size else np.arange(len(hashes_R))
    sample = np.empty(len(rows), _ENTRY)
    sample["hash"], sample["row"] = hashes_R[rows], rows
    return {"hash": int(total), "sample": base64.b64encode(sample.tobytes()).decode()}


@dataclass(frozen=True)
class _Part:
    """A file, or the part of a file that trains or is held out, with the hashes of its sampled rows."""

    name: str
    hashes: Hashes

    def share_in(self, other: "_Part") -> float:
        """The share of its distinct rows that `other` has too, less the share to expect by chance.

        In a log with few values, rows repeat. As often as they repeat within this part, they are expected in the other.
        """
        distinct = np.unique(self.hashes)
        if len(distinct) < _LEAST_SAMPLED:
            return 0.0
        repeated = 1 - len(distinct) / len(self.hashes)
        expected = min(1.0, repeated * len(other.hashes) / len(self.hashes))
        return float(np.isin(distinct, other.hashes).mean()) - expected


def file_digests(run: Run, layout: Layout) -> dict[str, str]:
    """The digest of each file, by its name. Files that an old dlrm parsed without hashing rows are left out."""
    digests = {}
    for day, name in enumerate(run.sources):
        blocks = list(run.parsed_blocks(day))
        if all("hash" in block for block in blocks):
            total = sum(block["hash"] for block in blocks) % 2**64
            digests[name] = f"{layout.day_rows[day]}-{total:016x}"
    return digests


def check_repeats(run: Run, layout: Layout) -> None:
    """Refuses files with the same rows or most rows in common; warns of held-out rows that are among those that train.

    Raises:
        DatasetError: naming both.
    """
    digests = file_digests(run, layout)
    if run.ranks.is_main:
        _tell_trained(run, digests)
    if run.config.repeated_rows == "allow" or len(digests) < len(
        run.raw
    ):  # some were parsed by an old dlrm that did not hash rows
        return
    seen: dict[str, Path] = {}
    for path, digest in zip(run.raw, digests.values(), strict=True):
        if (other := seen.setdefault(digest, path)) != path:
            raise _repeated(run, f"{path}: has the same rows as {other}")
    parts = _sample_parts(run, layout)
    for one, other in combinations(parts, 2):
        small, large = sorted((one, other), key=lambda part: len(part.hashes))
        if (share := small.share_in(large)) >= _SHARE_OF_COPIES:
            raise _repeated(run, f"{large.name}: about {share:.0%} of the rows of {small.name} are in it too")
    *training, held_out = parts
    if not training or layout.num_train_rows == 0:
        return
    share = held_out.share_in(_Part("", np.concatenate([part.hashes for part in training])))
    if share >= _SHARE_OF_COPIES:
        raise _repeated(run, f"{held_out.name}: about {share:.0%} of its rows, which are held out, train too")
    if share >= _SHARE_TO_TELL and run.ranks.is_main:
        print(f"Warning: about {share:.0%} of the held-out rows, of {held_out.name}, are among those that train.")


def _repeated(run: Run, what: str) -> DatasetError:
    return DatasetError(
        f"{what}. Remove {run.workspace.root}, and start again without what is there twice; or take it all with "
        "--repeated_rows allow --resume."
    )


def _sample_parts(run: Run, layout: Layout) -> list[_Part]:
    """The files as parts; or, of a single file, the part that trains and the part that is held out."""
    samples = [_sample_of(run, layout, day) for day in range(len(run.raw))]
    limit = min(limit for _, limit in samples)
    hashes = np.concatenate([sample["hash"] for sample, _ in samples])
    if (hashes < limit).sum() > _MOST_SAMPLED:
        limit = int(np.partition(hashes, _MOST_SAMPLED)[_MOST_SAMPLED])
    kept = [sample[sample["hash"] < limit] for sample, _ in samples]
    if len(kept) > 1 or layout.num_train_rows in (0, layout.num_rows):
        return [_Part(str(path), sample["hash"]) for path, sample in zip(run.raw, kept, strict=True)]
    trains = kept[0]["row"] < layout.num_train_rows
    held_out = _Part("its last seventh, which is held out,", kept[0]["hash"][~trains])
    return [_Part(f"{run.raw[0]}, first six sevenths", kept[0]["hash"][trains]), held_out]


def _sample_of(run: Run, layout: Layout, day: int) -> tuple[npt.NDArray[Any], int]:
    """Hashes and numbers of a file's sampled rows, and the hash below which every row of the file is sampled."""
    samples, limit = [np.empty(0, [("hash", "<u8"), ("row", "<i8")])], 2**64 - 1
    for block, facts in zip(layout.days[day], run.parsed_blocks(day), strict=True):
        sample = np.frombuffer(base64.b64decode(facts["sample"]), _ENTRY).astype(samples[0].dtype)
        sample["row"] += block.day_row
        samples.append(sample)
        if len(sample) < block.rows:
            limit = min(limit, int(sample["hash"].max()))
    return np.concatenate(samples), limit


def trained_digests(run: Run, digests: Mapping[str, str]) -> dict[str, str]:
    """Digests of the files that models of this vocabulary are trained on."""
    if run.config.applied is not None:
        return run.config.applied.get("trained_digests", {})
    names = run.sources if len(run.sources) == 1 else run.sources[:-1]
    return {name: digests[name] for name in names if name in digests}


def _tell_trained(run: Run, digests: Mapping[str, str]) -> None:
    """Warns of a file for a trained model if the model was trained on its rows."""
    if run.config.applied is None:
        return
    trained = {digest: name for name, digest in trained_digests(run, {}).items()}
    for name, digest in digests.items():
        if digest in trained:
            print(
                f"Warning: {name} has the rows of {trained[digest]}, on which models of {run.config.vocabulary} were "
                "trained: scores on them say nothing about new rows.",
                flush=True,
            )
