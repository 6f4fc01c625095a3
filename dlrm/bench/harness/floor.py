"""The floor: the least time that this machine needs for a piece of work.

Operations are divided by the machine's matrix rate, bytes by its memory bandwidth. `dlrm/cost/least_work.py` counts
the work; docs/design/floor.md explains both.
"""

from dataclasses import asdict, dataclass
from typing import Any

from dlrm.cost.work import Work


@dataclass(frozen=True)
class Ceilings:
    """What the machine reached in the same call: operations/s of a large product, bytes/s of a copy."""

    flop_per_second: float
    bytes_per_second: float


@dataclass(frozen=True)
class Floor:
    """The least seconds of some work, whose kernels and host memory do not count.

    `seconds` assumes that matrix products and memory traffic hide each other completely: the strict bound.
    `sum_seconds` assumes that neither hides the other.
    """

    work: Work
    ceilings: Ceilings

    @property
    def matrix_seconds(self) -> float:
        """Seconds of the products alone."""
        return self.work.flop / self.ceilings.flop_per_second

    @property
    def memory_seconds(self) -> float:
        """Seconds of the memory traffic alone."""
        return self.work.num_bytes / self.ceilings.bytes_per_second

    @property
    def seconds(self) -> float:
        """The larger of the two."""
        return max(self.matrix_seconds, self.memory_seconds)

    @property
    def sum_seconds(self) -> float:
        """Both, one after the other."""
        return self.matrix_seconds + self.memory_seconds

    def to_json(self) -> dict[str, Any]:
        """The work, the ceilings and the seconds, for a result."""
        names = ("matrix_seconds", "memory_seconds", "seconds", "sum_seconds")
        work = {"flop": self.work.flop, "num_bytes": self.work.num_bytes}
        return {**work, **asdict(self.ceilings), **{name: getattr(self, name) for name in names}}
