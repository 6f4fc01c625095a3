"""What a sharding plan is, for people and for plan.json: which ranks hold which part of each table. No torch here."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dlrm.system.console import align

GIB = 2**30


@dataclass(frozen=True)
class TablePlacement:
    """One table and the ranks that hold it.

    Attributes:
        gib: weights of the whole table, in GiB.
        optimizer_gib: optimizer state of the whole table, in GiB.
        sharding: TorchRec's sharding type.
        kernel: TorchRec's compute kernel.
        ranks: ranks that hold a part.
        gib_by_rank: weights and optimizer state that each of `ranks` holds, in GiB.
    """

    table: str
    rows: int
    dim: int
    gib: float
    optimizer_gib: float
    sharding: str
    kernel: str
    ranks: tuple[int, ...]
    gib_by_rank: tuple[float, ...]


@dataclass(frozen=True)
class Placement:
    """The tables of a model on `world_size` ranks."""

    world_size: int
    tables: tuple[TablePlacement, ...]

    @property
    def gib(self) -> float:
        """Weights of all tables in GiB; the "collective size" of the public example's results table."""
        return sum(table.gib for table in self.tables)

    @property
    def gib_per_rank(self) -> list[float]:
        """Weights and optimizer state of tables in GiB, by rank."""
        return self._gib_per_rank_of(self.tables)

    def _gib_per_rank_of(self, tables: Iterable[TablePlacement]) -> list[float]:
        totals = [0.0] * self.world_size
        for table in tables:
            for rank, gib in zip(table.ranks, table.gib_by_rank, strict=True):
                totals[rank] += gib
        return totals

    def host_bytes(self, device: str, ranks_per_host: int) -> int:
        """Bytes of tables and optimizer state in the memory of the host that holds the most.

        Args:
            device: `cpu`, where all tables are in host memory, or `cuda`, where those with a UVM kernel are.
        """
        on_host = (table for table in self.tables if device == "cpu" or "uvm" in table.kernel)
        totals = self._gib_per_rank_of(on_host)
        hosts = range(0, self.world_size, ranks_per_host)
        return int(max(sum(totals[first : first + ranks_per_host]) for first in hosts) * GIB)

    def to_json(self) -> dict[str, Any]:
        """The content of plan.json."""
        return {
            "world_size": self.world_size,
            "tables_gib": self.gib,
            "gib_per_rank": self.gib_per_rank,
            "tables": [asdict(table) for table in self.tables],
        }

    def to_text(self) -> str:
        """A line for each table, then a line for each rank."""
        ranks = [f"rank {rank}: {gib:.4f} GiB with optimizer state" for rank, gib in enumerate(self.gib_per_rank)]
        return "\n".join([*show_tables(self.tables), *ranks])

    def summary(self) -> str:
        """The plan in one line."""
        kinds = sorted({f"{table.sharding}/{table.kernel}" for table in self.tables})
        most = max(self.gib_per_rank)
        weights = f"{len(self.tables)} tables, {self.gib:.2f} GiB of weights"
        return f"{weights}, {', '.join(kinds)}, at most {most:.2f} GiB a rank with optimizer state"


def show_tables(tables: Sequence[TablePlacement]) -> list[str]:
    """A head, and an aligned line for each table."""
    head = ("table", "rows", "dim", "GiB", "sharding", "kernel", "ranks")
    lines = [
        (t.table, f"{t.rows:,}", str(t.dim), f"{t.gib:.4f}", t.sharding, t.kernel, _show_ranks(t.ranks)) for t in tables
    ]
    return align([head, *lines], right={1, 2, 3})


def _show_ranks(ranks: tuple[int, ...]) -> str:
    """`0-7` for three ranks or more in a row, else `0,2`."""
    if len(ranks) > 2 and ranks == tuple(range(ranks[0], ranks[-1] + 1)):
        return f"{ranks[0]}-{ranks[-1]}"
    return ",".join(map(str, ranks))
