"""`dlrm train` and `dlrm_main.py`, from the command line: a second signal may end the process."""

from collections.abc import Sequence

from dlrm.signals import StopSignals
from dlrm.train.main import train


def main(argv: Sequence[str]) -> None:
    """As `dlrm.train.main.main`, in a process that has nothing else to do."""
    train(argv, StopSignals())
