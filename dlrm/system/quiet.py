"""Silences what libraries print and a user of this one can't use."""

import logging
import warnings


def quieten_libraries() -> None:
    """TorchRec and torch.fx log internals as warnings; errors still come through.

    FBGEMM registers its dense CPU lookup in a way that torch warns of; its gradients are right, as
    tests/distributed/test_parity.py holds (2026-11-23: fbgemm-gpu-cpu 1.8).
    """
    # 2026-11-23: torchrec 1.8 uses names that torch 2.13 is about to drop.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", "fbgemm::dense_embedding_codegen_lookup_function: an autograd kernel was not")
    for name in ("torchrec", "torch.fx._symbolic_trace"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger().addFilter(_knows_fbgemm)


def _knows_fbgemm(record: logging.LogRecord) -> bool:
    """False for what fbgemm-gpu 1.6 logs, once for each library that it loads: it does not know itself (2026-11-30)."""
    return "_fbgemm_torch_compat_table has no entry for" not in record.getMessage()
