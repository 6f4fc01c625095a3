"""Preprocessing: speed against torchrec's functions, peak memory, and what `kill -9` does to it.

    python -m benchmarks.preprocess speed --json benchmarks/results/preprocess_speed.json
    python -m benchmarks.preprocess memory --json benchmarks/results/preprocess_memory.json
    python -m benchmarks.preprocess kills --json benchmarks/results/preprocess_kills.json

speed runs both sides in turn, in processes of their own, on the same planted rows. torchrec's side is
BinaryCriteoUtils.tsv_to_npys, sparse_to_contiguous and shuffle, as its scripts call them.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dlrm.bench.provenance import write_result

DAYS = 3
STAGES = ("parse", "count", "encode", "create", "plan", "scatter", "gather", "verify")
NO_INTEGERS = "\t" * 13
MILLION = 1_000_000


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
    said = process.stdout.read()
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


def torchrec_side(raw: Sequence[Path], folder: Path) -> dict[str, float]:
    """Seconds of each of torchrec's functions."""
    from torchrec.datasets.criteo import BinaryCriteoUtils

    warnings.simplefilter("ignore")
    for name in ("npy", "contiguous", "shuffled"):
        (folder / name).mkdir(parents=True)
    parts = ("dense", "sparse", "labels")
    with contextlib.redirect_stdout(io.StringIO()):
        times = [time.perf_counter()]
        for day, path in enumerate(raw):
            BinaryCriteoUtils.tsv_to_npys(str(path), *(str(folder / "npy" / f"day_{day}_{part}.npy") for part in parts))
        times.append(time.perf_counter())
        sparse = [str(folder / "npy" / f"day_{day}_sparse.npy") for day in range(len(raw))]
        BinaryCriteoUtils.sparse_to_contiguous(sparse, str(folder / "contiguous"), output_file_suffix=".npy")
        times.append(time.perf_counter())
        rows = {day: len(np.load(folder / "npy" / f"day_{day}_labels.npy")) for day in range(len(raw) - 1)}
        BinaryCriteoUtils.shuffle(
            str(folder / "npy"), str(folder / "contiguous"), str(folder / "shuffled"), rows, days=len(raw)
        )
        times.append(time.perf_counter())
    names = ("tsv_to_npys", "sparse_to_contiguous", "shuffle")
    return {name: stop - start for name, start, stop in zip(names, times, times[1:], strict=False)}


def run_torchrec(raw: Sequence[Path], folder: Path) -> dict[str, Any]:
    """The same in a process of its own, which gives its memory back."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "benchmarks.preprocess", "torchrec-side", str(folder), *map(str, raw)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    stages = json.loads(done.stdout.splitlines()[-1])
    return {"stages": stages, "through_shuffle": sum(stages.values())}


def speed(rows: int, rounds: int, scratch: Path) -> dict[str, Any]:
    """Both sides in turn."""
    raw = synthesize(scratch / "raw", rows)
    run_ours(raw[1:], scratch / "warm_up", "--rows", "1000")  # compiles what this machine has not compiled yet
    ours, theirs = [], []
    for number in range(rounds):
        theirs.append(run_torchrec(raw, scratch / "torchrec"))
        ours.append(run_ours(raw, scratch / "ours"))
        print(f"round {number}: {theirs[-1]['through_shuffle'] / ours[-1]['through_shuffle']:.1f} times", flush=True)
    ratios = [a["through_shuffle"] / b["through_shuffle"] for a, b in zip(theirs, ours, strict=True)]
    whole = [a["through_shuffle"] / b["process"] for a, b in zip(theirs, ours, strict=True)]
    print(f"\n{'stage':<24}{'rows/s, median':>16}{'lowest':>12}{'highest':>12}")
    for side, runs in (("torchrec", theirs), ("ours", ours)):
        for stage in runs[0]["stages"]:
            print_rates(f"{side}: {stage}", rows, [run["stages"][stage] for run in runs])
        print_rates(f"{side}: through shuffle", rows, [run["through_shuffle"] for run in runs])
    print_rates("ours: whole process", rows, [run["process"] for run in ours])
    print(f"ratio, parse through shuffle: {describe(ratios)}")
    print(f"ratio, our whole process, verification and start-up included: {describe(whole)}")
    return {
        "rows": rows,
        "ratio": statistics.median(ratios),
        "ratio_spread": [min(ratios), max(ratios)],
        "ratio_of_whole_process": statistics.median(whole),
        "ours": ours,
        "torchrec": theirs,
    }


def print_rates(label: str, rows: int, seconds: Sequence[float]) -> None:
    """A line of the table."""
    rates = sorted(rows / max(spent, 0.05) for spent in seconds)
    print(f"{label:<32}{statistics.median(rates):>12,.0f}{rates[0]:>12,.0f}{rates[-1]:>12,.0f}")


def describe(ratios: Sequence[float]) -> str:
    """Median and spread."""
    return f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"


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
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("speed", "memory", "kills"):
        command = commands.add_parser(name)
        command.add_argument("--json", type=Path, help="where the result goes")
        command.add_argument("--scratch", type=Path, help="folder for rows and outputs (default: a temporary one)")
    commands.choices["speed"].add_argument("--rows", type=int, default=2 * MILLION)
    commands.choices["speed"].add_argument("--rounds", type=int, default=3)
    commands.choices["memory"].add_argument("--millions", type=int, nargs="+", default=[2, 8, 32])
    commands.choices["kills"].add_argument("--rows", type=int, default=2 * MILLION)
    commands.choices["kills"].add_argument("--count", type=int, default=20)
    side = commands.add_parser("torchrec-side")
    side.add_argument("folder", type=Path)
    side.add_argument("raw", type=Path, nargs="+")
    arguments = parser.parse_args()
    if arguments.command == "torchrec-side":
        print(json.dumps(torchrec_side(arguments.raw, arguments.folder)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        match arguments.command:
            case "speed":
                result = speed(arguments.rows, arguments.rounds, Path(folder))
            case "memory":
                result = memory(arguments.millions, Path(folder))
            case _:
                result = kills(arguments.rows, arguments.count, Path(folder))
    if arguments.json:
        write_result(arguments.json, result)


if __name__ == "__main__":
    main()
