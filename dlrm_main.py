"""Trains, validates and tests a DLRM: the entry point that python, torchrun and torchx start."""

import sys

from dlrm import cli
from dlrm.train.command import train as main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(cli.main(["train", *sys.argv[1:]]))
