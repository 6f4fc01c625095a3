"""Which rows of a split each rank takes at each step."""

from collections.abc import Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Span:
    """Rows [start, stop) of a split for one rank at one step, and how many all ranks take together.

    `padded_rows` is the same on all ranks: a rank that has fewer rows of its own fills up with empty samples.
    """

    step: int
    start: int
    stop: int
    padded_rows: int
    global_rows: int

    @property
    def rows(self) -> int:
        """Rows of this rank's own."""
        return self.stop - self.start


@dataclass(frozen=True)
class Partition:
    """Cuts `num_rows` rows, in order, into steps of one batch per rank.

    The rows of a step do not depend on how many ranks share them: step s holds rows [s * G, (s + 1) * G), with G the
    global batch, and rank r the r-th part of it. What is left for the last step is shared as evenly as can be. So every
    row is in exactly one span, every rank has the same number of steps, and a run goes on at another world size from
    a row number alone.

    Attributes:
        limit: steps of a pass at the most.
        first_row: where the pass goes on; the rows before it were taken in `first_step` steps, of whatever size.
    """

    num_rows: int
    batch_size: int
    world_size: int
    drop_last: bool = False
    limit: int | None = None
    first_row: int = 0
    first_step: int = 0

    def resumed(self, row: int, step: int) -> "Partition":
        """The rest of a pass of which `row` rows were taken in `step` steps."""
        return replace(self, first_row=min(row, self.num_rows), first_step=step)

    @property
    def is_regular(self) -> bool:
        """Whether each step has the rows that it has in a pass from the start."""
        return self.first_row == min(self.first_step * self.global_batch_size, self.num_rows)

    @property
    def global_batch_size(self) -> int:
        """Rows of a full step over all ranks."""
        return self.batch_size * self.world_size

    @property
    def num_steps(self) -> int:
        """Steps of one pass, those before `first_row` included; the same on every rank."""
        full, left = divmod(self.num_rows - self.first_row, self.global_batch_size)
        steps = self.first_step + full + (left > 0 and not self.drop_last)
        return steps if self.limit is None else max(self.first_step, min(steps, self.limit))

    @property
    def num_used_rows(self) -> int:
        """Rows of one pass over all ranks."""
        return self.rows_before(self.num_steps)

    def span(self, step: int, rank: int) -> Span:
        """The rows of `rank` at `step`."""
        first = self.rows_before(step)
        rows = min(self.global_batch_size, self.num_rows - first)
        share, larger = divmod(rows, self.world_size)
        start = first + rank * share + min(rank, larger)
        return Span(step, start, start + share + (rank < larger), share + (larger > 0), rows)

    def spans(self, rank: int) -> Iterator[Span]:
        """All spans of `rank`, in order."""
        return (self.span(step, rank) for step in range(self.first_step, self.num_steps))

    def rows_before(self, step: int) -> int:
        """Rows of the pass that steps before this one take."""
        return min(self.num_rows, self.first_row + (step - self.first_step) * self.global_batch_size)
