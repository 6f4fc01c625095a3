"""The parse stage: text becomes columns, a block of lines at a time."""

import hashlib
import json
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dlrm.errors import DatasetError
from dlrm.preprocess.columns import explain, parse_block, read_rejected, write_columns, write_rejected
from dlrm.preprocess.layout import Layout
from dlrm.preprocess.raw import TextBlock, read_blocks
from dlrm.preprocess.repeats import check_repeats, digest_block
from dlrm.preprocess.run import Run
from dlrm.system.console import Progress

MAX_REJECTED_PER_BLOCK = 10_000


def parse(run: Run, estimated_rows: int) -> Layout:
    """Writes the columns of this rank's days; returns where all rows go. Collective.

    Raises:
        DatasetError: if a line is not a row, unless such lines are skipped and few; or if rows are there twice.
    """
    _parse_days(run, estimated_rows)
    if _content_is_other(run):
        _start_again(run)
        _parse_days(run, estimated_rows)
    content = {"digest": _digest(run)}
    if run.ranks.is_main and run.workspace.facts("content", "days") != content:
        run.workspace.finish("content", "days", content)
    run.meet()
    parsed = [[(facts["rows"], facts["minimum"]) for facts in run.parsed_blocks(day)] for day in range(len(run.names))]
    layout = Layout.build(parsed, run.config.is_split)
    held_out = layout.num_rows - layout.num_train_rows
    if held_out == 0 or (layout.num_train_rows == 0 and run.config.vocabulary is None):
        raise DatasetError(f"{run.raw[0]}: {layout.num_rows:,} rows are too few to train on some and hold out some.")
    check_repeats(run, layout)
    return layout


def _parse_days(run: Run, estimated_rows: int) -> None:
    with run.stage("Parsing", "rows", estimated_rows) as progress:
        for day, name in run.ranks.share(list(enumerate(run.names))):
            if run.workspace.facts("parse", name) is None:
                _parse_day(run, day, progress)
            else:
                progress.advance(sum(facts["rows"] for facts in run.parsed_blocks(day)))


def _digest(run: Run) -> str:
    """Digest of the text that was parsed. If it changes, all later stages must be done again."""
    blocks = [[facts.get("crc32") for facts in run.parsed_blocks(day)] for day in range(len(run.names))]
    return hashlib.sha256(json.dumps(blocks).encode()).hexdigest()


def _content_is_other(run: Run) -> bool:
    """Whether later stages have seen other rows, because a raw file has changed since."""
    before = run.workspace.facts("content", "days")
    return before is not None and before["digest"] != _digest(run)


def _start_again(run: Run) -> None:
    """Forgets what depends on all days. A parsed day stays parsed, unless its columns are gone. Collective."""
    missing = [name for day, name in enumerate(run.names) if not _has_columns(run, day)]
    run.ranks.barrier()
    if run.ranks.is_main:
        for folder in ("days", "counts", "encoded", "buckets", "positions"):
            run.workspace.empty(folder)
    for stage in ("count", "encode", "create", "scatter", "gather", "verify"):
        run.workspace.forget(stage)
    for stage, part in (("plan", "buckets"), ("plan", "minima"), *(("parse", name) for name in missing)):
        run.workspace.forget(stage, part)
    run.ranks.barrier()


def _has_columns(run: Run, day: int) -> bool:
    folder = run.workspace.root / "parsed" / run.names[day]
    return all((folder / f"{number:06d}").exists() for number, _ in enumerate(run.parsed_blocks(day)))


def _parse_day(run: Run, day: int, progress: Progress) -> None:
    raw, name = run.raw[day], run.names[day]
    lines = rows = num_blocks = 0
    before = raw.stat()
    blocks = enumerate(read_blocks(raw, run.config.rows, window_bytes=run.resources.window_bytes))
    for (number, _), facts in run.in_order(blocks, partial(_parse_block, run, name), run.resources.blocks_ahead):
        _check_rejected(run, name, number, lines, facts)
        lines += facts["lines"]
        rows += facts["rows"]
        num_blocks = number + 1
        progress.advance(facts["rows"])
    if (raw.stat().st_size, raw.stat().st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise DatasetError(f"{raw}: changed while it was read. Continue with --resume once it is complete.")
    if _is_mostly_bad(lines - rows, lines):
        raise DatasetError(f"{raw}: {_count_bad(lines - rows, lines)}. Expected raw Criteo text.")
    run.workspace.finish("parse", name, {"blocks": num_blocks}, [run.workspace.folder("parsed", name)])


def _parse_block(run: Run, name: str, item: tuple[int, TextBlock]) -> dict[str, Any]:
    number, text = item
    part = f"{name}.{number:06d}"
    path = run.workspace.folder("parsed", name) / f"{number:06d}"
    checksum = zlib.crc32(memoryview(text.text)[: text.size])  # type: ignore[arg-type]
    finished = run.workspace.facts("parse", part)
    is_there = path.exists() or run.workspace.facts("scatter", name) is not None
    if finished is not None and finished.get("crc32") == checksum and is_there:
        return finished
    run.workspace.forget("parse", part)  # its columns are about to be overwritten
    columns = parse_block(text, MAX_REJECTED_PER_BLOCK, run.has_labels)
    facts = {
        "rows": columns.num_rows,
        "lines": columns.num_rows + len(columns.rejected),
        "minimum": int(columns.integers_IR.min(initial=2**31 - 1)),
        "positives": int(np.count_nonzero(columns.labels_R == 1)),
        "rejected": len(columns.rejected),
        "crc32": checksum,
        **digest_block(columns, number),
    }
    files = [path]
    if columns.rejected:
        files.append(rejected_path(run, part))
        write_rejected(files[1], columns.rejected)
    # A block that is too bad ends the run. It is not recorded, so that a resumed run parses it again.
    if not _is_too_bad(run, facts):
        write_columns(files[0], columns)
        run.workspace.finish("parse", part, facts, files)
    return facts


def rejected_path(run: Run, part: str) -> Path:
    """File with the lines of a block that are not rows."""
    return run.workspace.folder("rejected") / part


def _is_too_bad(run: Run, facts: dict[str, Any]) -> bool:
    return facts["rejected"] > 0 if run.config.bad_rows == "refuse" else facts["rejected"] >= MAX_REJECTED_PER_BLOCK


def _check_rejected(run: Run, name: str, number: int, lines: int, facts: dict[str, Any]) -> None:
    """Ends the run if a block has a line that may not be skipped.

    Args:
        lines: lines of the file before this block.
    """
    if not _is_too_bad(run, facts):
        return
    raw = run.raw[run.names.index(name)]
    first, *_ = read_rejected(rejected_path(run, f"{name}.{number:06d}"))
    where = f"{raw}: line {lines + first.line + 1:,}: {explain(first.text, run.has_labels)}"
    if run.config.bad_rows == "skip" or _is_mostly_bad(facts["rejected"], facts["lines"]):
        count = _count_bad(facts["rejected"], facts["lines"])
        raise DatasetError(f"{where}; {count} from line {lines + 1:,} on. Expected raw Criteo text.")
    remedy = "leave such lines out with --bad_rows skip --resume, or fix the file and continue with --resume"
    if lines + first.line == 0 and facts["rejected"] == 1:
        remedy = f"If it is a header, {remedy}"
    raise DatasetError(f"{where}. {remedy[0].upper()}{remedy[1:]}.")


def _is_mostly_bad(rejected: int, lines: int) -> bool:
    """Whether most lines are bad: then the file is probably of another kind, and none of it should be used."""
    return 2 * rejected > lines


def _count_bad(rejected: int, lines: int) -> str:
    return f"all {lines:,} lines are bad" if rejected == lines else f"{rejected:,} of {lines:,} lines are bad"
