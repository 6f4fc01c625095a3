"""Several processes that preprocess together, in a folder that all of them see."""

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, TypeVar

from typing_extensions import Self

from dlrm.errors import LaunchError
from dlrm.ranks.launcher import adopt_launcher

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch.distributed import Store

T = TypeVar("T")

_SECONDS_BETWEEN_LOOKS = 0.05
_FAILED, _LEFT = "preprocess/failed", "preprocess/left"


@dataclass(frozen=True)
class Ranks:
    """This process, as one of those of the job."""

    rank: int = 0
    world_size: int = 1
    store: "Store | None" = None
    _barriers: "Iterator[int]" = field(default_factory=count)

    @staticmethod
    def start() -> "Ranks":
        """Joins the job that the launcher's environment names. Without one, the process works alone.

        Raises:
            LaunchError: if the environment is incomplete, or the ranks can't meet.
        """
        adopt_launcher()
        if os.environ.get("WORLD_SIZE", "1") == "1":
            return Ranks()
        from torch.distributed import DistNetworkError, rendezvous

        try:
            store, rank, world_size = next(rendezvous("env://"))
        except (DistNetworkError, ValueError) as error:
            raise LaunchError(f"the ranks can't meet: {str(error).splitlines()[0]}. Start with torchrun.") from None
        return Ranks(rank, world_size, store)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Reports an error to the others, so that they do not wait. Rank 0, which may host the store, leaves last."""
        if self.store is None:
            return
        with suppress(RuntimeError):  # the store may be gone
            if kind is not None:
                self.store.compare_set(_FAILED, "", str(self.rank))  # the first one that failed
            elif self.store.add(_LEFT, 1) < self.world_size and self.is_main:
                self._wait(lambda store: store.add(_LEFT, 0) == self.world_size)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's share of `items`."""
        return list(items[self.rank :: self.world_size])

    def barrier(self) -> None:
        """Waits until all processes are here. Each then sees what the others wrote before.

        Raises:
            LaunchError: if one of them has failed, or the one that hosts the store is gone.
        """
        if self.store is None:
            return
        name = f"preprocess/{next(self._barriers)}"
        try:
            self.store.add(name, 1)
            self._wait(lambda store: store.add(name, 0) >= self.world_size)
        except RuntimeError:
            raise LaunchError("lost rank 0; its error, if there is one, says why. Continue with --resume.") from None

    def _wait(self, is_done: "Callable[[Store], bool]") -> None:
        assert self.store is not None
        while not is_done(self.store):
            if self.store.check([_FAILED]):
                rank = self.store.get(_FAILED).decode()
                raise LaunchError(f"rank {rank} has failed; its error says why. Continue with --resume.")
            time.sleep(_SECONDS_BETWEEN_LOOKS)
