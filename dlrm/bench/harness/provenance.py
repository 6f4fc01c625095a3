"""What every result says of where its figures come from."""

import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from dlrm.checkpoint.run_files import SUMMARY
from dlrm.errors import DatasetError
from dlrm.system.environment import describe_software
from dlrm.system.files import is_stream
from dlrm.system.files import write_result as write_document

_VARIABLES = ("DLRM_KERNELS", "OMP_NUM_THREADS")


def write_result(path: Path | str | None, result: dict[str, Any]) -> None:
    """Writes `result` beside the command, the commit, the machine and the versions. None: nowhere."""
    if path is None:
        return
    software = describe_software()
    machine = {"cpu": cpu_model(), "cpu_count": os.cpu_count(), "system": platform.platform()}
    write_document(
        path,
        {
            "command": command_line(),
            **software,
            "machine": machine,
            **result,
        },
    )
    if not is_stream(path):
        print(f"{path} written")


class _Content(dict[str, Any]):
    """An object of a result, which names the file when it lacks a key."""

    def __init__(self, path: Path, content: Mapping[str, Any]) -> None:
        super().__init__(content)
        self._path = path

    def __missing__(self, key: str) -> NoReturn:
        raise DatasetError(f"{self._path}: has no {key}. Measure it again, with --json.")


def read_result(path: Path) -> dict[str, Any]:
    """What `write_result` wrote. To look up a key that it lacks raises a DatasetError, too.

    Raises:
        DatasetError: naming the file, if it is not there, or no JSON object of texts and finite numbers.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_hook=partial(_Content, path))
        json.dumps(content, allow_nan=False)
    except FileNotFoundError:
        raise DatasetError(f"{path}: not there. Run the command that measures it, with --json.") from None
    except OSError as error:
        raise DatasetError(f"{path}: can't be read ({error.strerror}). Expected a result in JSON.") from None
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path}: is no JSON ({error}). Measure it again, with --json.") from None
    if not isinstance(content, dict):
        raise DatasetError(f"{path}: is no JSON object. Expected what a benchmark writes with --json.")
    return content


def command_line() -> str:
    """What was typed to get here: dlrm, or a module of benchmarks, behind the variables that choose what computes."""
    program = Path(sys.argv[0])
    start = ["python", "-m", f"benchmarks.{program.stem}"] if program.parent.name == "benchmarks" else ["dlrm"]
    variables = [f"{name}={os.environ[name]} " for name in _VARIABLES if name in os.environ]
    return "".join(variables) + shlex.join([*start, *sys.argv[1:]])


def short_commit(result: dict[str, Any]) -> str:
    """A result's commit as pages name it; `-dirty` where files differed from it."""
    commit, _, dirty = result["commit"].partition("-")
    return f"{commit[:12]}-{dirty}" if dirty else commit[:12]


def cpu_model() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def read_summary(run_dir: Path) -> dict[str, Any]:
    """summary.json of a finished run."""
    return json.loads((run_dir / SUMMARY).read_text(encoding="utf-8"))
