"""Loads the compiled operators, torch.ops.dlrm, if they were built."""

import os
from functools import cache

import torch

from dlrm.errors import ConfigError
from dlrm.kernels.build import library_path
from dlrm.kernels.meta import register_meta_functions

_CHOICES = ("none", "baseline", "AVX2", "AVX-512", "AVX-512 BF16")


@cache
def load_native() -> str | None:
    """Loads the operators. Returns None, or why they can't be loaded.

    Raises:
        ConfigError: if DLRM_KERNELS is not one of the words that it may be.
    """
    asked = os.environ.get("DLRM_KERNELS")
    if asked and asked not in _CHOICES:
        raise ConfigError(f"DLRM_KERNELS={asked}: expected {', '.join(_CHOICES)}, or nothing for what the CPU has")
    if asked == "none":
        return "DLRM_KERNELS=none"
    path = library_path()
    if not path.exists():
        return "not compiled for this PyTorch; run `python -m dlrm.kernels.build`"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{error} ({error.__cause__})".splitlines()[0]
    register_meta_functions()
    return None


def has_native() -> bool:
    """Whether torch.ops.dlrm can be called on CPU tensors."""
    return load_native() is None


def why_no_vnni() -> str | None:
    """None if integer products can be computed, or why not."""
    if (why := load_native()) is not None:
        return f"no compiled operators: {why}"
    if torch.ops.dlrm.has_vnni():
        return None
    asked = os.environ.get("DLRM_KERNELS")
    return "this CPU has no AVX-512 VNNI" if (asked or "AVX-512").startswith("AVX-512") else f"DLRM_KERNELS={asked}"


def describe_kernels() -> str:
    """Which operators compute on this CPU, as the start of a run says it."""
    if (why := load_native()) is not None:
        return f"PyTorch's and FBGEMM's operators ({why})"
    return f"{torch.ops.dlrm.instruction_set()} kernels"
