"""Text to columns, a block of lines at a time."""

from functools import partial
from pathlib import Path
from typing import Any

from dlrm.console import Progress
from dlrm.errors import DatasetError
from dlrm.preprocess.layout import Layout
from dlrm.preprocess.parse import explain, parse_block, read_rejected, write_columns, write_rejected
from dlrm.preprocess.raw import TextBlock, read_blocks
from dlrm.preprocess.repeats import check_repeats, digest_block
from dlrm.preprocess.run import Run

MAX_REJECTED_PER_BLOCK = 10_000


def parse(run: Run, estimated_rows: int) -> Layout:
    """Writes the columns of this rank's days. Collective.

    Raises:
        DatasetError: at a line that is not a row, unless such lines are skipped and few; or if rows are there twice.
    """
    with run.stage("Parsing", "rows", estimated_rows) as progress:
        for day, name in run.ranks.share(list(enumerate(run.names))):
            if run.workspace.facts("parse", name) is None:
                _parse_day(run, day, progress)
            else:
                progress.advance(sum(facts["rows"] for facts in run.parsed_blocks(day)))
    parsed = [[(facts["rows"], facts["minimum"]) for facts in run.parsed_blocks(day)] for day in range(len(run.names))]
    layout = Layout.build(parsed, run.config.is_split)
    held_out = layout.num_rows - layout.num_train_rows
    if held_out == 0 or (layout.num_train_rows == 0 and run.config.vocabulary is None):
        raise DatasetError(f"{run.raw[0]}: {layout.num_rows:,} rows are too few to train on some and hold out some.")
    check_repeats(run, layout)
    return layout


def _parse_day(run: Run, day: int, progress: Progress) -> None:
    raw, name = run.raw[day], run.names[day]
    lines = rows = num_blocks = 0
    before = raw.stat()
    blocks = enumerate(read_blocks(raw, run.config.rows))
    for (number, _), facts in run.in_order(blocks, partial(_parse_block, run, name), run.resources.blocks_ahead):
        _check_rejected(run, name, number, lines, facts)
        lines += facts["lines"]
        rows += facts["rows"]
        num_blocks = number + 1
        progress.advance(facts["rows"])
    if (raw.stat().st_size, raw.stat().st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise DatasetError(
            f"{raw}: changed while it was read. Remove {run.workspace.root}, and start again once it is complete."
        )
    if rows == 0:
        raise DatasetError(f"{raw}: all {lines:,} lines are bad. Expected raw Criteo text.")
    run.workspace.finish("parse", name, {"blocks": num_blocks}, [run.workspace.folder("parsed", name)])


def _parse_block(run: Run, name: str, item: tuple[int, TextBlock]) -> dict[str, Any]:
    number, text = item
    part = f"{name}.{number:06d}"
    if (finished := run.workspace.facts("parse", part)) is not None:
        return finished
    skips = run.config.bad_rows == "skip"
    columns = parse_block(text, MAX_REJECTED_PER_BLOCK if skips else 1)
    facts = {
        "rows": columns.num_rows,
        "lines": columns.num_rows + len(columns.rejected),
        "minimum": int(columns.integers_IR.min(initial=2**31 - 1)),
        "positives": int(columns.labels_R.sum()),
        "rejected": len(columns.rejected),
        **digest_block(columns, number),
    }
    files = [run.workspace.folder("parsed", name) / f"{number:06d}"]
    if columns.rejected:
        files.append(rejected_path(run, part))
        write_rejected(files[1], columns.rejected)
    if not _is_too_bad(run, facts):  # which ends the run, and is not to be taken for finished by the next one
        write_columns(files[0], columns)
        run.workspace.finish("parse", part, facts, files)
    return facts


def rejected_path(run: Run, part: str) -> Path:
    """Lines of a block that are not rows."""
    return run.workspace.folder("rejected") / part


def _is_too_bad(run: Run, facts: dict[str, Any]) -> bool:
    return facts["rejected"] > 0 if run.config.bad_rows == "refuse" else facts["rejected"] >= MAX_REJECTED_PER_BLOCK


def _check_rejected(run: Run, name: str, number: int, lines: int, facts: dict[str, Any]) -> None:
    """Ends the run at a line that may not be skipped; `lines` came before this block."""
    if not _is_too_bad(run, facts):
        return
    raw = run.raw[run.names.index(name)]
    *_, last = read_rejected(rejected_path(run, f"{name}.{number:06d}"))
    if run.config.bad_rows == "refuse":
        raise DatasetError(
            f"{raw}: line {lines + last.line + 1:,}: {explain(last.text)}. Leave such lines out with --bad_rows skip "
            f"--resume, or mend the file, remove {run.workspace.root}, and start again."
        )
    raise DatasetError(
        f"{raw}: {facts['rejected']:,} bad lines among the {facts['lines']:,} from line {lines + 1:,} on; the last: "
        f"{explain(last.text)}. Expected raw Criteo text."
    )
