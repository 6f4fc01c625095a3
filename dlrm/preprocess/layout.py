"""Which rows a preprocessing run has, and where they go."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from dlrm.schema import num_kaggle_training_rows


@dataclass(frozen=True)
class Block:
    """Rows that were parsed together.

    Attributes:
        first_row: of all rows, in the order of the files.
        day_row: the same within the block's day.
    """

    day: int
    number: int
    rows: int
    first_row: int
    day_row: int
    minimum: int
    positives: int


@dataclass(frozen=True)
class Layout:
    """All rows, in the order of the raw files: training rows first, then held-out ones."""

    names: tuple[str, ...]
    blocks: tuple[Block, ...]
    num_train_rows: int

    @staticmethod
    def build(names: tuple[str, ...], blocks: tuple[Block, ...], kaggle: bool) -> "Layout":
        """With the rule of the data set: the last day, or the last seventh of the only file, is held out."""
        rows = sum(block.rows for block in blocks)
        last = sum(block.rows for block in blocks if block.day == len(names) - 1)
        return Layout(names, blocks, num_kaggle_training_rows(rows) if kaggle else rows - last)

    @property
    def num_rows(self) -> int:
        """Rows of all days."""
        return sum(block.rows for block in self.blocks)

    def of_day(self, day: int) -> tuple[Block, ...]:
        """Blocks of a day, in order."""
        return tuple(block for block in self.blocks if block.day == day)

    def day_rows(self, day: int) -> int:
        """Rows of a day."""
        return sum(block.rows for block in self.of_day(day))

    def train_rows_of(self, block: Block) -> int:
        """Rows of a block, from its start, that train."""
        return min(block.rows, max(0, self.num_train_rows - block.first_row))


def place_blocks(facts: list[list[dict[str, int]]]) -> Iterator[Block]:
    """Blocks, from what was recorded of each when it was parsed, day by day."""
    first_row = 0
    for day, blocks in enumerate(facts):
        day_rows = list(accumulate((block["rows"] for block in blocks), initial=0))
        for number, block in enumerate(blocks):
            yield Block(
                day,
                number,
                block["rows"],
                first_row + day_rows[number],
                day_rows[number],
                block["minimum"],
                block["positives"],
            )
        first_row += day_rows[-1]
