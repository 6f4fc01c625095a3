"""The rows of a preprocessing run, and where they go."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from dlrm.schema.criteo import num_kaggle_training_rows


@dataclass(frozen=True)
class Block:
    """Rows that were parsed together.

    Attributes:
        first_row: number of its first row, counted over all files in order.
        day_row: number of its first row, counted from the start of its day.
        minimum: smallest integer of the block's rows.
    """

    day: int
    number: int
    rows: int
    first_row: int
    day_row: int
    minimum: int


@dataclass(frozen=True)
class Layout:
    """All rows, in the order of the raw files: training rows first, then held-out ones.

    Attributes:
        days: blocks of each day.
    """

    days: tuple[tuple[Block, ...], ...]
    num_train_rows: int

    @staticmethod
    def build(parsed: Sequence[Sequence[tuple[int, int]]], kaggle: bool) -> "Layout":
        """Numbers the rows, and holds out the last day or, if `kaggle`, the last seventh of the only file.

        Args:
            parsed: for each day the rows and the smallest integer of each block.
        """
        days = []
        first_row = day_row = 0
        for day, blocks in enumerate(parsed):
            placed, day_row = [], 0
            for number, (rows, minimum) in enumerate(blocks):
                placed.append(Block(day, number, rows, first_row + day_row, day_row, minimum))
                day_row += rows
            days.append(tuple(placed))
            first_row += day_row
        # `day_row` is now the last day's number of rows.
        return Layout(tuple(days), num_kaggle_training_rows(first_row) if kaggle else first_row - day_row)

    @property
    def blocks(self) -> Iterator[Block]:
        """All blocks, in order."""
        return (block for day in self.days for block in day)

    @cached_property
    def day_rows(self) -> tuple[int, ...]:
        """Rows of each day."""
        return tuple(sum(block.rows for block in day) for day in self.days)

    @property
    def num_rows(self) -> int:
        """Rows of all days."""
        return sum(self.day_rows)

    def train_rows_of(self, block: Block) -> int:
        """How many rows of a block train. They are its first ones."""
        return min(block.rows, max(0, self.num_train_rows - block.first_row))
