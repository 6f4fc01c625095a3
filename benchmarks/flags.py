"""What the scripts' command lines have in common: a mistake is told in one line before any work begins, exit code 2."""

import argparse
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from dlrm.config.checks import check_output_file
from dlrm.config.flags import value_of
from dlrm.errors import ConfigError, DlrmError
from dlrm.system.console import result_alone
from dlrm.system.ending import exit_code_of

T = TypeVar("T")
Number = TypeVar("Number", int, float)


class Parser(argparse.ArgumentParser):
    """Flags of a script, without abbreviations."""

    def __init__(self, **options: Any) -> None:
        """Takes what argparse does; a description stays as it is written."""
        options.setdefault("prog", _program())
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Refuses a command line.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(message.removeprefix("argument "))


def result_file(text: str) -> Path:
    """The value of --json, which can be written.

    Raises:
        ConfigError: if it can't.
    """
    check_output_file("json", text, may_be_stream=True)
    return Path(text)


def between(least: Number, most: Number) -> Callable[[str], Number]:
    """The type of a flag: an int or a float as its bounds are, which are allowed."""
    kind = type(least)

    def parse(text: str) -> Number:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:  # holds for no nan
            name = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"got {text[:40]}, expected {name} from {least:,} to {most:,}")
        return value

    return parse


positive_int = between(1, 2**31 - 1)


def each(parse: Callable[[str], T], text: str) -> list[T]:
    """Values with commas between, each once. `partial(each, int)` is the type of a flag."""
    values = [parse(part) for part in text.split(",")]
    if len(set(values)) < len(values):
        raise argparse.ArgumentTypeError(f"got {text[:80]}, expected each once")
    return values


def some_of(*names: str) -> Callable[[str], list[str]]:
    """The type of a flag: some of these names."""

    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"got {text[:40]!r}, expected some of {','.join(names)}")
        return text

    return partial(each, parse)


def run_script(main: Callable[[], int | None]) -> NoReturn:
    """Ends with the exit code of a script's `main`.

    SIGTERM ends it as SIGINT does, by an exception, so that processes that it started and folders end with it.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _leave)
    raise SystemExit(exit_code_of(_program(), lambda: _call(main)))


def _leave(number: int, _: object) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)  # a second one would break off what ends processes
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


def _call(main: Callable[[], int | None]) -> int | None:
    try:
        with result_alone(value_of(sys.argv, "json")):
            return main()
    except subprocess.CalledProcessError as error:
        raise DlrmError(f"`{shlex.join(map(str, error.cmd))[:200]}` ended with {error.returncode}") from None


def _program() -> str:
    return f"benchmarks.{Path(sys.argv[0]).stem}"
