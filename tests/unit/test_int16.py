"""Int16 products against float64, and how a run comes to use them.

Shapes: B samples, N outputs, K inputs of a layer.
"""

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dlrm.config import Config, DataConfig, DenseExecution, ModelConfig, TrainingConfig
from dlrm.errors import ConfigError
from dlrm.kernels import build, native
from dlrm.kernels.mlp import mlp, plain_mlp
from dlrm.model.dense import ReluMLP
from dlrm.runtime import start_runtime
from dlrm.train import dense_execution
from dlrm.train.build import build_model
from dlrm.train.dense_execution import check_arithmetic

SIZES = [(777, 1024, 479), (33, 13, 1), (1, 1, 13), (300, 1, 512), (129, 241, 193), (6300, 33, 65)]
INT16 = TrainingConfig(precision="int16")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def compiled() -> None:
    if build.find_compiler() is None:
        pytest.skip("no C++ compiler: there is nothing to test")
    assert build.main() == 0
    native.load_native.cache_clear()
    if (why := native.why_no_int16()) is not None:
        pytest.skip(why)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def draw(b: int, n: int, k: int, *, heavy_tails: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input, weight, gradient, bias; samples and columns of very different size where the tails are heavy."""
    torch.manual_seed(b + n + k)
    input_BK, weight_NK, grad_BN, bias_N = (torch.randn(*size) for size in ((b, k), (n, k), (b, n), (n,)))
    if heavy_tails:
        input_BK *= torch.randn(b, 1).exp() * torch.randn(k).exp()
        grad_BN *= torch.randn(b, 1).mul(2).exp() * torch.randn(n).exp() * 1e-6 * (torch.rand(b, n) < 0.6)
    return input_BK, weight_NK, grad_BN, bias_N


def products(input_BK: Tensor, weight_NK: Tensor, grad_BN: Tensor, bias_N: Tensor) -> list[Tensor]:
    return [
        torch.ops.dlrm.int16_linear(input_BK, weight_NK, bias_N, False),
        torch.ops.dlrm.int16_grad_input(grad_BN, weight_NK),
        torch.ops.dlrm.int16_grad_weight(grad_BN, input_BK),
    ]


def exact_products(input_BK: Tensor, weight_NK: Tensor, grad_BN: Tensor, bias_N: Tensor) -> list[Tensor]:
    input_BK, weight_NK, grad_BN = input_BK.double(), weight_NK.double(), grad_BN.double()
    return [input_BK @ weight_NK.t() + bias_N.double(), grad_BN @ weight_NK, grad_BN.t() @ input_BK]


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Of the whole in the Euclidean norm; 0 / 0 counts as 0."""
    return ((got.double() - expected).norm() / expected.norm().clamp_min(1e-300)).item()


@pytest.mark.parametrize("heavy_tails", [False, True])
@pytest.mark.parametrize(("b", "n", "k"), SIZES)
def test_products_are_those_of_float64(b: int, n: int, k: int, heavy_tails: bool) -> None:
    given = draw(b, n, k, heavy_tails=heavy_tails)
    for got, expected in zip(products(*given), exact_products(*given), strict=True):
        assert got.dtype == torch.float32
        assert relative_error(got, expected) < 5e-4


@pytest.mark.parametrize(("b", "n", "k"), [(777, 241, 479), (6300, 64, 65)])
def test_products_do_not_depend_on_the_number_of_threads(b: int, n: int, k: int, threads: None) -> None:
    given = draw(b, n, k, heavy_tails=True)
    torch.set_num_threads(1)
    expected = products(*given)
    for count in (2, 3, 7):
        torch.set_num_threads(count)
        assert all(torch.equal(own, other) for own, other in zip(products(*given), expected, strict=True))


def test_the_worst_that_a_block_can_hold_does_not_overflow() -> None:
    for input_BK in (torch.ones(9, 384), torch.eye(9, 384), torch.tensor([1.0, -1.0]).repeat(9, 192)):
        ones_NK = torch.ones(17, 384)
        for sign in (1, -1):
            got = torch.ops.dlrm.int16_linear(sign * input_BK, ones_NK, torch.zeros(17), False)
            expected = sign * input_BK.sum(1, keepdim=True).double().expand(9, 17)
            torch.testing.assert_close(got.double(), expected, rtol=5e-4, atol=1e-3)


def test_zero_rows_give_the_bias_and_zero_gradients() -> None:
    bias_N = torch.randn(70)
    output_BN, grad_BK, grad_NK = products(torch.zeros(5, 80), torch.randn(70, 80), torch.zeros(5, 70), bias_N)
    assert torch.equal(output_BN, bias_N.expand(5, 70))
    assert not grad_BK.any()
    assert not grad_NK.any()


@pytest.mark.parametrize("scale", [3e38, 1e37, 1e20, 1e-20, 1e-30])
def test_huge_and_tiny_values(scale: float) -> None:
    """As far as fp32's own products stay in range."""
    torch.manual_seed(0)
    input_BK = torch.rand(40, 200).clamp_(0.1) * scale
    weight_NK = torch.rand(70, 200) / 300
    got = torch.ops.dlrm.int16_linear(input_BK, weight_NK, torch.zeros(70), False)
    assert torch.mm(input_BK, weight_NK.t()).isfinite().all()
    assert relative_error(got / scale, (input_BK.double() @ weight_NK.double().t()) / scale) < 5e-4
    got = torch.ops.dlrm.int16_grad_weight(input_BK, weight_NK[:40])
    assert relative_error(got / scale, (input_BK.double().t() @ weight_NK[:40].double()) / scale) < 5e-4


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 77, 199])
def test_what_is_not_finite_stays_so(bad: float, place: int) -> None:
    input_BK, weight_NK, grad_BN, bias_N = draw(40, 70, 200, heavy_tails=False)
    input_BK[3, place] = bad
    rectified_BN = torch.ops.dlrm.int16_linear(input_BK, weight_NK, bias_N, True)
    assert not rectified_BN[3].isfinite().any()
    assert rectified_BN[4:].isfinite().all()
    grad_NK = torch.ops.dlrm.int16_grad_weight(grad_BN, input_BK)
    assert not grad_NK[:, place].isfinite().any()
    weight_NK[9, place] = bad
    assert not torch.ops.dlrm.int16_grad_input(grad_BN, weight_NK)[:, place].isfinite().any()
    assert not torch.ops.dlrm.int16_linear(torch.ones_like(input_BK), weight_NK, bias_N, True)[:, 9].isfinite().any()


def test_an_empty_batch() -> None:
    output_BN, grad_BK, grad_NK = products(*draw(0, 70, 80, heavy_tails=False))
    assert output_BN.shape == (0, 70)
    assert grad_BK.shape == (0, 80)
    assert torch.equal(grad_NK, torch.zeros(70, 80))


def test_bad_arguments_are_refused() -> None:
    input_BK, weight_NK, bias_N = torch.randn(5, 64), torch.randn(70, 64), torch.randn(70)
    linear = torch.ops.dlrm.int16_linear
    with pytest.raises(ValueError, match="input and weight: got \\[5, 64\\] and \\[70, 63\\]"):
        linear(input_BK, weight_NK[:, 1:].contiguous(), bias_N, True)
    with pytest.raises(ValueError, match="weight: expected a contiguous tensor"):
        linear(input_BK, weight_NK[:, 1:], bias_N, True)
    with pytest.raises(TypeError, match="input: got BFloat16, expected float32"):
        linear(input_BK.bfloat16(), weight_NK, bias_N, True)
    with pytest.raises(ValueError, match="bias: expected 70 floats"):
        linear(input_BK, weight_NK, bias_N[1:], True)
    with pytest.raises(ValueError, match="gradient and input"):
        torch.ops.dlrm.int16_grad_weight(torch.randn(6, 70), input_BK)


def make_layers(sizes: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    weights = [torch.randn(o, i).div(i**0.5).requires_grad_() for i, o in pairwise(sizes)]
    return weights, [torch.randn(o, requires_grad=True) for o in sizes[1:]]


def test_two_mlps_in_turn_have_the_gradients_of_float64() -> None:
    """Forward of both before backward of either, so that neither may rely on what is left of a call."""
    torch.manual_seed(2)
    cases = []
    for sizes in ([13, 96, 64], [479, 128, 33, 70]):
        weights, biases = make_layers(sizes)
        given = torch.randn(150, sizes[0], requires_grad=True)
        cases.append(([given, *weights, *biases], mlp(given, weights, biases, uses_int16=True)))
    for leaves, output in cases:
        exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
        num_layers = len(leaves) // 2
        expected = plain_mlp(exact[0], exact[1 : 1 + num_layers], exact[1 + num_layers :])
        assert relative_error(output, expected) < 5e-4
        grad = torch.randn_like(output)
        own = torch.autograd.grad(output, leaves, grad)
        for got, other in zip(own, torch.autograd.grad(expected, exact, grad.double()), strict=True):
            # ReLU's mask differs where an activation lies within rounding of 0.
            assert relative_error(got, other) < 3e-2


def test_narrow_layers_are_those_of_fp32() -> None:
    torch.manual_seed(2)
    for sizes, is_same in (([13, 512], True), ([512, 1], True), ([512, 63], True), ([512, 64], False)):
        weights, biases = make_layers(sizes)
        given = torch.randn(50, sizes[0])
        own, fp32 = (mlp(given, weights, biases, uses_int16=flag) for flag in (True, False))
        assert torch.equal(own, fp32) is is_same


def test_without_operators_int16_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dlrm.kernels.mlp.has_native", lambda: False)
    with pytest.raises(RuntimeError, match="int16 products: expected CPU tensors"):
        mlp(torch.randn(2, 64), *make_layers([64, 64]), uses_int16=True)


@pytest.mark.parametrize("interaction", ["original", "projection"])
def test_a_model_is_built_with_int16(interaction: str) -> None:
    model = ModelConfig(
        num_embeddings=8,
        embedding_dim=8,
        dense_arch_layer_sizes=(16, 8),
        over_arch_layer_sizes=(16, 1),
        interaction_type=interaction,
        interaction_branch1_layer_sizes=(8,),
        interaction_branch2_layer_sizes=(8,),
    )
    for precision in ("int16", None):
        training = TrainingConfig(seed=1, precision=precision)
        with start_runtime() as runtime:
            built = build_model(Config(data=DataConfig(batch_size=8), model=model, training=training), runtime)
        parts = [part for part in built.modules() if isinstance(part, ReluMLP)]
        assert [part.uses_int16 for part in parts] == [precision == "int16"] * (4 if interaction == "projection" else 2)
        assert built.autocast is None


def test_what_can_compute_int16() -> None:
    check_arithmetic(INT16, CPU)
    check_arithmetic(TrainingConfig(), torch.device("cuda"))


@pytest.mark.parametrize(
    ("device", "why", "execution", "message"),
    [
        ("cuda", None, "eager", "--precision int16: expected a CPU, got cuda"),
        ("cpu", "this CPU has no AVX-512 VNNI", "eager", "this CPU has no AVX-512 VNNI. Use fp32, or bf16"),
        ("cpu", None, "compile", "--precision int16 with --dense_execution compile"),
    ],
)
def test_where_int16_is_refused(
    monkeypatch: pytest.MonkeyPatch, device: str, why: str | None, execution: DenseExecution, message: str
) -> None:
    monkeypatch.setattr(dense_execution, "why_no_int16", lambda: why)
    with pytest.raises(ConfigError, match=message):
        check_arithmetic(TrainingConfig(precision="int16", dense_execution=execution), torch.device(device))
