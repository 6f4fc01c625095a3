"""Host memory that the ranks of a host share, as a budget that is spent."""


class MemoryBudget:
    """Memory of its host that a rank may still take. Each rank keeps the same account.

    Attributes:
        left: bytes for this rank. Below 0 if more was spent than there was.
    """

    def __init__(self, host_bytes: int, ranks: int) -> None:
        """A budget of nothing spent.

        Args:
            host_bytes: free on the host before any of its ranks took something.
            ranks: of the host.
        """
        self._ranks = ranks
        self.left = host_bytes // ranks

    @property
    def left_on_host(self) -> int:
        """Bytes for all ranks of the host together."""
        return self.left * self._ranks

    def spend(self, num_bytes: int) -> None:
        """Spends `num_bytes` on each rank of the host."""
        self.left -= num_bytes

    def spend_on_host(self, num_bytes: int) -> None:
        """Spends `num_bytes` once, for all ranks of the host."""
        self.left -= num_bytes // self._ranks
