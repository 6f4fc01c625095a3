"""What integers become, and whether it is the same to the last bit on this machine as on another.

numpy has several float32 logarithms, and takes one by the CPU: with AVX2 or AVX-512 some 3 % of the values differ in
the last bit from those without. Days that were written in part by each would have two values for one integer.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from dlrm.errors import ConfigError
from dlrm.preprocess.workspace import Workspace

_PROBED = 1 << 16


def log_dense(integers_IR: npt.NDArray[np.int32], minimum: int) -> npt.NDArray[np.float32]:
    """log(x - minimum + 2) in float32, as torchrec's tsv_to_npys has it; integers below the minimum count as it."""
    shifted_IR = np.maximum(integers_IR.astype(np.float64) - (minimum - 2), 2.0)
    return np.log(shifted_IR.astype(np.float32))


def digest_logarithm() -> str:
    """Digest of this machine's logarithms of 2 to 65537: equal on machines that write the same bytes."""
    logarithms = log_dense(np.arange(_PROBED, dtype=np.int32)[None], 0)
    return hashlib.sha256(logarithms.astype("<f4").tobytes()).hexdigest()


def record_logarithm(workspace: Workspace, applied: Mapping[str, Any] | None) -> None:
    """Remembers, for one rank, which logarithm a run began with; says so if an applied vocabulary has another."""
    if workspace.facts("plan", "logarithm") is None:
        workspace.finish("plan", "logarithm", {"sha256": digest_logarithm()})
    before = None if applied is None else applied["integers"].get("logarithm")
    if before not in (None, recorded_logarithm(workspace)):
        print(
            "Warning: this machine's logarithm differs from that of the vocabulary's days in the last bit of some "
            "values (numpy takes another one on another CPU)."
        )


def check_logarithm(workspace: Workspace) -> None:
    """Refuses to go on with a run that began on a machine with another logarithm.

    Raises:
        ConfigError: if this machine's differs.
    """
    if recorded_logarithm(workspace) != digest_logarithm():
        raise ConfigError(
            f"{workspace.root}: was begun on a machine whose logarithm differs in the last bit of some values (numpy "
            "takes another one on another CPU). Continue there with --resume, or remove it to start again."
        )


def recorded_logarithm(workspace: Workspace) -> str:
    """Digest of the logarithm that the run began with."""
    facts = workspace.facts("plan", "logarithm")
    assert facts is not None
    return facts["sha256"]
