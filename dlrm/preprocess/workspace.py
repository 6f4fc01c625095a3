"""The folder in which a preprocessing run works, and which records what is finished."""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from typing_extensions import Self

from dlrm.errors import ConfigError, reason_of
from dlrm.system.files import sync, write_json
from dlrm.system.lock import FileLock

_LOCK_TEXT = "dlrm preprocess\n"
_RAW_FILES = "raw files"


class Workspace:
    """`OUTPUT.partial`, beside the output. For each finished part of a stage it has a mark: a small file of facts.

    A part is marked only after its data is on disk, so that a marked part survives `kill -9` and a power cut.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.root = output.with_name(output.name + ".partial")
        self.days = self.root / "days"
        self._plan = self.root / "plan.json"
        self._lock = FileLock(self.root / "lock")
        self._facts: dict[tuple[str, str], dict[str, Any]] = {}
        self._syncer = ThreadPoolExecutor(1, thread_name_prefix="sync")
        self._failure: OSError | None = None

    def open(self, plan: Mapping[str, Any], resume: bool, names: Sequence[str] = ()) -> list[str] | None:
        """Begins a run, or continues the unfinished one. For one rank only.

        Args:
            plan: everything that the output depends on. An unfinished run is continued only with the same plan, but its
                raw files may have changed; those are read again.
            names: names of the raw files' days.

        Returns:
            None for a new run; the raw files that have changed since the unfinished one began.

        Raises:
            ConfigError: if there is an unfinished run and `resume` is false, its plan differs, or it is at work.
        """
        if self.root.is_symlink() or (self.root.exists() and not self._is_ours()):
            raise ConfigError(f"{self.root}: is needed for the work, and is something else. Move it away.")
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"--output {self.output}: can't be made ({reason_of(error)}). Choose another folder."
            ) from None
        if (obstacle := self._take_lock()) is not None:
            raise ConfigError(f"{self.root}: {obstacle}. Wait for it, or end it.")
        if self.output.exists():
            raise ConfigError(f"--output {self.output}: another process has just written it.")
        if not (self._plan.exists() and self.days.exists()):
            self._clear()
            self.days.mkdir()
            write_json(self._plan, plan)
            return None
        if not resume:
            raise ConfigError(
                f"{self.root}: holds an unfinished run. Continue with --resume, or remove it to start from the "
                "beginning."
            )
        try:
            before = json.loads(self._plan.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{self._plan}: not readable ({error}). Remove {self.root} to start again.") from None
        now = json.loads(json.dumps(plan))
        differing = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
        if [name for name in differing if name != _RAW_FILES]:
            name = next(name for name in differing if name != _RAW_FILES)
            raise ConfigError(
                f"--resume: {name} was {before.get(name)!r} and is {now.get(name)!r}. "
                f"Run with what was, or remove {self.root} to start from the beginning."
            )
        for half_written in self.root.rglob(".*"):
            half_written.unlink()
        changed = [path for path, facts in now[_RAW_FILES].items() if before[_RAW_FILES].get(path) != facts]
        for path in changed:
            self.forget("parse", names[list(now[_RAW_FILES]).index(path)])
        if changed:
            write_json(self._plan, plan)
        return changed

    def _is_ours(self) -> bool:
        """Whether the folder is empty, or was made by this class."""
        if not self.root.is_dir():
            return False
        lock = self._lock.path
        if all(path in self._lock.files for path in self.root.iterdir()):
            return True
        return lock.is_file() and lock.read_bytes() == _LOCK_TEXT.encode()

    def _clear(self) -> None:
        """Removes what was left by a run that was killed while it began or ended. The lock stays."""
        for path in self.root.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path not in self._lock.files:
                path.unlink()

    def _take_lock(self) -> str | None:
        """Takes the folder for this process; if another one has it, returns what is known about that one."""
        if (obstacle := self._lock.take()) is None:
            self._lock.path.write_text(_LOCK_TEXT)
        return obstacle

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Waits until all recorded parts are marked, also after an error, and then releases the lock."""
        self._syncer.shutdown()
        self._lock.release()

    def folder(self, *names: str) -> Path:
        """A folder of scratch files, created if it is missing."""
        folder = self.root.joinpath(*names)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def facts(self, stage: str, part: str) -> dict[str, Any] | None:
        """What was recorded about a part; None if it is not finished."""
        if (stage, part) not in self._facts:
            path = self._mark(stage, part)
            if not path.exists():
                return None
            try:
                self._facts[stage, part] = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ConfigError(f"{path}: not readable ({error}). Remove {self.root} to start again.") from None
        return self._facts[stage, part]

    def finish(self, stage: str, part: str, facts: Mapping[str, Any], files: Iterable[Path] = ()) -> None:
        """Records a finished part. A thread marks it later, once its `files` have reached the disk."""
        self._facts[stage, part] = dict(facts)

        def mark() -> None:
            for file in files:
                sync(file)
            path = self._mark(stage, part)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, facts)

        self._later(mark)

    def forget(self, stage: str, part: str | None = None) -> None:
        """Forgets that a part of a stage, or all of the stage, is finished, so that it is done again."""
        if part is not None:
            parts = {part}
        else:  # another rank may have removed some marks already, so look into memory too
            known = {name for of, name in self._facts if of == stage}
            parts = known | {mark.stem for mark in (self.root / "done" / stage).glob("*.json")}
        for one in parts:
            self._mark(stage, one).unlink(missing_ok=True)
            self._facts.pop((stage, one), None)

    def empty(self, *names: str) -> None:
        """Removes everything in a folder, immediately."""
        for path in self.folder(*names).iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _mark(self, stage: str, part: str) -> Path:
        return self.root / "done" / stage / f"{part}.json"

    def drop(self, *names: str) -> None:
        """Removes a folder that no stage needs any more, after all parts recorded so far are marked."""
        self._later(lambda: shutil.rmtree(self.root.joinpath(*names), ignore_errors=True))

    def remove(self, path: Path) -> None:
        """Removes a file that no stage needs any more, after all parts recorded so far are marked."""
        self._later(lambda: path.unlink(missing_ok=True))

    def _later(self, task: Callable[[], object]) -> None:
        """Queues a task for the thread, which does tasks in order. After a task that failed it does no others.

        Raises:
            OSError: the error of an earlier task.
        """
        if self._failure is not None:
            raise self._failure

        def do() -> None:
            if self._failure is None:
                try:
                    task()
                except OSError as error:
                    self._failure = error

        self._syncer.submit(do)

    def flush(self) -> None:
        """Waits until all recorded parts are marked.

        Raises:
            OSError: if something can't be written.
        """
        self._syncer.submit(lambda: None).result()
        if self._failure is not None:
            raise self._failure

    def publish(self) -> None:
        """Renames the finished days to the output, and removes the rest."""
        self.flush()
        self.days.rename(self.output)
        sync(self.output.parent)
        self._remove()

    def discard_leftovers(self) -> None:
        """Removes what was left by a run that was killed after it had renamed the days to the output."""
        if self.root.exists() and self._is_ours() and self._take_lock() is None and not self.days.exists():
            self._remove()

    def _remove(self) -> None:
        self._clear()
        self._lock.remove()  # last: it is the sign that the rest of the folder is ours
        with suppress(OSError):  # another run may have begun there
            self.root.rmdir()
