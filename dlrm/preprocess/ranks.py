"""Several processes that preprocess together, started by torchrun on a folder that all of them see."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.distributed import Store

T = TypeVar("T")

# A stage of terabytes may keep the others waiting for hours. The launcher ends those who wait for a lost rank.
_LONGEST_WAIT = timedelta(days=30)


@dataclass(frozen=True)
class Ranks:
    """This process among those of the job."""

    rank: int = 0
    world_size: int = 1
    store: "Store | None" = None
    _barriers: "Iterator[int]" = field(default_factory=count)

    @staticmethod
    def start() -> "Ranks":
        """Joins the job that the launcher's environment names; alone without one."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return Ranks()
        from torch.distributed import rendezvous

        store, rank, world_size = next(rendezvous("env://"))
        return Ranks(rank, world_size, store)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that speaks."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's share of `items`."""
        return list(items[self.rank :: self.world_size])

    def barrier(self) -> None:
        """Waits until all are here. What they wrote before it is then seen by all."""
        if self.store is None:
            return
        name = f"preprocess/{next(self._barriers)}"
        if self.store.add(f"{name}/count", 1) == self.world_size:
            self.store.set(f"{name}/open", "1")
        self.store.wait([f"{name}/open"], _LONGEST_WAIT)
