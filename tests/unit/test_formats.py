"""Raw files of other kinds, named by their first bytes whatever their names are."""

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import zstandard

from dlrm.errors import ConfigError, DatasetError
from dlrm.preprocess.config import Resources
from dlrm.preprocess.raw import read_blocks, sample
from tests.unit.preprocessed import arrays_of, assert_refused, digests, write


@pytest.fixture(scope="module")
def text(criteo_lines) -> bytes:
    return "".join(criteo_lines(40)).encode()


def zip_of(text: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("day_0.tsv", text)
    return file.getvalue()


def tar_of(text: bytes, mode: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        info = tarfile.TarInfo("day_0.tsv")
        info.size = len(text)
        archive.addfile(info, io.BytesIO(text))
    return file.getvalue()


def frame_of(text: bytes, kind: str) -> bytes:
    file = io.BytesIO()
    getattr(pl.DataFrame({"label": [0, 1]}), f"write_{kind}")(file)
    return file.getvalue()


def npy_of(text: bytes) -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros(3))
    return file.getvalue()


OTHERS = {
    "zip": (zip_of, "a .zip archive"),
    "bz2": (bz2.compress, "packed by bzip2"),
    "xz": (lzma.compress, "packed by xz"),
    "lzma": (lambda text: lzma.compress(text, lzma.FORMAT_ALONE), "packed by lzma"),
    "lz4": (lambda text: b"\x04\x22\x4d\x18" + text, "packed by lz4"),
    "7z": (lambda text: b"7z\xbc\xaf\x27\x1c" + text, "a .7z archive"),
    "tar": (lambda text: tar_of(text, "w"), "a tar archive"),
    "tar.gz": (lambda text: tar_of(text, "w:gz"), "packed by gzip, and in it a tar archive"),
    "tar.zst": (lambda text: zstandard.compress(tar_of(text, "w")), "packed by zstd, and in it a tar archive"),
    "twice": (lambda text: gzip.compress(gzip.compress(text)), "packed by gzip, and in it packed twice"),
    "zip.gz": (lambda text: gzip.compress(zip_of(text)), "packed by gzip, and in it a .zip archive"),
    "parquet": (lambda text: frame_of(text, "parquet"), "a Parquet file"),
    "arrow": (lambda text: frame_of(text, "ipc"), r"an Arrow \(Feather\) file"),
    "avro": (lambda text: frame_of(text, "avro"), "an Avro file"),
    "orc": (lambda text: b"ORC\x00" + text, "an ORC file"),
    "npy": (npy_of, "a .npy array"),
    "utf-16": (lambda text: text.decode().encode("utf-16"), "text in UTF-16"),
    "utf-16le": (lambda text: text.decode().encode("utf-16-le"), "text in UTF-16"),
    "bom": (lambda text: b"\xef\xbb\xbf" + text, "text that begins with a byte order mark"),
    "html": (lambda _: b"\n<!DOCTYPE html>\n<html><body>404 Not Found", "a page in HTML or XML"),
    "xml": (lambda _: b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "a page in HTML or XML"),
    "json": (lambda _: b'{"error": "token expired"}\n', "JSON"),
    "lfs": (lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\n", "a pointer of Git LFS"),
    "commas": (lambda text: text.replace(b"\t", b","), "text with commas between columns"),
    "semicolons": (lambda text: text.replace(b"\t", b";"), "text with semicolons between columns"),
    "spaces": (lambda text: text.replace(b"\t", b" "), "text with spaces between columns"),
    "hive": (lambda text: text.replace(b"\t", b"\x01"), "text with Hive's bytes 1 between columns"),
    "mac": (lambda text: text.replace(b"\n", b"\r"), r"text whose lines end in .r alone"),
    "packed commas": (
        lambda text: gzip.compress(text.replace(b"\t", b",")),
        "packed by gzip, and in it text with commas",
    ),
    "pickle": (lambda _: b"\x80\x04\x95\x00\x00\x00\x00" * 9, "no text"),
}


@pytest.mark.parametrize("suffix", ["", ".tsv", ".gz", ".zst"])
@pytest.mark.parametrize("kind", OTHERS)
def test_another_kind_of_file_is_named(kind, suffix, text, tmp_path):
    make, words = OTHERS[kind]
    path = tmp_path / f"day_0{suffix}"
    path.write_bytes(make(text))
    if kind == "pickle" and suffix in (".gz", ".zst"):  # neither text nor anything known: then the name counts
        words = "can't be read to its end"
    with pytest.raises(DatasetError, match=f"{path}: (is )?{words}") as caught:
        sample(path, None)
    assert "\n" not in str(caught.value)
    assert "--bad_rows" not in str(caught.value)


@pytest.mark.parametrize("name", ["day.tsv", "day", "day.gz", "day.zst", "day.tsv.zip"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.compress])
def test_text_and_packed_text_are_read_whatever_the_name(pack, name, text, tmp_path):
    path = tmp_path / name
    path.write_bytes(pack(text))
    assert sample(path, None).num_lines == 40
    assert b"".join(block.text[: block.size].tobytes() for block in read_blocks(path)) == text


@pytest.mark.parametrize("zeros", [1, 3, 512, 300_000])
def test_zeros_behind_zstd_frames(zeros, text, tmp_path):
    half = len(text) // 2
    path = tmp_path / "day.zst"
    padding = b"\0" * zeros
    path.write_bytes(zstandard.compress(text[:half]) + padding + zstandard.compress(text[half:]) + padding)
    assert b"".join(block.text[: block.size].tobytes() for block in read_blocks(path)) == text


def long_frame(text: bytes, window_log: int) -> bytes:
    """As `zstd --long` of a pipe packs it: the header has the window, whatever the size."""
    packer = zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(window_log=window_log)
    ).compressobj()
    return packer.compress(text) + packer.flush()


@pytest.mark.parametrize("window_log", [27, 28, 31])
def test_zstd_with_a_long_window(window_log, raw):
    reference = digests(write(raw, output="plain"))
    (raw / "day_1.zst").write_bytes(long_frame((raw / "day_1.tsv").read_bytes(), window_log))
    folder = write(raw, "day_0.tsv", "day_1.zst", "day_2.tsv")
    assert arrays_of(digests(folder)) == arrays_of(reference)


def test_a_window_counts_as_memory(raw):
    (raw / "day_1.zst").write_bytes(long_frame((raw / "day_1.tsv").read_bytes(), 31))
    words = r"--memory_gib 1.5 .* 1 worker and a zstd window of 2.0 GiB: expected \d.\d or more.* zstd -dc --long=31"
    assert_refused(raw, words, "day_0.tsv", "day_1.zst", "day_2.tsv", error=ConfigError, memory_gib=1.5)
    assert Resources.within(4, 1).bytes_per_worker - Resources.within(4, 1, 1 << 31).bytes_per_worker > 1.8 * 2**30


def test_a_later_frame_with_a_longer_window(text, tmp_path):
    path = tmp_path / "day.zst"
    path.write_bytes(zstandard.compress(text) + long_frame(text, 29))
    with pytest.raises(
        DatasetError, match=r"window of 512.0 MiB, its first one less. Pack it again: zstd -dc --long=31"
    ):
        list(read_blocks(path))
    assert len(list(read_blocks(path, window_bytes=1 << 29))) == 1


def test_a_zstd_dictionary_is_named(text, tmp_path):
    trained = zstandard.train_dictionary(2000, text.splitlines() * 9)
    path: Path = tmp_path / "day.zst"
    path.write_bytes(zstandard.ZstdCompressor(dict_data=trained).compress(text))
    with pytest.raises(DatasetError, match=rf"is packed with zstd dictionary {trained.dict_id()}. Unpack it with that"):
        sample(path, None)
