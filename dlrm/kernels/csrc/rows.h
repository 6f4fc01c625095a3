// What the loops of several subjects share: fetching rows ahead, choosing the loop for a type, copying and adding rows.
//
// Only kernels.cpp includes this header and those that are built on it: lookup.h, update.h, interaction.h,
// activations.h and random.h. Their functions are in an anonymous namespace, so that the compiler inlines those with
// one caller.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "vectors.h"

namespace dlrm::DLRM_INSTRUCTION_SET {
namespace {

constexpr int64_t kCacheLine = 64;

// Asks for a row's cache lines before they are read.
inline void fetch(const void* row, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += kCacheLine) __builtin_prefetch(static_cast<const char*>(row) + at, 0, 2);
}

// Calls body(ids, offsets) with pointers of their own types.
template <class Body>
auto with_ids(const Ids& ids, Body body) {
  const auto offsets = [&](auto* values) {
    return ids.offset_type == Integer::kInt32 ? body(values, static_cast<const int32_t*>(ids.offsets))
                                              : body(values, static_cast<const int64_t*>(ids.offsets));
  };
  return ids.value_type == Integer::kInt32 ? offsets(static_cast<const int32_t*>(ids.values))
                                           : offsets(static_cast<const int64_t*>(ids.values));
}

// Calls body(data) with a pointer of the data's own type.
template <class Body>
auto with_scalar(Scalar type, const void* data, Body body) {
  return type == Scalar::kFloat ? body(static_cast<const float*>(data)) : body(static_cast<const BFloat16*>(data));
}

template <class Body>
auto with_scalar(Scalar type, void* data, Body body) {
  return type == Scalar::kFloat ? body(static_cast<float*>(data)) : body(static_cast<BFloat16*>(data));
}

// out = row, rounded to the type of `out`.
template <class Out>
void copy_row(Out* out, const float* row, int64_t dim) {
  over(
      dim, [&](int64_t i) { store(out + i, load(row + i)); }, [&](int64_t i) { store_one(out + i, row[i]); });
}

// to += factor * from. A step of SGD is one with factor -rate, a sum of gradients one with factor 1.
template <class From>
void add_scaled(float* to, const From* from, int64_t dim, float factor) {
  over(
      dim, [&](int64_t i) { store(to + i, load(to + i) + factor * load(from + i)); },
      [&](int64_t i) { to[i] += factor * load_one(from + i); });
}

}  // namespace
}  // namespace dlrm::DLRM_INSTRUCTION_SET
