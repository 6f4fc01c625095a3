"""Output that can't be shown, or has nowhere to go."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dlrm.system.streams import safe_streams

ROOT = Path(__file__).parents[2]
SAYS = "import sys; from dlrm.cli import main; sys.exit(main({arguments!r}))"
TRAINS = (
    "import sys, dlrm.cli, dlrm.train.command as command\n"
    "from dlrm.system.streams import make_stdout_optional\n"
    "def train(argv):\n"
    "    make_stdout_optional()\n"
    "    for step in range(3): print('step', step, flush=True)\n"
    "    print('saved', file=sys.stderr)\n"
    "command.main = train\n"
    "sys.exit(dlrm.cli.main(['train']))"
)


def run(code: str, redirections: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python code by way of a shell, as users redirect."""
    command = ["sh", "-c", f'exec "$0" -c "$1" {redirections}', sys.executable, code]
    return subprocess.run(
        command,
        capture_output=True,
        encoding="ascii",
        check=False,
        cwd=ROOT,
        env={**os.environ, **environment},
    )


C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize(
    ("environment", "shown"),
    [
        ({"PYTHONIOENCODING": "ascii"}, r"Lauf \xe4 \u6f22 \udce9"),
        ({"PYTHONIOENCODING": "ascii:strict"}, r"Lauf \xe4 \u6f22 \udce9"),
        (C_LOCALE, r"Lauf \xe4 \u6f22 \udce9"),
        ({"PYTHONUNBUFFERED": "1", **C_LOCALE}, r"Lauf \xe4 \u6f22 \udce9"),
    ],
)
def test_a_terminal_of_another_encoding(environment, shown):
    code = (
        "import sys\nfrom dlrm.system.streams import safe_streams\n"
        "with safe_streams():\n"
        "    for stream in (sys.stdout, sys.stderr): print('Lauf \\xe4 \\u6f22 \\udce9', file=stream)"
    )
    done = run(code, **environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{shown}\n", f"{shown}\n")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["verify", "--help"], ["train", "--help"]])
def test_a_full_disk_under_stdout_is_one_line(arguments, unbuffered):
    done = run(SAYS.format(arguments=arguments), ">/dev/full", PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == 2
    assert done.stderr == "dlrm: stdout can't be written (the disk is full). What follows is not shown.\n"


def test_a_training_goes_on_without_stdout():
    done = run(TRAINS, ">/dev/full")
    assert (done.returncode, done.stderr.splitlines()[-1]) == (0, "saved")
    assert done.stderr.startswith("dlrm: stdout can't be written (the disk is full).")


def test_a_training_outlives_its_reader():
    done = run(TRAINS, "| true")
    assert done.stderr.splitlines() == [
        "dlrm: stdout can't be written (Broken pipe). What follows is not shown.",
        "saved",
    ]


def test_another_command_ends_with_its_reader():
    code = "import sys, time, dlrm.cli; time.sleep(0.5); code = dlrm.cli.main(['--help']); print(code, file=sys.stderr)"
    assert run(code, "| true").stderr == "1\n"


@pytest.mark.parametrize("redirections", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_stay_free_of_other_files(redirections, tmp_path):
    path = tmp_path / "file"
    code = (
        "import os, sys\nfrom dlrm.system.streams import safe_streams\n"
        "with safe_streams():\n"
        f"    number = os.open({str(path)!r}, os.O_WRONLY | os.O_CREAT)\n"
        "    print('text'); print('text', file=sys.stderr)\n"
        "    os.write(number, str(number > 2).encode())"
    )
    assert run(code, redirections).returncode == 0
    assert path.read_text() == "True"


def test_a_stream_of_somebody_else_is_left_alone(capsys):
    before = sys.stdout, sys.stderr
    with safe_streams() as stdout:
        assert (sys.stdout, sys.stderr) == before
        print("text")
    assert stdout is None
    assert capsys.readouterr().out == "text\n"
