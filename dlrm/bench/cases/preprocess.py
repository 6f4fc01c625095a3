"""`dlrm bench preprocess`: raw text to shuffled binary days."""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dlrm.bench.harness.ceilings import ceilings_side
from dlrm.bench.harness.flags import PreprocessBench
from dlrm.bench.harness.floor import Floor
from dlrm.bench.harness.provenance import write_result
from dlrm.bench.harness.report import Speed, compare, describe_spread, print_floor, print_speeds
from dlrm.bench.harness.rounds import best_ceilings, take_turns
from dlrm.cost.least_work import RECORD
from dlrm.cost.work import Work

DAYS = 3
_WARM_UP_ROWS = 1000


def run(bench: PreprocessBench) -> dict[str, Any]:
    """Measures, prints, writes; returns the result."""
    rows = bench.num_rows
    ceilings = best_ceilings(take_turns([ceilings_side("fp32")], 1, lambda *_: None))
    with tempfile.TemporaryDirectory(dir=bench.scratch) as scratch:
        raw = synthesize(Path(scratch, "raw"), rows)
        num_bytes = sum(path.stat().st_size for path in raw) + rows * RECORD
        ours, theirs = _take_rounds(bench, raw, Path(scratch))
    speeds = {
        "ours": Speed(rows, [[measured["through_shuffle"]] for measured in ours]),
        "reference": Speed(rows, [[measured["through_shuffle"]] for measured in theirs]),
    }
    whole = [a["through_shuffle"] / b["process"] for a, b in zip(theirs, ours, strict=True)]
    # The text is read once, and the days are written once.
    floor = Floor(Work(0, num_bytes), ceilings)
    result: dict[str, Any] = {
        "case": "preprocess",
        **compare(speeds["ours"], speeds["reference"], floor),
        "rows": rows,
        "ratio_of_whole_process": statistics.median(whole),
        "sides": {"ours": {"stages": ours}, "reference": {"stages": theirs}},
        "bench": asdict(bench),
    }
    for name, speed in speeds.items():
        result["sides"][name] |= speed.to_json()
    print_speeds({**_stage_speeds("ours", rows, ours), **_stage_speeds("reference", rows, theirs)}, "rows")
    print(f"ratio by round, parse through shuffle: {describe_spread(result['ratios'])}")
    print(f"ratio by round, our whole process, verification and start-up included: {describe_spread(whole)}")
    print_floor(floor, speeds["ours"], "the pass")
    write_result(bench.repetition.json, result)
    return result


def _take_rounds(
    bench: PreprocessBench, raw: Sequence[Path], scratch: Path
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    # Compiles what this machine has not compiled yet.
    run_ours(raw[1:], scratch / "warm_up", "--rows", str(_WARM_UP_ROWS))
    ours, theirs = [], []
    for number in range(bench.repetition.rounds):
        theirs.append(run_torchrec(raw, scratch / "torchrec"))
        ours.append(run_ours(raw, scratch / "ours"))
        ratio = theirs[-1]["through_shuffle"] / ours[-1]["through_shuffle"]
        print(f"round {number + 1}/{bench.repetition.rounds}  {ratio:.1f} times", flush=True)
    return ours, theirs


def _stage_speeds(side: str, rows: int, runs: Sequence[dict[str, Any]]) -> dict[str, Speed]:
    stages = {
        f"{side}: {stage}": Speed(rows, [[max(measured["stages"][stage], 0.005)] for measured in runs])
        for stage in runs[0]["stages"]
    }
    whole = Speed(rows, [[measured["through_shuffle"]] for measured in runs])
    return {**stages, f"{side}: through shuffle": whole}


def synthesize(folder: Path, rows: int) -> list[Path]:
    """Planted days of `rows` rows in all."""
    subprocess.run([*dlrm(), "synthesize", str(folder), "--rows", str(rows), "--days", str(DAYS)], check=True)
    return [folder / f"day_{day}.tsv" for day in range(DAYS)]


def dlrm() -> list[str]:
    """The command, in a process of its own."""
    return [sys.executable, "-c", "import sys; from dlrm.cli import main; sys.exit(main(sys.argv[1:]))"]


def run_ours(raw: Sequence[Path], output: Path, *flags: str) -> dict[str, Any]:
    """Preprocesses; seconds of each stage and of the whole process, and its peak memory."""
    shutil.rmtree(output, ignore_errors=True)
    started = time.perf_counter()
    command = [*dlrm(), "preprocess", *map(str, raw), "--output", str(output), *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        with process.stdout:
            said = process.stdout.read()
    except BaseException:
        process.kill()
        process.wait()
        raise
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"dlrm preprocess ended with {process.returncode}: {said}")
    line = next(line for line in said.splitlines() if "rows/s):" in line)
    seconds = float(re.search(r"rows in ([0-9.]+) s", line)[1])  # type: ignore[index]
    stages = {name.strip(): float(value) for name, value in re.findall(r"([a-z ]+) ([0-9.]+)", line.split("):")[1])}
    return {
        "stages": stages,
        "through_shuffle": seconds - stages["verifying"],
        "process": time.perf_counter() - started,
        "peak_memory_gib": usage.ru_maxrss / 2**20,
    }


def run_torchrec(raw: Sequence[Path], folder: Path) -> dict[str, Any]:
    """The same of torchrec's functions, in a process that gives its memory back."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "dlrm.bench.cases.torchrec_preprocess", str(folder), *map(str, raw)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    stages = json.loads(done.stdout.splitlines()[-1])
    return {"stages": stages, "through_shuffle": sum(stages.values())}
