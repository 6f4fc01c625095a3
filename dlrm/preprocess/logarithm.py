"""Integers become logarithms, and days are written on machines whose logarithms agree to the last bit.

numpy has several float32 logarithms, and chooses one by the CPU: with AVX2 or AVX-512 some 3 % of the values differ in
the last bit from those without. If two such machines wrote parts of the same days, an integer could have two values.
Shapes: R rows, I integer features.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from dlrm.errors import ConfigError
from dlrm.preprocess.workspace import Workspace
from dlrm.schema.criteo import MISSING_DENSE

TRANSFORM = "log(x - minimum + 2)"
"""What the manifest says about `log_dense`."""
_PROBED = 1 << 16


def transform_integers(
    integers_IR: npt.NDArray[np.int32], minimum: int, missing_IR: npt.NDArray[np.bool_] | None
) -> npt.NDArray[np.float32]:
    """The dense values of some rows.

    Args:
        missing_IR: integers that become MISSING_DENSE; None if missing integers become what 0 becomes.
    """
    dense_IR = log_dense(integers_IR, minimum)
    if missing_IR is not None:
        dense_IR[missing_IR] = MISSING_DENSE
    return dense_IR


def log_dense(integers_IR: npt.NDArray[np.int32], minimum: int) -> npt.NDArray[np.float32]:
    """log(x - minimum + 2) in float32, as in torchrec's tsv_to_npys. Integers below the minimum count as it."""
    shifted_IR = np.maximum(integers_IR.astype(np.float64) - (minimum - 2), 2.0)
    return np.log(shifted_IR.astype(np.float32))


def digest_logarithm() -> str:
    """Digest of this machine's logarithms of 2 to 65537. Machines with equal digests write the same bytes."""
    logarithms = log_dense(np.arange(_PROBED, dtype=np.int32)[None], 0)
    return hashlib.sha256(logarithms.astype("<f4").tobytes()).hexdigest()


def record_logarithm(workspace: Workspace, applied: Mapping[str, Any] | None) -> None:
    """Records the logarithm that a run began with; warns if that of an applied vocabulary's days differs.

    For one rank only.

    Args:
        applied: manifest of the vocabulary; None without one.
    """
    if workspace.facts("plan", "logarithm") is None:
        workspace.finish("plan", "logarithm", {"sha256": digest_logarithm()})
    before = None if applied is None else applied["integers"].get("logarithm")
    if before not in (None, recorded_logarithm(workspace)):
        print(
            "Warning: this machine's logarithm differs from that of the vocabulary's days in the last bit of some "
            "values (numpy chooses one by the CPU)."
        )


def check_logarithm(workspace: Workspace) -> None:
    """Refuses to continue a run that began on a machine with another logarithm.

    Raises:
        ConfigError: if this machine's differs.
    """
    if recorded_logarithm(workspace) != digest_logarithm():
        raise ConfigError(
            f"{workspace.root}: was begun on a machine whose logarithm differs in the last bit of some values (numpy "
            "chooses one by the CPU). Continue there with --resume, or remove it to start again."
        )


def recorded_logarithm(workspace: Workspace) -> str:
    """Digest of the logarithm that the run began with."""
    facts = workspace.facts("plan", "logarithm")
    assert facts is not None
    return facts["sha256"]
