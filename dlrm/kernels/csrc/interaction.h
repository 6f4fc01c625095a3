// Interaction: the dot product of each pair of a sample's vectors, and its gradient.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "rows.h"
#if defined(__AVX512BF16__)
#include "bf16_interaction.h"
#endif

namespace dlrm::DLRM_INSTRUCTION_SET {
namespace {

constexpr int kTile = 4;  // vectors on each side of a tile of products: its 16 sums stay in registers
constexpr int kRows = 3;  // gradients of vectors that are summed at once, kColumns registers of each
constexpr int kColumns = DLRM_LANES == 16 ? 8 : 4;

int64_t round_up(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

// A sample's vectors in floats, one after the other. Zeros fill each vector up to whole registers, and follow the last
// one up to a whole number of tiles, so that the loops need no remainders.
struct Sample {
  int64_t num_vectors, dim, width;
  std::vector<float> storage;
  float* vectors;  // in `storage`, from the first multiple of a cache line

  explicit Sample(const Interaction& interaction)
      : num_vectors(interaction.num_vectors), dim(interaction.dim), width(round_up(dim, kLanes)) {
    const int64_t size = round_up(num_vectors, kTile * kRows) * width;
    storage.assign(size + kCacheLine / 4, 0.0f);
    const auto address = reinterpret_cast<uintptr_t>(storage.data());
    vectors = storage.data() + (round_up(address, kCacheLine) - address) / 4;
  }
  Sample(const Sample&) = delete;

  void read(const Interaction& interaction, int64_t b) {
    for (int64_t v = 0; v < num_vectors; ++v) {
      const Source& source = interaction.sources[interaction.vectors[v].source];
      with_scalar(source.type, source.data, [&](auto* data) {
        const auto* from = data + b * source.stride + interaction.vectors[v].column;
        float* to = vectors + v * width;
        over(
            dim, [&](int64_t i) { store(to + i, load(from + i)); }, [&](int64_t i) { to[i] = load_one(from + i); });
      });
    }
  }
};

// The dot products of vectors i to i + 3 with vectors j to j + 3.
void multiply_tile(const Sample& sample, int64_t i, int64_t j, float (&products)[kTile * kTile]) {
  Floats sums[kTile][kTile] = {};
  const float *left = sample.vectors + i * sample.width, *right = sample.vectors + j * sample.width;
  for (int64_t d = 0; d < sample.width; d += kLanes) {
    Floats columns[kTile];
    for (int k = 0; k < kTile; ++k) columns[k] = load(right + k * sample.width + d);
    for (int r = 0; r < kTile; ++r) {
      const Floats row = load(left + r * sample.width + d);
      for (int k = 0; k < kTile; ++k) sums[r][k] += row * columns[k];
    }
  }
  const Floats* flat = &sums[0][0];
  for (int k = 0; k < kTile * kTile; k += kLanes) {
    store(products + k, sum_lanes(*reinterpret_cast<const Floats(*)[kLanes]>(flat + k)));
  }
}

// The place of the product of vectors i < j among the pairs: (0, 1), (0, 2), ..., (1, 2), ....
int64_t pair(int64_t i, int64_t j, int64_t num_vectors) { return i * (2 * num_vectors - i - 1) / 2 + j - i - 1; }

template <class Out>
void interact_samples(const Interaction& interaction, Out* output, int64_t first, int64_t stop) {
  const int64_t size = interaction.num_vectors, dim = interaction.dim;
  const int64_t width = dim + size * (size - 1) / 2;
  Sample sample(interaction);
  std::vector<float> row(width);
  for (int64_t b = first; b < stop; ++b) {
    sample.read(interaction, b);
    std::copy_n(sample.vectors, dim, row.data());
    float* pairs = row.data() + dim;
    for (int64_t i = 0; i < size; i += kTile) {
      for (int64_t j = i; j < size; j += kTile) {
        float products[kTile * kTile];
        multiply_tile(sample, i, j, products);
        for (int64_t r = i; r < std::min(i + kTile, size); ++r) {
          for (int64_t c = std::max(j, r + 1); c < std::min(j + kTile, size); ++c) {
            pairs[pair(r, c, size)] = products[(r - i) * kTile + c - j];
          }
        }
      }
    }
    copy_row(output + b * width, row.data(), width);
  }
}

void interact(const Interaction& interaction, void* output, Scalar type, int64_t first, int64_t stop) {
#if defined(__AVX512BF16__)
  if (bf16::fits(interaction, type)) return bf16::interact(interaction, static_cast<BFloat16*>(output), first, stop);
#endif
  with_scalar(type, output, [&](auto* out) { interact_samples(interaction, out, first, stop); });
}

// Spreads the gradients of the pairs to a symmetric matrix with zeros on its diagonal, G.
template <class Gradient>
void spread_pairs(const Gradient* pairs, int64_t size, int64_t stride, float* matrix) {
  for (int64_t i = 0; i < size; ++i) {
    matrix[i * stride + i] = 0;
    for (int64_t j = i + 1; j < size; ++j) matrix[i * stride + j] = matrix[j * stride + i] = load_one(pairs++);
  }
}

// sums[r] = the sum over j of matrix[r][j] * vector j, for kRows rows and N registers of columns from column d on.
template <int N>
void combine(const Sample& sample, const float* matrix, int64_t stride, int64_t d, float* sums) {
  Floats parts[kRows][N] = {};
  for (int64_t j = 0; j < sample.num_vectors; ++j) {
    const float* vector = sample.vectors + j * sample.width + d;
    Floats columns[N];
    for (int k = 0; k < N; ++k) columns[k] = load(vector + k * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const float factor = matrix[r * stride + j];
      for (int k = 0; k < N; ++k) parts[r][k] += factor * columns[k];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int k = 0; k < N; ++k) store(sums + r * sample.width + d + k * kLanes, parts[r][k]);
  }
}

// The products are those of V V^T, which depends on V twice. As G is symmetric, the gradient of V is G V. The output
// also holds the dense vector itself, so the first D columns of its gradient are added to that vector's.
template <class Gradient>
void interact_backward_samples(const Interaction& interaction, const Source* gradients, const Gradient* gradient,
                               int64_t first, int64_t stop) {
  const int64_t size = interaction.num_vectors, dim = interaction.dim;
  const int64_t width = dim + size * (size - 1) / 2, stride = round_up(size, kRows);
  Sample sample(interaction);
  std::vector<float> matrix(stride * stride), sums(kRows * sample.width);
  for (int64_t b = first; b < stop; ++b) {
    const Gradient* own = gradient + b * width;
    sample.read(interaction, b);
    spread_pairs(own + dim, size, stride, matrix.data());
    for (int64_t i = 0; i < size; i += kRows) {
      int64_t d = 0;
      for (; d + kColumns * kLanes <= sample.width; d += kColumns * kLanes) {
        combine<kColumns>(sample, matrix.data() + i * stride, stride, d, sums.data());
      }
      for (; d < sample.width; d += kLanes) combine<1>(sample, matrix.data() + i * stride, stride, d, sums.data());
      if (i == 0) add_scaled(sums.data(), own, dim, 1.0f);
      for (int64_t v = i; v < std::min(i + kRows, size); ++v) {
        const Source& target = gradients[interaction.vectors[v].source];
        with_scalar(target.type, target.data, [&](auto* data) {
          copy_row(data + b * target.stride + interaction.vectors[v].column, sums.data() + (v - i) * sample.width, dim);
        });
      }
    }
  }
}

void interact_backward(const Interaction& interaction, const Source* gradients, const void* gradient, Scalar type,
                       int64_t first, int64_t stop) {
#if defined(__AVX512BF16__)
  if (bf16::fits(interaction, type)) {
    return bf16::interact_backward(interaction, gradients, static_cast<const BFloat16*>(gradient), first, stop);
  }
#endif
  with_scalar(type, gradient,
              [&](auto* own) { interact_backward_samples(interaction, gradients, own, first, stop); });
}

}  // namespace
}  // namespace dlrm::DLRM_INSTRUCTION_SET
