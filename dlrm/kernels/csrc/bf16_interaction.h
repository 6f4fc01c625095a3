// The interaction of bfloat16 vectors through vdpbf16ps, which adds two products in each lane: half the loads and half
// the multiplications of the loops on floats in interaction.h, which includes this. Sums are in fp32 here, too.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "vectors.h"

namespace dlrm::DLRM_INSTRUCTION_SET::bf16 {

constexpr int kHalves = 2 * kLanes;  // entries in a register
constexpr int kTile = 4;             // vectors on each side of a tile of products: its 16 sums stay in registers
constexpr int kRows = 3;             // gradients of vectors that are summed at once,
constexpr int kColumns = 8;          // kColumns registers of each

// Whether all vectors and `output` are bfloat16, and a vector fills whole registers.
inline bool fits(const Interaction& interaction, Scalar output) {
  return output == Scalar::kBFloat16 && interaction.dim % kHalves == 0 &&
         std::all_of(interaction.vectors, interaction.vectors + interaction.num_vectors, [&](const Vector& vector) {
           return interaction.sources[vector.source].type == Scalar::kBFloat16;
         });
}

inline __m512bh load_halves(const BFloat16* from) { return (__m512bh)_mm512_loadu_si512(from); }

// Where a sample's vectors lie. Vectors of zeros follow the last one, up to a whole number of tiles and of pairs.
class Sample {
 public:
  explicit Sample(const Interaction& interaction)
      : interaction_(interaction),
        zeros_(interaction.dim),
        at_((interaction.num_vectors + kTile - 1) / kTile * kTile, zeros_.data()) {}
  Sample(const Sample&) = delete;

  void find(int64_t b) {
    for (int64_t v = 0; v < interaction_.num_vectors; ++v) {
      const Source& source = interaction_.sources[interaction_.vectors[v].source];
      at_[v] = static_cast<const BFloat16*>(source.data) + b * source.stride + interaction_.vectors[v].column;
    }
  }
  const BFloat16* operator[](int64_t v) const { return at_[v]; }
  int64_t padded() const { return at_.size(); }

 private:
  const Interaction& interaction_;
  std::vector<BFloat16> zeros_;
  std::vector<const BFloat16*> at_;
};

// The dot products of vectors i to i + 3 with vectors j to j + 3, to rows that are `stride` apart.
inline void multiply_tile(const Sample& sample, int64_t dim, int64_t i, int64_t j, float* products, int64_t stride) {
  Floats sums[kTile][kTile] = {};
  for (int64_t d = 0; d < dim; d += kHalves) {
    __m512bh columns[kTile];
    for (int k = 0; k < kTile; ++k) columns[k] = load_halves(sample[j + k] + d);
    for (int r = 0; r < kTile; ++r) {
      const __m512bh row = load_halves(sample[i + r] + d);
      for (int k = 0; k < kTile; ++k) sums[r][k] = (Floats)_mm512_dpbf16_ps((__m512)sums[r][k], row, columns[k]);
    }
  }
  const Floats flat = sum_lanes(*reinterpret_cast<const Floats(*)[kLanes]>(&sums[0][0]));
  const float* by_row = reinterpret_cast<const float*>(&flat);
  for (int r = 0; r < kTile; ++r) std::memcpy(products + r * stride, by_row + r * kTile, 16);
}

inline void interact(const Interaction& interaction, BFloat16* output, int64_t first, int64_t stop) {
  const int64_t size = interaction.num_vectors, dim = interaction.dim, width = dim + size * (size - 1) / 2;
  Sample sample(interaction);
  const int64_t stride = sample.padded() + kLanes;  // a row is read by whole registers, which may go past its end
  std::vector<float> products(sample.padded() * stride + kLanes);
  std::vector<BFloat16> row(width + kLanes);
  for (int64_t b = first; b < stop; ++b) {
    sample.find(b);
    for (int64_t i = 0; i < size; i += kTile) {
      for (int64_t j = i; j < size; j += kTile) {
        multiply_tile(sample, dim, i, j, products.data() + i * stride + j, stride);
      }
    }
    std::memcpy(row.data(), sample[0], dim * sizeof(BFloat16));
    BFloat16* pairs = row.data() + dim;
    for (int64_t i = 0; i + 1 < size; ++i) {
      // The last register of a row of pairs holds too many; the next row's pairs overwrite those.
      const float* own = products.data() + i * stride + i + 1;
      for (int64_t j = i + 1; j < size; j += kLanes) store(pairs + j - i - 1, load(own + j - i - 1));
      pairs += size - i - 1;
    }
    std::memcpy(output + b * width, row.data(), width * sizeof(BFloat16));
  }
}

// For 16 columns, the entries of two vectors beside each other: the pairs that vdpbf16ps multiplies.
inline __m512i interleave(const BFloat16* even, const BFloat16* odd) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(even)));
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd)));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// All lanes hold the pair at `two`.
inline __m512bh fill_with_pair(const BFloat16* two) {
  int32_t word;
  std::memcpy(&word, two, sizeof word);
  return (__m512bh)_mm512_set1_epi32(word);
}

// sums[r] = the sum over j of factors[r][j] * vector j, for kRows rows and N registers of columns. `panel` holds the
// vectors by pairs, `factors` a pair of factors for each.
template <int N>
void combine(const int32_t* panel, int64_t dim, const BFloat16* factors, int64_t pairs, float* sums) {
  Floats parts[kRows][N] = {};
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const int32_t* vectors = panel + pair * dim;
    __m512bh own[kRows];
    for (int r = 0; r < kRows; ++r) own[r] = fill_with_pair(factors + 2 * (r * pairs + pair));
    for (int k = 0; k < N; ++k) {
      const __m512bh columns = (__m512bh)_mm512_loadu_si512(vectors + k * kLanes);
      for (int r = 0; r < kRows; ++r) parts[r][k] = (Floats)_mm512_dpbf16_ps((__m512)parts[r][k], own[r], columns);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int k = 0; k < N; ++k) store(sums + r * dim + k * kLanes, parts[r][k]);
  }
}

inline void interact_backward(const Interaction& interaction, const Source* gradients, const BFloat16* gradient,
                              int64_t first, int64_t stop) {
  const int64_t size = interaction.num_vectors, dim = interaction.dim, width = dim + size * (size - 1) / 2;
  Sample sample(interaction);
  const int64_t pairs = (size + 1) / 2, stride = 2 * pairs, rows = (size + kRows - 1) / kRows * kRows;
  std::vector<int32_t> panel(pairs * dim);       // [pair of vectors][column], entries of both in one word
  std::vector<BFloat16> factors(rows * stride);  // gradients of the products: symmetric, zeros on the diagonal
  std::vector<float> sums(kRows * dim);
  for (int64_t b = first; b < stop; ++b) {
    sample.find(b);
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const BFloat16 *even = sample[2 * pair], *odd = sample[2 * pair + 1];
      for (int64_t d = 0; d < dim; d += kLanes) {
        _mm512_storeu_si512(&panel[pair * dim + d], interleave(even + d, odd + d));
      }
    }
    const BFloat16* own = gradient + b * width;
    const BFloat16* next = own + dim;
    for (int64_t i = 0; i < size; ++i) {
      for (int64_t j = i + 1; j < size; ++j) factors[i * stride + j] = factors[j * stride + i] = *next++;
    }
    for (int64_t i = 0; i < size; i += kRows) {
      const BFloat16* rows_of_factors = factors.data() + i * stride;
      int64_t d = 0;
      for (; d + kColumns * kLanes <= dim; d += kColumns * kLanes) {
        combine<kColumns>(panel.data() + d, dim, rows_of_factors, pairs, sums.data() + d);
      }
      for (; d < dim; d += kLanes) combine<1>(panel.data() + d, dim, rows_of_factors, pairs, sums.data() + d);
      for (int64_t v = i; v < std::min(i + kRows, size); ++v) {
        const Source& target = gradients[interaction.vectors[v].source];
        BFloat16* to = static_cast<BFloat16*>(target.data) + b * target.stride + interaction.vectors[v].column;
        for (d = 0; d < dim; d += kLanes) {
          const Floats sum = load(sums.data() + (v - i) * dim + d);
          store(to + d, v == 0 ? sum + load(own + d) : sum);  // the dense vector stands in the output, too
        }
      }
    }
  }
}

}  // namespace dlrm::DLRM_INSTRUCTION_SET::bf16
