#!/usr/bin/env bash
# Training speed against plain TorchRec: every row of the table in docs/results.md, one JSON each.
#
#   benchmarks/train_matrix.sh [FOLDER]                                        (default: benchmarks/results/train)
#   python -m benchmarks.pages                draws the table into docs/results.md
#
# Two hours on two cores with nothing else running. A result that is there already is not measured again, so that an
# interrupted call goes on where it ended. DLRM names the command (default: .venv/bin/dlrm).
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-benchmarks/results/train}
dlrm=${DLRM:-.venv/bin/dlrm}

measure() {
  local file=$folder/$1.json
  shift
  if [[ -e $file ]]; then
    echo "$file: is there already"
  else
    echo "== $file"
    "$dlrm" bench train "$@" --json "$file"
  fi
}

# The fastest arithmetic first, which bench chooses (int8 on a CPU with AVX-512 BF16 and no AMX), then bf16.
free_gib=$(awk '/MemAvailable/ {print int($2 / 1048576)}' /proc/meminfo)
for precision in "" bf16; do
  prefix=${precision:+${precision}_}
  given=(--rounds 3 ${precision:+--precision $precision})

  # Optimizer, ranks, batch: ids uniform over 100,000 rows a table.
  for batch in 4096 512 16384 2048 65536; do
    for optimizer in sgd rowwise_adagrad; do
      for ranks in 1 2; do
        measure "${prefix}uniform100k_${optimizer}_${ranks}x_$batch" --optimizer $optimizer --ranks $ranks \
          --batch_size $batch "${given[@]}"
      done
    done
  done

  # The same optimizers and ranks: ids by a power law over MLPerf's cardinalities, scaled to 12 GiB.
  for optimizer in sgd rowwise_adagrad; do
    for ranks in 1 2; do
      measure "${prefix}mlperf12_${optimizer}_${ranks}x_4096" --rows mlperf --tables_gib 12 --optimizer $optimizer \
        --ranks $ranks "${given[@]}"
    done
  done

  # Id space: 1 to 64 GiB of tables, as far as memory goes.
  for gib in 1 2 4 8 16 32 64; do
    if ((gib * 100 / 85 + 4 > free_gib)); then
      echo "$gib GiB of tables: $free_gib GiB of memory free, left out"
      continue
    fi
    measure "${prefix}mlperf${gib}_rowwise_adagrad_2x_4096" --rows mlperf --tables_gib $gib \
      --optimizer rowwise_adagrad --ranks 2 "${given[@]}"
  done
done

# In other arithmetic; fp32 is the reference's own.
for precision in fp32 int16; do
  for ranks in 1 2; do
    measure "${precision}_uniform100k_sgd_${ranks}x_4096" --precision $precision --ranks $ranks --rounds 3
  done
done
