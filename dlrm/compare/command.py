"""The command `dlrm compare`: what differs between two runs, and their metrics. No torch here."""

import dataclasses
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import tyro

from dlrm.checkpoint.checkpoint import Checkpoint
from dlrm.checkpoint.compatibility import differences
from dlrm.checkpoint.find import read_newest
from dlrm.checkpoint.manifest import step_of
from dlrm.checkpoint.run_files import CONFIG, DOCUMENTS, ENVIRONMENT, METRICS, PLAN, SUMMARY
from dlrm.config.config import Config
from dlrm.config.flags import parse_flags
from dlrm.errors import CheckpointError, ConfigError, RunDirectoryError
from dlrm.system.console import align, plural, printable

_SCORES = {"auroc": "AUROC", "logloss": "log loss", "ne": "NE", "calibration": "calibration"}
_MEASURES = {
    "num_val_samples": ("val samples", ",.0f"),
    "num_test_samples": ("test samples", ",.0f"),
    "num_train_samples": ("training samples", ",.0f"),
    "num_train_steps": ("training steps", ",.0f"),
    "train_seconds": ("training seconds", ",.1f"),
    "total_seconds": ("all seconds", ",.1f"),
    "samples_per_second": ("samples/s", ",.0f"),
    "peak_memory_gib": ("peak memory, GiB a rank", ",.2f"),
}
_DIGEST = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{28,52}\b")
_SHOWN_TABLES = 3


@dataclass(frozen=True)
class CompareConfig:
    """Shows what differs between two runs: flags, data, versions, commit, host, device, ranks, where tables lie; and
    their metrics side by side. Equal facts are counted, not listed. A run that has not finished is compared as far as
    it has come, a checkpoint as of its step.

    Example: `dlrm compare runs/first runs/second/checkpoints/step_0000001200`."""

    run1: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN1")]
    """Run directory; or a checkpoint (step_...), folder of checkpoints or address, whose newest complete one is
    taken."""

    run2: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN2")]
    """The other one."""

    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class Record:
    """What is known of a run.

    Attributes:
        state: how far it has come, in words.
        environment: facts by name, versions among them.
        plan: where each table lies, in words.
        metrics: as in summary.json, of the last validation; None for what is not known.
    """

    address: str
    state: str
    config: Config
    environment: Mapping[str, Any]
    plan: Mapping[str, str]
    metrics: Mapping[str, float | None]


@dataclass(frozen=True)
class Change:
    """A fact that differs between two runs."""

    name: str
    first: Any
    second: Any


@dataclass(frozen=True)
class Changes:
    """All facts of one kind that differ, and the number of facts of that kind."""

    kind: str
    found: list[Change]
    total: int

    @property
    def agreeing(self) -> int:
        """How many facts are equal."""
        return self.total - len(self.found)


def read_record(address: str) -> Record:
    """Reads what a run directory or a checkpoint says about its run.

    Raises:
        CheckpointError: if there is neither, or the checkpoint is damaged.
        RunDirectoryError: if a file can't be read, or is damaged, naming it.
    """
    folder = Path(address)
    is_run = "://" not in address and step_of(folder.name) is None and (folder / CONFIG).exists()
    address, state, texts = _read_run(folder) if is_run else _read_checkpoint(address)
    with _reading(address, CONFIG):
        config = Config.from_text(texts[CONFIG])
    with _reading(address, ENVIRONMENT):
        environment = _read_environment(json.loads(texts.get(ENVIRONMENT, "{}")))
    with _reading(address, PLAN):
        plan = json.loads(texts.get(PLAN, '{"tables": []}'))
        places = {table["table"]: _describe_placement(table) for table in plan["tables"]}
    so_far, metrics = _read_progress(address, texts)
    return Record(address, state or so_far, config, environment, places, metrics)


@contextmanager
def _reading(address: str, name: str) -> Iterator[None]:
    """Raises an error that names the file if its content is not what it must be."""
    try:
        yield
    except (ConfigError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise RunDirectoryError(f"{address}/{name}: is damaged or of another version ({error}).") from None


def _read_environment(content: Mapping[str, Any]) -> dict[str, Any]:
    facts = {key: value for key, value in content.items() if key not in ("versions", "launch", "folded_ids")}
    return facts | content.get("versions", {})


def _read_progress(address: str, texts: Mapping[str, str]) -> tuple[str, dict[str, float | None]]:
    """How far a run has come, in words, and its metrics."""
    with _reading(address, METRICS):
        lines = _read_lines(texts.get(METRICS, ""))
        scored = _numbers(_count_scored(lines))
        if SUMMARY not in texts:
            return _describe_state(lines), {**_numbers(_sum_up(lines)), **scored}
    with _reading(address, SUMMARY):
        summary = json.loads(texts[SUMMARY])
        return f"finished {summary['finished']}", {**_numbers(_metrics_of(summary)), **scored}


def _numbers(metrics: dict[str, float | None]) -> dict[str, float | None]:
    """The same metrics, after a check that each is None or a number that can be shown."""
    for name, value in metrics.items():
        if not isinstance(value, int | float | None):
            raise TypeError(f"{name} is {value!r}, expected a number")
        float(value or 0)  # an int of JSON may be too large
    return metrics


def _read_run(folder: Path) -> tuple[str, str, dict[str, str]]:
    texts = {}
    for name in (*DOCUMENTS, SUMMARY):
        try:
            texts[name] = (folder / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            raise RunDirectoryError(f"{folder / name}: can't be read ({error}).") from None
    return str(folder), "", texts


def _read_checkpoint(address: str) -> tuple[str, str, dict[str, str]]:
    return read_newest(address, lambda text: print(text, file=sys.stderr), _read_documents)


def _read_documents(checkpoint: Checkpoint) -> tuple[str, str, dict[str, str]]:
    manifest = checkpoint.manifest
    files = [name for name in DOCUMENTS if name in manifest.files]
    checkpoint.verify(files)
    try:
        texts = {name: checkpoint.read(name).decode() for name in files}
    except UnicodeDecodeError as error:
        raise CheckpointError(str(error)) from None
    return checkpoint.address, f"checkpoint of step {manifest.step:,}, written {manifest.created}", texts


def _read_lines(text: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without a last one that is still being written."""
    whole, _, _ = text.rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def _describe_state(lines: Sequence[Mapping[str, Any]]) -> str:
    """How far a run has come that has not finished."""
    return f"not finished, up to step {lines[-1]['step']:,}" if lines else "not finished, no step yet"


def _describe_placement(table: Mapping[str, Any]) -> str:
    ranks = ",".join(map(str, table["ranks"]))
    return f"{table['sharding']} {table['kernel']}, rank{'' if len(table['ranks']) == 1 else 's'} {ranks}"


def _metrics_of(summary: Mapping[str, Any]) -> dict[str, float | None]:
    """The metrics of a run that has finished."""
    validations = {score: summary.get(f"val_{score}") or [None] for score in _SCORES}
    own = validations["auroc"][summary.get("num_foreign_validations", 0) :]
    known = [auroc for auroc in own if auroc is not None]
    return {
        **{f"val_{score}": values[-1] for score, values in validations.items()},
        "best_val_auroc": max(known, default=None),
        **{f"test_{score}": summary.get(f"test_{score}") for score in _SCORES},
        **{name: summary.get(name) for name in _MEASURES},
    }


def _sum_up(lines: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """The metrics of a run that has not finished, from its lines so far."""
    of_kind = {kind: [line for line in lines if line["kind"] == kind] for kind in ("train", "val", "test")}
    last: dict[str, Mapping[str, Any]] = {kind: found[-1] if found else {} for kind, found in of_kind.items()}
    samples = [0, *(line["num_train_samples"] for line in of_kind["train"])]
    rates = [line["samples_per_second"] for line in of_kind["train"]]
    seconds = sum((after - before) / rate for (before, after), rate in zip(pairwise(samples), rates, strict=True))
    begun = max((number for number, line in enumerate(lines) if line.get("has_new_data")), default=0)
    known = [line["auroc"] for line in lines[begun:] if line["kind"] == "val" and line["auroc"] is not None]
    return {
        **{f"val_{score}": last["val"].get(score) for score in _SCORES},
        "best_val_auroc": max(known, default=None),
        **{f"test_{score}": last["test"].get(score) for score in _SCORES},
        "num_train_samples": samples[-1],
        "num_train_steps": last["train"].get("step", 0),
        "train_seconds": seconds,
        "total_seconds": lines[-1]["elapsed_seconds"] if lines else None,
        "samples_per_second": samples[-1] / seconds if seconds else None,
        "peak_memory_gib": None,
    }


def _count_scored(lines: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """The number of samples of the last validation and of the test."""
    scored = {line["kind"]: line.get("num_samples") for line in lines if line["kind"] in ("val", "test")}
    return {f"num_{kind}_samples": scored.get(kind) for kind in ("val", "test")}


def changes_between(one: Record, other: Record) -> list[Changes]:
    """What differs in config, environment and plan."""
    sections = [getattr(one.config, field.name) for field in dataclasses.fields(Config)]
    num_fields = sum(len(dataclasses.fields(part)) if dataclasses.is_dataclass(part) else 1 for part in sections)
    fields = [
        Change(f"--{difference.name}", difference.saved, difference.given)
        for difference in differences(one.config, other.config)
    ]
    return [
        Changes("config", fields, num_fields),
        _compare("environment", one.environment, other.environment),
        _compare("plan", one.plan, other.plan),
    ]


def _compare(kind: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> Changes:
    names = list(dict.fromkeys([*one, *other]))
    found = [Change(name, one.get(name), other.get(name)) for name in names if one.get(name) != other.get(name)]
    return Changes(kind, found, len(names))


def to_text(one: Record, other: Record) -> list[str]:
    """Lines that show two runs."""
    lines = [f"1  {one.address}: {one.state}", f"2  {other.address}: {other.state}"]
    words = {"config": "field", "environment": "fact", "plan": "table"}
    for changes in changes_between(one, other):
        shown = _join_tables(changes.found) if changes.kind == "plan" else changes.found
        rows = [(change.name, _show(change.first), _show(change.second)) for change in shown]
        of = f"{changes.agreeing:,} of {plural(changes.total, words[changes.kind])} agree"
        lines += ["", *(align([(changes.kind, "1", "2"), *rows]) if rows else []), f"{changes.kind}: {of}"]
    return [*lines, "", *_show_metrics(one.metrics, other.metrics)]


def _join_tables(found: Sequence[Change]) -> list[Change]:
    """Joins tables that are placed alike in each of the two runs."""
    alike: dict[tuple[Any, Any], list[str]] = {}
    for change in found:
        alike.setdefault((change.first, change.second), []).append(change.name)
    return [
        Change(", ".join(names) if len(names) <= _SHOWN_TABLES else f"{names[0]} and {len(names) - 1} more", *places)
        for places, names in alike.items()
    ]


def _show(value: Any) -> str:
    if value is None:
        return "-"
    return _DIGEST.sub(r"\1", ",".join(map(str, value)) if isinstance(value, tuple) else str(value))


def _show_metrics(one: Mapping[str, float | None], other: Mapping[str, float | None]) -> list[str]:
    names = {f"val_{score}": f"val {word}" for score, word in _SCORES.items()}
    names |= {"best_val_auroc": "best val AUROC"} | {f"test_{score}": f"test {word}" for score, word in _SCORES.items()}
    rows = [("metrics", "1", "2", "2 against 1")]
    for name, words in names.items():
        rows.append((words, *_pair(one[name], other[name], ".6f"), _difference(one[name], other[name])))
    for name, (words, form) in _MEASURES.items():
        rows.append((words, *_pair(one[name], other[name], form), _share(one[name], other[name])))
    return align(rows, right={1, 2, 3})


def _pair(one: float | None, other: float | None, form: str) -> tuple[str, str]:
    first, second = ("-" if value is None else format(value, form) for value in (one, other))
    return first, second


def _difference(one: float | None, other: float | None) -> str:
    return "" if one is None or other is None else f"{other - one:+.6f}"


def _share(one: float | None, other: float | None) -> str:
    return "" if not one or other is None else f"{other / one - 1:+.1%}"


def to_json(one: Record, other: Record) -> dict[str, Any]:
    """The comparison, ready for JSON: each value is a pair, the first run's first."""
    return {
        "runs": [{"address": record.address, "state": record.state} for record in (one, other)],
        **{
            changes.kind: {
                "agreeing": changes.agreeing,
                "differing": {
                    change.name.removeprefix("--"): [change.first, change.second] for change in changes.found
                },
            }
            for changes in changes_between(one, other)
        },
        "metrics": {name: [value, other.metrics[name]] for name, value in one.metrics.items()},
    }


def main(argv: Sequence[str]) -> None:
    """`dlrm compare`."""
    config = parse_flags(CompareConfig, argv, "dlrm compare")
    one, other = read_record(config.run1), read_record(config.run2)
    if config.json:
        print(json.dumps(to_json(one, other), indent=2))
    else:
        print("\n".join(map(printable, to_text(one, other))))
