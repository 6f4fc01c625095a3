"""Says which rows of a split each rank takes at each step."""

from collections.abc import Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Span:
    """Rows [start, stop) of a split, which one rank takes at one step.

    Attributes:
        padded_rows: samples of the rank's batch, the same on all ranks: a rank with fewer rows adds an empty sample.
        global_rows: rows that all ranks take together at this step.
    """

    step: int
    start: int
    stop: int
    padded_rows: int
    global_rows: int

    @property
    def rows(self) -> int:
        """Rows of this rank."""
        return self.stop - self.start


@dataclass(frozen=True)
class Partition:
    """Cuts `num_rows` rows, in order, into steps of one batch per rank.

    Step s holds rows [s * G, (s + 1) * G), with G the global batch, and rank r takes the r-th part of them. The last
    step's rows are shared as evenly as possible. So every row is in exactly one span, and every rank has the same
    number of steps. A run on another number of ranks can continue a pass from a row number alone.

    Attributes:
        limit: most steps of a pass; None for no limit.
        first_row: first row of the rest of a pass. The rows before it were taken in `first_step` steps, of any size.
    """

    num_rows: int
    batch_size: int
    world_size: int
    drop_last: bool = False
    limit: int | None = None
    first_row: int = 0
    first_step: int = 0

    def resumed(self, row: int, step: int) -> "Partition":
        """The rest of a pass whose first `row` rows were taken in `step` steps."""
        return replace(self, first_row=min(row, self.num_rows), first_step=step)

    @property
    def is_regular(self) -> bool:
        """Whether each step has the same rows as in a pass from the start."""
        return self.first_row == min(self.first_step * self.global_batch_size, self.num_rows)

    @property
    def global_batch_size(self) -> int:
        """Rows of a full step over all ranks."""
        return self.batch_size * self.world_size

    @property
    def num_steps(self) -> int:
        """Steps of one pass, including those before `first_row`; the same on every rank."""
        full, left = divmod(self.num_rows - self.first_row, self.global_batch_size)
        steps = self.first_step + full + (left > 0 and not self.drop_last)
        return steps if self.limit is None else max(self.first_step, min(steps, self.limit))

    @property
    def num_used_rows(self) -> int:
        """Rows that all ranks take in one pass."""
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
        """Rows that the pass has taken before this step."""
        return min(self.num_rows, self.first_row + (step - self.first_step) * self.global_batch_size)
