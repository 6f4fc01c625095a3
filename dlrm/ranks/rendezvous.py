"""The key-value store through which the ranks of one start of a job find each other.

torchrun keeps one store for all restarts of a job. Ranks that are started again could read the addresses that the
ranks before them have left there, and wait for them forever (https://github.com/pytorch/pytorch/issues/135712).
"""

import json
import os
import secrets
import time
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

_SECONDS_BETWEEN_LOOKS = 0.02
_TIMEOUT = timedelta(minutes=30)


def open_launch_store(rank: int, world_size: int) -> dist.Store:
    """A part of the launcher's store that none but the ranks of this very start use. Collective.

    Raises:
        DistNetworkError: if the launcher's store can't be reached.
        DistStoreError: if not all ranks come within half an hour.
        ValueError: if the launcher's variables are incomplete.
    """
    store, _, _ = next(rendezvous("env://", rank, world_size, timeout=_TIMEOUT))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return store  # made by rank 0, for this start
    meeting = dist.PrefixStore("dlrm/start", store)
    return dist.PrefixStore(_call(meeting, world_size) if rank == 0 else _answer(meeting, rank), store)


def share_texts(store: dist.Store, rank: int, world_size: int, text: str) -> list[str]:
    """Each rank's text, on every rank. Collective, once for a store."""
    store.set(f"text/{rank}", text)
    if rank == 0:
        texts = [store.get(f"text/{other}").decode() for other in range(world_size)]
        store.set("texts", json.dumps(texts))
        return texts
    return json.loads(store.get("texts"))


def _call(store: dist.Store, world_size: int) -> str:
    """Rank 0: calls the ranks by the tokens that they have left, and again whenever one has a new token."""
    others = [str(rank) for rank in range(1, world_size)]
    called, start = None, ""
    for _ in _looks():
        tokens = [_read(store, f"token/{rank}") for rank in others]
        if tokens != called:
            called, start = tokens, secrets.token_hex(8)
            store.set("call", json.dumps([start, *tokens]))
        if all(_read(store, f"answer/{rank}") == start for rank in others):
            store.set(f"complete/{start}", "")
            return start
    raise dist.DistStoreError(f"not all of {world_size} ranks have come within {_TIMEOUT}")


def _answer(store: dist.Store, rank: int) -> str:
    """Other ranks: answer a call that names their token, until one is answered by all."""
    token = secrets.token_hex(8)
    store.set(f"token/{rank}", token)
    for _ in _looks():
        start, *tokens = json.loads(_read(store, "call") or '[""]')
        if token in tokens[rank - 1 : rank]:
            store.set(f"answer/{rank}", start)
            if store.check([f"complete/{start}"]):
                return start
    raise dist.DistStoreError(f"rank 0 has not called within {_TIMEOUT}")


def _looks() -> Iterator[None]:
    deadline = time.monotonic() + _TIMEOUT.total_seconds()
    while time.monotonic() < deadline:
        yield
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _read(store: dist.Store, key: str) -> str:
    """A key's value; empty while it has none."""
    return store.get(key).decode() if store.check([key]) else ""
