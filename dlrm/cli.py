"""The `dlrm` command. A command's module is loaded only when it is called."""

import importlib
import os
import sys
from collections.abc import Callable, Sequence

from dlrm import __version__
from dlrm.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, DlrmError, explain
from dlrm.shortage import shortage_as_error
from dlrm.signals import Ended, InterruptedRun, ended_by_signals, exit_code
from dlrm.streams import safe_streams

COMMANDS = {
    "synthesize": ("dlrm.preprocess.synthesize", "write raw Criteo text whose best AUROC is known"),
    "preprocess": ("dlrm.preprocess.command", "turn raw Criteo text into binary days"),
    "materialize": ("dlrm.preprocess.materialize", "give binary days several ids per feature, as MLPerf v2 has"),
    "verify": ("dlrm.preprocess.verify", "check binary days against their manifest"),
    "plan": ("dlrm.plan.command", "say what a training would take on a cluster: memory, sharding, step time"),
    "train": ("dlrm.train.command", "train, validate and test; the same as dlrm_main.py"),
    "evaluate": ("dlrm.train.evaluate", "score the held-out sets with a checkpoint's weights"),
    "inspect": ("dlrm.checkpoint.inspect", "say what a checkpoint holds, or which checkpoints there are"),
    "export-table": ("dlrm.checkpoint.export_table", "write an embedding table of a checkpoint as .parquet or .npy"),
    "compare": ("dlrm.compare", "say in what two runs differ, and show their metrics side by side"),
    "bench": ("dlrm.bench.command", "measure speed against plain TorchRec on this machine"),
    "doctor": ("dlrm.doctor", "say whether what is installed fits together and runs"),
}

USAGE = "\n".join(
    [
        "usage: dlrm COMMAND [FLAGS]",
        "",
        "Trains deep learning recommendation models on TorchRec, from click logs to a measured model.",
        "",
        *(f"  {name:<14}{purpose}" for name, (_, purpose) in COMMANDS.items()),
        "",
        "`dlrm COMMAND --help` lists a command's flags.",
    ]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    with safe_streams() as stdout:
        try:
            code = _run(arguments)
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else int(left.code is not None)
    is_lost = stdout is not None and stdout.lost is not None and not stdout.is_optional
    return code or (EXIT_USER_ERROR if is_lost else 0)


def _run(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        return exit_code_of("dlrm", lambda: print(USAGE)) or (0 if arguments else EXIT_USER_ERROR)
    if arguments[0] == "--version":
        return exit_code_of("dlrm", lambda: print(f"dlrm {__version__}"))
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"dlrm: error: {name}: no such command. Expected one of {', '.join(COMMANDS)}.", file=sys.stderr)
        return EXIT_USER_ERROR
    path = COMMANDS[name][0]
    return exit_code_of(f"dlrm {name}", lambda: importlib.import_module(path).main(rest), path)


def exit_code_of(program: str, run: Callable[[], int | None], module: str = "") -> int:
    """Runs a program; what a user can mend is told in one line.

    Args:
        module: whose IF_INTERRUPTED is said after an interruption.
    """

    def consequence() -> str:
        return getattr(sys.modules.get(module), "IF_INTERRUPTED", "")

    try:
        with ended_by_signals(), shortage_as_error():
            code = run() or 0
        sys.stdout.flush()
        return code
    except DlrmError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except InterruptedRun:
        return EXIT_INTERRUPTED
    except KeyboardInterrupt:
        print(f"{program}: interrupted. {consequence()}".rstrip(), file=sys.stderr)
        return EXIT_INTERRUPTED
    except Ended as ended:
        print(f"{program}: {ended.number.name}: ended. {consequence()}".rstrip(), file=sys.stderr)
        return exit_code(ended.number)
    except BrokenPipeError:  # the reader of our output has gone, as in `dlrm ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, UnicodeEncodeError) as error:
        print(f"{program}: error: {explain(error).rstrip('.')}.", file=sys.stderr)
        return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
