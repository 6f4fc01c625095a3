import io
import os
import subprocess
import sys
import time

import pytest

from dlrm.system import console


class Terminal:
    """A stderr that says it is one."""

    def isatty(self):
        return True

    def fileno(self):
        return 2


@pytest.mark.parametrize(("columns", "has_bars"), [(0, False), (80, True)])
def test_a_terminal_without_columns_gets_lines(columns, has_bars, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(os, "get_terminal_size", lambda _: os.terminal_size((columns, 24)))
    assert console._has_bars() is has_bars


@pytest.mark.parametrize("stream", [None, io.StringIO()])
def test_no_terminal(stream, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream)
    assert not console._has_bars()


def test_what_takes_long_gives_signs_of_life(monkeypatch, capsys):
    with console.signs_of_life("Searching"):
        pass
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(console, "_SECONDS_TO_FIRST_SIGN", 0.01)
    with console.signs_of_life("Searching"):
        time.sleep(0.5)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Searching: 0:00:00 so far"
    assert 1 <= len(lines) <= 7  # after 0.01, 0.03, 0.07, 0.15 s ...


def test_bytes_and_plurals():
    assert [console.show_bytes(size) for size in (0, 1023, 2**10, 2**20, 2**30, 5 * 2**39)] == [
        *("0 B", "1023 B", "1.0 KiB", "1.0 MiB", "1.0 GiB", "2,560.0 GiB")
    ]
    assert [console.plural(number, "rank") for number in (1, 2, 1000)] == ["1 rank", "2 ranks", "1,000 ranks"]


ALONE = """
import subprocess
from dlrm.system import console

with console.result_alone("/dev/stdout"):
    print("for people")
    subprocess.run(["echo", "of a child"], check=True)
    console.print_result('{"auroc": 0.5}')
print("afterwards")
"""


def test_a_result_is_alone_on_standard_output():
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=True)
    assert done.stdout == '{"auroc": 0.5}\nafterwards\n'
    assert sorted(done.stderr.splitlines()) == ["for people", "of a child"]


@pytest.mark.parametrize("name", ["-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_a_result_is_alone_if_standard_output_is_no_file(name, capsys):
    with console.result_alone(name):
        print("for people")
        console.print_result("5")
    assert capsys.readouterr() == ("5\n", "for people\n")


def test_a_result_in_a_file_leaves_standard_output_as_it_is(capsys):
    with console.result_alone("file.json"), console.result_alone(None):
        print("for people")
    assert capsys.readouterr().out == "for people\n"
