"""The `dlrm` command. A command's module is loaded only when it is called."""

import importlib
import sys
from collections.abc import Sequence

from dlrm import __version__
from dlrm.errors import EXIT_USER_ERROR
from dlrm.system.ending import exit_code_of
from dlrm.system.streams import safe_streams

COMMANDS = {
    "synthesize": ("dlrm.synthesize.command", "write raw Criteo text whose best AUROC is known"),
    "preprocess": ("dlrm.preprocess.command", "turn raw Criteo text into binary days"),
    "materialize": ("dlrm.materialize.command", "give binary days several ids per feature, as MLPerf v2 has"),
    "verify": ("dlrm.dataset.command", "check binary days against their manifest"),
    "plan": ("dlrm.plan.command", "say what a training would take on a cluster: memory, sharding, step time"),
    "train": ("dlrm.train.command", "train, validate and test; the same as dlrm_main.py"),
    "evaluate": ("dlrm.evaluate.command", "score the held-out sets with a checkpoint's weights"),
    "inspect": ("dlrm.inspect.command", "say what a checkpoint holds, or which checkpoints there are"),
    "export-table": ("dlrm.export_table.command", "write an embedding table of a checkpoint as .parquet or .npy"),
    "compare": ("dlrm.compare.command", "say in what two runs differ, and show their metrics side by side"),
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


if __name__ == "__main__":
    sys.exit(main())
