"""The bytes that `dlrm synthesize`, `dlrm preprocess` and `dlrm materialize` promise for a seed.

Not pinned are bytes that a library decides: those of Parquet, of a zip file's directory, and the last bit of numpy's
logarithm (see dlrm/preprocess/logarithm.py). Their contents are.
"""

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from dlrm.materialize.command import MaterializeConfig, materialize
from dlrm.preprocess.command import preprocess
from dlrm.preprocess.config import PreprocessConfig
from dlrm.preprocess.logarithm import log_dense
from dlrm.preprocess.ranks import Ranks
from dlrm.synthesize.command import SynthesizeConfig, synthesize

DAYS = ("day_0", "day_1", "day_2")
HOTNESS = tuple(1 + feature % 3 for feature in range(26))


def digest(content: bytes) -> str:
    """The first half of a SHA-256."""
    return hashlib.sha256(content).hexdigest()[:32]


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    """Three days of 100 rows each."""
    folder = tmp_path_factory.mktemp("golden") / "log"
    synthesize(SynthesizeConfig(str(folder), rows=300, click_rate=0.3, cardinality_scale=1e-5, seed=7, workers=2))
    return folder


def write_days(log: Path, output: str, *names: str, **fields: Any) -> Path:
    raw = tuple(str(log / f"{name}.tsv") for name in names)
    config = PreprocessConfig(raw, str(log.parent / output), workers=2, **fields)
    config.validate()
    preprocess(config, Ranks())
    return log.parent / output


def digest_days(folder: Path) -> list[str]:
    """Digests of dense values, ids, labels, vocabulary and manifest, without what a library or the machine decides."""
    manifest = json.loads((folder / "manifest.json").read_text())
    minima = manifest["integers"]["minimum"]
    minima = [minima] * len(manifest["days"]) if isinstance(minima, int) else minima
    dense = b"".join(
        shifted_integers(np.load(folder / f"{day}_dense.npy"), minimum)
        for day, minimum in zip(manifest["days"], minima, strict=True)
    )
    sparse, labels = (
        b"".join((folder / f"{day}_{part}.npy").read_bytes() for day in manifest["days"])
        for part in ("sparse", "labels")
    )
    files = sorted((folder / "vocabulary").glob("*.parquet"))
    vocabulary = b"".join(path.name.encode() + pl.read_parquet(path).write_csv().encode() for path in files)
    del manifest["software"], manifest["files"], manifest["integers"]["logarithm"]
    return list(map(digest, (dense, sparse, labels, vocabulary, json.dumps(manifest).encode())))


def shifted_integers(dense_BI: np.ndarray, minimum: int) -> bytes:
    """The integers whose logarithms the values are, to the last bit on this machine; 1 for one told to be missing."""
    shifted_BI = np.round(np.exp(dense_BI.astype(np.float64))).astype(np.int32)
    expected_BI = np.where(shifted_BI == 1, np.float32(0), log_dense(shifted_BI + (minimum - 2), minimum))
    assert dense_BI.tobytes() == expected_BI.tobytes()
    return shifted_BI.tobytes()


def test_synthesized_log(log):
    assert [digest((log / f"{day}.tsv").read_bytes()) for day in DAYS] == [
        "21a512e5533023cdf81fc39bb3b64919",
        "a1f28ef14c2005636c77d92c5b24468d",
        "478ff15e895ed2d01d490ed54556a855",
    ]
    assert json.loads((log / "truth.json").read_text()) == pytest.approx(
        {
            "auroc": 0.8581835842642059,
            "logloss": 0.4134010226655398,
            "ne": 0.6865396786496752,
            "val_auroc": 0.8484848484848485,
            "val_logloss": 0.40678761835872357,
            "val_ne": 0.772027845724058,
            "test_auroc": 0.8871527777777778,
            "test_logloss": 0.42001442697235597,
            "test_ne": 0.6427957322262254,
            "click_rate": 0.29,
        },
        rel=1e-12,
    )


@pytest.mark.parametrize(
    ("name", "raw", "fields", "expected"),
    [
        (
            "default",
            DAYS,
            {},
            [
                "6f73e970041c2d79540e477daa26bf39",
                "3ef7fceb03f35fc11999d8d11d52dcc1",
                "023a4ffc9acb500e2aaa1a7830a11c3d",
                "672fcfe0034f83143fe46325ab60431c",
                "46c29be7c508dff7736c2aba89bb0abf",
            ],
        ),
        (
            "apart",
            DAYS,
            {"frequency_threshold": 2, "max_embeddings": 7, "missing_integers": "apart", "seed": 5},
            [
                "d4688b79e5a8202e6fc2f7ba74fd4801",
                "39cb99234a33112483b01ebe72569604",
                "faa5884583c52034e07fad6745932aa7",
                "7a6b02ca5ddcb51e0b4dd0e18d5db795",
                "a6d0ececc92f1184b3335e834f5d98df",
            ],
        ),
        (
            "all",
            DAYS,
            {"vocabulary_days": "all"},
            [
                "6f73e970041c2d79540e477daa26bf39",
                "180815b6d7191fb1c752a490aa541f74",
                "023a4ffc9acb500e2aaa1a7830a11c3d",
                "2e8658ec133f6973030a9bece4d03402",
                "51c8d6bc0ca073d1039af587b97de7b0",
            ],
        ),
        (
            "torchrec",
            DAYS,
            {"compat": "torchrec"},
            [
                "a3d137f8bd972cc36a7e372e79f9e853",
                "389014a184cacf6f20feae2046ffbd93",
                "57f2799226fe601e7f31e86594e7d335",
                "880872536c19841b143ea32a66ade181",
                "1be38cf0d99c2d772096dee88f60b798",
            ],
        ),
        (
            "kaggle",
            DAYS[:1],
            {"dataset_name": "criteo_kaggle"},
            [
                "777a7f94e47361c08a9baeaac6a615e1",
                "403507c09c2433a4873eeec2b635cb4e",
                "e0638380cdc2ebe001f98f28cf6b5622",
                "654c15a4ffb8240592f85c911987861f",
                "6f615e7ca75a5d84b4015a3d001a5f8d",
            ],
        ),
    ],
)
def test_preprocessed_days(log, name, raw, fields, expected):
    assert digest_days(write_days(log, name, *raw, **fields)) == expected


@pytest.mark.parametrize(
    ("distribution", "expected"),
    [
        (
            "uniform",
            [
                "b4137a281d8db14ddce4eb51ac1c0178",
                "aa2438d518ff07da86bd85efb4f89c08",
                "32ce6451678f58439c73d9b3d20bd525",
                "30c536c7fcff18ca3dd290e4154be608",
            ],
        ),
        (
            "pareto",
            [
                "f2f1d5f0fd6e1b106ed6a848cd4e3bdc",
                "865c2e0c703df77bfe6b4e98f0f815ad",
                "85a2596179b41ea42cc7aa84970fa5ee",
                "481d126ad3880b549e9bd8d5f7c44abc",
            ],
        ),
    ],
)
def test_multi_hot_days(log, distribution, expected):
    days, output = write_days(log, f"of_{distribution}", *DAYS), log.parent / distribution
    config = MaterializeConfig(
        str(days), str(output), multi_hot_sizes=HOTNESS, multi_hot_distribution_type=distribution, workers=2
    )
    manifest = materialize(config)
    del manifest["software"], manifest["files"], manifest["source_manifest_sha256"], manifest["vocabulary_sha256"]
    found = [digest(json.dumps(manifest).encode())]
    for day in DAYS:
        with zipfile.ZipFile(output / f"{day}_sparse_multi_hot.npz") as archive:
            found.append(digest(b"".join(name.encode() + archive.read(name) for name in archive.namelist())))
    assert found == expected
