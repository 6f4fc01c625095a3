"""Trains, validates and tests a DLRM: the entry point that python, torchrun and torchx start."""

import sys

from dlrm.train.main import main

if __name__ == "__main__":
    main(sys.argv[1:])
