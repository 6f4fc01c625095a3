import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from dlrm import __version__
from dlrm.cli import COMMANDS, main
from dlrm.dataset.binary_days import open_splits

USER_ERROR = 2


def test_usage_lists_every_command(capsys):
    assert main(["--help"]) == main(["-h"]) == 0
    shown = capsys.readouterr().out
    assert main([]) == USER_ERROR
    assert capsys.readouterr().out * 2 == shown
    for name, (_, purpose) in COMMANDS.items():
        assert f"  {name:<14}{purpose}\n" in shown


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"dlrm {__version__}\n"


def test_unknown_command(capsys):
    assert main(["trian", "--batch_size", "3"]) == USER_ERROR
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"dlrm: error: trian: no such command. Expected one of {', '.join(COMMANDS)}.\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command, capsys):
    assert main([command, "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: ")
    assert importlib.import_module(COMMANDS[command][0]).__doc__


def test_arguments_come_from_the_process(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dlrm", "--version"])
    assert main() == 0
    assert capsys.readouterr().out == f"dlrm {__version__}\n"


def test_a_users_mistake_is_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["synthesize", str(tmp_path)]) == USER_ERROR
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"dlrm synthesize: error: {tmp_path}: ")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["synthesize", "raw", "--row", "5"], "--row 5: not a flag; did you mean --rows"),
        (["synthesize", "raw", "--rows", "many"], "--rows: "),
        (["synthesize"], "missing: output"),
        (["preprocess", "day_0.tsv", "--dataset_name", "movielens"], "--dataset_name movielens: expected one of"),
        (["preprocess", "day_0.tsv", "day_1.tsv"], "missing: --output"),
        (["verify", "--foo", "days"], "--foo: not a flag. "),
        (["verify", "-v", "days"], "-v: not a flag. "),
        (["verify", "days", "extra"], "extra: not a flag. "),
        (["verify", "--folder", "days"], "--folder: not a flag; FOLDER is given without one, as in `dlrm verify FOL"),
        (["materialize", "days", "--foo"], "--foo: not a flag. "),
        (["materialize", "--in_memory_binary_criteo_path", "days"], "--in_memory_binary_criteo_path: not a flag; DAYS"),
        (["materialize", "--in-memory-binary-criteo-path=d"], "--in-memory-binary-criteo-path: not a flag; DAYS is"),
        (["materialize", "days", "--output_path", "to"], "--output_path: not a flag; did you mean --output. "),
        (["preprocess", "--input_dir", "raw"], "--input_dir: not a flag; RAW is given without one"),
        (["inspect", "--jsno", "run"], "--jsno: not a flag; did you mean --json. "),
        (["inspect", "run", "--verify=yes"], "yes: not a flag, and --verify takes no value. "),
        (["compare", "--foo", "one", "other"], "--foo: not a flag. "),
        (["synthesize", "\N{EN DASH}rows", "5", "raw"], "\N{EN DASH}rows: not a flag; did you mean --rows. "),
        (["plan", "--foo", "3"], "--foo: not a flag. "),
        (["doctor", "--foo"], "--foo: not a flag. "),
        (["bench", "train", "--foo"], "--foo: not a flag. "),
    ],
)
def test_mistyped_flags(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == USER_ERROR
    captured = capsys.readouterr()
    assert captured.err.startswith(f"dlrm {arguments[0]}: error: {words}")
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_mistyped_flag_of_train(capsys):
    assert main(["train", "--batch_sise", "3"]) == USER_ERROR
    captured = capsys.readouterr()
    assert captured.err.startswith("dlrm: error: --batch_sise 3: not a flag")
    assert captured.err.count("\n") == 1


def test_from_nothing_to_binary_days(tmp_path, capsys):
    raw, days = tmp_path / "raw", tmp_path / "days"
    assert main(["synthesize", str(raw), "--rows", "301", "--days", "3", "--seed", "5"]) == 0
    assert main(["preprocess", *[str(raw / f"day_{i}.tsv") for i in range(3)], "--output", str(days)]) == 0
    splits = open_splits(days, "criteo_1t")
    assert {stage: rows.num_rows for stage, rows in splits.items()} == {"train": 200, "val": 51, "test": 50}
    shown = capsys.readouterr().out
    truth = json.loads((raw / "truth.json").read_text())
    assert f"val {truth['val_auroc']:.4f}, test {truth['test_auroc']:.4f}" in shown
    assert "301 rows in" in shown
    assert f"python dlrm_main.py --recipe debug_cpu --in_memory_binary_criteo_path {days}" in shown


@pytest.mark.parametrize(
    "command",
    ["train", "preprocess", "synthesize", "materialize", "verify", "evaluate", "inspect", "export-table", "compare"],
)
def test_help_answers_without_torch(command):
    code = (
        "import sys\nfrom dlrm.cli import main\n"
        f"main(['{command}', '--help'])\n"
        "print({'torch', 'torchrec', 'fbgemm_gpu', 'numba'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert done.stderr == "set()\n"
