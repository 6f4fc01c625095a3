"""Does what is installed fit together, and does it run?"""

import ctypes
import importlib.metadata
import logging
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dlrm.errors import ConfigError
from dlrm.system.console import plural, show_bytes
from dlrm.system.host import available_cores, available_memory_bytes, chosen_threads, usable_cores
from dlrm.system.limits import cpu_quota, open_files_limit
from dlrm.system.package_sets import SETS

REMEDY = "pip install --no-deps -r requirements/cpu.txt (or cuda.txt), or `make setup` in a fresh checkout"

# torchrec and fbgemm-gpu 1.n are built for torch 2.(n + 5).
_TORCH_MINOR_OFFSET = 5

_DRIVER_LIBRARY = "libnvidia-ml.so.1"
_USAGE = """usage: dlrm doctor [--no_device]

Checks versions, devices and native parts. Exit code 1 where something does not fit.

  --no_device   leave out what needs a GPU or its driver where there is none, as on a login node or while an image is
                built"""


class _NoDeviceError(RuntimeError):
    """A check needs a GPU, and there is none, or no driver."""


@dataclass(frozen=True)
class Finding:
    """One line of the report. `is_well` is None if the check was left out."""

    name: str
    is_well: bool | None
    text: str

    @property
    def mark(self) -> str:
        """The first word of the line."""
        return "-" if self.is_well is None else "ok" if self.is_well else "FAIL"


def main(argv: Sequence[str]) -> int:
    """`dlrm doctor`: prints the findings; 0 if all is well, 1 otherwise."""
    if {"-h", "--help"} & set(argv):
        print(_USAGE)
        return 0
    if foreign := [argument for argument in argv if argument != "--no_device"]:
        raise ConfigError(f"{foreign[0]}: not a flag. `dlrm doctor --help` lists the flags.")
    findings = diagnose(needs_device=not argv)
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(f"{finding.mark:<4}  {finding.name:<{width}}  {finding.text}")
    num_ailing, num_left_out = (sum(finding.is_well is kind for finding in findings) for kind in (False, None))
    if num_ailing:
        print(f"{num_ailing} of {len(findings)} checks failed.")
    elif num_left_out:
        print(f"All else is well. Left out: {num_left_out} of {len(findings)} checks. Run `dlrm doctor` beside a GPU.")
    else:
        print("All is well.")
    return 1 if num_ailing else 0


def diagnose(*, needs_device: bool = True) -> list[Finding]:
    """All checks, in the order in which one builds on another.

    Args:
        needs_device: where CUDA's packages are installed, a GPU must be there. If not, what needs one is left out.
    """
    versions = {name: _version(name) for name in ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu")}
    findings = [_check_python(), check_versions(versions)]
    if findings[-1].is_well:
        for name, check in (
            ("native parts", _check_native),
            ("kernels", _check_kernels),
            ("devices", _check_devices),
            ("limits", _describe_limits),
        ):
            findings.append(_guarded(name, check, needs_device=needs_device))
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
    for package_set in SETS:
        if all(_release(version) == package_set.releases[package] for package, version in parts.items()):
            return Finding(name, True, f"{shown}: the {package_set.name} set")
    expected = _minor(parts["torch"]) - _TORCH_MINOR_OFFSET
    unfit = [package for package in ("torchrec", fbgemm[0]) if _minor(parts[package]) != expected]
    if not unfit:
        return Finding(name, True, f"{shown}: they belong together, but were not tried. {_tried()}")
    needed = f"torch 2.{_minor(parts['torch'])} needs torchrec 1.{expected} and fbgemm 1.{expected}"
    return Finding(name, False, f"{shown}: {needed}. Remedy: {_remedy(parts, unfit)}")


def _release(version: str) -> str:
    return version.split("+")[0]


def _minor(version: str) -> int:
    return int(version.split(".")[1])


def _tried() -> str:
    return "Tried: " + "; ".join(f"torch {each.torch}, torchrec {each.torchrec}, fbgemm {each.fbgemm}" for each in SETS)


def _remedy(parts: dict[str, str], unfit: Sequence[str]) -> str:
    """What to install beside this torch if a set has it, or which torch beside the others, or else the pinned set."""
    minors = {package: _minor(version) for package, version in parts.items()}
    fitting = [{package: each.releases[package] for package in parts} for each in SETS]
    for releases in fitting:
        if _minor(releases["torch"]) == minors["torch"]:
            return f"pip install --no-deps {' '.join(f'{package}=={releases[package]}' for package in unfit)}"
    for releases in fitting:
        if {package for package in parts if _minor(releases[package]) != minors[package]} == {"torch"}:
            return f"pip install torch=={releases['torch']}"
    return f"{REMEDY}. {_tried()}"


def _guarded(name: str, check: Callable[[], str], *, needs_device: bool = True) -> Finding:
    try:
        return Finding(name, True, check())
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        text = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, _NoDeviceError) and not needs_device:
            return Finding(name, None, f"left out: {text}")
        return Finding(name, False, f"{text}. Remedy: {REMEDY}")


def _check_native() -> str:
    """Loads FBGEMM's operators and looks two rows up."""
    if _version("fbgemm-gpu") is not None and not _has_driver():
        raise _NoDeviceError(f"fbgemm-gpu (CUDA) loads {_DRIVER_LIBRARY} of NVIDIA's driver, which is not installed")
    import torch

    logging.disable(logging.WARNING)  # 2026-11-30: fbgemm-gpu 1.6 warns that it does not know with which torch it fits
    try:
        import torchrec  # noqa: F401 - its import registers the operators
    finally:
        logging.disable(logging.NOTSET)
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


def _has_driver() -> bool:
    try:
        ctypes.CDLL(_DRIVER_LIBRARY)
    except OSError:
        return False
    return True


def _check_kernels() -> str:
    """The trainer's own operators. A machine without a compiler does without them."""
    from dlrm.kernels.native import describe_kernels

    return describe_kernels()


def _describe_limits() -> str:
    """Limits on cores, memory and open files."""
    quota = cpu_quota()
    of_quota = "" if quota is None else f", a CPU quota of {quota:.3g}"
    return (
        f"{plural(len(os.sched_getaffinity(0)), 'core')}{of_quota}: {plural(available_cores(), 'worker')}; "
        f"{show_bytes(available_memory_bytes())} of memory free; {open_files_limit():,} open files"
    )


def _check_devices() -> str:
    import torch

    if not torch.cuda.is_available():
        if _version("fbgemm-gpu") is not None:
            raise _NoDeviceError("fbgemm-gpu (CUDA) is installed, but torch finds no CUDA device")
        threads = chosen_threads() or usable_cores(torch.get_num_threads())
        return f"cpu, {plural(threads, 'thread')} ({torch.backends.cpu.get_cpu_capability()}); no CUDA device"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if _version("fbgemm-gpu") is None:
        raise RuntimeError(f"{len(names)} CUDA devices, but fbgemm-gpu-cpu is installed")
    torch.ones(1, device="cuda").sum().item()
    return f"{len(names)} x {names[0]}, CUDA {torch.version.cuda}"
