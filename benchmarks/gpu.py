"""Everything worth knowing on one GPU, in under nine minutes: benchmarks/gpu.sh starts it.

First what the device can do and the fused interaction alone, then the checks of tests/gpu, then training of MLPerf v1's
shape with tables as large as fit: ids uniform and by a power law, MLPs eager, compiled and as CUDA graphs, fp32, tf32
and bf16. Each part is a process of its own, so that one that fails leaves the others; cases for which no time is left
are listed as such. Writes gpu.json and gpu.md after each part, gpu.log, and the trace of some steps.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.flags import Parser, between, run_script
from benchmarks.gpu_report import add_floor, to_markdown
from benchmarks.gpu_step import Case
from dlrm.config.checks import check_output_file
from dlrm.errors import ConfigError
from dlrm.system.environment import describe_software
from dlrm.system.files import write_json

ROOT = Path(__file__).parent.parent
CHECK_GROUPS = (
    ("interaction_in_every_case", "interaction_of_mlperf_shape"),
    (
        *("nccl_group_of_one_rank", "tables_sgd", "tables_adagrad", "tables_rowwise_adagrad"),
        *("tables_rowwise_adagrad_weight_decay", "tables_adam", "tables_adam_weight_decay"),
    ),
    (
        *("pipelines_agree", "prefetch_trains_and_evaluates", "precisions_agree", "every_dense_optimizer"),
        *("entry_point", "compiled_parts_agree"),
    ),
)
CHECKS_OF_A_CPU = (CHECK_GROUPS[1][:4],)
SECONDS_OF_CHECKS = 75.0
"""A group of checks at the most: the cases must have their time."""

CASES = (
    Case("bf16 eager"),
    Case("bf16 compile", execution="compile"),
    Case("bf16 cuda_graph", execution="cuda_graph"),
    Case("tf32 eager", "tf32"),
    Case("fp32 eager", "fp32"),
    Case("bf16 eager, row-wise Adagrad", optimizer="rowwise_adagrad"),
    Case("tf32 compile", "tf32", "compile"),
    Case("bf16 eager, batch 4,096", batch_size=4096, steps=100),
    Case("bf16 cuda_graph, batch 4,096", execution="cuda_graph", batch_size=4096, steps=100),
    Case("tf32 cuda_graph", "tf32", "cuda_graph"),
    Case("fp32 compile", "fp32", "compile"),
    Case("fp32 cuda_graph", "fp32", "cuda_graph"),
)
"""The most telling first."""

SECONDS_OF_CASE = {"eager": 30.0, "compile": 60.0, "cuda_graph": 60.0}
"""What must be left for a case to be begun."""


@dataclass(frozen=True)
class Outcome:
    """Lines that a process printed for us, and how it ended."""

    lines: list[Any]
    error: str


@dataclass(frozen=True)
class Session:
    """Where things go, and until when."""

    out: Path
    deadline: float
    result: dict[str, Any]

    @property
    def seconds_left(self) -> float:
        """Until the time is up."""
        return self.deadline - time.monotonic()

    def start(self, tag: str, module: str, arguments: Sequence[str], seconds: float) -> Outcome:
        """Runs a module; what it printed after `tag`, as JSON. The rest goes to gpu.log."""
        command = [sys.executable, "-m", module, *arguments]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=max(1.0, seconds), cwd=ROOT, check=False
            )
            text, error = done.stdout + done.stderr, "" if done.returncode == 0 else done.stderr[-1500:]
        except subprocess.TimeoutExpired as late:
            text, error = _text(late.stdout) + _text(late.stderr), f"stopped after {seconds:.0f} s"
        with (self.out / "gpu.log").open("a") as log:
            log.write(f"$ {' '.join(command)}\n{text}\n")
        lines = [json.loads(line.removeprefix(f"{tag} ")) for line in text.splitlines() if line.startswith(f"{tag} ")]
        return Outcome(lines, error)

    def save(self) -> None:
        """Writes what there is."""
        write_json(self.out / "gpu.json", self.result)
        (self.out / "gpu.md").write_text(to_markdown(self.result))


def _text(output: str | bytes | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def run_cases(session: Session, cases: Sequence[Case], announce: Callable[[str], None]) -> None:
    """Trains each case for which time is left."""
    for case in cases:
        if session.seconds_left < SECONDS_OF_CASE[case.execution]:
            session.result["cases"].append({"case": asdict(case), "error": "not run: no time left"})
            continue
        outcome = session.start("RESULT", "benchmarks.gpu_step", [json.dumps(asdict(case))], session.seconds_left)
        if not outcome.lines:
            session.result["cases"].append({"case": asdict(case), "error": outcome.error or "no result"})
        for measured in outcome.lines:
            if rates := session.result["device"].get("ceilings"):
                for ids in measured["ids"].values():
                    add_floor(ids, case.precision, rates)
            session.result["cases"].append(measured)
        announce(case.name)
        session.save()


def run_checks(session: Session, groups: Sequence[Sequence[str]]) -> None:
    """Each group in a process; checks that did not come to an end have failed."""
    for names in groups:
        seconds = min(SECONDS_OF_CHECKS * (1 if len(names) > 2 else 0.6), session.seconds_left)
        outcome = session.start("CHECK", "tests.gpu.checks", names, seconds)
        ended = {line["check"] for line in outcome.lines}
        unfinished = [
            {"check": name, "passed": False, "error": outcome.error or "no result"}
            for name in names
            if name not in ended
        ]
        session.result["checks"] += [*outcome.lines, *unfinished]
        session.save()


def tiny(out: Path) -> list[Case]:
    """Cases that a CPU runs in seconds."""
    case = Case("bf16 eager", batch_size=64, steps=3, cap_gib=0.02, trace=str(out))
    return [case, replace(case, name="fp32 eager", precision="fp32", optimizer="rowwise_adagrad", trace=None)]


def main() -> int:
    """Runs all parts; exit code 1 if one failed or had no time left, 2 without a GPU."""
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu"), help="folder of the results")
    parser.add_argument("--commit", default="", help="what to call the source where there is no git")
    parser.add_argument(
        "--budget_seconds", type=between(1.0, 1e6), default=520.0, help="time in all (default: %(default)s)"
    )
    parser.add_argument("--dry_run", action="store_true", help="the same steps with tiny sizes, on a CPU if need be")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.dry_run:
        raise ConfigError("no CUDA device, expected one. --dry_run runs the same steps tiny on a CPU.")
    check_output_file("out", arguments.out / "gpu.json")
    return 0 if run_all(arguments) else 1


def run_all(arguments: argparse.Namespace) -> bool:
    """All parts in order; whether none of them failed."""
    started = time.monotonic()
    arguments.out.mkdir(parents=True, exist_ok=True)
    software, is_dry = describe_software(), arguments.dry_run
    result: dict[str, Any] = {
        **software,
        "commit": arguments.commit or software["commit"] or "unknown",
        "cpu_count": os.cpu_count(),
        "dry_run": is_dry,
        "device": {},
        "checks": [],
        "cases": [],
    }
    session = Session(arguments.out, started + arguments.budget_seconds, result)

    def announce(part: str) -> None:
        print(f"{time.monotonic() - started:6.1f} s  {part}", flush=True)

    outcome = session.start("RESULT", "benchmarks.gpu_kernels", ["small"] * is_dry, 90.0)
    result["device"] = outcome.lines[0] if outcome.lines else {"error": outcome.error}
    announce("device and interaction")
    run_checks(session, CHECKS_OF_A_CPU if is_dry else CHECK_GROUPS)
    announce("checks")
    full = [replace(CASES[0], trace=str(arguments.out)), *CASES[1:]]
    run_cases(session, tiny(arguments.out) if is_dry else full, announce)
    result["seconds"] = time.monotonic() - started
    session.save()
    print((arguments.out / "gpu.md").read_text())
    return all(check["passed"] for check in result["checks"]) and all("ids" in case for case in result["cases"])


if __name__ == "__main__":
    run_script(main)
