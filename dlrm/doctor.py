"""Does what is installed fit together, and does it run?"""

import importlib.metadata
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

REMEDY = "pip install --no-deps -r requirements/cpu.txt (or cuda.txt), or `make setup` in a fresh checkout"

# torchrec and fbgemm-gpu 1.n are built for torch 2.(n + 5).
_TORCH_MINOR_OFFSET = 5


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    is_well: bool
    text: str


def main(argv: Sequence[str]) -> int:
    """`dlrm doctor`: prints the findings; 0 if all is well, 1 otherwise."""
    if argv:
        print(
            "usage: dlrm doctor\n\nChecks versions, devices and native parts. Exit code 1 where something does not fit."
        )
        return 0 if argv[0] in ("-h", "--help") else 2
    findings = diagnose()
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(f"{'ok  ' if finding.is_well else 'FAIL'}  {finding.name:<{width}}  {finding.text}")
    ailing = [finding for finding in findings if not finding.is_well]
    print(f"{len(ailing)} of {len(findings)} checks failed." if ailing else "All is well.")
    return 1 if ailing else 0


def diagnose() -> list[Finding]:
    """All checks, in the order in which one builds on another."""
    versions = {name: _version(name) for name in ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu")}
    findings = [_check_python(), check_versions(versions)]
    if findings[-1].is_well:
        for name, check in (
            ("native parts", _check_native),
            ("kernels", _check_kernels),
            ("devices", _check_devices),
        ):
            findings.append(_guarded(name, check))
    return findings


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _check_python() -> Finding:
    is_well = (3, 10) <= sys.version_info[:2] <= (3, 12)
    return Finding("python", is_well, platform.python_version() + ("" if is_well else ": 3.10 to 3.12 needed"))


def check_versions(versions: dict[str, str | None]) -> Finding:
    """Whether torch, torchrec and fbgemm belong together."""
    name = "versions"
    fbgemm = [package for package in ("fbgemm-gpu", "fbgemm-gpu-cpu") if versions[package]]
    missing = [package for package in ("torch", "torchrec") if not versions[package]]
    if not fbgemm:
        missing.append("fbgemm-gpu-cpu (or fbgemm-gpu)")
    if missing:
        return Finding(name, False, f"{', '.join(missing)} not installed. Remedy: {REMEDY}")
    if len(fbgemm) > 1:
        return Finding(
            name, False, "fbgemm-gpu and fbgemm-gpu-cpu are both installed. Remedy: pip uninstall one of them"
        )
    parts = {package: version for package in ("torch", "torchrec", fbgemm[0]) if (version := versions[package])}
    shown = ", ".join(f"{package} {version}" for package, version in parts.items())
    minors = {package: int(version.split(".")[1]) for package, version in parts.items()}
    expected = minors["torch"] - _TORCH_MINOR_OFFSET
    if minors["torchrec"] == minors[fbgemm[0]] == expected:
        return Finding(name, True, shown)
    return Finding(
        name,
        False,
        f"{shown}: torch 2.{minors['torch']} needs torchrec 1.{expected} and fbgemm 1.{expected}. Remedy: {REMEDY}",
    )


def _guarded(name: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(name, True, check())
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        text = (str(error).splitlines() or [type(error).__name__])[0]
        return Finding(name, False, f"{text}. Remedy: {REMEDY}")


def _check_native() -> str:
    """Loads FBGEMM's operators and looks two rows up."""
    import torch
    import torchrec  # noqa: F401 - its import registers the operators
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    tables = SplitTableBatchedEmbeddingBagsCodegen(
        [(4, 8, EmbeddingLocation.HOST, ComputeDevice.CPU)], device=torch.device("cpu")
    )
    tables.split_embedding_weights()[0].fill_(0.5)
    pooled = tables(torch.tensor([1, 3]), torch.tensor([0, 2]))
    if not torch.equal(pooled, torch.ones(1, 8)):
        raise RuntimeError(f"FBGEMM's lookup gave {pooled.tolist()}, expected ones")
    return "FBGEMM's operators load and look up"


def _check_kernels() -> str:
    """The trainer's own operators. A machine without a compiler does without them."""
    from dlrm.kernels.native import describe_kernels

    return describe_kernels()


def _check_devices() -> str:
    import torch

    if not torch.cuda.is_available():
        if _version("fbgemm-gpu") is not None:
            raise RuntimeError("fbgemm-gpu (CUDA) is installed, but torch finds no CUDA device")
        return f"cpu, {torch.get_num_threads()} threads ({torch.backends.cpu.get_cpu_capability()}); no CUDA device"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if _version("fbgemm-gpu") is None:
        raise RuntimeError(f"{len(names)} CUDA devices, but fbgemm-gpu-cpu is installed")
    torch.ones(1, device="cuda").sum().item()
    return f"{len(names)} x {names[0]}, CUDA {torch.version.cuda}"
