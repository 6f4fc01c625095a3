"""What every result says of where its figures come from."""

import json
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

from dlrm.artifacts import write_json
from dlrm.train.run_directory import describe_software


def write_result(path: Path | str | None, result: dict[str, Any]) -> None:
    """Writes `result` beside the command, the commit, the machine and the versions. None: nowhere."""
    if path is None:
        return
    path = Path(path)
    software = describe_software()
    machine = {"cpu": cpu_model(), "cpu_count": os.cpu_count(), "system": platform.platform()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        path,
        {
            "command": command_line(),
            **software,
            "machine": machine,
            **result,
        },
    )
    print(f"{path} written")


def command_line() -> str:
    """What was typed to get here: dlrm, or a module of benchmarks."""
    program = Path(sys.argv[0])
    start = ["python", "-m", f"benchmarks.{program.stem}"] if program.parent.name == "benchmarks" else ["dlrm"]
    return shlex.join([*start, *sys.argv[1:]])


def short_commit(result: dict[str, Any]) -> str:
    """A result's commit as pages name it; `-dirty` where files differed from it."""
    commit, _, dirty = result["commit"].partition("-")
    return f"{commit[:12]}-{dirty}" if dirty else commit[:12]


def cpu_model() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def read_summary(run_dir: Path) -> dict[str, Any]:
    """summary.json of a finished run."""
    return json.loads((run_dir / "summary.json").read_text())
