"""The compiled operators against PyTorch in float64.

Shapes: B samples, F features, D columns of a table, V vectors.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch.testing import assert_close

from dlrm.kernels import build, meta, native
from dlrm.kernels.draw import draw_uniform, plain_draw_uniform
from dlrm.kernels.interaction import dot_interaction, plain_dot_interaction, take_vectors
from dlrm.kernels.mlp import mlp, plain_mlp
from dlrm.sharding.host.lookups import HostTables

RATE, EPS = 0.1, 1e-8
SCALE = 1 / 3  # of gradients
OPTIMIZERS = {
    "sgd": EmbOptimType.EXACT_SGD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
}
TOLERANCE: dict[torch.dtype, dict[str, float]] = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
}


@pytest.fixture(autouse=True, scope="module")
def compiled() -> None:
    if build.find_compiler() is None:
        pytest.skip("no C++ compiler: there is nothing to test")
    build.main()
    native.load_native.cache_clear()
    assert native.has_native(), native.describe_kernels()


def make_tables(rows: list[int], dims: list[int], optimizer: str) -> SplitTableBatchedEmbeddingBagsCodegen:
    module = SplitTableBatchedEmbeddingBagsCodegen(
        [(r, d, EmbeddingLocation.HOST, ComputeDevice.CPU) for r, d in zip(rows, dims, strict=True)],
        optimizer=OPTIMIZERS[optimizer],
        learning_rate=RATE,
        eps=EPS,
        device=torch.device("cpu"),
    )
    for weights in module.split_embedding_weights():
        weights.normal_()
    return module


def draw_ids(rows: list[int], batch: int, most: int, ids_type: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Bags of 0 to `most` ids, many of them the same."""
    lengths = torch.randint(0, most + 1, (len(rows) * batch,))
    ids = [torch.randint(0, r, (int(lengths[f * batch : (f + 1) * batch].sum()),)) for f, r in enumerate(rows)]
    ids = [torch.where(torch.rand(len(part)) < 0.3, part.new_zeros(()), part) for part in ids]
    return torch.cat(ids).to(ids_type), torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0))).to(ids_type)


def bag_matrices(rows: list[int], batch: int, ids: torch.Tensor, offsets: torch.Tensor) -> list[torch.Tensor]:
    """For each feature [B, rows]: how often each row is in each bag."""
    matrices = []
    for f, r in enumerate(rows):
        counts = torch.zeros(batch, r, dtype=torch.float64)
        for b in range(batch):
            own = ids[offsets[f * batch + b] : offsets[f * batch + b + 1]].long()
            counts[b].index_add_(0, own, torch.ones(len(own), dtype=torch.float64))
        matrices.append(counts)
    return matrices


def step_float64(optimizer: str, weight: torch.Tensor, state: Any, grad: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """One step from zero state or what the last one left."""
    match optimizer:
        case "sgd":
            return weight - RATE * grad, None
        case "adagrad":
            state = state + grad**2
        case _:
            state = state + (grad**2).mean(dim=1, keepdim=True)
    return weight - RATE * grad / (state.sqrt() + EPS), state


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("grad_type", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("most", "ids_type"), [(1, torch.int32), (5, torch.int64)])
def test_tables_are_those_of_float64(
    optimizer: str, threads: int, grad_type: torch.dtype, most: int, ids_type: torch.dtype
) -> None:
    torch.manual_seed(7)
    rows, dims, batch = [3, 1000, 5_000, 17, 1], [128, 4, 36, 260, 16], 37
    module = make_tables(rows, dims, optimizer)
    tables = HostTables.of(module)
    assert tables is not None
    expected = [weights.double() for weights in module.split_embedding_weights()]
    states: list[Any] = [0.0] * len(rows)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(3):
            ids, offsets = draw_ids(rows, batch, most, ids_type)
            matrices = bag_matrices(rows, batch, ids, offsets)
            pooled = pool(tables, ids, offsets, torch.float32)
            assert_close(pooled, torch.cat([m @ w for m, w in zip(matrices, expected, strict=True)], 1).float())
            grad = torch.randn(batch, sum(dims)).to(grad_type)
            tables.update(ids, offsets, [grad], RATE, SCALE)
            for f, part in enumerate((SCALE * grad.double()).split(dims, dim=1)):
                expected[f], states[f] = step_float64(optimizer, expected[f], states[f], matrices[f].t() @ part)
    finally:
        torch.set_num_threads(before)
    for weights, own in zip(module.split_embedding_weights(), expected, strict=True):
        assert_close(weights, own.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_tables_are_those_of_fbgemm(optimizer: str) -> None:
    torch.manual_seed(3)
    rows, dims, batch = [500, 20], [64, 64], 128
    ours, theirs = make_tables(rows, dims, optimizer), make_tables(rows, dims, optimizer)
    for own, other in zip(ours.split_embedding_weights(), theirs.split_embedding_weights(), strict=True):
        other.copy_(own)
    tables = HostTables.of(ours)
    assert tables is not None
    for _ in range(3):
        ids, offsets = draw_ids(rows, batch, 3, torch.int64)
        grad = torch.randn(batch, sum(dims))
        pooled = theirs(ids, offsets)
        assert_close(pool(tables, ids, offsets, torch.float32), pooled.detach())
        pooled.backward(grad)
        tables.update(ids, offsets, [grad], RATE)
    for own, other in zip(ours.split_embedding_weights(), theirs.split_embedding_weights(), strict=True):
        assert_close(own, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_update_does_not_depend_on_the_number_of_threads(optimizer: str) -> None:
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.manual_seed(1)
        module = make_tables([50, 9], [32, 32], optimizer)
        tables = HostTables.of(module)
        assert tables is not None
        ids, offsets = draw_ids([50, 9], 400, 4, torch.int32)
        grad = torch.randn(400, 64)
        torch.set_num_threads(threads)
        try:
            tables.update(ids, offsets, [grad], RATE)
        finally:
            torch.set_num_threads(before)
        results.append(module.weights_host.detach().clone())
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_in_blocks_is_like_one_in_one_piece(optimizer: str, dtype: torch.dtype) -> None:
    """As where samples belong to several ranks, and their rows have other ranks' columns, too."""
    rows, dims, sizes = [30, 500], [32, 20], [130, 0, 7, 263]
    whole, cut = (make_tables(rows, dims, optimizer) for _ in range(2))
    cut.weights_host.data.copy_(whole.weights_host.data)
    ids, offsets = draw_ids(rows, sum(sizes), 3, torch.int32)
    ours, theirs = HostTables.of(whole), HostTables.of(cut)
    assert ours is not None
    assert theirs is not None
    expected = pool(ours, ids, offsets, dtype)
    wide = [torch.full((size, 90), 7.0, dtype=dtype) for size in sizes]
    theirs.pool(ids, offsets, [block[:, 5:57] for block in wide])
    assert torch.equal(torch.cat([block[:, 5:57] for block in wide]), expected)
    assert all((block[:, :5] == 7).all() and (block[:, 57:] == 7).all() for block in wide)
    gradient = torch.randn(sum(sizes), 52).to(dtype)
    for block, part in zip(wide, gradient.split(sizes), strict=True):
        block[:, 5:57] = part
    ours.update(ids, offsets, [gradient], RATE)
    theirs.update(ids, offsets, [block[:, 5:57] for block in wide], RATE)
    assert torch.equal(cut.weights_host, whole.weights_host)


def test_blocks_that_do_not_fit_are_refused() -> None:
    tables = HostTables.of(make_tables([5], [16], "sgd"))
    assert tables is not None
    ids, offsets = torch.tensor([0, 1]), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match="pooled: got 3 rows, expected 2"):
        tables.pool(ids, offsets, [torch.empty(1, 16), torch.empty(2, 16)])
    with pytest.raises(ValueError, match=r"pooled: got \[2, 15\], expected rows of 16 numbers"):
        tables.pool(ids, offsets, [torch.empty(2, 15)])
    with pytest.raises(ValueError, match="gradients: expected one matrix or more"):
        tables.update(ids, offsets, [], RATE)


@pytest.mark.parametrize("optimizer", ["adagrad", "rowwise_adagrad"])
def test_rows_that_come_often_take_one_step(optimizer: str) -> None:
    """More lookups than rows, and ids whose hashes meet."""
    torch.manual_seed(5)
    rows, dim, batch = 2**20, 16, 3000
    module = make_tables([rows], [dim], optimizer)
    tables = HostTables.of(module)
    assert tables is not None
    ids = torch.cat((torch.randint(0, 40, (1500,)) * 16384, torch.randint(0, rows, (1500,))))[torch.randperm(batch)]
    expected, state = module.split_embedding_weights()[0].double(), 0.0
    gradient = torch.randn(batch, dim)
    sums = torch.zeros(rows, dim, dtype=torch.float64).index_add_(0, ids, gradient.double())
    tables.update(ids, torch.arange(batch + 1), [gradient], RATE)
    expected, _ = step_float64(optimizer, expected, state, sums)
    assert_close(module.split_embedding_weights()[0], expected.float(), rtol=1e-4, atol=1e-5)


def test_rows_near_overflow_and_rounded_ones() -> None:
    module = make_tables([2], [16], "sgd")
    tables = HostTables.of(module)
    assert tables is not None
    module.split_embedding_weights()[0][0] = 3e38
    module.split_embedding_weights()[0][1] = torch.linspace(-2.0, 2.0, 16)
    ids, offsets = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 2, 3, 4])
    pooled = pool(tables, ids, offsets, torch.float32)
    assert pooled[0].isinf().all()
    assert (pooled[1] == 3e38).all()
    assert torch.equal(pool(tables, ids, offsets, torch.bfloat16), pooled.bfloat16())


@pytest.mark.parametrize("bad", [-1, 2, 2**31 - 1])
def test_an_id_outside_its_table_is_refused(bad: int) -> None:
    module = make_tables([5, 2], [16, 16], "sgd")
    tables = HostTables.of(module)
    assert tables is not None
    with pytest.raises(IndexError, match=f"id {bad} of feature 1 is outside its table of 2 rows"):
        pool(tables, torch.tensor([0, bad]), torch.tensor([0, 1, 2]), torch.float32)


def test_offsets_that_run_backwards_are_refused() -> None:
    tables = HostTables.of(make_tables([5], [16], "sgd"))
    assert tables is not None
    with pytest.raises(ValueError, match="offsets: expected ascending"):
        pool(tables, torch.tensor([0, 1]), torch.tensor([0, 2, 1]), torch.float32)


def pool(tables: HostTables, ids: torch.Tensor, offsets: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    pooled = torch.empty(tables.batch_size(offsets), tables.columns, dtype=dtype)
    tables.pool(ids, offsets, [pooled])
    return pooled


def interaction_case(
    batch: int, dim: int, counts: list[int], dtype: torch.dtype, source_type: torch.dtype
) -> tuple[Any, Any, Any]:
    dense = torch.randn(batch, dim).to(dtype).requires_grad_()
    sources = [torch.randn(batch, count * dim).to(source_type).requires_grad_() for count in counts]
    columns = [(torch.randperm(count) * dim).tolist() for count in counts]
    return dense, sources, columns


@pytest.mark.parametrize(
    ("dtype", "source_type"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
)
@pytest.mark.parametrize(
    ("batch", "dim", "counts"),
    [
        *((5, 128, [26]), (33, 64, [26, 13]), (1, 4, [1]), (70, 16, [3, 2, 1]), (2, 20, [6]), (3, 132, [27])),
        *((7, 32, [1]), (9, 160, [2, 3]), (0, 8, [2]), (0, 32, [2])),
    ],
)
def test_interaction_is_that_of_float64(
    batch: int, dim: int, counts: list[int], dtype: torch.dtype, source_type: torch.dtype
) -> None:
    torch.manual_seed(5)
    dense, sources, columns = interaction_case(batch, dim, counts, dtype, source_type)
    output = dot_interaction(dense, sources, columns)
    exact_inputs = [dense.detach().double().requires_grad_(), *(s.detach().double().requires_grad_() for s in sources)]
    exact = plain_dot_interaction(exact_inputs[0], exact_inputs[1:], columns)
    assert output.dtype == dtype
    scale = dim**0.5
    assert_close(output.double() / scale, exact / scale, **TOLERANCE[dtype])
    grad = torch.randn_like(output)
    gradients = torch.autograd.grad(output, [dense, *sources], grad)
    for own, other in zip(gradients, torch.autograd.grad(exact, exact_inputs, grad.double()), strict=True):
        assert_close(own.double() / 10, other / 10, **TOLERANCE[own.dtype])


@pytest.mark.parametrize(("dim", "dtype"), [(32, torch.bfloat16), (20, torch.bfloat16), (128, torch.float32)])
def test_gradients_may_take_the_place_of_their_sources(dim: int, dtype: torch.dtype) -> None:
    dense, leaves, columns = interaction_case(70, dim, [5, 2], dtype, dtype)
    gradient = torch.randn(70, dim + 28).to(dtype)
    expected = torch.autograd.grad(dot_interaction(dense, leaves, columns), [dense, *leaves], gradient)
    sources = [leaf.clone() for leaf in leaves]
    output = dot_interaction(dense, sources, columns, may_overwrite=True)
    got = torch.autograd.grad(output, [dense, *sources], gradient, retain_graph=True)
    assert all(torch.equal(own, other) for own, other in zip(got, expected, strict=True))
    assert [own.data_ptr() for own in got[1:]] == [source.data_ptr() for source in sources]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(output, dense, gradient)


def test_what_others_may_read_is_not_overwritten() -> None:
    dense, (leaf,), columns = interaction_case(3, 8, [2], torch.float32, torch.float32)
    wide = torch.cat((leaf, torch.zeros(3, 1)), 1)  # a column that is in no vector
    for source in (leaf, wide):
        before = source.detach().clone()
        dot_interaction(dense, [source], columns, may_overwrite=True).sum().backward()
        assert torch.equal(source, before)


def test_columns_that_no_vector_uses_have_no_gradient() -> None:
    dense, source = torch.randn(3, 8), torch.randn(3, 24, requires_grad=True)
    dot_interaction(dense, [source], [[16]]).sum().backward()
    assert source.grad is not None
    assert (source.grad[:, :16] == 0).all()
    assert_close(source.grad[:, 16:], dense)


def test_vectors_from_anywhere_and_the_gradients_of_a_source_once() -> None:
    sources = [torch.randn(3, 16, requires_grad=True), torch.randn(3, 21, requires_grad=True)]
    columns = [[8, 0], [1, 12]]
    vectors = take_vectors(8, sources, columns)
    expected = [source[:, c : c + 8] for source, starts in zip(sources, columns, strict=True) for c in starts]
    for vector, other in zip(vectors, expected, strict=True):
        assert torch.equal(vector, other)
    (vectors[0] + 2 * vectors[1] + 3 * vectors[3]).sum().backward()
    assert torch.equal(sources[0].grad, torch.tensor([2.0] * 8 + [1.0] * 8).expand(3, 16))
    assert torch.equal(sources[1].grad, torch.tensor([0.0] * 12 + [3.0] * 8 + [0.0]).expand(3, 21))
    assert vectors[0].grad_fn is vectors[1].grad_fn, "one gradient of the whole source, not one for each vector"


@pytest.mark.parametrize("columns", [[[1, 9]], [[-1, 0]], [[0, 7]], [[8, 1]]])
def test_a_vector_outside_its_matrix_or_over_another_is_refused(columns: list[list[int]]) -> None:
    with pytest.raises(ValueError, match=r"columns: (got|vectors)"):
        dot_interaction(torch.randn(3, 8), [torch.randn(3, 16)], columns)


@pytest.mark.parametrize("batch", [1, 300, 777])
@pytest.mark.parametrize("sizes", [[13, 512, 256, 128], [479, 33, 5], [7, 1]])
def test_layers_are_those_of_float64(batch: int, sizes: list[int]) -> None:
    torch.manual_seed(2)
    given = torch.randn(batch, sizes[0], requires_grad=True)
    weights = [torch.randn(o, i).div(i**0.5).requires_grad_() for i, o in pairwise(sizes)]
    biases = [torch.randn(o, requires_grad=True) for o in sizes[1:]]
    leaves = [given, *weights, *biases]
    output = mlp(given, weights, biases)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = plain_mlp(exact[0], exact[1 : 1 + len(weights)], exact[1 + len(weights) :])
    assert_close(output, expected.float())
    grad = torch.randn_like(output)
    gradients = torch.autograd.grad(output, leaves, grad)
    for own, other in zip(gradients, torch.autograd.grad(expected, exact, grad.double()), strict=True):
        assert_close(own, other.float(), rtol=1e-4, atol=1e-4)


def test_layers_in_bfloat16_are_those_of_autocast() -> None:
    torch.manual_seed(2)
    given = torch.randn(64, 32)
    weights, biases = [torch.randn(48, 32) / 6, torch.randn(8, 48) / 7], [torch.randn(48), torch.randn(8)]
    leaves = [*weights, *biases]
    for leaf in leaves:
        leaf.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = mlp(given, weights, biases), plain_mlp(given, weights, biases)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert_close(ours, theirs, **TOLERANCE[torch.bfloat16])
    grad = torch.ones_like(ours)
    for own, other in zip(
        torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(theirs, leaves, grad), strict=True
    ):
        assert own.dtype == torch.float32
        assert_close(own / 64, other / 64, **TOLERANCE[torch.bfloat16])


def test_what_is_not_a_number_stays_so() -> None:
    given = torch.full((2, 43), float("nan"))  # whole vectors of any instruction set, and a rest
    assert mlp(given, [torch.ones(43, 43)], [torch.zeros(43)]).isnan().all()
    assert dot_interaction(given, [given], [[0]]).isnan().all()
    assert dot_interaction(given.bfloat16(), [given], [[0]]).isnan().all()


def test_the_caller_keeps_its_gradient() -> None:
    given, grad = torch.randn(4, 3), torch.ones(4, 2)
    output = mlp(given, [torch.randn(2, 3, requires_grad=True)], [torch.zeros(2, requires_grad=True)])
    output.backward(grad)
    assert (grad == 1).all()


@pytest.mark.parametrize("size", [0, 1, 227, 623, 624, 625, 40_000])
@pytest.mark.parametrize("seed", [0, 1, 2**32 + 5, 2**63 - 9])
def test_random_weights_are_those_of_pytorch(size: int, seed: int) -> None:
    drawn, expected = torch.empty(size), torch.empty(size)
    draw_uniform(drawn, 0.003, seed)
    plain_draw_uniform(expected, 0.003, seed)
    # Without FMA there is one rounding more than in what PyTorch uses on a CPU that has it.
    one_rounding = 0.003 * 2**-23 if torch.ops.dlrm.instruction_set() == "baseline" else 0.0
    assert_close(drawn, expected, rtol=0.0, atol=one_rounding)


@pytest.mark.skipif("DLRM_KERNELS" in os.environ, reason="runs once, from the run that names no instruction set")
@pytest.mark.parametrize("instruction_set", ["AVX-512", "AVX2", "baseline"])
def test_other_instruction_sets_pass_these_tests(instruction_set: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command, env={**os.environ, "DLRM_KERNELS": instruction_set}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]


def operator_calls() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Each operator with arguments that it takes."""
    tables = HostTables.of(make_tables([9, 5], [16, 8], "rowwise_adagrad"))
    assert tables is not None
    where = (tables.weight_offsets_F, tables.rows_F, tables.dim_offsets_F1)
    ids, offsets, pooled = torch.tensor([0, 8, 4, 0]), torch.arange(5), torch.randn(2, 24)
    yield "pool", (tables.weights, *where, ids, offsets, [pooled])
    state = (tables.state, tables.state_offsets_F)
    yield "update", (tables.weights, *state, *where, ids, offsets, [pooled], 2, 0.1, 1e-8, 1.0)
    dense, others, columns = torch.randn(3, 8), [torch.randn(3, 16), torch.randn(3, 9)], [2, 8, 0, 1, 1]
    gradient = torch.randn(3, 8 + 6)
    yield "interact", (dense, others, columns)
    yield "interact_backward", (gradient, dense, others, columns)
    yield "interact_backward_", (torch.randn(3, 8 + 3), dense, others[:1], columns[:3])
    yield "add_bias_", (torch.randn(3, 8), torch.randn(8), True)
    yield "mask_", (torch.randn(3, 8), torch.randn(3, 8))
    yield "draw_", (torch.empty(7), 1, 0.0, 1.0)
    if torch.ops.dlrm.has_vnni():
        for integers, dtype in (("int16", torch.float32), ("int8", torch.bfloat16)):
            input_BK, weight_NK, grad_BN = (torch.randn(*size).to(dtype) for size in ((3, 70), (65, 70), (3, 65)))
            yield f"{integers}_linear", (input_BK, weight_NK, torch.randn(65), True)
            yield f"{integers}_grad_input", (grad_BN, weight_NK)
            yield f"{integers}_masked_grad_input_", (grad_BN, weight_NK, input_BK)
            yield f"{integers}_grad_parameters", (grad_BN, input_BK, torch.empty(65, 70), torch.empty(65))
            weights, formats = [weight_NK, torch.randn(4, 65).to(dtype)], [integers, ""]
            yield "mlp", (input_BK, weights, [torch.randn(65), torch.randn(4)], formats)
            outputs, gradients = [grad_BN.clone(), grad_BN[:, :4].clone()], [torch.empty(65, 70), torch.empty(65)]
            gradients += [torch.empty(4, 65), torch.empty(4)]
            yield "mlp_backward", (outputs[1].clone(), input_BK, outputs, weights, gradients, formats, True)


def test_meta_functions_and_schemas_tell_what_operators_do() -> None:
    for name, arguments in operator_calls():
        operator = getattr(torch.ops.dlrm, name).default
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_threads_that_come_first_together_register_once(monkeypatch: pytest.MonkeyPatch) -> None:
    registered = []

    def register(operator: str, _: object) -> None:
        registered.append(operator)
        time.sleep(0.001)  # lets the other threads in

    monkeypatch.setattr(meta, "register_fake", register)
    meta._register.cache_clear()
    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(meta.register_meta_functions) for _ in range(4)]:
            done.result()
    assert "dlrm::pool" in registered
    assert len(registered) == len(set(registered))
