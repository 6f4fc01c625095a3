"""Compiles the operators for the PyTorch that is installed: `python -m dlrm.kernels.build`.

The library stands beside this file. It is named after the PyTorch, the kind of CPU and a digest of its sources, so that
it is never loaded for others. The loops (kernels.cpp) are compiled once for each instruction set; the best one that the
CPU has is chosen when they run. The loops of integer products are compiled for AVX-512 VNNI only; integer_product.cpp
is compiled a second time with BF16.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from dlrm.errors import reason_of
from dlrm.system.host import available_cores

SOURCES = Path(__file__).parent / "csrc"
_FLAGS = ("-std=c++20", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-Wno-psabi")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma")
_INSTRUCTION_SETS = {
    "x86_64": {
        "baseline": (),
        "avx2": ("-mavx2", "-mfma"),
        "avx512": _AVX512,
        "avx512_bf16": (*_AVX512, "-mavx512bf16"),
    }
}
_VNNI = {"x86_64": (*_AVX512, "-mavx512vnni", "-mprfchw")}
_WITHOUT = (
    "dlrm will run, slower, on PyTorch's and FBGEMM's own operators. With g++ 10 or newer: python -m dlrm.kernels.build"
)
_OPERATORS = ("ops", "integer_ops", "mlp_ops", "exchange")
_HOST_EXCHANGE = ("host_memory", "lanes")
_INTEGER_PRODUCTS = ("integer_product", "int16_quantize", "int8_quantize")
_ROUNDED_PRODUCTS = "integer_product"  # compiled a second time, with instructions that round to bfloat16


def library_path() -> Path:
    """Path of the library that is built from these sources for this PyTorch, whether it exists or not."""
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.read_bytes())
    digest.update(repr((torch.__version__, platform.machine(), _FLAGS, _INSTRUCTION_SETS, _VNNI)).encode())
    return SOURCES.parent / f"native_{torch.__version__}_{platform.machine()}_{digest.hexdigest()[:16]}.so"


def find_compiler() -> str | None:
    """$CXX, or else g++; None if there is no compiler."""
    # Not clang: torch brings GCC's OpenMP, and clang uses another one.
    return shutil.which(os.environ.get("CXX", "")) or shutil.which("g++")


def build(compiler: str) -> Path:
    """Compiles the library; takes about half a minute.

    Older libraries for this PyTorch are removed. Those for others stay: several environments may share a checkout.

    Raises:
        subprocess.CalledProcessError: if the compiler fails; `stderr` has its messages.
        OSError: if the library can't be written.
    """
    path = library_path()
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.touch()  # fails before the long compilation, if the folder can't be written
    try:
        _compile(compiler, unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    same_pytorch, _, _ = path.stem.rpartition("_")
    for older in path.parent.glob(f"{same_pytorch}_*.so"):
        if older != path:
            older.unlink(missing_ok=True)
    return path


def _compile(compiler: str, library: Path) -> None:
    from torch.utils.cpp_extension import library_paths  # not at the top: it imports setuptools, which is slow

    with tempfile.TemporaryDirectory() as folder:
        parts = list(_parts())
        objects = [Path(folder, f"{number}.o") for number in range(len(parts))]
        commands = [
            [compiler, *_FLAGS, *flags, "-c", str(SOURCES / source), "-o", str(target)]
            for (source, flags), target in zip(parts, objects, strict=True)
        ]
        with ThreadPoolExecutor(available_cores()) as threads:
            list(threads.map(_run, commands))
        libraries = [f"-L{folder}" for folder in library_paths()] + ["-ltorch_cpu", "-lc10"]
        _run([compiler, "-shared", *map(str, objects), *libraries, "-o", str(library)])


def _parts() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Source and flags of each compilation."""
    from torch.utils.cpp_extension import include_paths

    # at::parallel_for must be compiled with -fopenmp, but not linked with it: that would load a second OpenMP.
    includes = [f"-isystem{folder}" for folder in include_paths()]
    for name in _OPERATORS:
        yield f"{name}.cpp", ("-fopenmp", *includes)
    for name in _HOST_EXCHANGE:
        yield f"{name}.cpp", ()
    machine = platform.machine()
    for flags in _INSTRUCTION_SETS.get(machine, {"baseline": ()}).values():
        yield "kernels.cpp", flags
    if machine in _VNNI:
        for name in _INTEGER_PRODUCTS:
            yield f"{name}.cpp", _VNNI[machine]
        yield f"{_ROUNDED_PRODUCTS}.cpp", (*_VNNI[machine], "-mavx512bf16")


def _run(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def main() -> int:
    """Builds the library if there is none. Returns 0 even if it can't: the trainer runs without, and says so."""
    if library_path().exists():
        return 0
    compiler = find_compiler()
    if compiler is None:
        print(f"No C++ compiler found. {_WITHOUT}")
        return 0
    print("Compiling dlrm's operators (half a minute)", flush=True)
    try:
        build(compiler)
    except subprocess.CalledProcessError as error:
        first = next((line for line in error.stderr.splitlines() if "error" in line), f"exit code {error.returncode}")
        print(f"{compiler} failed: {first}\n{_WITHOUT}")
    except OSError as error:
        print(f"{library_path()}: can't be written ({reason_of(error)}). {_WITHOUT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
