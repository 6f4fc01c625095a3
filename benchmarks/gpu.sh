#!/usr/bin/env bash
# Everything worth knowing on one GPU in under nine minutes: see benchmarks/gpu.py, which takes the same flags.
#
#   benchmarks/gpu.sh               on a machine with a GPU
#   benchmarks/gpu.sh --dry_run     the same steps with tiny sizes, on a CPU if need be
#
# OUT is where results go (default: benchmarks/results/gpu), COMMIT what to call the source where there is no git,
# PYTHON the interpreter (default: that of .venv, else python3). Needs no network and no pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}
export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$PWD" PYTHONUNBUFFERED=1
exec "$python" -m benchmarks.gpu --out "${OUT:-benchmarks/results/gpu}" --commit "${COMMIT:-}" "$@"
