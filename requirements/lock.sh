#!/usr/bin/env bash
# Writes requirements/cpu.txt and cuda.txt: every package of a run and its tests, for Python 3.10 to 3.12. Needs uv.
set -euo pipefail
cd "$(dirname "$0")"
fbgemm=1.8.0
resolved=$(echo "fbgemm-gpu==$fbgemm" | uv pip compile --universal --python-version 3.10 --quiet --no-annotate --no-header \
    --constraints - runtime.in dev.in)
{
    echo "# All packages, CPU; written by 'make lock'. torch comes first and with its own dependencies (see Makefile),"
    echo "# the rest without, so that nothing replaces torch."
    grep -vE '^(nvidia-|cuda-|triton|fbgemm-gpu)' <<<"$resolved"
    echo "fbgemm-gpu-cpu==$fbgemm"
} >cpu.txt
{
    echo "# All packages, CUDA; written by 'make lock'."
    cat <<<"$resolved"
} >cuda.txt
