"""Raw Criteo text to binary days, in bounded memory: parse, count, encode, scatter, gather, verify.

Shapes: R rows of a block, I integer features, F categorical features.
"""

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dlrm import __version__
from dlrm.artifacts import MANIFEST_VERSION, write_json
from dlrm.console import Progress
from dlrm.errors import DatasetError
from dlrm.preprocess import parse, vocabulary
from dlrm.preprocess.compat import (
    merged_ids,
    numpy_shuffle_positions,
    round_to_float32,
)
from dlrm.preprocess.config import MAX_REJECTED_PER_BLOCK, PreprocessConfig, Resources
from dlrm.preprocess.kernels import bucket_sizes
from dlrm.preprocess.layout import Block, Layout, place_blocks
from dlrm.preprocess.ranks import Ranks
from dlrm.preprocess.raw import TextBlock, read_blocks
from dlrm.preprocess.shuffle import (
    GATHER_BYTES_PER_ROW,
    ArrayFiles,
    Buckets,
    GivenKeys,
    KeySource,
    RandomKeys,
    count_buckets,
    write_rows,
)
from dlrm.preprocess.threads import in_order
from dlrm.preprocess.verify import measure_file, rows_of
from dlrm.preprocess.workspace import Workspace
from dlrm.schema import CATEGORICAL_NAMES, NUM_CATEGORICAL_FEATURES

_BUCKET_ROWS, _MAX_BUCKETS = 1 << 17, 1 << 10
_SHUFFLE_PURPOSE = 0x53485546464C45  # "SHUFFLE"


class Pipeline:
    """The stages of one run, in order. Every rank has one, and calls the same methods."""

    def __init__(
        self,
        config: PreprocessConfig,
        raw: Sequence[Path],
        names: tuple[str, ...],
        workspace: Workspace,
        resources: Resources,
        ranks: Ranks,
    ) -> None:
        self.config = config
        self.raw = raw
        self.names = names
        self.workspace = workspace
        self.resources = resources
        self.ranks = ranks
        self.seconds: dict[str, float] = {}
        self._pool = ThreadPoolExecutor(resources.workers)

    def run(self, estimated_rows: int) -> Layout:
        """All stages; then the output has its name."""
        with self._pool:
            self._parse(estimated_rows)
            layout = self._layout()
            self._count(layout)
            self._encode(layout)
            days = self._create_days(layout)
            buckets = self._scatter(layout, days)
            self._gather(layout, days, buckets)
            self._verify(layout, days)
        if self.ranks.is_main:
            self._warn_of_merged_ids()
            self.workspace.publish()
        self._meet()
        return layout

    # Parse

    def _parse(self, estimated_rows: int) -> None:
        progress = self._begin("Parsing", "rows", estimated_rows)
        for day in self.ranks.share(range(len(self.names))):
            if self.workspace.facts("parse", self.names[day]) is None:
                self._parse_day(day, progress)
            else:
                progress.advance(sum(facts["rows"] for facts in self._parsed_blocks(day)))
        self._end("Parsing", progress)

    def _parse_day(self, day: int, progress: Progress) -> None:
        raw, name = self.raw[day], self.names[day]
        folder = self.workspace.folder("parsed", name)

        def parse_one(item: tuple[int, TextBlock]) -> dict[str, Any]:
            number, text = item
            facts = self.workspace.facts("parse", f"{name}.{number:06d}")
            return facts if facts is not None else self._parse_block(folder, name, number, text)

        blocks = enumerate(read_blocks(raw, self.config.rows))
        lines = num_blocks = rows = 0
        for (number, _), facts in in_order(self._pool, blocks, parse_one, self.resources.blocks_ahead):
            if facts["rejected"] and self.config.bad_rows == "refuse":
                line, text = facts["rejected"][0]
                raise DatasetError(
                    f"{raw}: line {lines + line + 1:,}: {parse.explain(text.encode('latin-1'))}. "
                    "Mend the file, or leave such lines out with --bad_rows skip."
                )
            if len(facts["rejected"]) >= MAX_REJECTED_PER_BLOCK:
                raise DatasetError(
                    f"{raw}: {MAX_REJECTED_PER_BLOCK:,} bad lines among the {facts['lines']:,} from line {lines + 1:,} "
                    f"on; the last: {parse.explain(facts['rejected'][-1][1].encode('latin-1'))}. "
                    "Expected raw Criteo text."
                )
            lines += facts["lines"]
            rows += facts["rows"]
            num_blocks = number + 1
            progress.advance(facts["rows"])
        if rows == 0:
            raise DatasetError(f"{raw}: no rows. Expected raw Criteo text.")
        self.workspace.finish("parse", name, {"blocks": num_blocks}, [folder])

    def _parse_block(self, folder: Path, name: str, number: int, text: TextBlock) -> dict[str, Any]:
        skips = self.config.bad_rows == "skip"
        columns = parse.parse_block(text, MAX_REJECTED_PER_BLOCK if skips else 1)
        facts = {
            "rows": columns.num_rows,
            "lines": columns.num_rows + len(columns.rejected),
            "minimum": int(columns.integers_IR.min(initial=2**31 - 1)),
            "positives": int(columns.labels_R.sum()),
            "rejected": [(line.line, line.text.decode("latin-1")) for line in columns.rejected],
        }
        if (columns.rejected and not skips) or len(columns.rejected) >= MAX_REJECTED_PER_BLOCK:
            return facts  # ends the run; not to be taken for finished by the next one
        path = folder / f"{number:06d}"
        parse.write_columns(path, columns)
        self.workspace.finish("parse", f"{name}.{number:06d}", facts, [path])
        return facts

    def _parsed_blocks(self, day: int) -> list[dict[str, Any]]:
        facts = self.workspace.facts("parse", self.names[day])
        assert facts is not None
        blocks = []
        for number in range(facts["blocks"]):
            block = self.workspace.facts("parse", f"{self.names[day]}.{number:06d}")
            assert block is not None
            blocks.append(block)
        return blocks

    def _layout(self) -> Layout:
        facts = [self._parsed_blocks(day) for day in range(len(self.names))]
        layout = Layout.build(self.names, tuple(place_blocks(facts)), self.config.dataset_name == "criteo_kaggle")
        held_out = layout.num_rows - layout.num_train_rows
        if held_out == 0 or (layout.num_train_rows == 0 and self.config.vocabulary is None):
            raise DatasetError(
                f"{self.raw[0]}: {layout.num_rows:,} rows are too few to train on some and hold out some."
            )
        return layout

    # Vocabulary

    def _count(self, layout: Layout) -> None:
        """Counts the ids of each column, and chooses which have an index of their own."""
        if self.config.vocabulary is not None:
            if self.ranks.is_main:
                shutil.copytree(
                    Path(self.config.vocabulary, "vocabulary"), self.workspace.days / "vocabulary", dirs_exist_ok=True
                )
            self._meet()
            return
        progress = self._begin("Counting ids", "ids", layout.num_train_rows * NUM_CATEGORICAL_FEATURES)
        self._each_column("count", lambda column: self._count_column(layout, column, progress))
        self._end("Counting ids", progress)

    def _each_column(self, stage: str, do: Callable[[int], tuple[dict[str, Any], list[Path]]]) -> None:
        """Runs a stage on this rank's columns, those that are not finished yet."""

        def one(column: int) -> None:
            if self.workspace.facts(stage, CATEGORICAL_NAMES[column]) is None:
                facts, files = do(column)
                self.workspace.finish(stage, CATEGORICAL_NAMES[column], facts, files)

        # The many small columns fill the gaps that a large one leaves.
        for _ in in_order(self._pool, self.ranks.share(range(NUM_CATEGORICAL_FEATURES)), one, NUM_CATEGORICAL_FEATURES):
            pass

    def _count_column(self, layout: Layout, column: int, progress: Progress) -> tuple[dict[str, Any], list[Path]]:
        name, is_compat = CATEGORICAL_NAMES[column], self.config.is_compat
        folder, finished = self.workspace.folder("counts"), self.workspace.folder("days", "vocabulary")
        counts, first_rows = folder / name, folder / f"{name}.first_rows"
        for stale in (*finished.glob(f"{name}.*"), counts, first_rows):
            stale.unlink(missing_ok=True)
        memory = self.resources.bytes_per_worker
        order: vocabulary.Order = "first_seen" if is_compat else "frequency"

        def blocks() -> Iterator[tuple[int, vocabulary.Ids]]:
            for block in layout.blocks:
                rows = block.rows if self._counts_all else layout.train_rows_of(block)
                if rows:
                    yield block.first_row, self._read_ids(block, column)[:rows]

        def blocks_with_progress() -> Iterator[tuple[int, vocabulary.Ids]]:
            for first_row, ids_R in blocks():
                yield first_row, ids_R
                progress.advance(len(ids_R))

        with counts.open("wb") as counts_file, first_rows.open("wb") as first_rows_file:
            if is_compat and (zeros := _count_zeros(blocks())) is not None:
                np.array([zeros[0]], np.uint64).tofile(counts_file)
                np.array([zeros[1]], np.int64).tofile(first_rows_file)
            for counted in vocabulary.count_column(blocks_with_progress, order, memory):
                counted.entries.tofile(counts_file)
                counted.first_rows.tofile(first_rows_file)
        if is_compat:
            choice = vocabulary.choose_by_first_row(
                counts, first_rows, self.config.frequency_threshold, finished, name, layout.num_rows, memory
            )
        else:
            choice = vocabulary.choose_by_frequency(counts, self.config.frequency_threshold, finished, name)
        counts.unlink()
        first_rows.unlink()
        return {"distinct": choice.distinct, "kept": choice.kept}, [finished]

    @property
    def _counts_all(self) -> bool:
        return self.config.is_compat or self.config.vocabulary_days == "all"

    @property
    def _mimics_shuffle(self) -> bool:
        # torchrec.shuffle takes days, and leaves the last one alone: with a single file there is nothing to shuffle.
        return self.config.is_compat and self.config.dataset_name == "criteo_1t"

    def _read_ids(self, block: Block, column: int) -> npt.NDArray[np.uint32]:
        return parse.read_ids(self._parsed(block), column, block.rows)

    def _parsed(self, block: Block) -> Path:
        return self.workspace.root / "parsed" / self.names[block.day] / f"{block.number:06d}"

    # Encode

    def _encode(self, layout: Layout) -> None:
        progress = self._begin("Encoding", "ids", layout.num_rows * NUM_CATEGORICAL_FEATURES)
        for day in range(len(self.names)):
            self.workspace.folder("encoded", self.names[day])
        self._each_column("encode", lambda column: self._encode_column(layout, column, progress))
        self._end("Encoding", progress)

    def _encode_column(self, layout: Layout, column: int, progress: Progress) -> tuple[dict[str, Any], list[Path]]:
        name = CATEGORICAL_NAMES[column]
        files = vocabulary.vocabulary_files(self.workspace.days / "vocabulary", name)
        memory = self.resources.bytes_per_worker
        paths = [self._encoded(day, name) for day in range(len(self.names))]
        for turn, table in enumerate(vocabulary.lookup_tables(files, self.config.max_embeddings, memory)):
            for day, path in enumerate(paths):
                if turn == 0:
                    path.touch()
                with path.open("r+b") as file:
                    for block in layout.of_day(day):
                        ids_R = self._read_ids(block, column)
                        if turn == 0:
                            indices_R = np.where(
                                ids_R == 0, np.int32(table.missing_index), np.int32(vocabulary.RARE_INDEX)
                            )
                            progress.advance(block.rows)
                        else:
                            indices_R = np.fromfile(path, np.int32, block.rows, offset=4 * block.day_row)
                        table.look_up(ids_R, indices_R)
                        file.seek(4 * block.day_row)
                        file.write(memoryview(indices_R))  # type: ignore[arg-type]
        return {}, paths

    def _encoded(self, day: int, column: str) -> Path:
        return self.workspace.root / "encoded" / self.names[day] / column

    # Scatter

    def _create_days(self, layout: Layout) -> list[ArrayFiles]:
        last = len(self.names) - 1
        # torchrec.shuffle copies the last day as sparse_to_contiguous left it, in 64 bits.
        wide = {last} if self.config.is_compat else set()
        days = [
            ArrayFiles(self.workspace.days, name, layout.day_rows(day), np.dtype("<i8" if day in wide else "<i4"))
            for day, name in enumerate(self.names)
        ]
        if self.ranks.is_main and self.workspace.facts("create", "days") is None:
            for day in days:
                day.create()
            self.workspace.finish("create", "days", {})
        self._meet()
        return days

    def _keys(self, layout: Layout) -> KeySource:
        if self.config.is_compat and not self._mimics_shuffle:
            return GivenKeys(np.arange(layout.num_train_rows))
        if not self.config.is_compat:
            seed = np.random.SeedSequence([self.config.seed, _SHUFFLE_PURPOSE]).generate_state(1, np.uint64)[0]
            return RandomKeys(int(seed))
        folder = self.workspace.folder("positions", str(self.ranks.rank))
        memory = self.resources.bytes_per_worker * self.resources.workers
        return GivenKeys(numpy_shuffle_positions(layout.num_train_rows, self.config.seed, folder, memory))

    def _scatter(self, layout: Layout, days: list[ArrayFiles]) -> Buckets:
        """Writes held-out rows to their places, and training rows to buckets."""
        keys = self._keys(layout)
        buckets = self._plan_buckets(layout, keys)
        minima = self._minima(layout)
        progress = self._begin("Scattering", "rows", layout.num_rows)
        own = set(self.ranks.share(range(len(self.names))))
        places = np.zeros(len(buckets.sizes), np.int64)
        for day, name in enumerate(self.names):
            is_due = day in own and self.workspace.facts("scatter", name) is None

            def items(day: int = day) -> Iterator[tuple[Block, npt.NDArray[np.uint64], npt.NDArray[np.int64]]]:
                for block in layout.of_day(day):
                    keys_R = keys.keys(block.first_row, layout.train_rows_of(block))
                    yield block, keys_R, places.copy()
                    bucket_sizes(keys_R, places)

            if not is_due:
                for _ in items():
                    pass
                continue
            clamped = 0
            work = in_order(
                self._pool,
                items(),
                lambda item: self._scatter_block(days, buckets, minima, *item),
                self.resources.blocks_ahead,
            )
            for (block, _, _), clamped_in_block in work:
                clamped += clamped_in_block
                progress.advance(block.rows)
            files = [*buckets.folder.iterdir(), *days[day].paths]
            self.workspace.finish("scatter", name, {"clamped": clamped}, files)
            self.workspace.drop("parsed", name)
            self.workspace.drop("encoded", name)
        self._end("Scattering", progress)
        self.workspace.drop("positions")
        return buckets

    def _plan_buckets(self, layout: Layout, keys: KeySource) -> Buckets:
        """Of as many rows as `Resources` allows; remembered, since a resumed run may be allowed others."""
        if self.ranks.is_main and self.workspace.facts("plan", "buckets") is None:
            rows = max(_BUCKET_ROWS, layout.num_train_rows // _MAX_BUCKETS)
            rows = min(rows, self.resources.bytes_per_worker // GATHER_BYTES_PER_ROW)
            count = max(1, -(-layout.num_train_rows // rows))
            sizes = count_buckets(keys, layout.num_train_rows, count)
            self.workspace.finish("plan", "buckets", {"sizes": sizes})
        self._meet()
        facts = self.workspace.facts("plan", "buckets")
        assert facts is not None
        return Buckets(self.workspace.folder("buckets"), tuple(facts["sizes"]))

    def _minima(self, layout: Layout) -> list[int]:
        """What each day's integers are measured from."""
        if self.ranks.is_main and self.workspace.facts("plan", "minima") is None:
            self.workspace.finish("plan", "minima", {"minima": self._find_minima(layout)})
        self._meet()
        facts = self.workspace.facts("plan", "minima")
        assert facts is not None
        return facts["minima"]

    def _find_minima(self, layout: Layout) -> list[int]:
        if self.config.is_compat:
            return [min(block.minimum for block in layout.of_day(day)) for day in range(len(self.names))]
        if self.config.applied is not None:
            return [self.config.applied["integers"]["minimum"]] * len(self.names)
        minimum = 2**31 - 1
        for block in layout.blocks:
            rows = layout.train_rows_of(block)
            if 0 < rows < block.rows:
                integers_IR = parse.read_integers(self._parsed(block), block.rows)
                minimum = min(minimum, int(integers_IR[:, :rows].min()))
            elif rows:
                minimum = min(minimum, block.minimum)
        return [minimum] * len(self.names)

    def _scatter_block(
        self,
        days: list[ArrayFiles],
        buckets: Buckets,
        minima: list[int],
        block: Block,
        keys_R: npt.NDArray[np.uint64],
        places: npt.NDArray[np.int64],
    ) -> int:
        """Returns how many held-out integers are below the training rows' smallest."""
        path, rows = self._parsed(block), block.rows
        integers_IR = parse.read_integers(path, rows)
        dense_IR = log_dense(integers_IR, minima[block.day])
        indices_FR = np.empty((NUM_CATEGORICAL_FEATURES, rows), np.int32)
        for column, name in enumerate(CATEGORICAL_NAMES):
            encoded = self._encoded(block.day, name)
            indices_FR[column] = np.fromfile(encoded, np.int32, rows, offset=4 * block.day_row)
        labels_R = parse.read_labels(path, rows)
        train = len(keys_R)
        if train:
            indices = indices_FR[:, :train]
            if self._mimics_shuffle:
                indices = round_to_float32(indices)
            buckets.scatter(keys_R, places, dense_IR[:, :train], indices, labels_R[:train])
        if train < rows:
            write_rows(days, block.first_row + train, dense_IR[:, train:].T, indices_FR[:, train:].T, labels_R[train:])
        return int((integers_IR < minima[block.day]).sum())

    # Gather

    def _gather(self, layout: Layout, days: list[ArrayFiles], buckets: Buckets) -> None:
        progress = self._begin("Shuffling", "rows", layout.num_train_rows)

        def one(bucket: int) -> None:
            if self.workspace.facts("gather", str(bucket)) is None:
                touched = buckets.gather(bucket, days)
                self.workspace.finish("gather", str(bucket), {}, [path for day in touched for path in day.paths])
            self.workspace.remove(buckets.path(bucket))

        share = self.ranks.share(range(len(buckets.sizes)))
        for bucket, _ in in_order(self._pool, share, one, self.resources.workers):
            progress.advance(buckets.sizes[bucket])
        self._end("Shuffling", progress)

    # Verify

    def _verify(self, layout: Layout, days: list[ArrayFiles]) -> None:
        """Reads everything again, checks it, and writes the manifest."""
        self._write_rejected()
        columns = self._columns()
        table_rows = [columns[name]["rows"] for name in CATEGORICAL_NAMES]
        folder = self.workspace.days
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
        rows = {day.name: day.rows for day in days}
        progress = self._begin("Verifying", "bytes", sum(path.stat().st_size for path in files))

        def one(path: Path) -> None:
            name = path.relative_to(folder).as_posix()
            part = name.replace("/", ".")
            if self.workspace.facts("verify", part) is None:
                self.workspace.finish("verify", part, measure_file(path, rows_of(name, rows), table_rows, progress))

        for _ in in_order(self._pool, self.ranks.share(files), one, self.resources.workers):
            pass
        self._end("Verifying", progress)
        if self.ranks.is_main:
            facts = {}
            for path in files:
                name = path.relative_to(folder).as_posix()
                measured = self.workspace.facts("verify", name.replace("/", "."))
                assert measured is not None
                facts[name] = measured
            self.workspace.flush()
            write_json(folder / "manifest.json", self._manifest(layout, columns, facts))

    def _columns(self) -> dict[str, dict[str, int]]:
        if self.config.applied is not None:
            columns = {name: dict(facts) for name, facts in self.config.applied["columns"].items()}
        else:
            columns = {}
            for name in CATEGORICAL_NAMES:
                facts = self.workspace.facts("count", name)
                assert facts is not None
                columns[name] = facts
        for facts in columns.values():
            rows = vocabulary.FIRST_INDEX + facts["kept"]
            facts["rows"] = min(rows, self.config.max_embeddings or rows)
        return columns

    def _manifest(self, layout: Layout, columns: dict[str, Any], files: dict[str, dict[str, Any]]) -> dict[str, Any]:
        days, clamped = {}, 0
        for day, name in enumerate(self.names):
            facts, scattered = self._parsed_blocks(day), self.workspace.facts("scatter", name)
            assert scattered is not None
            clamped += scattered["clamped"]
            positives = files[f"{name}_labels.npy"].pop("positives")
            rows = layout.day_rows(day)
            days[name] = {
                "rows": rows,
                "positives": positives,
                "rejected": sum(len(block["rejected"]) for block in facts),
                "source": self.raw[day].name,
            }
        if sum(block.positives for block in layout.blocks) != sum(day["positives"] for day in days.values()):
            raise DatasetError(f"{self.workspace.root}: labels were lost on the way. Remove it and start again.")
        found = self.workspace.facts("plan", "minima")
        assert found is not None
        minima = found["minima"]
        return {
            "version": MANIFEST_VERSION,
            "kind": "binary_days",
            "software": f"dlrm {__version__}",
            "days": days,
            "num_train_rows": layout.num_train_rows,
            "integers": {
                "transform": "log(x - minimum + 2)",
                "minimum": minima if self.config.is_compat else minima[0],
                "clamped": clamped,
            },
            "ids": {
                "compat": self.config.compat,
                "frequency_threshold": self.config.frequency_threshold,
                "max_embeddings": self.config.max_embeddings,
                "vocabulary_days": self.config.vocabulary_days,
                "vocabulary": None if self.config.vocabulary is None else Path(self.config.vocabulary).name,
                "seed": self.config.seed,
            },
            "columns": columns,
            "files": files,
        }

    def _write_rejected(self) -> None:
        if self.ranks.is_main:
            lines = []
            for day in range(len(self.names)):
                start = 0
                for block in self._parsed_blocks(day):
                    for line, latin in block["rejected"]:
                        text = latin.encode("latin-1")
                        lines.append(
                            f"{self.raw[day].name}\t{start + line + 1}\t{parse.explain(text)}\t".encode() + text + b"\n"
                        )
                    start += block["lines"]
            if lines:
                (self.workspace.days / "rejected.tsv").write_bytes(b"".join(lines))
        self._meet()

    def _warn_of_merged_ids(self) -> None:
        if not self._mimics_shuffle:
            return
        merged = {name: count for name, facts in self._columns().items() if (count := merged_ids(facts["kept"]))}
        if merged:
            print(
                f"Warning: torchrec's shuffle holds ids as float32; {sum(merged.values()):,} ids share their "
                f"index with another one in the training days ({', '.join(f'{n} {c:,}' for n, c in merged.items())}).",
                flush=True,
            )

    def _meet(self) -> None:
        """Waits for the other ranks; what each has recorded is then seen by all."""
        if self.ranks.world_size > 1:
            self.workspace.flush()
            self.ranks.barrier()

    def _begin(self, label: str, unit: str, total: int) -> Progress:
        self._started = time.monotonic()
        return Progress(
            label,
            total if self.ranks.world_size == 1 else total // self.ranks.world_size,
            unit,
            shown=self.ranks.is_main,
        )

    def _end(self, label: str, progress: Progress) -> None:
        progress.close()
        self._meet()
        self.seconds[label] = time.monotonic() - self._started


def log_dense(integers_IR: npt.NDArray[np.int32], minimum: int) -> npt.NDArray[np.float32]:
    """log(x - minimum + 2) in float32, as torchrec's tsv_to_npys has it; integers below the minimum count as it."""
    shifted_IR = np.maximum(integers_IR.astype(np.float64) - (minimum - 2), 2.0)
    return np.log(shifted_IR.astype(np.float32))


def _count_zeros(blocks: Iterable[tuple[int, npt.NDArray[np.uint32]]]) -> tuple[int, int] | None:
    """How often id 0 comes, and its first row."""
    count, first = 0, None
    for first_row, ids_R in blocks:
        zeros = np.flatnonzero(ids_R == 0)
        count += len(zeros)
        if first is None and len(zeros):
            first = first_row + int(zeros[0])
    return None if first is None else (min(count, 2**32 - 1), first)
