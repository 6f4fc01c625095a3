"""The MLPs compiled give what they give plainly, on the batches that are meant."""

import warnings

import pytest
import torch
from torch import nn

from dlrm.assembly import dense_execution
from dlrm.assembly.build import build_model
from dlrm.assembly.dense_execution import check_dense_execution, set_dense_execution
from dlrm.assembly.optimizers import _kernel_options
from dlrm.config.config import Config, DataConfig, DenseExecution, ModelConfig, TrainingConfig
from dlrm.errors import ConfigError
from dlrm.model.dlrm import DLRMTrain
from dlrm.ranks.runtime import start_runtime

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BATCH_SIZE = 8


def build(execution: DenseExecution, interaction: str = "original") -> DLRMTrain:
    config = Config(
        data=DataConfig(batch_size=BATCH_SIZE),
        model=ModelConfig(
            num_embeddings=8,
            embedding_dim=8,
            dense_arch_layer_sizes=(16, 8),
            over_arch_layer_sizes=(16, 1),
            interaction_type=interaction,
            interaction_branch1_layer_sizes=(8,),
            interaction_branch2_layer_sizes=(8,),
        ),
        training=TrainingConfig(seed=1, dense_execution=execution),
    )
    with start_runtime() as runtime:
        return build_model(config, runtime)


def test_compiled_parts_give_the_same_scores_and_gradients() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        plain, compiled = (build(execution).model.over_arch for execution in ("eager", "compile"))
        torch.manual_seed(0)
        hidden = torch.randn(BATCH_SIZE, 8 + 27 * 13)
        scores = [part(hidden) for part in (plain, compiled)]
        for score in scores:
            score.square().sum().backward()
    torch.testing.assert_close(scores[1], scores[0], rtol=0, atol=1e-6)
    named = dict(compiled.named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(named[name].grad, parameter.grad, rtol=0, atol=1e-5)


def record_compiler(monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[int]]:
    """Modes asked for, and sizes of the batches that went through a compiled part."""
    modes: list[str] = []
    sizes: list[int] = []

    def compiler(plain, *, mode, **_):
        modes.append(mode)
        return lambda *inputs: (sizes.append(len(inputs[0])), plain(*inputs))[1]

    monkeypatch.setattr(torch, "compile", compiler)
    return modes, sizes


def test_only_full_training_batches_are_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    _, sizes = record_compiler(monkeypatch)
    part: nn.Module = build("compile").model.dense_arch
    for rows in (BATCH_SIZE, BATCH_SIZE - 1):
        part(torch.randn(rows, 13))
    with torch.no_grad():
        part(torch.randn(BATCH_SIZE, 13))
    assert sizes == [BATCH_SIZE]


@pytest.mark.parametrize(("interaction", "num_parts"), [("original", 2), ("projection", 3), ("dcn", 3)])
def test_which_parts_are_compiled(interaction: str, num_parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    modes, _ = record_compiler(monkeypatch)
    assert not list(build("eager", interaction)._forward_pre_hooks)
    assert modes == []
    names = [name for name, _ in build("compile", interaction).named_parameters()]
    assert modes == ["default"] * num_parts
    model = build("eager", interaction)
    set_dense_execution(model, "cuda_graph", BATCH_SIZE)
    assert modes == ["default"] * num_parts + ["reduce-overhead"] * num_parts
    assert len(model._forward_pre_hooks) == 1
    assert [name for name, _ in model.named_parameters()] == names


def test_what_a_device_can_not_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_dense_execution("eager", CPU)
    check_dense_execution("eager", CUDA)
    check_dense_execution("compile", CPU)
    with pytest.raises(ConfigError, match=r"^--dense_execution cuda_graph: expected a CUDA device, got cpu\. Use comp"):
        check_dense_execution("cuda_graph", CPU)
    monkeypatch.setattr(dense_execution.importlib.util, "find_spec", lambda _: None)
    for execution in ("compile", "cuda_graph"):
        with pytest.raises(ConfigError, match=f"^--dense_execution {execution}: .*the package triton is not installed"):
            check_dense_execution(execution, CUDA)
    monkeypatch.setattr(dense_execution, "_has_cpp_compiler", lambda: False)
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler on a CPU, and there is none"):
        check_dense_execution("compile", CPU)


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (torch.optim.SGD, {"fused": True}),
        (torch.optim.AdamW, {"fused": True}),
        (torch.optim.Adagrad, {"foreach": True}),
    ],
)
def test_dense_parameters_are_updated_in_one_pass(optimizer, options) -> None:
    assert _kernel_options(optimizer, {"cuda"}) == options
    assert _kernel_options(optimizer, {"cpu"}) == {"fused": True}
