"""What goes through shared memory arrives as through gloo, and a rank that is gone is not waited for."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.dist_data import PooledEmbeddingsAllToAll
from torchrec.distributed.embedding_sharding import EmbeddingShardingContext
from torchrec.distributed.sharding.tw_sharding import TwPooledEmbeddingDist
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dlrm.kernels.exchange import exchange_in_memory
from dlrm.kernels.native import has_native
from dlrm.model.dense import ReluMLP
from dlrm.sharding.host.gradients import replace_averages
from dlrm.sharding.host.lookups import HostTables
from dlrm.sharding.host.pooled_rows import SharedMemoryPooledDist
from tests.launching import MAIN, ROOT, TINY, launch, run_main, take_port
from tests.unit.test_kernels import RATE, make_tables

pytestmark = pytest.mark.skipif(not has_native(), reason="the operators are not compiled")

PATIENCE = 10.0
"""Seconds that a rank may take to see that another is gone."""


def join() -> tuple[Any, Any, int, int]:
    """A group that exchanges in memory, one that goes through sockets, this rank, and how many there are."""
    dist.init_process_group("gloo")
    memory: Any = dist.group.WORLD
    sockets: Any = dist.new_group(backend="gloo")
    assert exchange_in_memory(memory) is None
    assert exchange_in_memory(memory) is None, "a second call changes nothing"
    assert torch.ops.dlrm.exchanges_in_memory(memory.boxed())
    assert not torch.ops.dlrm.exchanges_in_memory(sockets.boxed())
    return memory, sockets, dist.get_rank(), dist.get_world_size()


def compare_collectives() -> None:
    """Runs on every rank."""
    memory, sockets, rank, world = join()
    draws = torch.Generator().manual_seed(7)  # the same on all ranks
    for dtype, most in ((torch.int64, 5), (torch.bfloat16, 400_000), (torch.float32, 3), (torch.uint8, 70_000)):
        for _ in range(3):
            sizes = torch.randint(0, most, (world, world), generator=draws)
            sizes[0, -1] = 0
            given = torch.randint(0, 200, (int(sizes[rank].sum()), 3)).to(dtype)
            results = []
            for group in (memory, sockets):
                output = torch.empty(int(sizes[:, rank].sum()), 3, dtype=dtype)
                dist.all_to_all_single(output, given, sizes[:, rank].tolist(), sizes[rank].tolist(), group=group)
                results.append(output)
            assert torch.equal(*results)
    for count in (1, 2, 1000, 3_000_001):
        own = torch.randn(count)
        parts = [torch.empty(count) for _ in range(world)]
        dist.all_gather(parts, own, group=memory)
        total = own.clone()
        dist.all_reduce(total, group=memory)
        exact = torch.stack(parts).double().sum(0)
        torch.testing.assert_close(total.double(), exact, rtol=0, atol=4e-6)
        dist.all_gather(parts, total, group=sockets)
        assert all(torch.equal(part, total) for part in parts)
    whole = torch.arange(5) + rank
    dist.all_reduce(whole, group=memory)  # no floats: gloo's
    assert whole.tolist() == [world * i + sum(range(world)) for i in range(5)]
    works = [dist.all_reduce(torch.ones(100_000), group=memory, async_op=True) for _ in range(20)]
    for work in works:
        cast(Any, work).wait()
    with pytest.raises(ValueError, match=r"output: got parts of \[7\] rows, expected"):
        dist.all_to_all_single(torch.empty(7), torch.empty(world), [7], group=memory)
    memories = [part.view(torch.float32) for part in torch.ops.dlrm.share_memory(memory.boxed(), 400)]
    for other, part in enumerate(memories):
        part[rank::world] = 10 * other + rank
    torch.ops.dlrm.meet(memory.boxed()).wait()
    assert torch.equal(memories[rank], 10 * rank + torch.arange(100.0) % world)
    with pytest.raises(
        RuntimeError, match=r"rank \d asked for \d+ bytes of memory, this rank for|another rank could not"
    ):
        torch.ops.dlrm.share_memory(memory.boxed(), 400 + 64 * rank)
    with pytest.raises(ValueError, match="expected one that exchanges in memory"):
        torch.ops.dlrm.share_memory(sockets.boxed(), 400)
    dist.destroy_process_group()


def compare_means() -> None:
    """Runs on every rank: what DistributedDataParallel leaves, with and without shared memory."""
    memory, sockets, rank, world = join()
    torch.manual_seed(3)
    # An MLP's gradients are written into their buckets, a linear layer's are copied there.
    layers = torch.nn.Sequential(ReluMLP(300, [700, 90]), torch.nn.Linear(90, 3))
    ours, theirs = (
        DistributedDataParallel(deepcopy(layers), process_group=group, gradient_as_bucket_view=True, static_graph=True)
        for group in (memory, sockets)
    )
    replace_averages(torch.nn.ModuleList([ours, theirs]))
    assert len(ours._comm_hooks) == 1
    assert not theirs._comm_hooks
    torch.manual_seed(rank)
    for step in range(6):
        given = torch.randn(9, 300)
        for model in (ours, theirs):
            if step != 4:
                model.zero_grad()
            model(given).square().sum().backward()
        for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(own.grad, other.grad)
            # A bucket is offered from its second step on; the third step makes new ones.
            offered = vars(own).get("offered_memory")
            assert offered is None if step == 0 else offered is not None or step < 3
            assert offered is None or offered.data_ptr() == own.grad.data_ptr()
            assert "offered_memory" not in vars(other)
    values = torch.arange(7.0) * (1 + rank)
    view = values.view(7)
    torch.ops.dlrm.share_storage_(memory.boxed(), values)
    torch.ops.dlrm.share_storage_(memory.boxed(), values)
    dist.all_reduce(values[2:], group=memory)
    assert view.tolist() == [0, 1 + rank, *(i * sum(range(1, world + 1)) for i in range(2, 7))]
    with pytest.raises(ValueError, match="a mean is for tensors in shared memory"):
        dist.all_reduce(torch.ones(3), dist.ReduceOp.AVG, group=memory)
    with pytest.raises(ValueError, match="got 12 of 28 bytes of a storage, expected all"):
        torch.ops.dlrm.share_storage_(memory.boxed(), torch.ones(7)[:3])
    dist.destroy_process_group()


def compare_pooled(dtype: torch.dtype) -> None:
    """Runs on every rank."""
    memory, sockets, rank, world = join()
    columns = [12 * (1 + other) for other in range(world - 1)] + [0]
    batches = [3 + other for other in range(world)]
    torch.manual_seed(rank)
    pooled = torch.randn(sum(batches), columns[rank]).to(dtype)
    gradient = torch.randn(batches[rank], sum(columns)).to(dtype)
    theirs = pooled.clone().requires_grad_()
    expected = PooledEmbeddingsAllToAll(sockets, columns)(theirs, batch_size_per_rank=batches).wait()
    expected.backward(gradient)
    ours = pooled.clone().requires_grad_()
    exchange: Any = TwPooledEmbeddingDist(memory, columns, [])
    SharedMemoryPooledDist.make_of(exchange)

    context = EmbeddingShardingContext(batch_size_per_rank=batches)
    for is_in_place in (False, True):
        ours.grad = None
        result = exchange(ours, context).wait()
        assert torch.equal(result, expected)
        result.backward(result.detach().copy_(gradient) if is_in_place else gradient)
        assert ours.grad is not None
        assert torch.equal(ours.grad, theirs.grad)
        del result
    with torch.no_grad():
        assert torch.equal(exchange(pooled, context).wait(), expected)
        doubled = EmbeddingShardingContext(batch_size_per_rank=[2 * size for size in batches])
        twice = torch.cat([rows.repeat(2, 1) for rows in pooled.split(batches)])
        assert torch.equal(exchange(twice, doubled).wait(), expected.detach().repeat(2, 1))
        assert torch.equal(exchange(pooled, context).wait(), expected)
    dist.destroy_process_group()


def keep_pooled(dtype: torch.dtype) -> None:
    """Runs on every rank: pooled rows that are kept, and backward passes that come late, in any order."""
    memory, sockets, rank, world = join()
    columns, batches = [8] * world, [3 + other for other in range(world)]
    context = EmbeddingShardingContext(batch_size_per_rank=batches)
    exchange: Any = TwPooledEmbeddingDist(memory, columns, [])
    SharedMemoryPooledDist.make_of(exchange)
    theirs = PooledEmbeddingsAllToAll(sockets, columns)
    torch.manual_seed(rank)
    inputs = [torch.randn(sum(batches), 8).to(dtype).requires_grad_() for _ in range(5)]
    gradients = [torch.randn(batches[rank], 8 * world).to(dtype) for _ in inputs]
    expected = []
    for rows, gradient in zip(inputs, gradients, strict=True):
        result = theirs(rows, batch_size_per_rank=batches).wait()
        expected.append((result.detach().clone(), torch.autograd.grad(result, rows, gradient)[0]))
    with torch.no_grad():
        kept = [exchange(rows, context).wait() for rows in inputs]
    for result, (rows, _) in zip(kept, expected, strict=True):
        assert torch.equal(result, rows)
    for is_late, order in ((False, [0, 1, 2, 3, 4]), (False, [4, 2, 0, 3, 1]), (True, [1, 4, 3, 0, 2])):
        under_way = [exchange(rows, context) for rows in inputs] if is_late else []
        results = [one.wait() for one in under_way] or [exchange(rows, context).wait() for rows in inputs]
        for result, (rows, _) in zip(results, expected, strict=True):
            assert torch.equal(result, rows)
        for number in order:
            (gradient,) = torch.autograd.grad(results[number], inputs[number], gradients[number])
            assert torch.equal(gradient, expected[number][1])
    # In one backward pass all exchanges give their gradients back before any updates.
    under_way = [exchange(rows, context) for rows in inputs]
    together = torch.cat([one.wait() for one in under_way])
    found = torch.autograd.grad(together, inputs, torch.cat(gradients))
    assert all(torch.equal(gradient, one) for gradient, (_, one) in zip(found, expected, strict=True))
    for _ in range(3):  # graphs that no backward pass goes through
        exchange(inputs[0], context).wait()
    assert torch.equal(exchange(inputs[2], context).wait(), expected[2][0])
    dist.destroy_process_group()


class LateTables:
    """Tables of a rank that takes its time before each lookup and update."""

    def __init__(self, tables: HostTables, seconds: float) -> None:
        self.tables, self.seconds = tables, seconds

    def pool(self, *given: Any) -> None:
        time.sleep(self.seconds)
        self.tables.pool(*given)

    def update(self, *given: Any) -> None:
        time.sleep(self.seconds)
        self.tables.update(*given)


def look_up_for_all(late: int) -> None:
    """Runs on every rank: steps on tables of all ranks, against the same on copies of all of them here."""
    memory, _, rank, world = join()
    rows, dims, batches = 50, [8 + 4 * other for other in range(world)], [20 + other for other in range(world)]
    torch.manual_seed(11)  # all ranks draw all that there is
    modules = [make_tables([rows], [dim], "rowwise_adagrad") for dim in dims]
    own = make_tables([rows], [dims[rank]], "rowwise_adagrad")
    own.weights_host.data.copy_(modules[rank].weights_host.data)
    torch.manual_seed(12)
    tables = [HostTables.of(module) for module in (*modules, own)]
    left: list[KeyedJaggedTensor | None] = [None]
    bags = SimpleNamespace(
        take_features=lambda: left[0],
        emb_module=own,
        host_tables=LateTables(cast(Any, tables[-1]), 0.02 * (rank == late)),
        gradient_scale=0.5,
    )
    exchange = SharedMemoryPooledDist.make_of(TwPooledEmbeddingDist(memory, dims, []), cast(Any, bags), 1)
    context = EmbeddingShardingContext(batch_size_per_rank=batches)
    first = sum(batches[:rank])
    for _ in range(6):
        lengths = torch.ones(sum(batches), dtype=torch.int32)
        offsets = torch.arange(sum(batches) + 1, dtype=torch.int32)
        ids = [torch.randint(0, rows, (sum(batches),)) for _ in dims]
        expected = [torch.empty(sum(batches), dim, dtype=torch.bfloat16) for dim in dims]
        for part, copied, pooled in zip(ids, tables, expected, strict=False):
            cast(Any, copied).pool(part, offsets, [pooled])
        left[0] = KeyedJaggedTensor(["feature"], ids[rank], lengths=lengths)
        result = exchange(torch.empty(sum(batches), 0, dtype=torch.bfloat16), context).wait()
        assert torch.equal(result, torch.cat(expected, 1)[first : first + batches[rank]])
        result.backward(result.detach().mul_(0.25))
        del result
        for part, copied, pooled in zip(ids, tables, expected, strict=False):
            cast(Any, copied).update(part, offsets, [pooled * 0.25], RATE, 0.5)
        assert torch.equal(own.weights_host, modules[rank].weights_host)
    for _ in range(4):  # evaluation: others go on to the next batch while one still reads this one's pooled rows
        ids = [torch.randint(0, rows, (sum(batches),)) for _ in dims]
        for part, copied, pooled in zip(ids, tables, expected, strict=False):
            cast(Any, copied).pool(part, offsets, [pooled])
        left[0] = KeyedJaggedTensor(["feature"], ids[rank], lengths=lengths)
        with torch.no_grad():
            result = exchange(torch.empty(sum(batches), 0, dtype=torch.bfloat16), context).wait()
        time.sleep(0.05 * (rank == late))
        assert torch.equal(result, torch.cat(expected, 1)[first : first + batches[rank]])
        del result
    dist.destroy_process_group()


def differ() -> str:
    """Runs on every rank: rank 0 sends fewer rows than rank 1 expects."""
    memory, _, rank, world = join()
    sent = [1000 - (rank == 0)] * world
    received = [1000] * world
    received[rank] = sent[rank]
    try:
        dist.all_to_all_single(torch.empty(sum(received)), torch.empty(sum(sent)), received, sent, group=memory)
    except RuntimeError as error:
        return str(error)
    return ""


def lose_a_rank(rank: int, meeting: str, results: Any) -> None:
    """Runs on two ranks: one is killed in mid-exchange."""
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    assert exchange_in_memory(cast(Any, dist.group.WORLD)) is None
    values = torch.ones(3_000_000)  # more than waits in memory
    dist.all_reduce(values)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    for _ in range(2):
        try:
            dist.all_reduce(values)
        except RuntimeError as error:
            results.put((str(error), time.monotonic() - started))


@pytest.mark.parametrize("ranks", [2, 4])
def test_collectives_are_those_of_gloo(tmp_path: Path, ranks: int) -> None:
    launch(compare_collectives, ranks, folder=tmp_path)


@pytest.mark.parametrize(("ranks", "dtype"), [(2, torch.float32), (3, torch.bfloat16)])
def test_pooled_rows_and_gradients_are_those_of_torchrec(tmp_path: Path, ranks: int, dtype: torch.dtype) -> None:
    launch(compare_pooled, ranks, dtype, folder=tmp_path)


@pytest.mark.parametrize(("ranks", "dtype"), [(2, torch.bfloat16), (4, torch.float32)])
def test_pooled_rows_may_be_kept_and_go_back_late(tmp_path: Path, ranks: int, dtype: torch.dtype) -> None:
    launch(keep_pooled, ranks, dtype, folder=tmp_path)


@pytest.mark.parametrize(("ranks", "late"), [(2, 0), (2, 1), (3, 1)])
def test_lookups_and_updates_for_all_ranks_are_those_of_one(tmp_path: Path, ranks: int, late: int) -> None:
    launch(look_up_for_all, ranks, late, folder=tmp_path)


@pytest.mark.parametrize("ranks", [2, 3])
def test_means_of_gradients_are_those_over_sockets(tmp_path: Path, ranks: int) -> None:
    launch(compare_means, ranks, folder=tmp_path)


def test_parts_that_do_not_match_are_named(tmp_path: Path) -> None:
    errors = launch(differ, 2, folder=tmp_path)
    expected = "rank 0 sent 3996 bytes, expected 4000. Ranks must exchange the same things in the same order."
    assert expected in errors[1]


def test_a_rank_that_is_killed_is_named_at_once(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    results = spawn.Queue()
    ranks = [spawn.Process(target=lose_a_rank, args=(rank, str(tmp_path / "meeting"), results)) for rank in range(2)]
    for process in ranks:
        process.start()
    for _ in range(2):  # what is asked for after it fails for the same reason
        error, seconds = results.get(timeout=120)
        assert "rank 1 has ended" in error
        assert seconds < PATIENCE
    for process in ranks:
        process.join(30)
    assert [process.exitcode for process in ranks] == [0, -signal.SIGKILL]


def test_a_start_says_why_there_is_no_shared_memory(tmp_path: Path) -> None:
    flags = ["--limit_train_batches", "3", "--run_dir", str(tmp_path / "run")]
    done = run_main(*TINY, *flags, ranks=2, DLRM_KERNELS="none")
    assert done.returncode == 0, done.stderr
    assert "cpu, gloo without shared memory (DLRM_KERNELS=none), " in done.stdout


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="only root may make namespaces")
def test_ranks_in_containers_of_their_own_stay_with_gloo(tmp_path: Path) -> None:
    """Both have the process number 1, so that the path to the other's memory leads to their own files."""
    command = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable, MAIN, *TINY]
    command += ["--limit_train_batches", "3", "--run_dir", str(tmp_path / "run")]
    with take_port() as taken:
        port = str(taken.getsockname()[1])
    launcher = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, **launcher, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        output, _ = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert "cpu, gloo without shared memory (/proc/1/fd/" in output
