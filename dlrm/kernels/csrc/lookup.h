// Lookup: the sum of each bag's rows.
#pragma once

#include <algorithm>
#include <cstdint>

#include "rows.h"

namespace dlrm::DLRM_INSTRUCTION_SET {
namespace {

constexpr int64_t kBagsAhead = 12;  // bags whose first row is fetched before their turn
constexpr int64_t kIdsAhead = 8;    // rows fetched before their turn within a bag of several ids

// out = the sum of the rows that `ids` name. Columns are taken 8 registers at a time, over all rows, so that the sums
// never leave the registers.
template <class Out, class Id>
void pool_rows(Out* out, const float* table, const Id* ids, int64_t count, int64_t dim) {
  constexpr int64_t kWide = 8 * kLanes;
  for (int64_t i = 0; i < std::min(count, kIdsAhead); ++i) fetch(table + ids[i] * dim, dim * 4);
  int64_t column = 0;
  for (; column + kWide <= dim; column += kWide) {
    Floats sums[8] = {};
    for (int64_t i = 0; i < count; ++i) {
      if (column == 0 && i + kIdsAhead < count) fetch(table + ids[i + kIdsAhead] * dim, dim * 4);
      const float* row = table + ids[i] * dim + column;
      for (int k = 0; k < 8; ++k) sums[k] += load(row + k * kLanes);
    }
    for (int k = 0; k < 8; ++k) store(out + column + k * kLanes, sums[k]);
  }
  for (; column + kLanes <= dim; column += kLanes) {
    Floats sum = {};
    for (int64_t i = 0; i < count; ++i) sum += load(table + ids[i] * dim + column);
    store(out + column, sum);
  }
  for (; column < dim; ++column) {
    float sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += table[ids[i] * dim + column];
    store_one(out + column, sum);
  }
}

// Walks the bags sample by sample, feature by feature, so that a sample's pooled row is written from left to right. The
// tables are far larger than the caches and nearly every row is a miss: (fetched_b, fetched_f) walks the same bags
// kBagsAhead in front and fetches each one's first row.
template <class Id, class Offset, class Out>
BadId pool_samples(const Tables& tables, const Id* ids, const Offset* offsets, const float* weights, Out* pooled,
                   int64_t stride, int64_t first, int64_t stop) {
  const int64_t batch = tables.batch_size;
  int64_t fetched_b = first, fetched_f = std::min(kBagsAhead, tables.num_features);
  for (int64_t b = first; b < stop; ++b) {
    for (int64_t f = 0; f < tables.num_features; ++f) {
      if (fetched_f == tables.num_features) {
        fetched_f = 0;
        ++fetched_b;
      }
      if (fetched_b < stop && offsets[fetched_f * batch + fetched_b] < offsets[fetched_f * batch + fetched_b + 1]) {
        const int64_t dim = tables.dim_offsets[fetched_f + 1] - tables.dim_offsets[fetched_f];
        const int64_t row = ids[offsets[fetched_f * batch + fetched_b]];
        fetch(weights + tables.weight_offsets[fetched_f] + row * dim, dim * 4);
      }
      ++fetched_f;
      const int64_t dim = tables.dim_offsets[f + 1] - tables.dim_offsets[f];
      const int64_t begin = offsets[f * batch + b], end = offsets[f * batch + b + 1];
      for (int64_t i = begin; i < end; ++i) {
        if (static_cast<uint64_t>(ids[i]) >= static_cast<uint64_t>(tables.rows[f])) return {f, ids[i]};
      }
      const float* table = weights + tables.weight_offsets[f];
      Out* out = pooled + (b - first) * stride + tables.dim_offsets[f];
      if (end - begin == 1) {
        copy_row(out, table + ids[begin] * dim, dim);
      } else {
        pool_rows(out, table, ids + begin, end - begin, dim);
      }
    }
  }
  return {};
}

BadId pool(const Tables& tables, const Ids& ids, const float* weights, void* pooled, Scalar type, int64_t stride,
           int64_t first, int64_t stop) {
  return with_ids(ids, [&](auto* values, auto* offsets) {
    return with_scalar(type, pooled, [&](auto* out) {
      return pool_samples(tables, values, offsets, weights, out, stride, first, stop);
    });
  });
}

}  // namespace
}  // namespace dlrm::DLRM_INSTRUCTION_SET
