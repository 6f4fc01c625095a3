"""The last stage: reads everything that was written once more, and writes the manifest."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dlrm import __version__
from dlrm.dataset.arrays import measure_file, rows_of
from dlrm.dataset.manifest import MANIFEST_NAME, MANIFEST_VERSION
from dlrm.errors import DatasetError
from dlrm.preprocess.buckets import ArrayFiles
from dlrm.preprocess.columns import explain, read_rejected
from dlrm.preprocess.layout import Layout
from dlrm.preprocess.logarithm import TRANSFORM, recorded_logarithm
from dlrm.preprocess.repeats import file_digests, trained_digests
from dlrm.preprocess.run import Run
from dlrm.preprocess.stages.encoding import describe_column
from dlrm.preprocess.stages.parsing import rejected_path
from dlrm.preprocess.torchrec_compat import merged_ids, rounded_rows
from dlrm.preprocess.vocabulary import FIRST_INDEX
from dlrm.schema.criteo import CATEGORICAL_NAMES
from dlrm.system.files import write_atomically, write_json


def check(run: Run, layout: Layout, days: list[ArrayFiles]) -> None:
    """Checks every value and file of the days, and writes their manifest. Collective.

    Raises:
        DatasetError: if a value is out of range, or rows or files were lost.
    """
    if run.ranks.is_main:
        _write_rejected(run)
    run.meet()
    columns = describe_columns(run)
    table_rows = [columns[name]["rows"] for name in CATEGORICAL_NAMES]
    folder = run.workspace.days
    files = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST_NAME
    }
    rows = {day.name: day.rows for day in days}
    with run.stage("Verifying", "bytes", sum(path.stat().st_size for path in files.values())) as progress:

        def one(name: str) -> None:
            if run.workspace.facts("verify", _part(name)) is None:
                facts = measure_file(files[name], rows_of(name, rows), table_rows, progress, run.has_labels)
                run.workspace.finish("verify", _part(name), facts)

        for _ in run.in_order(run.ranks.share(list(files)), one):
            pass
    if run.ranks.is_main:
        measured = {name: run.recorded("verify", _part(name)) for name in files}
        expected = {path.name for day in days for path in day.paths}
        for name in sorted(expected - files.keys()) + [
            n for n in files if files[n].stat().st_size != measured[n]["bytes"]
        ]:
            raise DatasetError(f"{folder / name}: has changed since it was checked. Remove {run.workspace.root}.")
        run.workspace.flush()
        write_json(folder / MANIFEST_NAME, _manifest(run, layout, columns, measured))
        _warn_of_merged_ids(run, columns)


def _part(name: str) -> str:
    return name.replace("/", ".")


def describe_columns(run: Run) -> dict[str, dict[str, int]]:
    """For each column: its distinct ids, how many are kept, and the rows that its table needs."""
    columns = {}
    for name in CATEGORICAL_NAMES:
        facts = describe_column(run, name)
        rows = FIRST_INDEX + facts["kept"]
        if run.mimics_shuffle:
            rows = rounded_rows(rows)
        columns[name] = {**facts, "rows": min(rows, run.config.most_embeddings or rows)}
    return columns


def _manifest(
    run: Run, layout: Layout, columns: dict[str, dict[str, int]], measured: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    config, days, clamped, positives = run.config, {}, 0, 0
    for day, name in enumerate(run.names):
        blocks = list(run.parsed_blocks(day))
        clamped += run.recorded("scatter", name)["clamped"]
        positives += sum(block["positives"] for block in blocks)
        days[name] = {
            "rows": layout.day_rows[day],
            **({"positives": measured[f"{name}_labels.npy"]["positives"]} if run.has_labels else {"labels": False}),
            "rejected": sum(block["rejected"] for block in blocks),
            "source": run.sources[day],
        }
    if positives != sum(day.get("positives", 0) for day in days.values()):
        raise DatasetError(f"{run.workspace.root}: labels were lost on the way. Remove it and start again.")
    minima = run.recorded("plan", "minima")["minima"]
    source = config.applied["ids"] if config.applied else dataclasses.asdict(config)
    days_counted = "all" if config.is_compat else source["vocabulary_days"]
    digests = file_digests(run, layout)
    return {
        "version": MANIFEST_VERSION,
        "kind": "binary_days",
        "software": f"dlrm {__version__}",
        "days": days,
        "num_train_rows": layout.num_train_rows,
        "integers": {
            "transform": TRANSFORM,
            "logarithm": recorded_logarithm(run.workspace),
            "missing": "apart" if config.tells_missing_integers else "zero",
            "minimum": minima if config.is_compat else minima[0],
            "clamped": clamped,
        },
        "ids": {
            "compat": config.compat,
            "frequency_threshold": source["frequency_threshold"],
            "max_embeddings": config.most_embeddings,
            "vocabulary_days": days_counted,
            "vocabulary": None if config.vocabulary is None else Path(config.vocabulary).name,
            "seed": config.seed,
        },
        "columns": columns,
        "raw_digests": digests,
        "trained_digests": trained_digests(run, digests),
        "files": {name: {key: facts[key] for key in ("bytes", "sha256")} for name, facts in measured.items()},
    }


def _write_rejected(run: Run) -> None:
    """Writes rejected.tsv, which lists the lines that were skipped: file, line number, what is wrong, and the line."""

    def lines() -> Iterator[bytes]:
        for day, (name, raw) in enumerate(zip(run.names, run.sources, strict=True)):
            start = 1
            for number, block in enumerate(run.parsed_blocks(day)):
                if block["rejected"]:
                    for line in read_rejected(rejected_path(run, f"{name}.{number:06d}")):
                        where = f"{raw}\t{start + line.line}\t{explain(line.text, run.has_labels)}\t"
                        yield os.fsencode(where) + line.text + b"\n"
                start += block["lines"]

    if any(block["rejected"] for day in range(len(run.names)) for block in run.parsed_blocks(day)):
        write_atomically(run.workspace.days / "rejected.tsv", lambda file: file.writelines(lines()))


def _warn_of_merged_ids(run: Run, columns: dict[str, dict[str, int]]) -> None:
    merged = {name: count for name, facts in columns.items() if (count := merged_ids(facts["kept"]))}
    if run.mimics_shuffle and merged:
        print(
            f"Warning: torchrec's shuffle holds ids as float32; {sum(merged.values()):,} ids share their index with "
            f"another one in the training days ({', '.join(f'{n} {c:,}' for n, c in merged.items())}).",
            flush=True,
        )
