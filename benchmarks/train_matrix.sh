#!/usr/bin/env bash
# Training speed against plain TorchRec: every row of the table in docs/results.md, one JSON each.
#
#   benchmarks/train_matrix.sh [FOLDER]                                        (default: benchmarks/results/train)
#   python -m benchmarks.pages                draws the table into docs/results.md
#
# An hour and a half on two cores with nothing else running. A result that is there already is not measured again, so that an
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

# Batch, optimizer, ranks: ids uniform over 100,000 rows a table.
for optimizer in sgd rowwise_adagrad; do
  for ranks in 1 2; do
    for batch in 512 2048 4096 16384 $([[ $optimizer == sgd ]] && echo 65536); do
      rounds=$((batch == 4096 ? 5 : 3))
      measure "uniform100k_${optimizer}_${ranks}x_$batch" --optimizer $optimizer --ranks $ranks --batch_size $batch \
        --rounds $rounds
    done
  done
done

# In other arithmetic than the fastest; fp32 is the reference's own.
for precision in fp32 bf16 int16; do
  for ranks in 1 2; do
    measure "${precision}_uniform100k_sgd_${ranks}x_4096" --precision $precision --ranks $ranks --rounds 3
  done
done

# The same optimizers and ranks: ids by a power law over MLPerf's cardinalities, scaled to 12 GiB.
for optimizer in sgd rowwise_adagrad; do
  for ranks in 1 2; do
    measure "mlperf12_${optimizer}_${ranks}x_4096" --rows mlperf --tables_gib 12 --optimizer $optimizer --ranks $ranks
  done
done

# Id space: 1 to 64 GiB of tables, as far as memory goes.
free_gib=$(awk '/MemAvailable/ {print int($2 / 1048576)}' /proc/meminfo)
for gib in 1 2 4 8 16 32 64; do
  if ((gib * 100 / 85 + 4 > free_gib)); then
    echo "$gib GiB of tables: $free_gib GiB of memory free, left out"
    continue
  fi
  measure "mlperf${gib}_rowwise_adagrad_2x_4096" --rows mlperf --tables_gib $gib --optimizer rowwise_adagrad --ranks 2 --rounds 3
done
