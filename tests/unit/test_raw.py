import errno
import gzip
import io
import itertools
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import zstandard

from dlrm.errors import DatasetError
from dlrm.preprocess import raw
from dlrm.preprocess.raw import MAX_LINE_BYTES, PADDING, check_raw, read_blocks, reading, sample

KIB = 1 << 10
PACKED_READ_BYTES = 128 * KIB


def compress_zst(text: bytes) -> bytes:
    """With a checksum, as the command-line tool does."""
    return zstandard.ZstdCompressor(write_checksum=True).compress(text)


def stream_zst(text: bytes) -> bytes:
    """As from a pipe: no size in the header."""
    packer = zstandard.ZstdCompressor(write_checksum=True).compressobj()
    return packer.compress(text) + packer.flush()


def skippable_frame(size: int) -> bytes:
    return struct.pack("<II", 0x184D2A50, size) + b"\xfd" * size


PACK = {"": bytes, ".tsv": bytes, ".gz": gzip.compress, ".zst": compress_zst}


@pytest.fixture(scope="module")
def text(criteo_lines) -> bytes:
    """About 500 KiB of lines."""
    return "".join(criteo_lines(2300)).encode()


@pytest.fixture(scope="module")
def small_text(criteo_lines) -> bytes:
    return "".join(criteo_lines(30, seed=3)).encode()


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def read(path: Path, max_lines: int | None = None, block_bytes: int = 64 * KIB) -> bytes:
    """All blocks' text, each checked to be whole lines within its bounds."""
    parts = []
    for block in read_blocks(path, max_lines, block_bytes):
        assert 0 < block.size <= block_bytes + 1
        assert len(block.text) >= block.size + PADDING
        assert block.text[block.size - 1] == ord("\n")
        parts.append(block.text[: block.size].tobytes())
    return b"".join(parts)


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("extra", [0, 1, 77, 1000, 4097, 64 * KIB, 200 * KIB, 16 << 20])
def test_every_line_once(suffix, extra, text, tmp_path):
    path = write(tmp_path / f"day{suffix}", PACK[suffix](text))
    assert read(path, block_bytes=64 * KIB + extra) == text


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("end", [b"\n", b""])
@pytest.mark.parametrize("shift", [-2, -1, 0, 1, 2])
def test_a_file_that_ends_where_a_block_does(suffix, end, shift, text, tmp_path):
    content = text.removesuffix(b"\n") + end
    path = write(tmp_path / f"day{suffix}", PACK[suffix](content))
    for blocks in (1, 2, 5):
        assert read(path, block_bytes=-(-len(content) // blocks) + shift) == text


@pytest.mark.parametrize("suffix", PACK)
def test_blocks_are_the_same_each_time(suffix, text, tmp_path):
    path = write(tmp_path / f"day{suffix}", PACK[suffix](text))
    sizes = [[block.size for block in read_blocks(path, None, 70 * KIB)] for _ in range(2)]
    assert sizes[0] == sizes[1]
    assert len(sizes[0]) == -(-len(text) // (70 * KIB))
    plain = write(tmp_path / "plain", text)
    assert [block.size for block in read_blocks(plain, None, 70 * KIB)] == sizes[0]


@pytest.mark.parametrize("suffix", PACK)
def test_line_ends_are_left_as_they_are(suffix, text, tmp_path):
    content = text.replace(b"\n", b"\r\n")
    assert read(write(tmp_path / f"day{suffix}", PACK[suffix](content))) == content
    content = content.removesuffix(b"\r\n")
    assert read(write(tmp_path / f"day{suffix}", PACK[suffix](content))) == content + b"\n"


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("content", [b"\n", b"\n\n\n", b"a", b"a\nb", b"\n" * 70_000, b"\r"])
def test_short_lines(suffix, content, tmp_path):
    path = write(tmp_path / f"day{suffix}", PACK[suffix](content))
    assert read(path) == content + (b"" if content.endswith(b"\n") else b"\n")


@pytest.mark.parametrize("suffix", PACK)
def test_max_lines(suffix, text, tmp_path):
    lines = text.splitlines(keepends=True)
    path = write(tmp_path / f"day{suffix}", PACK[suffix](text))
    first_block = next(read_blocks(path, None, 64 * KIB))
    in_first_block = int((first_block.text[: first_block.size] == ord("\n")).sum())
    for count in (0, 1, 2, in_first_block - 1, in_first_block, in_first_block + 1, 1500, len(lines), 9999):
        assert read(path, count) == b"".join(lines[:count])
        assert read(path, count, block_bytes=1 << 20) == b"".join(lines[:count])


def test_lines_past_max_lines_are_not_read(text, tmp_path):
    path = write(tmp_path / "day.gz", gzip.compress(text)[:-9])
    assert read(path, 20) == b"".join(text.splitlines(keepends=True)[:20])


@pytest.mark.parametrize("parts", [1, 2, 3, 40])
@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_several_members_and_frames(suffix, parts, text, tmp_path):
    """As pigz, pzstd and `cat a.gz b.gz` write them, cut where lines are not."""
    bounds = np.linspace(0, len(text), parts + 1).astype(int)
    pieces = [text[start:stop] for start, stop in itertools.pairwise(bounds)]
    pack = PACK[suffix]
    path = write(tmp_path / f"day{suffix}", b"".join(map(pack, pieces)))
    assert read(path) == text
    path = write(tmp_path / f"day{suffix}", pack(b"") + b"".join(pack(piece) + pack(b"") for piece in pieces))
    assert read(path) == text


def test_gzip_with_a_name_and_zeros_at_its_end(text, tmp_path):
    buffer = io.BytesIO()
    with gzip.GzipFile("day_0.tsv", "wb", fileobj=buffer) as file:
        file.write(text)
    assert read(write(tmp_path / "day.gz", buffer.getvalue() + b"\0" * 500)) == text


@pytest.mark.parametrize("pack", [compress_zst, stream_zst, zstandard.compress])
def test_skippable_frames(pack, text, tmp_path):
    half = len(text) // 2
    frames = [pack(text[:half]), pack(text[half:])]
    for size in (0, 1, 4, 1000, 200_000):
        skip = skippable_frame(size)
        for content in (skip + frames[0] + skip + frames[1] + skip, skip + skip + frames[0] + skip + skip + frames[1]):
            assert read(write(tmp_path / "day.zst", content)) == text


@pytest.mark.parametrize("shift", [-9, -5, -4, -1, 0, 1, 4])
def test_frames_that_end_where_a_read_does(shift, text, tmp_path):
    quarter = len(text) // 4
    first, second = compress_zst(text[:quarter]), compress_zst(text[quarter:])
    assert len(first) + 20 < PACKED_READ_BYTES
    skip = skippable_frame(PACKED_READ_BYTES - len(first) - 8 + shift)
    assert len(first + skip) == PACKED_READ_BYTES + shift
    assert read(write(tmp_path / "day.zst", first + skip + second)) == text
    assert read(write(tmp_path / "day.zst", skip + first + second)) == text
    assert read(write(tmp_path / "day.zst", first + second + skip)) == text
    with pytest.raises(DatasetError, match="can't be read to its end"):
        read(write(tmp_path / "day.zst", (first + skip + second)[:-1]))


def test_much_text_in_few_bytes(tmp_path):
    text = b"0" + b"\t" * 39 + b"\n"
    for suffix in (".gz", ".zst"):
        path = write(tmp_path / f"day{suffix}", PACK[suffix](text * 200_000))
        assert path.stat().st_size < 40_000
        assert read(path, block_bytes=1 << 20) == text * 200_000


def assert_unreadable(path: Path) -> None:
    with pytest.raises(DatasetError, match="can't be read to its end") as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["gz", "zst", "streamed", "unchecked", "skippable"])
def test_every_cut_of_a_small_file_is_seen(name, small_text, tmp_path):
    pack = {
        "gz": gzip.compress,
        "zst": compress_zst,
        "streamed": stream_zst,
        "unchecked": zstandard.compress,
        "skippable": lambda text: compress_zst(text) + skippable_frame(50),
    }[name]
    content = pack(small_text)
    whole_without_the_skippable = len(compress_zst(small_text)) if name == "skippable" else None
    path = tmp_path / ("day.gz" if name == "gz" else "day.zst")
    cuts = {*range(1, 30), *range(30, len(content), 29), *range(len(content) - 30, len(content))}
    for cut in cuts - {whole_without_the_skippable}:
        assert_unreadable(write(path, content[:cut]))
    assert read(write(path, content)) == small_text


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_every_cut_of_a_second_part_is_seen(suffix, small_text, tmp_path):
    first, second = PACK[suffix](small_text[:4000]), PACK[suffix](small_text[4000:])
    path = tmp_path / f"day{suffix}"
    for cut in {*range(1, 40), *range(40, len(second), 61), *range(len(second) - 12, len(second))}:
        assert_unreadable(write(path, first + second[:cut]))
    assert read(write(path, first + second)) == small_text


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("block_bytes", [64 * KIB, 1 << 20])
def test_cuts_of_a_larger_file_are_seen(suffix, block_bytes, text, tmp_path):
    content = PACK[suffix](text)
    for share in (0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.9999):
        path = write(tmp_path / f"day{suffix}", content[: int(share * len(content))])
        with pytest.raises(DatasetError, match="can't be read to its end"):
            read(path, block_bytes=block_bytes)


def test_a_cut_behind_a_whole_line_is_seen(tmp_path):
    """The text's 128 KiB blocks hold 1,024 lines each: what comes before the cut looks whole."""
    line = "\t".join(["1"] * 14 + ["abc"] * 22 + ["ab"] * 4).encode() + b"\n"
    assert len(line) == 128
    assert_unreadable(write(tmp_path / "day.zst", zstandard.compress(line * 4096)[:-1]))
    assert_unreadable(write(tmp_path / "day.zst", stream_zst(line * 4096)[:-4]))
    assert_unreadable(write(tmp_path / "day.gz", gzip.compress(line * 4096)[:-8]))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("flip", [0x01, 0x55, 0xFF])
def test_damage_is_seen_or_does_not_matter(suffix, flip, small_text, tmp_path):
    content = PACK[suffix](small_text)
    path = tmp_path / f"day{suffix}"
    seen = 0
    positions = sorted({*range(30), *range(30, len(content), 29), *range(len(content) - 20, len(content))})
    for position in positions:
        damaged = content[:position] + bytes([content[position] ^ flip]) + content[position + 1 :]
        try:
            found = read(write(path, damaged))
        except DatasetError as error:
            assert str(path) in str(error)  # noqa: PT017 - a byte of the header may not matter
            seen += 1
        else:
            assert found == small_text
    assert seen > 0.9 * len(positions)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("junk", [b"x", b"0\t1\n" * 40, b"\x1f", b"\x28\xb5"])
def test_junk_behind_the_packed_text_is_seen(suffix, junk, small_text, tmp_path):
    assert_unreadable(write(tmp_path / f"day{suffix}", PACK[suffix](small_text) + junk))


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("before", [0, 1, 300, 2000])
def test_the_longest_line(suffix, before, text, tmp_path):
    lines = text.splitlines(keepends=True)
    parts = (b"".join(lines[:before]), b"x" * (MAX_LINE_BYTES - 1) + b"\n", b"".join(lines[before:]))
    path = write(tmp_path / f"day{suffix}", PACK[suffix](b"".join(parts)))
    for block_bytes in (MAX_LINE_BYTES, MAX_LINE_BYTES + 1, 100_000):
        assert read(path, block_bytes=block_bytes) == b"".join(parts)


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("size", [MAX_LINE_BYTES, MAX_LINE_BYTES + 1, 300_000])
def test_too_long_a_line(suffix, size, text, tmp_path):
    lines = text.splitlines(keepends=True)
    content = b"".join([*lines[:700], b"x" * size, b"\n", *lines[700:]])
    path = write(tmp_path / f"day{suffix}", PACK[suffix](content))
    with pytest.raises(DatasetError, match=r"day.*: a line of more than 64 KiB"):
        read(path)


def test_a_file_without_line_ends(tmp_path):
    path = write(tmp_path / "day", b"x" * (5 << 20))
    for do in (read, lambda path: sample(path, None)):
        with pytest.raises(DatasetError, match="a line of more than 64 KiB"):
            do(path)


@pytest.fixture(scope="module")
def long_text() -> bytes:
    """60,000 rows, 14 MB."""
    rng = np.random.default_rng(5)
    form = "\t".join(["%d"] * 14 + ["%08x"] * 26) + "\n"
    integers, ids = rng.integers(0, 2000, (60_000, 14)), rng.integers(0, 2**32, (60_000, 26))
    return "".join(form % (*a, *b) for a, b in zip(integers.tolist(), ids.tolist(), strict=True)).encode()


PACK_QUICKLY = {"": bytes, ".gz": lambda text: gzip.compress(text, 1), ".zst": zstandard.compress}


@pytest.mark.parametrize("suffix", PACK_QUICKLY)
def test_the_guess_of_the_number_of_lines(suffix, long_text, tmp_path):
    path = write(tmp_path / f"day{suffix}", PACK_QUICKLY[suffix](long_text))
    found = sample(path, None)
    assert found.total_lines == pytest.approx(60_000, rel=0.2)
    assert found.num_lines == long_text[: found.block.size].count(b"\n")
    assert found.block.text[: found.block.size].tobytes() == long_text[: found.block.size]
    assert 3 << 20 < found.block.size <= 4 << 20
    assert sample(path, 1000).total_lines == 1000
    assert sample(path, 10**9).total_lines == found.total_lines
    assert read(path, block_bytes=3 << 20) == long_text


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("end", [b"\n", b""])
def test_small_files_are_counted(suffix, end, text, tmp_path):
    path = write(tmp_path / f"day{suffix}", PACK[suffix](text.removesuffix(b"\n") + end))
    found = sample(path, None)
    assert (found.num_lines, found.total_lines) == (2300, 2300)
    assert found.block.text[: found.block.size].tobytes() == text
    assert sample(path, 7).total_lines == 7


@pytest.mark.parametrize("missing", [-1, 0, 1])
def test_a_file_as_large_as_the_sample(missing, tmp_path):
    text = (b"0" + b"\t" * 39 + b"\n") * 110_000
    path = write(tmp_path / "day", text[: (4 << 20) - missing - 1] + b"\n")
    assert sample(path, None).total_lines == pytest.approx(path.read_bytes().count(b"\n"), abs=1)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_packed_file_with_nothing_in_it(suffix, tmp_path):
    path = write(tmp_path / f"day{suffix}", PACK[suffix](b""))
    assert read(path) == b""
    with pytest.raises(DatasetError, match="no rows"):
        sample(path, None)


def test_a_sample_of_a_file_that_is_cut_short(small_text, tmp_path):
    for suffix in (".gz", ".zst"):
        path = write(tmp_path / f"day{suffix}", PACK[suffix](small_text)[:-1])
        with pytest.raises(DatasetError, match="can't be read to its end"):
            sample(path, None)


def test_what_can_not_be_raw_text(tmp_path):
    with pytest.raises(DatasetError, match="day_0: no such file"):
        check_raw(tmp_path / "day_0")
    with pytest.raises(DatasetError, match=f"{tmp_path.name}: a folder"):
        check_raw(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DatasetError, match="pipe: not a regular file"):
        check_raw(tmp_path / "pipe")
    with pytest.raises(DatasetError, match="day_1: no rows"):
        check_raw(write(tmp_path / "day_1", b""))
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(DatasetError, match="link: no such file"):
        check_raw(tmp_path / "link")
    check_raw(write(tmp_path / "day_1", b"\n"))


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = write(tmp_path / "day", b"0\n")
    monkeypatch.setattr(raw.os, "access", lambda *_: False)
    with pytest.raises(DatasetError, match="day: no permission to read it"):
        check_raw(path)


def test_a_file_that_is_gone_again(tmp_path):
    with pytest.raises(DatasetError, match="day: can't be read to its end"):
        read(tmp_path / "day")


def test_a_full_disk_is_not_the_input_s_fault(tmp_path):
    with pytest.raises(OSError, match="full") as caught, reading(tmp_path / "day"):
        raise OSError(errno.ENOSPC, "full")
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(DatasetError, match="day: can't be read to its end"), reading(tmp_path / "day"):
        raise OSError(errno.EIO, "unreadable")
