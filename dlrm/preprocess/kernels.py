"""Loops over bytes and ids, compiled by numba, where polars was measured to be too slow (LOG.md).

They release the interpreter's lock, so that threads run them side by side. Shapes: R rows of a block, I integer
features, F categorical features, C columns.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt

from dlrm.schema.criteo import NO_LABEL, NUM_CATEGORICAL_FEATURES, NUM_COLUMNS, NUM_INTEGER_FEATURES

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """Compiles a function at its first call.

    The result is kept on disk: beside the function's file or, if that folder can't be written, in the user's cache.
    """
    return cast(Function, numba.njit(function, nogil=True, cache=True))


MAX_ID_DIGITS = 8
_NO_LABEL = np.int8(NO_LABEL).view(np.uint8)
_TAB, _NEWLINE, _RETURN, _MINUS, _ZERO, _ONE = (np.uint8(byte) for byte in b"\t\n\r-01")
_NO_DIGIT = 255
_HEX = np.full(256, _NO_DIGIT, np.uint8)
for _digits in (b"0123456789abcdef", b"0123456789ABCDEF"):
    for _value, _byte in enumerate(_digits):
        _HEX[_byte] = _value
_MIN_INT, _MAX_INT = -(2**31), 2**31 - 1


@compiled
def parse_rows(
    text: npt.NDArray[np.uint8],
    size: int,
    labels_R: npt.NDArray[np.uint8],
    integers_IR: npt.NDArray[np.int32],
    ids_FR: npt.NDArray[np.uint32],
    missing_R: npt.NDArray[np.uint16],
    rejected: npt.NDArray[np.int64],
    has_labels: bool,
) -> tuple[int, int]:
    """Parses whole lines of Criteo text. A missing integer or id is 0.

    Args:
        text: `size` bytes that end with a newline, and `raw.PADDING` bytes more.
        missing_R: takes a bit for each missing integer; the lowest bit is that of the first column.
        rejected: takes (line, start, stop) for each line that is not a row: its number, and its bytes [start, stop)
            without the newline. Parsing ends once `rejected` is full.
        has_labels: whether a line begins with its label; if not, labels are NO_LABEL in int8.

    Returns:
        Numbers of rows and of rejected lines. The values of the rows are the first ones of each array.
    """
    row = line = num_rejected = at = 0
    while at < size:
        start = at
        good = not has_labels or ((text[at] == _ZERO or text[at] == _ONE) and text[at + 1] == _TAB)
        if good:
            labels_R[row] = _NO_LABEL
            if has_labels:
                labels_R[row] = text[at] - _ZERO
                at += 2
            missing = np.uint16(0)
            for column in range(NUM_INTEGER_FEATURES):
                negative = text[at] == _MINUS
                if negative:
                    at += 1
                first = at
                value = np.int64(0)
                while at - first < 11:
                    digit = np.uint8(text[at] - _ZERO)
                    if digit > 9:
                        break
                    value = value * 10 + np.int64(digit)
                    at += 1
                if negative:
                    value = -value
                if text[at] != _TAB or (negative and at == first) or value < _MIN_INT or value > _MAX_INT:
                    good = False
                    break
                integers_IR[column, row] = value
                if at == first:
                    missing |= np.uint16(1 << column)
                at += 1
            missing_R[row] = missing
        if good:
            for column in range(NUM_CATEGORICAL_FEATURES):
                number = np.uint32(0)
                digits = 0
                # Most ids have eight digits: these are read at once. `raw.PADDING` makes it safe at the text's end.
                d0, d1, d2, d3 = _HEX[text[at]], _HEX[text[at + 1]], _HEX[text[at + 2]], _HEX[text[at + 3]]
                d4, d5, d6, d7 = _HEX[text[at + 4]], _HEX[text[at + 5]], _HEX[text[at + 6]], _HEX[text[at + 7]]
                if (d0 | d1 | d2 | d3 | d4 | d5 | d6 | d7) < 16:
                    high = (np.uint32(d0) << 28) | (np.uint32(d1) << 24) | (np.uint32(d2) << 20) | (np.uint32(d3) << 16)
                    low = (np.uint32(d4) << 12) | (np.uint32(d5) << 8) | (np.uint32(d6) << 4) | np.uint32(d7)
                    number = np.uint32(high | low)
                    at += 8
                else:
                    while digits < MAX_ID_DIGITS and _HEX[text[at]] < 16:
                        number = np.uint32((number << 4) | np.uint32(_HEX[text[at]]))
                        digits += 1
                        at += 1
                ids_FR[column, row] = number
                if column < NUM_CATEGORICAL_FEATURES - 1:
                    if text[at] != _TAB:
                        good = False
                        break
                    at += 1
            if good:
                if text[at] == _RETURN:
                    at += 1
                good = text[at] == _NEWLINE
        if good:
            row += 1
        else:
            at = start
            while text[at] != _NEWLINE:
                at += 1
            rejected[num_rejected] = line, start, at
            num_rejected += 1
            if num_rejected == len(rejected):
                return row, num_rejected
        at += 1
        line += 1
    return row, num_rejected


_KEYS = np.random.SeedSequence(0x524F5753).generate_state(NUM_COLUMNS, np.uint32)  # "ROWS"


@compiled
def hash_rows(
    labels_R: npt.NDArray[np.uint8],
    integers_IR: npt.NDArray[np.int32],
    ids_FR: npt.NDArray[np.uint32],
    missing_R: npt.NDArray[np.uint16],
    hashes_R: npt.NDArray[np.uint64],
) -> np.uint64:
    """A hash of each parsed row, and their sum, which does not depend on the order of the rows.

    A key is added to each value, and pairs of such sums are multiplied (NH of UMAC). Since the factors have 32 bits, a
    CPU multiplies four or more pairs at once.
    """
    total = np.uint64(0)
    for start in range(0, len(labels_R), _TILE):
        stop = min(len(labels_R), start + _TILE)
        for row in range(start, stop):
            rest = np.uint32(missing_R[row]) << np.uint32(8) | np.uint32(labels_R[row])
            one = np.uint32(np.uint32(integers_IR[NUM_INTEGER_FEATURES - 1, row]) + _KEYS[0])
            hashes_R[row] = np.uint64(one) * np.uint64(np.uint32(rest + _KEYS[1]))
        for column in range(0, NUM_INTEGER_FEATURES - 1, 2):
            one_key, other_key = _KEYS[2 + column], _KEYS[3 + column]
            for row in range(start, stop):
                one = np.uint32(np.uint32(integers_IR[column, row]) + one_key)
                other = np.uint32(np.uint32(integers_IR[column + 1, row]) + other_key)
                hashes_R[row] += np.uint64(one) * np.uint64(other)
        for column in range(0, NUM_CATEGORICAL_FEATURES, 2):
            one_key, other_key = (
                _KEYS[1 + NUM_INTEGER_FEATURES + column],
                _KEYS[2 + NUM_INTEGER_FEATURES + column],
            )
            for row in range(start, stop):
                one = np.uint32(ids_FR[column, row] + one_key)
                other = np.uint32(ids_FR[column + 1, row] + other_key)
                hashes_R[row] += np.uint64(one) * np.uint64(other)
        for row in range(start, stop):
            number = (hashes_R[row] ^ (hashes_R[row] >> np.uint64(32))) * np.uint64(0x9E3779B97F4A7C15)
            number = (number ^ (number >> np.uint64(29))) * np.uint64(0xD6E8FEB86659FD93)
            hashes_R[row] = number ^ (number >> np.uint64(32))
            total += hashes_R[row]
    return total


@compiled
def mix(number: np.uint32) -> np.uint32:
    """A bijection of 32-bit numbers that spreads any set of ids evenly, and maps 0 to 0 (lowbias32 of C. Wellons)."""
    x = np.uint32(number)
    x = np.uint32(x ^ (x >> np.uint32(16)))
    x = np.uint32(x * np.uint32(0x7FEB352D))
    x = np.uint32(x ^ (x >> np.uint32(15)))
    x = np.uint32(x * np.uint32(0x846CA68B))
    return np.uint32(x ^ (x >> np.uint32(16)))


@compiled
def unmix(number: np.uint32) -> np.uint32:
    """The inverse of `mix`."""
    x = np.uint32(number)
    x = np.uint32(x ^ (x >> np.uint32(16)))
    x = np.uint32(x * np.uint32(0x43021123))
    x = np.uint32(x ^ (x >> np.uint32(15)) ^ (x >> np.uint32(30)))
    x = np.uint32(x * np.uint32(0x1D69E2A5))
    return np.uint32(x ^ (x >> np.uint32(16)))


@compiled
def _log2(size: int) -> int:
    """The n of 2**n."""
    bits = 0
    while (1 << bits) < size:
        bits += 1
    return bits


@compiled
def _find_slot(
    slots: npt.NDArray[np.uint64], key: np.uint64, prefix_bits: int, table_bits: int
) -> tuple[np.uint64, np.uint64]:
    """The place in a hash table of a key other than 0, and its entry; if it has none, the place for one, and 0.

    The search begins at the key's first bits after its prefix, which all keys of the table share, and goes from slot to
    slot (linear probing). Some slot must be free.

    Args:
        slots: 2**table_bits entries, `key << 32 | value`; 0 if a slot is free.
    """
    mask = np.uint64(len(slots) - 1)
    at = ((key << np.uint64(prefix_bits)) & np.uint64(0xFFFFFFFF)) >> np.uint64(32 - table_bits)
    while True:
        slot = slots[at]
        if slot == np.uint64(0):
            return at, np.uint64(0)
        if (slot >> np.uint64(32)) == key:
            return at, slot
        at = (at + np.uint64(1)) & mask


@compiled
def _has_prefix(key: np.uint64, prefix_bits: int, prefix: int) -> bool:
    """Whether the first bits of a 32-bit key are those of `prefix`."""
    return prefix_bits == 0 or (key >> np.uint64(32 - prefix_bits)) == np.uint64(prefix)


@compiled
def count_ids(
    ids_R: npt.NDArray[np.uint32],
    first_row: int,
    slots: npt.NDArray[np.uint64],
    first_rows: npt.NDArray[np.int64],
    used: int,
    limit: int,
    prefix_bits: int,
    prefix: int,
) -> tuple[int, int]:
    """Counts ids other than 0 in a hash table (see `_find_slot`) with entries `mix(id) << 32 | count`.

    Args:
        first_rows: takes the row in which each slot's id came first; of length 0 if that is not wanted.
        used: slots taken so far.
        limit: slots that may be taken.
        prefix_bits: only ids whose mixed value begins with these bits of `prefix` are counted.

    Returns:
        Number of ids dealt with, fewer than all if the limit was reached, and slots taken.
    """
    table_bits = _log2(len(slots))
    for i in range(len(ids_R)):
        if ids_R[i] == 0:
            continue
        key = np.uint64(mix(ids_R[i]))
        if not _has_prefix(key, prefix_bits, prefix):
            continue
        at, slot = _find_slot(slots, key, prefix_bits, table_bits)
        if slot == np.uint64(0):
            if used >= limit:
                return i, used
            slots[at] = (key << np.uint64(32)) | np.uint64(1)
            if len(first_rows) > 0:
                first_rows[at] = first_row + i
            used += 1
        elif (slot & np.uint64(0xFFFFFFFF)) != np.uint64(0xFFFFFFFF):
            slots[at] = slot + np.uint64(1)
    return len(ids_R), used


@compiled
def insert_slots(
    entries: npt.NDArray[np.uint64],
    entry_first_rows: npt.NDArray[np.int64],
    slots: npt.NDArray[np.uint64],
    first_rows: npt.NDArray[np.int64],
    prefix_bits: int,
) -> None:
    """Puts entries `mix(id) << 32 | value`, each id once and none of them 0, into a hash table that has room."""
    table_bits = _log2(len(slots))
    for i in range(len(entries)):
        at, _ = _find_slot(slots, entries[i] >> np.uint64(32), prefix_bits, table_bits)
        slots[at] = entries[i]
        if len(first_rows) > 0:
            first_rows[at] = entry_first_rows[i]


@compiled
def look_up_ids(
    ids_R: npt.NDArray[np.uint32],
    slots: npt.NDArray[np.uint64],
    prefix_bits: int,
    prefix: int,
    indices_R: npt.NDArray[np.int32],
) -> None:
    """Writes to `indices_R` the values of the ids with this prefix that a hash table has; leaves the others."""
    table_bits = _log2(len(slots))
    for i in range(len(ids_R)):
        if ids_R[i] == 0:
            continue
        key = np.uint64(mix(ids_R[i]))
        if not _has_prefix(key, prefix_bits, prefix):
            continue
        _, slot = _find_slot(slots, key, prefix_bits, table_bits)
        if slot != np.uint64(0):
            indices_R[i] = np.int32(slot & np.uint64(0xFFFFFFFF))


@compiled
def mix_ids(ids: npt.NDArray[np.uint32], mixed: npt.NDArray[np.uint32]) -> None:
    """`mix` of each id."""
    for i in range(len(ids)):
        mixed[i] = mix(ids[i])


@compiled
def unmix_ids(mixed: npt.NDArray[np.uint32], ids: npt.NDArray[np.uint32]) -> None:
    """`unmix` of each mixed id."""
    for i in range(len(mixed)):
        ids[i] = unmix(mixed[i])


GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)


@compiled
def split_mix(state: np.uint64) -> np.uint64:
    """The output of SplitMix64 for a state. Successive states differ by GOLDEN_GAMMA (Steele et al., OOPSLA 2014)."""
    z = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@compiled
def shuffle_keys(seed: np.uint64, first_row: int, keys_R: npt.NDArray[np.uint64]) -> None:
    """A random 64-bit key for each row, which depends only on its number and the seed."""
    for i in range(len(keys_R)):
        keys_R[i] = split_mix(seed + np.uint64(first_row + i + 1) * GOLDEN_GAMMA)


@compiled
def bucket_sizes(keys_R: npt.NDArray[np.uint64], sizes: npt.NDArray[np.int64]) -> None:
    """Adds to `sizes` how many keys fall into each of len(sizes) equal ranges."""
    count = np.uint64(len(sizes))
    for i in range(len(keys_R)):
        sizes[((keys_R[i] >> np.uint64(32)) * count) >> np.uint64(32)] += 1


_TILE = 256


@compiled
def scatter_rows(
    keys_R: npt.NDArray[np.uint64],
    starts: npt.NDArray[np.int64],
    dense_IR: npt.NDArray[np.int32],
    indices_FR: npt.NDArray[np.int32],
    labels_R: npt.NDArray[np.uint8],
    sorted_keys_R: npt.NDArray[np.uint64],
    records_RC: npt.NDArray[np.int32],
) -> None:
    """Turns columns into records (dense bits, indices, label), grouped by bucket, in row order within each.

    Args:
        starts: first position of each bucket; on return, the position after its last row.
    """
    count = np.uint64(len(starts))
    places = np.empty(_TILE, np.int64)
    # Tile by tile, so that the records that a tile writes to stay in the cache from column to column.
    for first in range(0, len(keys_R), _TILE):
        rows = min(_TILE, len(keys_R) - first)
        for i in range(rows):
            key = keys_R[first + i]
            bucket = ((key >> np.uint64(32)) * count) >> np.uint64(32)
            places[i] = starts[bucket]
            sorted_keys_R[starts[bucket]] = key
            starts[bucket] += 1
        for column in range(NUM_INTEGER_FEATURES):
            for i in range(rows):
                records_RC[places[i], column] = dense_IR[column, first + i]
        for column in range(NUM_CATEGORICAL_FEATURES):
            for i in range(rows):
                records_RC[places[i], NUM_INTEGER_FEATURES + column] = indices_FR[column, first + i]
        for i in range(rows):
            records_RC[places[i], NUM_COLUMNS - 1] = labels_R[first + i]


@compiled
def gather_rows(
    order_R: npt.NDArray[np.int64],
    records_RC: npt.NDArray[np.int32],
    dense_RI: npt.NDArray[np.int32],
    indices_RF: npt.NDArray[np.int32],
    labels_R: npt.NDArray[np.int32],
) -> None:
    """Splits records, taken in `order_R`, into the three arrays of a day."""
    for i in range(len(order_R)):
        source = order_R[i]
        for column in range(NUM_INTEGER_FEATURES):
            dense_RI[i, column] = records_RC[source, column]
        for column in range(NUM_CATEGORICAL_FEATURES):
            indices_RF[i, column] = records_RC[source, NUM_INTEGER_FEATURES + column]
        labels_R[i] = records_RC[source, NUM_COLUMNS - 1]
