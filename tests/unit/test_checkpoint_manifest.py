import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlrm.checkpoint.manifest import Chunk, File, Manifest, Tensor, _digest, name_of, step_of
from dlrm.errors import CheckpointError

numbers = st.integers(0, 2**60)
values = st.recursive(
    st.none() | st.booleans() | numbers | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
file_names = st.from_regex(r"[A-Za-z0-9_]{1,8}\.[a-z]{1,4}", fullmatch=True)
SIZES = {"float32": 4, "float64": 8, "int64": 8, "uint8": 1}


@st.composite
def manifests(draw):
    """Of tensors whose rows are split over files."""
    files = {name: File(10_000, draw(st.text("0123456789abcdef", min_size=64, max_size=64))) for name in ("a.bin",)}
    files |= {name: File(10_000, "0" * 64) for name in draw(st.lists(file_names, max_size=3))}
    tensors = {}
    for name in draw(st.lists(st.text("ab_.9", min_size=1, max_size=8), max_size=3, unique=True)):
        dtype = draw(st.sampled_from(sorted(SIZES)))
        shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
        cuts = sorted({0, *draw(st.lists(st.integers(0, shape[0]), max_size=2)), shape[0]}) if shape else []
        chunks = [
            Chunk(
                (start, *(0,) * (len(shape) - 1)), (stop - start, *shape[1:]), draw(st.sampled_from(sorted(files))), 64
            )
            for start, stop in pairwise(cuts)
        ]
        tensors[name] = Tensor(dtype, shape, tuple(chunks) if shape else (Chunk((), (), "a.bin", 0),))
    scores = st.none() | st.floats(0.0, 1.0)
    position = draw(st.dictionaries(st.text(max_size=8), values, max_size=4))
    data = draw(st.none() | st.text("0123456789abcdef", max_size=64))
    return Manifest(
        draw(numbers), draw(st.text(max_size=9)), draw(numbers), draw(scores), position, data, files, tensors
    )


@settings(deadline=None, max_examples=200)
@given(manifests())
def test_any_manifest_is_read_as_it_was_written(manifest):
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest


@settings(deadline=None, max_examples=200)
@given(manifests(), st.integers(0, 2**30), st.integers(1, 255))
def test_a_single_changed_byte_is_refused(manifest, place, change):
    text = bytearray(manifest.to_bytes())
    text[place % len(text)] ^= change
    with pytest.raises(CheckpointError):
        Manifest.from_bytes(bytes(text))


@settings(deadline=None, max_examples=100)
@given(manifests(), st.integers(0, 2**30))
def test_a_truncated_one_is_refused(manifest, place):
    text = manifest.to_bytes()
    with pytest.raises(CheckpointError, match="damaged"):
        Manifest.from_bytes(text[: place % len(text)])


@settings(deadline=None, max_examples=150)
@given(st.binary(max_size=40) | values.map(lambda value: json.dumps(value).encode()))
def test_anything_else_is_refused(text):
    with pytest.raises(CheckpointError):
        Manifest.from_bytes(text)


MANIFEST = Manifest(
    10,
    "2026-11-23T12:00:00+0000",
    1,
    0.75,
    {"step": 10},
    None,
    {"rank_0.bin": File(96, "0" * 64)},
    {"dense.w": Tensor("float32", (4, 2), (Chunk((0, 0), (4, 2), "rank_0.bin", 64),))},
)


def written(**changes):
    """A manifest with other fields and the digest that goes with them."""
    content = {**json.loads(MANIFEST.to_bytes()), **changes}
    del content["sha256"]
    return (json.dumps({**content, "sha256": _digest(content)}) + "\n").encode()


@pytest.mark.parametrize(("old", "new"), [(b", ", b",\t"), (b"}\n", b"} "), (b"e-05", b"E-05")])
def test_a_changed_byte_that_changes_no_value_is_refused(old, new):
    text = replace(MANIFEST, val_auroc=1e-5).to_bytes()
    assert old in text
    with pytest.raises(CheckpointError, match="its text was changed"):
        Manifest.from_bytes(text.replace(old, new, 1))


def with_chunk(**changes):
    chunk = {"offsets": [0, 0], "shape": [4, 2], "file": "rank_0.bin", "start": 64, **changes}
    return {"dense.w": {"dtype": "float32", "shape": [4, 2], "chunks": [chunk]}}


def with_chunks(*blocks):
    chunks = [{"offsets": o, "shape": s, "file": "rank_0.bin", "start": 64} for o, s in blocks]
    return {"dense.w": {"dtype": "float32", "shape": [4, 2], "chunks": chunks}}


def test_what_the_damaged_ones_below_differ_from():
    assert Manifest.from_bytes(written()) == MANIFEST
    assert Manifest.from_bytes(written(tensors=with_chunk())) == MANIFEST
    for blocks in (
        [([0, 0], [4, 1]), ([0, 1], [4, 1])],
        [([2, 0], [2, 2]), ([0, 0], [2, 2]), ([4, 0], [0, 2])],
        [([0, 0], [3, 1]), ([3, 0], [1, 1]), ([0, 1], [4, 1])],
    ):
        assert len(Manifest.from_bytes(written(tensors=with_chunks(*blocks))).tensors["dense.w"].chunks) == len(blocks)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"checkpoint_version": 2}, "checkpoint_version 2, and this dlrm reads 1"),
        ({"checkpoint_version": None}, "checkpoint_version None"),
        ({"files": {"../../etc/passwd": {"num_bytes": 1, "sha256": ""}}}, "names a file '../../etc/passwd'"),
        ({"files": {"rank_0.bin": {"num_bytes": "many", "sha256": ""}}}, "damaged"),
        ({"files": {"rank_0.bin": {"num_bytes": 96}}}, "damaged"),
        ({"files": []}, "damaged"),
        ({"tensors": with_chunk(file="rank_9.bin")}, "a chunk of dense.w lies outside its file or tensor"),
        ({"tensors": with_chunk(file=["rank_0.bin"])}, "damaged"),
        ({"tensors": with_chunk(start=65)}, "lies outside"),
        ({"tensors": with_chunk(start=-1)}, "a chunk of dense.w must be whole numbers from 0 to"),
        ({"tensors": with_chunk(start=64.0)}, "a chunk of dense.w must be whole numbers from 0 to"),
        ({"tensors": with_chunk(offsets=[1, 0])}, "overlap, or do not make up all of it"),
        ({"tensors": with_chunk(offsets=[0])}, "lies outside"),
        ({"tensors": with_chunk(shape=[3, 2])}, "the chunks of dense.w overlap, or do not make up all of it"),
        ({"tensors": with_chunks(([0, 0], [2, 2]), ([0, 0], [2, 2]))}, "overlap"),
        ({"tensors": with_chunks(([0, 0], [2, 2]), ([1, 0], [2, 2]))}, "overlap"),
        ({"tensors": with_chunks(([0, 0], [4, 1]), ([0, 0], [4, 1]))}, "overlap"),
        ({"tensors": {"dense.w": {"dtype": "object", "shape": [], "chunks": []}}}, "has the dtype 'object'"),
        ({"step": "12"}, "step and world_size must be whole numbers from 0 to"),
        ({"step": True}, "step and world_size must be whole numbers from 0 to"),
        ({"val_auroc": 10**400}, "val_auroc must be a number from 0 to 1"),
        ({"created": 5}, "created and data must be text"),
        (
            {"tensors": {"t_cat_" + "9" * 5000: {"dtype": "float32", "shape": [], "chunks": []}}},
            "names a tensor 't_cat_9",
        ),
        ({"tensors": {"dense.w": {"dtype": "float32", "shape": [2**40, 2**40], "chunks": []}}}, "whole numbers"),
        ({"world_size": -1}, "step and world_size must be whole numbers from 0 to"),
        ({"tensors": {"dense.w": {"dtype": ["float32"], "shape": [], "chunks": []}}}, "has the dtype"),
        ({"more": 1}, "damaged"),
        ({"val_auroc": math.nan}, "damaged"),
    ],
)
def test_one_that_is_made_up_is_refused(changes, words):
    with pytest.raises(CheckpointError, match=words):
        Manifest.from_bytes(written(**changes))


def test_one_of_many_levels_is_refused():
    text = written(created="here")
    for levels in range(300, 1200, 10):
        with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
            Manifest.from_bytes(text.replace(b'"here"', b"[" * levels + b"]" * levels))


def test_a_manifest_holds_no_number_that_json_has_not():
    with pytest.raises(ValueError, match="JSON"):
        replace(MANIFEST, val_auroc=math.inf).to_bytes()


@settings(deadline=None)
@given(st.integers(0, 10**10 - 2), st.integers(0, 9))
def test_names_sort_as_steps_do(step, times):
    taken: list[str] = []
    for _ in range(times + 1):
        taken.append(name_of(step, taken))
        assert step_of(taken[-1]) == step
    assert sorted(taken) == taken
    assert max(taken) < name_of(step + 1)


def test_a_step_that_was_saved_too_often():
    taken = ["step_0000000007", *(f"step_0000000007-{number}" for number in range(1, 10))]
    with pytest.raises(CheckpointError, match="has been saved ten times"):
        name_of(7, taken)


@pytest.mark.parametrize(
    "name", ["step_1", ".step_0000000001.ab.partial", "step_0000000001 ", "step_00000000010", "step_000000000a", ""]
)
def test_what_is_no_checkpoint(name):
    assert step_of(name) is None
