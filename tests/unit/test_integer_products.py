"""Products through integers against float64 and a plain twin, and how a run comes to use them.

Shapes: B samples, N outputs, K inputs of a layer.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Literal

import pytest
import torch
from torch import Tensor

from dlrm.assembly import dense_execution
from dlrm.assembly.build import build_model, make_sharder
from dlrm.assembly.dense_execution import check_arithmetic
from dlrm.config.config import Config, DataConfig, DenseExecution, ModelConfig, TrainingConfig
from dlrm.errors import ConfigError
from dlrm.kernels import build, native
from dlrm.kernels.gradient_memory import offer_memory
from dlrm.kernels.mlp import IntegerFormat, mlp, plain_mlp
from dlrm.model.dense import ReluMLP
from dlrm.ranks.runtime import start_runtime

FORMATS: tuple[IntegerFormat, ...] = ("int16", "int8")
DTYPES = {"int16": torch.float32, "int8": torch.bfloat16}
ERRORS = {"int16": 5e-4, "int8": 1.2e-2}
"""Of a product of operands that are as a Gaussian's, in the Euclidean norm."""

HEAVY_ERRORS = {"int16": 5e-4, "int8": 0.12}
"""The same where entries of a block differ by orders of magnitude."""

SIZES = [
    *((777, 1024, 479), (33, 13, 1), (1, 1, 13), (300, 1, 512), (129, 241, 193), (6300, 33, 65), (12400, 40, 70)),
    *((8, 15, 384), (9, 17, 385), (7, 64, 769), (12289, 16, 3)),  # a vector, a block or a slice, and one more
]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def compiled() -> None:
    if build.find_compiler() is None:
        pytest.skip("no C++ compiler: there is nothing to test")
    assert build.main() == 0
    native.load_native.cache_clear()
    if (why := native.why_no_vnni()) is not None:
        pytest.skip(why)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def draw(b: int, n: int, k: int, *, heavy_tails: bool, through: IntegerFormat) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input, weight, gradient, bias; samples and columns of very different size where the tails are heavy."""
    torch.manual_seed(b + n + k)
    input_BK, weight_NK, grad_BN, bias_N = (torch.randn(*size) for size in ((b, k), (n, k), (b, n), (n,)))
    if heavy_tails:
        input_BK *= torch.randn(b, 1).exp() * torch.randn(k).exp()
        grad_BN *= torch.randn(b, 1).mul(2).exp() * torch.randn(n).exp() * 1e-6 * (torch.rand(b, n) < 0.6)
    dtype = DTYPES[through]
    return input_BK.to(dtype), weight_NK.to(dtype), grad_BN.to(dtype), bias_N


def linear(
    through: IntegerFormat, input_BK: Tensor, weight_NK: Tensor, bias_N: Tensor, *, rectified: bool = False
) -> Tensor:
    return getattr(torch.ops.dlrm, f"{through}_linear")(input_BK, weight_NK, bias_N, rectified)


def grad_input(through: IntegerFormat, grad_BN: Tensor, weight_NK: Tensor) -> Tensor:
    return getattr(torch.ops.dlrm, f"{through}_grad_input")(grad_BN, weight_NK)


def grad_parameters(through: IntegerFormat, grad_BN: Tensor, input_BK: Tensor) -> tuple[Tensor, Tensor]:
    grad_NK, grad_N = (
        torch.full((grad_BN.size(1), input_BK.size(1)), torch.nan),
        torch.full(grad_BN.shape[1:], torch.nan),
    )
    getattr(torch.ops.dlrm, f"{through}_grad_parameters")(grad_BN, input_BK, grad_NK, grad_N)
    return grad_NK, grad_N


def grad_weight(through: IntegerFormat, grad_BN: Tensor, input_BK: Tensor) -> Tensor:
    return grad_parameters(through, grad_BN, input_BK)[0]


def products(
    through: IntegerFormat, input_BK: Tensor, weight_NK: Tensor, grad_BN: Tensor, bias_N: Tensor
) -> list[Tensor]:
    return [
        linear(through, input_BK, weight_NK, bias_N),
        grad_input(through, grad_BN, weight_NK),
        *grad_parameters(through, grad_BN, input_BK),
    ]


def exact_products(input_BK: Tensor, weight_NK: Tensor, grad_BN: Tensor, bias_N: Tensor) -> list[Tensor]:
    input_BK, weight_NK, grad_BN = input_BK.double(), weight_NK.double(), grad_BN.double()
    return [input_BK @ weight_NK.t() + bias_N.double(), grad_BN @ weight_NK, grad_BN.t() @ input_BK, grad_BN.sum(0)]


def blocks_of_int8(matrix: Tensor, length: int) -> Tensor:
    """[vectors, blocks, entries], zeros behind the last entry."""
    padding = -matrix.size(1) % length
    return torch.nn.functional.pad(matrix.float(), (0, padding)).view(matrix.size(0), -1, length)


def int8_twin(left: Tensor, right: Tensor) -> Tensor:
    """left right^T as the operators have it, from what dlrm/kernels/csrc/integer.h says, in float64."""
    count = -(-left.size(1) // 384)
    length = -(-left.size(1) // count // 4) * 4
    left, right = blocks_of_int8(left, length), blocks_of_int8(right, length)
    low, high = left.amin(2, keepdim=True).clamp(max=0), left.amax(2, keepdim=True).clamp(min=0)
    factor = torch.where(high > low, torch.tensor(127.2) / (high * 0.5 - low * 0.5), torch.tensor(1.0))
    zero = (-low * factor).ceil()
    left = ((left.double() * factor.double() + zero).float().round() - zero).double() / factor.double()
    factor = 127 / right.abs().amax(2, keepdim=True)
    factor = torch.where(factor.isfinite(), factor, torch.tensor(1.0)).double()
    right = (right.double() * factor).float().round().double() / factor
    return left.flatten(1) @ right.flatten(1).t()


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Of the whole in the Euclidean norm; 0 / 0 counts as 0."""
    return ((got.double() - expected).norm() / expected.norm().clamp_min(1e-300)).item()


@pytest.mark.parametrize("through", FORMATS)
@pytest.mark.parametrize("heavy_tails", [False, True])
@pytest.mark.parametrize(("b", "n", "k"), SIZES)
def test_products_are_those_of_float64(b: int, n: int, k: int, heavy_tails: bool, through: IntegerFormat) -> None:
    given = draw(b, n, k, heavy_tails=heavy_tails, through=through)
    for got, expected in zip(products(through, *given), exact_products(*given), strict=True):
        assert relative_error(got, expected) < (HEAVY_ERRORS if heavy_tails else ERRORS)[through]


@pytest.mark.parametrize("through", FORMATS)
@pytest.mark.parametrize(("b", "n", "k"), SIZES)
def test_masked_gradients_are_those_behind_a_relu(b: int, n: int, k: int, through: IntegerFormat) -> None:
    """To the bit; where an activation is NaN gradients pass, as in PyTorch."""
    _, weight_NK, grad_BN, _ = draw(b, n, k, heavy_tails=True, through=through)
    output_BK = torch.randn(b, k).to(grad_BN.dtype)
    output_BK.flatten()[::7] = torch.tensor([0.0, -0.0, 1e-40, torch.nan, -torch.nan]).repeat(b * k)[: -(b * k // -7)]
    expected = torch.ops.aten.threshold_backward(grad_input(through, grad_BN, weight_NK), output_BK, 0)
    getattr(torch.ops.dlrm, f"{through}_masked_grad_input_")(grad_BN, weight_NK, output_BK)
    assert torch.equal(output_BK, expected)


@pytest.mark.parametrize("through", FORMATS)
def test_masked_gradients_of_another_size_are_refused(through: IntegerFormat) -> None:
    dtype = DTYPES[through]
    gradient, weight = torch.randn(9, 70).to(dtype), torch.randn(70, 80).to(dtype)
    with pytest.raises(ValueError, match=r"output: got \[9, 79\], expected \[9, 80\]"):
        getattr(torch.ops.dlrm, f"{through}_masked_grad_input_")(gradient, weight, torch.ones(9, 79, dtype=dtype))


@pytest.mark.parametrize("through", FORMATS)
def test_types_of_products(through: IntegerFormat) -> None:
    types = [product.dtype for product in products(through, *draw(9, 70, 80, heavy_tails=False, through=through))]
    assert types == [DTYPES[through], DTYPES[through], torch.float32, torch.float32]


@pytest.mark.parametrize("heavy_tails", [False, True])
@pytest.mark.parametrize(("b", "n", "k"), SIZES)
def test_int8_products_are_those_of_the_twin(b: int, n: int, k: int, heavy_tails: bool) -> None:
    """But for bfloat16's rounding, and for entries halfway between two integers."""
    input_BK, weight_NK, grad_BN, bias_N = draw(b, n, k, heavy_tails=heavy_tails, through="int8")
    output_BN, grad_BK, grad_NK, _ = products("int8", input_BK, weight_NK, grad_BN, bias_N)
    assert relative_error(output_BN, int8_twin(input_BK, weight_NK) + bias_N.double()) < 4e-3
    assert relative_error(grad_BK, int8_twin(grad_BN, weight_NK.t().contiguous())) < 4e-3
    pieces = range(0, b, 12288)  # a slice of 32 blocks
    expected = [int8_twin(grad_BN[i : i + 12288].t(), input_BK[i : i + 12288].t()) for i in pieces]
    assert relative_error(grad_NK, torch.stack(expected).sum(0)) < 1e-3


@pytest.mark.parametrize("through", FORMATS)
@pytest.mark.parametrize(("b", "n", "k"), [(777, 241, 479), (6300, 64, 65)])
def test_products_do_not_depend_on_the_number_of_threads(
    b: int, n: int, k: int, through: IntegerFormat, threads: None
) -> None:
    given = draw(b, n, k, heavy_tails=True, through=through)
    torch.set_num_threads(1)
    expected = products(through, *given)
    for count in (2, 3, 7):
        torch.set_num_threads(count)
        assert all(torch.equal(own, other) for own, other in zip(products(through, *given), expected, strict=True))


@pytest.mark.parametrize("through", FORMATS)
def test_the_worst_that_a_block_can_hold_does_not_overflow(through: IntegerFormat) -> None:
    dtype = DTYPES[through]
    for input_BK in (torch.ones(9, 768), torch.eye(9, 768), torch.tensor([1.0, -1.0]).repeat(9, 384)):
        ones_NK = torch.ones(17, 768, dtype=dtype)
        for sign in (1, -1):
            got = linear(through, (sign * input_BK).to(dtype), ones_NK, torch.zeros(17))
            expected = sign * input_BK.sum(1, keepdim=True).double().expand(9, 17)
            torch.testing.assert_close(got.double(), expected, rtol=ERRORS[through], atol=1e-3)


@pytest.mark.parametrize("through", FORMATS)
def test_zero_rows_give_the_bias_and_zero_gradients(through: IntegerFormat) -> None:
    dtype, bias_N = DTYPES[through], torch.randn(70)
    given = torch.zeros(5, 80, dtype=dtype), torch.randn(70, 80).to(dtype), torch.zeros(5, 70, dtype=dtype)
    output_BN, grad_BK, grad_NK, grad_N = products(through, *given, bias_N)
    assert torch.equal(output_BN, bias_N.to(dtype).expand(5, 70))
    assert not grad_BK.any()
    assert not grad_NK.any()
    assert not grad_N.any()


def test_zeros_among_others_stay_zeros_in_int8() -> None:
    """What ReLU has masked adds nothing, whatever the sample's other gradients."""
    torch.manual_seed(0)
    grad_BN, weight_NK = torch.randn(40, 96).bfloat16(), torch.randn(96, 70).bfloat16()
    grad_BN[:, 48:] = 0
    weight_NK[:48] = 0
    assert not grad_input("int8", grad_BN, weight_NK).any()


@pytest.mark.parametrize("through", FORMATS)
@pytest.mark.parametrize("scale", [3e38, 1e37, 1e20, 1e-20, 1e-30])
def test_huge_and_tiny_values(scale: float, through: IntegerFormat) -> None:
    """As far as fp32's own products stay in range."""
    torch.manual_seed(0)
    input_BK = (torch.rand(40, 200).clamp_(0.1) * scale).to(DTYPES[through])
    weight_NK = (torch.rand(70, 200) / 300).to(DTYPES[through])
    got = linear(through, input_BK, weight_NK, torch.zeros(70))
    assert torch.mm(input_BK, weight_NK.t()).isfinite().all()
    expected = (input_BK.double() @ weight_NK.double().t()) / scale
    assert relative_error(got.double() / scale, expected) < ERRORS[through]
    got = grad_weight(through, input_BK, weight_NK[:40])
    expected = (input_BK.double().t() @ weight_NK[:40].double()) / scale
    assert relative_error(got.double() / scale, expected) < ERRORS[through]


def test_both_signs_at_their_largest_in_int8() -> None:
    largest = torch.finfo(torch.bfloat16).max
    input_BK = torch.tensor([largest, -largest] * 40).repeat(3, 1).bfloat16()
    weight_NK = torch.zeros(70, 80).bfloat16()
    weight_NK[:, 0] = 0.5
    got = linear("int8", input_BK, weight_NK, torch.zeros(70))
    torch.testing.assert_close(got.double() / largest, torch.full((3, 70), 0.5).double(), rtol=2e-2, atol=0)


@pytest.mark.parametrize("through", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 77, 199])
def test_what_is_not_finite_stays_so(bad: float, place: int, through: IntegerFormat) -> None:
    input_BK, weight_NK, grad_BN, bias_N = draw(40, 70, 200, heavy_tails=False, through=through)
    input_BK[3, place] = bad
    rectified_BN = linear(through, input_BK, weight_NK, bias_N, rectified=True)
    assert not rectified_BN[3].isfinite().any()
    assert rectified_BN[4:].isfinite().all()
    grad_NK = grad_weight(through, grad_BN, input_BK)
    assert not grad_NK[:, place].isfinite().any()
    weight_NK[9, place] = bad
    assert not grad_input(through, grad_BN, weight_NK)[:, place].isfinite().any()
    ones_BK = torch.ones_like(input_BK)
    assert not linear(through, ones_BK, weight_NK, bias_N, rectified=True)[:, 9].isfinite().any()


@pytest.mark.parametrize("bits", [-1, -64, 0x7FFF, 0x7F81])
def test_every_nan_of_bfloat16_shows_in_int8(bits: int) -> None:
    input_BK, weight_NK, _, bias_N = draw(40, 70, 200, heavy_tails=False, through="int8")
    input_BK.view(torch.int16)[3, 77] = bits
    output_BN = linear("int8", input_BK, weight_NK, bias_N, rectified=True)
    assert output_BN[3].isnan().all()
    assert output_BN[4:].isfinite().all()


@pytest.mark.parametrize("through", FORMATS)
def test_huge_entries_beside_zeros_of_the_other_operand(through: IntegerFormat) -> None:
    """Scales whose product is infinite, of a sum that is 0."""
    input_BK, weight_NK = (torch.zeros(3, 80, dtype=DTYPES[through]) for _ in range(2))
    input_BK[:, 0], weight_NK[:, 1] = 3e38, 1e8
    assert torch.equal(linear(through, input_BK, weight_NK, torch.ones(3)), torch.ones(3, 3, dtype=DTYPES[through]))


@pytest.mark.parametrize("through", FORMATS)
def test_an_empty_batch(through: IntegerFormat) -> None:
    output_BN, grad_BK, grad_NK, grad_N = products(through, *draw(0, 70, 80, heavy_tails=False, through=through))
    assert output_BN.shape == (0, 70)
    assert grad_BK.shape == (0, 80)
    assert torch.equal(grad_NK, torch.zeros(70, 80))
    assert torch.equal(grad_N, torch.zeros(70))


@pytest.mark.parametrize("through", FORMATS)
def test_bad_arguments_are_refused(through: IntegerFormat) -> None:
    dtype = DTYPES[through]
    name, other = ("float32", torch.bfloat16) if through == "int16" else ("bfloat16", torch.float32)
    input_BK, weight_NK, bias_N = torch.randn(5, 64).to(dtype), torch.randn(70, 64).to(dtype), torch.randn(70)
    with pytest.raises(ValueError, match="input and weight: got \\[5, 64\\] and \\[70, 63\\]"):
        linear(through, input_BK, weight_NK[:, 1:].contiguous(), bias_N)
    with pytest.raises(ValueError, match="weight: expected a contiguous tensor"):
        linear(through, input_BK, weight_NK[:, 1:], bias_N)
    with pytest.raises(ValueError, match="input: got \\[64\\], expected a matrix"):
        linear(through, input_BK[0], weight_NK, bias_N)
    with pytest.raises(ValueError, match="input: got \\[\\], expected a matrix"):
        linear(through, input_BK[0, 0], weight_NK, bias_N)
    with pytest.raises(TypeError, match=f"input: got (BFloat16|Float), expected {name}"):
        linear(through, input_BK.to(other), weight_NK, bias_N)
    with pytest.raises(ValueError, match="bias: expected 70 floats"):
        linear(through, input_BK, weight_NK, bias_N[1:])
    with pytest.raises(ValueError, match="gradient and input"):
        grad_weight(through, torch.randn(6, 70).to(dtype), input_BK)


def make_layers(sizes: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    weights = [torch.randn(o, i).div(i**0.5).requires_grad_() for i, o in pairwise(sizes)]
    return weights, [torch.randn(o, requires_grad=True) for o in sizes[1:]]


@pytest.mark.parametrize(("through", "error", "gradient_error"), [("int16", 5e-4, 3e-2), ("int8", 3e-2, 0.15)])
def test_two_mlps_in_turn_have_the_gradients_of_float64(
    through: IntegerFormat, error: float, gradient_error: float
) -> None:
    """Forward of both before backward of either, so that neither may rely on what is left of a call."""
    torch.manual_seed(2)
    cases = []
    for sizes in ([13, 96, 64], [479, 128, 33, 70]):
        weights, biases = make_layers(sizes)
        given = torch.randn(150, sizes[0], requires_grad=True)
        cases.append(([given, *weights, *biases], mlp(given, weights, biases, through=through)))
    for leaves, output in cases:
        exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
        num_layers = len(leaves) // 2
        expected = plain_mlp(exact[0], exact[1 : 1 + num_layers], exact[1 + num_layers :])
        assert relative_error(output, expected) < error
        grad = torch.randn_like(output)
        own = torch.autograd.grad(output, leaves, grad)
        for got, other in zip(own, torch.autograd.grad(expected, exact, grad.double()), strict=True):
            # ReLU's mask differs where an activation lies within rounding of 0.
            assert relative_error(got, other) < gradient_error


@pytest.mark.parametrize("through", FORMATS)
def test_a_second_backward_pass_is_told_that_activations_are_gone(through: IntegerFormat) -> None:
    weights, biases = make_layers([64, 128, 64])
    output = mlp(torch.randn(9, 64), weights, biases, through=through).float().sum()
    output.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


@pytest.mark.parametrize("through", [None, *FORMATS])
def test_activations_that_are_not_written_over_serve_a_second_backward_pass(through: IntegerFormat | None) -> None:
    weights, biases = make_layers([32, 40, 16])
    output = mlp(torch.randn(9, 32), weights, biases, through=through).float().sum()
    first = torch.autograd.grad(output, weights, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(output, weights)))


@pytest.mark.parametrize("through", [None, *FORMATS])
def test_gradients_are_written_where_memory_was_offered_once(through: IntegerFormat | None) -> None:
    torch.manual_seed(2)
    weights, biases = make_layers([13, 96, 64])
    leaves, given = [*weights, *biases], torch.randn(50, 13)
    expected = torch.autograd.grad(mlp(given, weights, biases, through=through).float().sum(), leaves)
    offered = [torch.full_like(leaf, torch.nan) for leaf in leaves]
    for leaf, memory in zip(leaves, offered, strict=True):
        offer_memory(leaf, memory)
    mlp(given, weights, biases, through=through).float().sum().backward()
    for leaf, memory, gradient in zip(leaves, offered, expected, strict=True):
        assert leaf.grad is not None
        assert leaf.grad.data_ptr() == memory.data_ptr()
        assert torch.equal(memory, gradient)
        offer_memory(leaf, memory)
    mlp(given, weights, biases, through=through).float().sum().backward()
    for leaf, gradient in zip(leaves, expected, strict=True):
        assert torch.equal(leaf.grad, 2 * gradient), "offered memory that holds a gradient is left alone"
        leaf.grad = None
        offer_memory(leaf, torch.full_like(leaf, torch.nan))
    twice = (
        mlp(given, weights, biases, through=through).float().sum() * 2
        - mlp(given, weights, biases, through=through).float().sum()
    )
    for got, gradient in zip(torch.autograd.grad(twice, leaves), expected, strict=True):
        torch.testing.assert_close(got, gradient, rtol=2e-2, atol=2e-2)


def test_gradients_of_gradients_are_refused() -> None:
    weights, biases = make_layers([13, 8])
    loss = mlp(torch.randn(5, 13), weights, biases).square().sum()
    (gradient,) = torch.autograd.grad(loss, weights, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_lists_that_do_not_fit_are_refused() -> None:
    given, weight, bias = torch.randn(3, 70), torch.randn(65, 70), torch.randn(65)
    with pytest.raises(ValueError, match="biases: got 0, expected 1, for one layer or more"):
        torch.ops.dlrm.mlp(given, [weight], [], [""])
    with pytest.raises(ValueError, match="formats: got int4, expected int16, int8 or nothing"):
        torch.ops.dlrm.mlp(given, [weight], [bias], ["int4"])
    output, gradients = torch.randn(3, 65), [torch.empty(65, 71), torch.empty(65)]
    with pytest.raises(ValueError, match=r"gradients: got \[65, 71\] and \[65\] for a weight of \[65, 70\]"):
        torch.ops.dlrm.mlp_backward(output, given, [output], [weight], gradients, [""], True)
    with pytest.raises(ValueError, match=r"grad_weight: got \[65, 71\], expected \[65, 70\]"):
        torch.ops.dlrm.int16_grad_parameters(output, given, *gradients)
    with pytest.raises(ValueError, match="grad_bias: expected 65 floats on the CPU"):
        torch.ops.dlrm.int16_grad_parameters(output, given, weight, torch.empty(64))


@pytest.mark.parametrize("through", FORMATS)
def test_narrow_layers_do_not_go_through_integers(through: IntegerFormat) -> None:
    torch.manual_seed(2)
    for sizes, is_same in (([13, 512], True), ([512, 1], True), ([512, 63], True), ([512, 64], False)):
        weights, biases = make_layers(sizes)
        given = torch.randn(50, sizes[0])
        with torch.autocast("cpu", dtype=DTYPES[through], enabled=through == "int8"):
            own, other = (mlp(given, weights, biases, through=choice) for choice in (through, None))
        assert torch.equal(own, other) is is_same


def test_without_operators_integers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dlrm.kernels.mlp.has_native", lambda: False)
    with pytest.raises(RuntimeError, match="int8 products: expected CPU tensors"):
        mlp(torch.randn(2, 64), *make_layers([64, 64]), through="int8")


@pytest.mark.parametrize("interaction", ["original", "projection"])
def test_a_model_is_built_with_integers(interaction: Literal["original", "projection"]) -> None:
    model = ModelConfig(
        num_embeddings=8,
        embedding_dim=8,
        dense_arch_layer_sizes=(16, 8),
        over_arch_layer_sizes=(16, 1),
        interaction_type=interaction,
        interaction_branch1_layer_sizes=(8,),
        interaction_branch2_layer_sizes=(8,),
    )
    for precision, autocast in (("int16", None), ("int8", "cpu"), (None, None)):
        training = TrainingConfig(seed=1, precision=precision)
        config = Config(data=DataConfig(batch_size=8), model=model, training=training)
        with start_runtime() as runtime:
            built = build_model(config, runtime)
        parts = [part for part in built.modules() if isinstance(part, ReluMLP)]
        assert [part.through for part in parts] == [precision] * (4 if interaction == "projection" else 2)
        assert built.autocast == autocast
        assert make_sharder(config).pooled_type == (torch.bfloat16 if autocast else torch.float32)


def test_what_can_compute_with_integers() -> None:
    check_arithmetic(TrainingConfig(precision="int16"), CPU)
    check_arithmetic(TrainingConfig(precision="int8"), CPU)
    check_arithmetic(TrainingConfig(), torch.device("cuda"))


@pytest.mark.parametrize(
    ("device", "why", "execution", "message"),
    [
        ("cuda", None, "eager", "--precision int8: expected a CPU, got cuda"),
        ("cpu", "this CPU has no AVX-512 VNNI", "eager", "this CPU has no AVX-512 VNNI. Use fp32, or bf16"),
        ("cpu", None, "compile", "--precision int8 with --dense_execution compile"),
    ],
)
def test_where_integers_are_refused(
    monkeypatch: pytest.MonkeyPatch, device: str, why: str | None, execution: DenseExecution, message: str
) -> None:
    monkeypatch.setattr(dense_execution, "why_no_vnni", lambda: why)
    with pytest.raises(ConfigError, match=message):
        check_arithmetic(TrainingConfig(precision="int8", dense_execution=execution), torch.device(device))
