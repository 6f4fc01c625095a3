"""How the MLPs run: operator by operator, compiled, or compiled and replayed as CUDA graphs; and in what arithmetic.

The tables' lookup, the input's all-to-all and the loss stay as they are.
"""

import importlib.util
from typing import Any

import torch
from torch import nn

from dlrm.config.config import DenseExecution, TrainingConfig
from dlrm.errors import ConfigError
from dlrm.kernels.native import why_no_vnni
from dlrm.model.dlrm import DLRMTrain
from dlrm.model.interaction import DotInteraction


def check_dense_execution(execution: DenseExecution, device: torch.device) -> None:
    """Refuses what this device or this machine can't do.

    Raises:
        ConfigError: naming what is missing.
    """
    if execution == "cuda_graph" and device.type != "cuda":
        raise ConfigError(
            f"--dense_execution cuda_graph: expected a CUDA device, got {device.type}. Use compile or eager."
        )
    if execution == "eager":
        return
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ConfigError(
            f"--dense_execution {execution}: torch.compile writes Triton kernels, and the package triton is not "
            "installed. Install it, or use eager."
        )
    if device.type == "cpu" and not _has_cpp_compiler():
        raise ConfigError(
            "--dense_execution compile: torch.compile needs a C++ compiler on a CPU, and there is none. Install g++, "
            "or use eager."
        )


def check_arithmetic(training: TrainingConfig, device: torch.device) -> None:
    """Refuses integer arithmetic on a device that has none.

    Raises:
        ConfigError: naming what is missing.
    """
    if training.integers is None:
        return
    asked = f"--precision {training.integers}"
    if device.type != "cpu":
        raise ConfigError(f"{asked}: expected a CPU, got {device.type}. Use bf16 or tf32.")
    if (why := why_no_vnni()) is not None:
        raise ConfigError(f"{asked}: {why}. Use fp32, or bf16 where the CPU has AMX or AVX-512 BF16.")
    if training.dense_execution != "eager":
        raise ConfigError(
            f"{asked} with --dense_execution {training.dense_execution}: its products are not compiled. "
            "Drop one of the two."
        )


def _has_cpp_compiler() -> bool:
    from torch._inductor import cpp_builder  # here, as it takes a second to load
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        cpp_builder.get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True


def set_dense_execution(model: DLRMTrain, execution: DenseExecution, batch_size: int) -> None:
    """Has the dense parts run so on full training batches; those of other sizes, and evaluation, run as they are.

    One graph for each part, then: compiling takes seconds to a minute, at the first step, and never again.
    Call before or after sharding; names of parameters stay.
    """
    if execution == "eager":
        return
    parts: list[nn.Module] = [model.model.dense_arch, model.model.over_arch]
    if not isinstance(model.model.interaction, DotInteraction):  # which is one kernel already
        parts.append(model.model.interaction)
    for part in parts:
        _compile_for(part, batch_size, execution)
    if execution == "cuda_graph":  # outputs of the last step's graphs may be overwritten
        model.register_forward_pre_hook(lambda *_: torch.compiler.cudagraph_mark_step_begin())


def _compile_for(part: nn.Module, batch_size: int, execution: DenseExecution) -> None:
    plain = part.forward
    mode = "reduce-overhead" if execution == "cuda_graph" else "default"
    compiled = torch.compile(plain, fullgraph=True, dynamic=False, mode=mode)

    def forward(*inputs: Any) -> torch.Tensor:
        is_full = torch.is_grad_enabled() and inputs[0].size(0) == batch_size
        return compiled(*inputs) if is_full else plain(*inputs)

    part.forward = forward
