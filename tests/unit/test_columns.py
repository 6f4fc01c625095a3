import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlrm.preprocess.columns import (
    MIN_ROW_BYTES,
    PARSED_BYTES_PER_ROW,
    Columns,
    RejectedLine,
    explain,
    has_labels,
    parse_block,
    read_ids,
    read_integers,
    read_labels,
    read_missing,
    write_columns,
)
from dlrm.preprocess.raw import PADDING, TextBlock
from dlrm.schema.criteo import NUM_CATEGORICAL_FEATURES, NUM_COLUMNS, NUM_INTEGER_FEATURES

EMPTY_ROW = b"0" + b"\t" * (NUM_COLUMNS - 1)
ODD_FIELDS = (
    b"+5", b" 5", b"5 ", b"1_0", b"-", b"--1", b"1-", b"-0", b"0x1f", b"1.0", b"1e3", b"nan", b"x", b"g", b"\x00",
    b"\xff\xfe", b"\xc3\xa9", b"\xd9\xa3", b'"1"', b"2147483647", b"2147483648", b"-2147483648", b"-2147483649",
    b"9" * 10, b"9" * 11, b"9" * 12, b"9" * 19, b"18446744073709551617", b"4294967297", b"0" * 11, b"0" * 12,
    b"-" + b"0" * 11, b"-" + b"0" * 12, b"-00000000007", b"00000002147", b"12345678", b"123456789", b"0000000001",
    b"ABCDEF01", b"abcdefg1", b"fffffff/", b"0000000:", b"@0000000", b"`0000000", b"ffffffff", b"FFFFFFFFF", b"7" * 300,
    b"", b"\r", b"1\r", b"\v", b"\x1c",
)  # fmt: skip


def block_of(text: bytes, padding: bytes = b"0") -> TextBlock:
    """`text` before bytes that would be read as digits."""
    return TextBlock(np.frombuffer(bytearray(text + padding * PADDING), np.uint8), len(text))


def valid_row(rng: random.Random) -> list[bytes]:
    integers = [
        b"%d" % rng.choice((rng.randint(-3, 5000), rng.randint(-(2**31), 2**31 - 1))) if rng.random() < 0.8 else b""
        for _ in range(NUM_INTEGER_FEATURES)
    ]
    ids = [
        (b"%08x" if rng.random() < 0.7 else b"%X") % rng.getrandbits(rng.choice((32, 32, 12, 1)))
        if rng.random() < 0.9
        else b""
        for _ in range(NUM_CATEGORICAL_FEATURES)
    ]
    return [rng.choice((b"0", b"1")), *integers, *ids]


def mutate(fields: list[bytes], rng: random.Random) -> bytes:
    """A row with a small fault, or one that only looks like it."""
    fields = list(fields)
    at = rng.choice((0, 1, 13, 14, 39, rng.randrange(NUM_COLUMNS)))
    match rng.randrange(12):
        case 0:
            fields[at] = rng.choice(ODD_FIELDS)
        case 1:
            fields[rng.randrange(14, 40)] = b"%0*x" % (rng.randint(1, 10), rng.getrandbits(rng.randint(1, 40)))
        case 2:
            fields[rng.randrange(1, 14)] = b"%d" % (rng.choice((-1, 1)) * rng.getrandbits(rng.randint(1, 70)))
        case 3:
            fields[at] += rng.choice((b"\t", b" ", b"\r", b"\x00", b"0", b"a", b"-"))
        case 4:
            fields[at] = rng.choice((b" ", b"+", b"-", b"0", b"\xff", b"F")) + fields[at]
        case 5:
            del fields[at]
        case 6:
            fields.insert(at, rng.choice((b"", b"1", fields[at])))
        case 7:
            fields[at] = b""
    line = bytearray(b"\t".join(fields))
    place = rng.randrange(len(line)) if line else 0
    match rng.randrange(14):
        case 0:
            line[place] = rng.randrange(256)
        case 1:
            line[place] ^= 1 << rng.randrange(8)
        case 2:
            line.insert(place, rng.randrange(256))
        case 3:
            del line[place : place + rng.randint(1, 3)]
        case 4:
            line[place:place] = rng.choice((b"\r", b"\n", b"\t", b"\x00", b"\r\n"))
        case 5:
            line += rng.choice((b"\r", b"\r\r", b"\t", b" ", b"\x00", b"\t\r"))
        case 6:
            tabs = [i for i, byte in enumerate(line) if byte == 9]
            if tabs:
                tab = rng.choice(tabs)
                line[tab : tab + 1] = rng.choice((b"", b"\t\t", b" ", b","))
        case 7:
            del line[place:]
        case 8 if rng.random() < 0.05:
            line *= 40
        case 9 if rng.random() < 0.2:
            line = bytearray(rng.randbytes(rng.randrange(80)))
    return bytes(line)


def plain_values(line: bytes) -> tuple[int, list[int], list[int]]:
    label, *fields = line.removesuffix(b"\r").split(b"\t")
    integers, ids = fields[:NUM_INTEGER_FEATURES], fields[NUM_INTEGER_FEATURES:]
    return int(label), [int(field or 0) for field in integers], [int(field or b"0", 16) for field in ids]


def assert_parsed(columns: Columns, lines: list[bytes]) -> int:
    """`columns` is what the plain twin makes of all of `lines`; returns the number of rows."""
    refused = [i for i, line in enumerate(lines) if explain(line) is not None]
    assert list(columns.rejected) == [RejectedLine(i, lines[i]) for i in refused]
    good = np.delete(np.arange(len(lines)), refused)
    values = [plain_values(lines[i]) for i in good]
    assert columns.num_rows == len(values)
    labels = np.array([label for label, _, _ in values], np.uint8)
    integers = np.array([row for _, row, _ in values], np.int64).reshape(-1, NUM_INTEGER_FEATURES)
    ids = np.array([row for _, _, row in values], np.int64).reshape(-1, NUM_CATEGORICAL_FEATURES)
    np.testing.assert_array_equal(columns.labels_R, labels)
    np.testing.assert_array_equal(columns.integers_IR, integers.T)
    fields = [lines[i].split(b"\t")[1 : 1 + NUM_INTEGER_FEATURES] for i in good]
    missing = [sum(1 << column for column, field in enumerate(row) if not field) for row in fields]
    np.testing.assert_array_equal(columns.missing_R, np.array(missing, np.uint16))
    np.testing.assert_array_equal(columns.ids_FR, ids.T)
    return len(values)


@pytest.mark.parametrize("seed", range(10))
def test_fuzz_against_the_plain_twin(seed):
    rng = random.Random(seed)
    rows = [valid_row(rng) for _ in range(300)]
    text = b"".join(mutate(rng.choice(rows), rng) + b"\n" for _ in range(25_000))
    lines = text[:-1].split(b"\n")
    assert len(lines) >= 25_000
    columns = parse_block(block_of(text, bytes([seed * 4])), len(lines) + 1)
    good = assert_parsed(columns, lines)
    assert 0.1 < good / len(lines) < 0.6


@pytest.mark.parametrize("odd", ODD_FIELDS)
def test_odd_fields_in_every_column(odd):
    lines = []
    for column in range(NUM_COLUMNS):
        fields = EMPTY_ROW.split(b"\t")
        fields[column] = odd
        lines.append(b"\t".join(fields))
    assert_parsed(parse_block(block_of(b"\n".join(lines) + b"\n"), len(lines) + 1), lines)


@pytest.mark.parametrize("padding", [b"0", b"\t", b"\n", b"\r", b"\xff", b"f"])
def test_the_text_ends_where_it_says(padding):
    """Every prefix of a row, as the last line of a block."""
    row = b"\t".join(valid_row(random.Random(1)))
    for size in range(len(row) + 1):
        for end in (b"\n", b"\r\n"):
            lines = [row, row[:size] + end[:-1]]
            assert_parsed(parse_block(block_of(row + b"\n" + row[:size] + end, padding), 2), lines)


def test_rows_without_any_value():
    assert len(EMPTY_ROW) - 1 == MIN_ROW_BYTES  # of a row without a label
    columns = parse_block(block_of((EMPTY_ROW + b"\n") * 1000), 1)
    assert columns.num_rows == 1000
    assert not columns.rejected
    assert not columns.integers_IR.any()
    assert not columns.ids_FR.any()


@pytest.mark.parametrize("rows", [0, 1, 1000])
def test_a_fault_after_rows_without_any_value(rows):
    """The last line fills a row up to its last column before it is refused."""
    bad = b"1" + b"\t7" * (NUM_COLUMNS - 1) + b"x"
    columns = parse_block(block_of((EMPTY_ROW + b"\n") * rows + bad + b"\n"), 1)
    assert list(columns.rejected) == [RejectedLine(rows, bad)]
    assert columns.num_rows == rows
    assert not columns.integers_IR.any()


def test_integers_and_ids_at_their_bounds():
    integers = [-(2**31), 2**31 - 1, 0, -1] * 3 + [7]
    ids = [2**32 - 1, 0, 1, 2**31] * 6 + [16, 0xABCDEF01]
    fields = [b"1", *(b"%d" % value for value in integers), *(b"%08x" % value for value in ids)]
    columns = parse_block(block_of(b"\t".join(fields) + b"\n"), 1)
    assert columns.labels_R.tolist() == [1]
    assert columns.integers_IR[:, 0].tolist() == integers
    assert columns.ids_FR[:, 0].tolist() == ids
    assert (columns.labels_R.dtype, columns.integers_IR.dtype, columns.ids_FR.dtype) == (np.uint8, np.int32, np.uint32)


@pytest.mark.parametrize("max_rejected", [1, 2, 5, 6])
def test_parsing_ends_at_max_rejected(max_rejected):
    bad_lines = (3, 4, 10, 17, 19)
    lines = [b"bad %d" % i if i in bad_lines else EMPTY_ROW for i in range(20)]
    columns = parse_block(block_of(b"\n".join(lines) + b"\n"), max_rejected)
    assert [line.line for line in columns.rejected] == list(bad_lines[:max_rejected])
    assert [line.text for line in columns.rejected] == [b"bad %d" % i for i in bad_lines[:max_rejected]]
    assert columns.num_rows == {1: 3, 2: 3, 5: 15, 6: 15}[max_rejected]


def test_a_long_line_comes_back_whole():
    long = b"0\t" + b"f" * 1_000_000
    columns = parse_block(block_of(long + b"\r\n" + EMPTY_ROW + b"\n"), 9)
    assert list(columns.rejected) == [RejectedLine(0, long + b"\r")]
    assert columns.num_rows == 1


integer_texts = st.one_of(
    st.just(b""),
    st.integers(-(2**31), 2**31 - 1).map(lambda value: b"%d" % value),
    st.builds(lambda sign, value, width: sign + b"%0*d" % (width, value), st.sampled_from((b"", b"-")),
              st.integers(0, 2**31 - 1), st.integers(1, 11)),
)  # fmt: skip
id_texts = st.one_of(
    st.just(b""),
    st.builds(lambda form, value: form % value, st.sampled_from((b"%x", b"%08x", b"%X", b"%05X")),
              st.integers(0, 2**32 - 1)),
)  # fmt: skip
rows_of_text = st.builds(
    lambda label, integers, ids, end: b"\t".join([label, *integers, *ids]) + end,
    st.sampled_from((b"0", b"1")),
    st.lists(integer_texts, min_size=NUM_INTEGER_FEATURES, max_size=NUM_INTEGER_FEATURES),
    st.lists(id_texts, min_size=NUM_CATEGORICAL_FEATURES, max_size=NUM_CATEGORICAL_FEATURES),
    st.sampled_from((b"\n", b"\r\n")),
)


@settings(deadline=None, max_examples=150)
@given(st.lists(rows_of_text, min_size=1, max_size=4))
def test_any_valid_row_is_parsed(rows):
    text = b"".join(rows)
    columns = parse_block(block_of(text), 1)
    assert not columns.rejected
    assert assert_parsed(columns, text[:-1].split(b"\n")) == len(rows)


def test_threads_do_not_share_arrays(criteo_lines):
    texts = ["".join(criteo_lines(200 + 40 * seed, seed=seed)).encode() for seed in range(6)]

    def parse_often(text: bytes) -> None:
        for _ in range(3):
            assert_parsed(parse_block(block_of(text), 1), text[:-1].split(b"\n"))

    with ThreadPoolExecutor(len(texts)) as pool:
        list(pool.map(parse_often, texts))


def test_a_short_block_after_a_long_one(criteo_lines):
    for rows in (300, 1, 40, 700, 2):
        text = "".join(criteo_lines(rows, seed=rows)).encode()
        assert assert_parsed(parse_block(block_of(text), 1), text[:-1].split(b"\n")) == rows


@pytest.mark.parametrize("rows", [0, 1, 250])
def test_columns_are_read_as_they_were_written(rows, criteo_lines, tmp_path):
    text = ("".join(criteo_lines(rows)) + "bad\n").encode()
    columns = parse_block(block_of(text), 9)
    write_columns(tmp_path / "block", columns)
    assert (tmp_path / "block").stat().st_size == PARSED_BYTES_PER_ROW * rows
    ids = np.array([read_ids(tmp_path / "block", column, rows) for column in range(NUM_CATEGORICAL_FEATURES)])
    np.testing.assert_array_equal(ids, columns.ids_FR)
    np.testing.assert_array_equal(read_integers(tmp_path / "block", rows), columns.integers_IR)
    np.testing.assert_array_equal(read_labels(tmp_path / "block", rows), columns.labels_R)
    bits = sum(read_missing(tmp_path / "block", rows)[i].astype(int) << i for i in range(13))
    np.testing.assert_array_equal(bits, columns.missing_R)
    assert len(columns.labels_R) == rows


@pytest.mark.parametrize(
    ("column", "field", "words"),
    [
        (0, b"", "column 1 (label): '', expected 0 or 1"),
        (0, b"2", "column 1 (label): '2', expected 0 or 1"),
        (0, b"01", "column 1 (label): '01', expected 0 or 1"),
        (1, b"+5", "column 2 (int_0): '+5', expected an integer of 32 bits, or nothing"),
        (4, b"1.5", "column 5 (int_3): '1.5', expected an integer of 32 bits, or nothing"),
        (13, b"-", "column 14 (int_12): '-', expected an integer of 32 bits, or nothing"),
        (2, b"2147483648", "column 3 (int_1): '2147483648', expected an integer of 32 bits, or nothing"),
        (2, b"000000000001", "column 3 (int_1): '000000000001', expected an integer of 32 bits, or nothing"),
        (14, b"g", "column 15 (cat_0): 'g', expected at most 8 hexadecimal digits, or nothing"),
        (20, b"0123456789", "column 21 (cat_6): '0123456789', expected at most 8 hexadecimal digits, or nothing"),
        (39, b"\xff", r"column 40 (cat_25): '\\xff', expected at most 8 hexadecimal digits, or nothing"),
        (39, b"\r", r"column 40 (cat_25): '\r', expected at most 8 hexadecimal digits, or nothing"),
        (15, b"f" * 41, f"column 16 (cat_1): '{'f' * 40}'..., expected at most 8 hexadecimal digits, or nothing"),
    ],
)
def test_what_is_said_of_a_bad_field(column, field, words):
    fields = EMPTY_ROW.split(b"\t")
    fields[column] = field
    assert explain(b"\t".join(fields) + b"\r") == words


@pytest.mark.parametrize(
    ("line", "columns"),
    [
        (b"", "1 column"),
        (b"\r", "1 column"),
        (b"0", "1 column"),
        (b"\t" * 37, "38 columns"),
        (EMPTY_ROW + b"\t", "41 columns"),
        (b"x" * 99, "1 column"),
        (EMPTY_ROW.replace(b"\t", b" "), "1 column"),
    ],
)
def test_what_is_said_of_a_wrong_number_of_columns(line, columns):
    words = f"{columns}, expected 40: label, 13 integers, 26 hexadecimal ids, tab separated"
    assert explain(line) == words
    assert list(parse_block(block_of(line + b"\n"), 2).rejected) == [RejectedLine(0, line)]


def test_nothing_is_said_of_a_row(criteo_lines):
    for line in criteo_lines(20):
        assert explain(line.removesuffix("\n").encode()) is None


def test_rows_without_labels(criteo_lines):
    lines = [line.rstrip("\n").encode() for line in criteo_lines(50)]
    unlabelled = [line.partition(b"\t")[2] for line in lines]
    expected = parse_block(block_of(b"\n".join(lines) + b"\n"), 1)
    expected = [array.copy() for array in (expected.integers_IR, expected.ids_FR, expected.missing_R)]
    block = block_of(b"\r\n".join(unlabelled) + b"\n")
    assert not has_labels(block)
    found = parse_block(block, 1, has_labels=False)
    assert (found.num_rows, len(found.rejected)) == (50, 0)
    for array, other in zip((found.integers_IR, found.ids_FR, found.missing_R), expected, strict=True):
        np.testing.assert_array_equal(array, other)
    assert set(found.labels_R.view(np.int8).tolist()) == {-1}
    assert has_labels(block_of(b"\n".join(lines) + b"\n"))
    assert {explain(line, has_labels=False) for line in unlabelled} == {None}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"x" + b"\t" * 38, "column 1 (int_0): 'x', expected an integer of 32 bits, or nothing"),
        (b"\t" * 38 + b"g", "column 39 (cat_25): 'g', expected at most 8 hexadecimal digits, or nothing"),
        (
            EMPTY_ROW,
            "40 columns, expected 39 as in the other lines: no label, 13 integers, 26 hexadecimal ids; a line ",
        ),
        (b"", "1 column, expected 39 as in the other lines"),
    ],
)
def test_lines_that_are_no_row_without_a_label(line, words):
    rows = b"\t" * 38 + b"\n"
    found = parse_block(block_of(rows * 2 + line + b"\n" + rows * 3), 9, has_labels=False)
    assert list(found.rejected) == [RejectedLine(2, line)]
    assert found.num_rows == 5
    assert (explain(line, has_labels=False) or "").startswith(words)
