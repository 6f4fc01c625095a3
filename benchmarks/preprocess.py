"""Preprocessing: peak memory, and what `kill -9` does to it.

    python -m benchmarks.preprocess memory --json benchmarks/results/preprocess_memory.json
    python -m benchmarks.preprocess kills --json benchmarks/results/preprocess_kills.json

Its speed against torchrec's functions: `dlrm bench preprocess`.
"""

import hashlib
import json
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.flags import Parser, between, positive_int, result_file, run_script
from dlrm.bench.cases.preprocess import DAYS, dlrm, run_ours, synthesize
from dlrm.bench.harness.provenance import write_result

STAGES = ("parse", "count", "encode", "create", "plan", "scatter", "gather", "verify")
NO_INTEGERS = "\t" * 13
MILLION = 1_000_000


def memory(millions: Sequence[int], scratch: Path) -> dict[str, Any]:
    """Peak memory by rows, and of 30 million distinct ids under a limit of 1 GiB."""
    results = []
    for size in millions:
        raw = synthesize(scratch / "raw", size * MILLION)
        results.append({"rows": size * MILLION, "memory_gib": 4.0, **run_ours(raw, scratch / "ours")})
        print(f"{size} million rows: peak {results[-1]['peak_memory_gib']:.2f} GiB, limit 4 GiB", flush=True)
        shutil.rmtree(scratch / "raw")
    raw = write_distinct_ids(scratch, 30 * MILLION)
    flags = ("--memory_gib", "1", "--frequency_threshold", "1")
    result = {"rows": 31 * MILLION, "memory_gib": 1.0, **run_ours(raw, scratch / "ours", *flags)}
    manifest = json.loads((scratch / "ours" / "manifest.json").read_text())
    result["distinct"] = manifest["columns"]["cat_0"]["distinct"]
    print(f"{result['distinct']:,} distinct ids in a column: peak {result['peak_memory_gib']:.2f} GiB, limit 1 GiB")
    return {"by_rows": results, "distinct_ids": result}


def write_distinct_ids(folder: Path, rows: int) -> list[Path]:
    """Two days of rows, each with an id of its own in the first column, and a short third one."""
    raw = [folder / f"distinct_{day}.tsv" for day in range(DAYS)]
    rest = "".join(f"\t{column:08x}" for column in range(1, 26)) + "\n"
    sizes = (rows // 2, rows - rows // 2, MILLION)
    first = 1
    for path, size in zip(raw, sizes, strict=True):
        with path.open("w") as file:
            for start in range(first, first + size, 10_000):
                stop = min(start + 10_000, first + size)
                file.writelines(f"{i & 1}\t{i % 1000}{NO_INTEGERS}{i:08x}{rest}" for i in range(start, stop))
        first += size
    return raw


def kills(rows: int, count: int, scratch: Path) -> dict[str, Any]:
    """Ends runs at random moments, resumes them, and compares every byte with an undisturbed run's."""
    raw = synthesize(scratch / "raw", rows)
    started = time.perf_counter()
    run_ours(raw, scratch / "undisturbed")
    seconds = time.perf_counter() - started
    reference = digest(scratch / "undisturbed")
    chance = random.Random(0)
    killed = []
    output = scratch / "killed"
    command = [*dlrm(), "preprocess", *map(str, raw), "--output", str(output), "--resume"]
    while len(killed) < count:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        moment = chance.uniform(0.5, seconds)
        try:
            process.wait(moment)
        except BaseException as error:
            process.send_signal(signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            marks = sorted(path.parent.name for path in (scratch / "killed.partial" / "done").rglob("*.json"))
            stage = max(marks, key=STAGES.index, default="none")
            killed.append({"after_seconds": round(moment, 2), "last_finished": stage})
            print(f"kill {len(killed)}: after {moment:.2f} s, last finished: {stage}", flush=True)
            continue
        if process.returncode or digest(output) != reference:
            raise SystemExit(
                f"exit code {process.returncode}; same bytes: {output.exists() and digest(output) == reference}"
            )
        shutil.rmtree(output)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    if digest(output) != reference:
        raise SystemExit("the bytes differ")
    print(f"{count} kills; every resumed run ended in the same sha256, {reference[:16]}...")
    return {"rows": rows, "kills": killed, "sha256": reference, "same": True}


def digest(folder: Path) -> str:
    """SHA-256 over all files of a folder, by name."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        total.update(path.relative_to(folder).as_posix().encode())
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def main() -> None:
    """Runs one of them."""
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("memory", "kills"):
        command = commands.add_parser(name)
        command.add_argument("--json", type=result_file, help="where the result goes")
        command.add_argument("--scratch", type=Path, help="folder for rows and outputs (default: a temporary one)")
    commands.choices["memory"].add_argument("--millions", type=between(1, 2000), nargs="+", default=[2, 8, 32])
    commands.choices["kills"].add_argument("--rows", type=between(DAYS, 2**31 - 1), default=2 * MILLION)
    commands.choices["kills"].add_argument("--count", type=positive_int, default=20)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        if arguments.command == "memory":
            result = memory(arguments.millions, Path(folder))
        else:
            result = kills(arguments.rows, arguments.count, Path(folder))
    if arguments.json:
        write_result(arguments.json, result)


if __name__ == "__main__":
    run_script(main)
