"""The releases of PyTorch, TorchRec and FBGEMM that the suite has run with: the one list of them.

`dlrm doctor` compares what is installed with it. requirements/try.sh makes an environment of a set and runs the suite
there; `python -m dlrm.system.package_sets SET < requirements/cpu.txt` prints the pinned list with the set's releases.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class PackageSet:
    """Releases that fit together. `fbgemm` is that of fbgemm-gpu and of fbgemm-gpu-cpu.

    Attributes:
        others: packages whose pinned release this torch does not take, and the one to install.
    """

    name: str
    torch: str
    torchrec: str
    fbgemm: str
    others: Mapping[str, str] = field(default_factory=dict)

    @property
    def releases(self) -> dict[str, str]:
        """Package to release, of all that differ from the pinned list."""
        fbgemm = {"fbgemm-gpu": self.fbgemm, "fbgemm-gpu-cpu": self.fbgemm}
        return {"torch": self.torch, "torchrec": self.torchrec, **fbgemm, **self.others}


PINNED = PackageSet("pinned", torch="2.13.0", torchrec="1.8.0", fbgemm="1.8.0")
SETS = (
    # 2026-11-30: torch 2.15.0 is out; no torchrec or fbgemm-gpu is built for it yet.
    PackageSet("newest", torch="2.14.1", torchrec="1.9.2", fbgemm="1.9.0"),
    PINNED,
    PackageSet("oldest", torch="2.11.0", torchrec="1.6.1", fbgemm="1.6.0", others={"setuptools": "81.0.0"}),
)


def requirement_lines(package_set: PackageSet, pinned: Sequence[str]) -> list[str]:
    """The lines of a pinned list with the set's releases. The CUDA libraries are left out: each torch names its own."""
    if package_set == PINNED:
        return list(pinned)
    return [_with_release(package_set, line) for line in pinned if not re.match("nvidia-|cuda-|triton==", line)]


def _with_release(package_set: PackageSet, line: str) -> str:
    package = line.partition("==")[0]
    release = package_set.releases.get(package)
    return f"{package}=={release}" if release else line


def main(argv: Sequence[str]) -> int:
    """Prints a pinned list, read from stdin, with the releases of the set that is named."""
    sets = {package_set.name: package_set for package_set in SETS}
    if len(argv) != 1 or argv[0] not in sets:
        print(f"{' '.join(argv) or 'no set'}: expected one of {', '.join(sets)}", file=sys.stderr)
        return 2
    print("\n".join(requirement_lines(sets[argv[0]], sys.stdin.read().splitlines())))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
