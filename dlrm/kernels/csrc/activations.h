// Activations: what lies between two matrix products of an MLP, forward (bias, ReLU) and backward.
#pragma once

#include <algorithm>
#include <cstdint>

#include "rows.h"

namespace dlrm::DLRM_INSTRUCTION_SET {
namespace {

// NaN stays NaN, as in PyTorch: a run that diverges must not look healthy.
Floats larger(Floats a, Floats b) { return a < b ? b : a; }

// Without a ReLU the lower bound is -infinity.
template <class T>
void add_bias_rows(T* values, const float* bias, bool rectified, int64_t columns, int64_t first, int64_t stop) {
  const Floats least = fill(rectified ? 0.0f : -__builtin_inff());
  for (int64_t r = first; r < stop; ++r) {
    T* row = values + r * columns;
    over(
        columns, [&](int64_t i) { store(row + i, larger(load(row + i) + load(bias + i), least)); },
        [&](int64_t i) { store_one(row + i, std::max(load_one(row + i) + bias[i], least[0])); });
  }
}

void add_bias(void* values, Scalar type, const float* bias, bool rectified, int64_t columns, int64_t first,
              int64_t stop) {
  with_scalar(type, values, [&](auto* own) { add_bias_rows(own, bias, rectified, columns, first, stop); });
}

template <class T>
void mask_rows(T* gradient, const T* output, float* sums, int64_t columns, int64_t first, int64_t stop) {
  std::fill_n(sums, columns, 0.0f);
  for (int64_t r = first; r < stop; ++r) {
    T* row = gradient + r * columns;
    if (output == nullptr) {
      add_scaled(sums, row, columns, 1.0f);
      continue;
    }
    const T* own = output + r * columns;
    over(
        columns,
        [&](int64_t i) {
          const Floats kept = load(own + i) <= 0.0f ? Floats{} : load(row + i);
          store(row + i, kept);
          store(sums + i, load(sums + i) + kept);
        },
        [&](int64_t i) {
          const float kept = load_one(own + i) <= 0.0f ? 0.0f : load_one(row + i);
          store_one(row + i, kept);
          sums[i] += kept;
        });
  }
}

void mask(void* gradient, const void* output, Scalar type, float* sums, int64_t columns, int64_t first, int64_t stop) {
  with_scalar(type, gradient, [&](auto* own) {
    mask_rows(own, static_cast<decltype(own)>(const_cast<void*>(output)), sums, columns, first, stop);
  });
}

}  // namespace
}  // namespace dlrm::DLRM_INSTRUCTION_SET
