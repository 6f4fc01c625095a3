"""`dlrm evaluate`, from its command line to its result."""

from collections.abc import Sequence

from dlrm.config.flags import value_of
from dlrm.evaluate.config import parse_evaluate
from dlrm.ranks.launcher import adopt_launcher
from dlrm.system.allocator import tune_process
from dlrm.system.console import result_alone
from dlrm.system.ending import end_with_launcher, errors_as_one_line, on_each_rank
from dlrm.system.quiet import quieten_libraries
from dlrm.system.shortage import check_room_for_libraries


def main(argv: Sequence[str]) -> None:
    """`dlrm evaluate`. Call it on every rank that the launcher started.

    Raises:
        SystemExit: with code 2 and one line on stderr for what the user can fix; with code 0 after --help.
    """
    tune_process()
    end_with_launcher()
    with errors_as_one_line(), result_alone(value_of(argv, "json")):
        on_each_rank(adopt_launcher)
        asked = on_each_rank(lambda: parse_evaluate(argv))
        check_room_for_libraries()
        quieten_libraries()
        # Here and not above, so that --help and a mistyped flag answer without loading torch.
        from dlrm.evaluate.run import score_checkpoint
        from dlrm.ranks.runtime import start_runtime

        with start_runtime() as runtime:
            score_checkpoint(asked, argv, runtime)
