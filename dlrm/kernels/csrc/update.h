// Update: one step of the optimizer on each row that a batch looked up.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "rows.h"

namespace dlrm::DLRM_INSTRUCTION_SET {
namespace {

constexpr int64_t kStepsAhead = 8;  // rows, gradients and states fetched before their turn

inline Floats root(Floats v) {
  float lanes[kLanes];
  store(lanes, v);
  for (float& lane : lanes) lane = __builtin_sqrtf(lane);
  return load(lanes);
}

// Each of the steps below takes `scale * gradient` as the gradient.
template <class Gradient>
void step_adagrad(float* row, float* squares, const Gradient* gradient, int64_t dim, float scale, float rate,
                  float eps) {
  over(
      dim,
      [&](int64_t i) {
        const Floats g = scale * load(gradient + i), sum = load(squares + i) + g * g;
        store(squares + i, sum);
        store(row + i, load(row + i) - rate * g / (root(sum) + eps));
      },
      [&](int64_t i) {
        const float g = scale * load_one(gradient + i);
        squares[i] += g * g;
        row[i] -= rate * g / (__builtin_sqrtf(squares[i]) + eps);
      });
}

// One sum of squares for the row: the mean of its gradient's squares is added to it.
template <class Gradient>
void step_rowwise_adagrad(float* row, float* square, const Gradient* gradient, int64_t dim, float scale, float rate,
                          float eps) {
  Floats sums = {};
  float sum = 0;
  over(
      dim,
      [&](int64_t i) {
        const Floats g = scale * load(gradient + i);
        sums += g * g;
      },
      [&](int64_t i) {
        const float g = scale * load_one(gradient + i);
        sum += g * g;
      });
  *square += (sum + sum_lanes(sums)) / dim;
  add_scaled(row, gradient, dim, -scale * rate / (__builtin_sqrtf(*square) + eps));
}

template <class Gradient>
void step_row(const Update& update, int64_t feature, int64_t row, float* weights, const Gradient* gradient,
              int64_t dim) {
  float* state = update.state == nullptr ? nullptr : update.state + update.state_offsets[feature];
  const float scale = update.gradient_scale, rate = update.learning_rate;
  switch (update.optimizer) {
    case Optimizer::kSgd:
      return add_scaled(weights + row * dim, gradient, dim, -scale * rate);
    case Optimizer::kAdagrad:
      return step_adagrad(weights + row * dim, state + row * dim, gradient, dim, scale, rate, update.eps);
    case Optimizer::kRowwiseAdagrad:
      return step_rowwise_adagrad(weights + row * dim, state + row, gradient, dim, scale, rate, update.eps);
  }
}

inline void fetch_state(const Update& update, int64_t feature, int64_t row, int64_t dim) {
  if (update.optimizer == Optimizer::kSgd) return;
  const int64_t width = update.optimizer == Optimizer::kAdagrad ? dim : 1;
  fetch(update.state + update.state_offsets[feature] + row * width, width * 4);
}

struct Lookup {
  uint32_t row;
  uint32_t bag;
};

// Puts the lookups of one row side by side. The vectors are kept from call to call, so that they are allocated once.
class Grouping {
 public:
  // A stable grouping in two passes, without a comparison sort. With the rows 7 3 7 9 3 as input:
  //
  //   1. Number the distinct rows in the order of their first lookup, through a hash table with open addressing, and
  //      count the lookups of each:              group_of_ = 0 1 0 2 1,   rows_ = {7: 2, 3: 2, 9: 1}
  //   2. Turn the counts into each row's first place, by a running sum:   rows_ = {7: 0, 3: 2, 9: 4}
  //   3. Put each lookup into the next place of its row:                  7 7 3 3 9
  //
  // Lookups of one row stay in the order of their bags, so their gradients are always summed in the same order, with
  // any number of threads. Rows stay in the order of their first lookup, so gradients are read nearly in the order in
  // which they lie in memory; a sort by row would scatter these reads. If no row comes twice, the lookups stay as they
  // are.
  void group(std::vector<Lookup>& lookups) {
    int bits = 4;
    while (lookups.size() >> (bits - 1) > 0) ++bits;  // at most half of the slots get taken, so that probes stay short
    slots_.assign(size_t{1} << bits, kFree);
    rows_.clear();
    group_of_.resize(lookups.size());
    for (size_t i = 0; i < lookups.size(); ++i) {
      const uint32_t row = lookups[i].row;
      size_t slot = (row * 0x9e3779b97f4a7c15u) >> (64 - bits);  // Fibonacci hashing (Knuth)
      while (slots_[slot] != kFree && rows_[slots_[slot]].row != row) slot = (slot + 1) & (slots_.size() - 1);
      if (slots_[slot] == kFree) {
        slots_[slot] = rows_.size();
        rows_.push_back({row, 0});
      }
      group_of_[i] = slots_[slot];
      ++rows_[slots_[slot]].next;
    }
    if (rows_.size() == lookups.size()) return;  // no row twice
    uint32_t first = 0;
    for (Row& row : rows_) first += std::exchange(row.next, first);
    grouped_.resize(lookups.size());
    for (size_t i = 0; i < lookups.size(); ++i) grouped_[rows_[group_of_[i]].next++] = lookups[i];
    lookups.swap(grouped_);
  }

 private:
  static constexpr uint32_t kFree = ~uint32_t{0};
  struct Row {
    uint32_t row, next;  // `next`: the number of its lookups, from step 2 on the place of its next lookup
  };
  std::vector<uint32_t> slots_;     // the hash table: places in rows_, or kFree
  std::vector<uint32_t> group_of_;  // for each lookup, its row's place in rows_
  std::vector<Row> rows_;           // the distinct rows
  std::vector<Lookup> grouped_;
};

// The lookups of a feature's rows whose number is `part` modulo `parts`, in the order of the bags.
template <class Id, class Offset>
void collect(std::vector<Lookup>& lookups, const Id* ids, const Offset* offsets, int64_t batch, int64_t rows,
             int64_t part, int64_t parts) {
  lookups.clear();
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t i = offsets[b]; i < offsets[b + 1]; ++i) {
      const uint64_t row = static_cast<uint64_t>(ids[i]);
      if (row >= static_cast<uint64_t>(rows)) continue;  // not in the table; `pool` has already refused it
      if (parts == 1 || row % parts == static_cast<uint64_t>(part)) {
        lookups.push_back({static_cast<uint32_t>(row), static_cast<uint32_t>(b)});
      }
    }
  }
}

// One step for each row, with the sum of its gradients. SGD needs no sum and no grouping: steps with one gradient after
// the other give the same result.
template <class Gradient>
void step_rows(const Tables& tables, const Update& update, int64_t feature, std::vector<Lookup>& lookups) {
  thread_local Grouping grouping;
  thread_local std::vector<float> sum;
  const int64_t dim = tables.dim_offsets[feature + 1] - tables.dim_offsets[feature];
  float* weights = update.weights + tables.weight_offsets[feature];
  const bool is_linear = update.optimizer == Optimizer::kSgd;
  if (!is_linear) grouping.group(lookups);
  sum.resize(dim);
  const auto gradient_of = [&](int64_t i) {
    return static_cast<const Gradient*>(update.gradients[lookups[i].bag]) + tables.dim_offsets[feature];
  };
  const int64_t count = lookups.size();
  for (int64_t i = 0, next; i < count; i = next) {
    if (i + kStepsAhead < count) {
      fetch(weights + int64_t{lookups[i + kStepsAhead].row} * dim, dim * 4);
      fetch(gradient_of(i + kStepsAhead), dim * sizeof(Gradient));
      fetch_state(update, feature, lookups[i + kStepsAhead].row, dim);
    }
    const int64_t row = lookups[i].row;
    next = i + 1;
    if (is_linear || next == count || lookups[next].row != row) {
      step_row(update, feature, row, weights, gradient_of(i), dim);
      continue;
    }
    std::fill_n(sum.data(), dim, 0.0f);
    for (next = i; next < count && lookups[next].row == row; ++next) {
      add_scaled(sum.data(), gradient_of(next), dim, 1.0f);
    }
    step_row(update, feature, row, weights, static_cast<const float*>(sum.data()), dim);
  }
}

void update(const Tables& tables, const Ids& ids, const Update& update, int64_t feature, int64_t part, int64_t parts) {
  thread_local std::vector<Lookup> lookups;
  with_ids(ids, [&](auto* values, auto* offsets) {
    const int64_t batch = tables.batch_size;
    collect(lookups, values, offsets + feature * batch, batch, tables.rows[feature], part, parts);
  });
  const auto run = update.gradient_type == Scalar::kFloat ? step_rows<float> : step_rows<BFloat16>;
  run(tables, update, feature, lookups);
}

}  // namespace
}  // namespace dlrm::DLRM_INSTRUCTION_SET
