// What int16_quantize.cpp, int8_quantize.cpp and integer_product.cpp share. For AVX-512 only.
#pragma once

#include <immintrin.h>

#include "integer.h"

namespace dlrm::integer {

// A mask of the first `rest` lanes.
inline __mmask16 live_lanes(int64_t rest) { return rest >= kLanes ? 0xffff : rest <= 0 ? 0 : (1u << rest) - 1; }

// Transposes a square of 16 x 16 dwords. Rows are `stride` apart in `rows`, kLanes apart in `out`.
inline void transpose_square(const int32_t* rows, int64_t stride, int32_t* out) {
  __m512i a[kLanes], b[kLanes];
  for (int i = 0; i < kLanes; ++i) a[i] = _mm512_loadu_si512(rows + i * stride);
  for (int i = 0; i < kLanes; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < kLanes; i += 4) {
    for (int h = 0; h < 2; ++h) {
      a[i + 2 * h] = _mm512_unpacklo_epi64(b[i + h], b[i + h + 2]);
      a[i + 2 * h + 1] = _mm512_unpackhi_epi64(b[i + h], b[i + h + 2]);
    }
  }
  // Now a[4 g + c] holds columns c, 4 + c, 8 + c and 12 + c of rows 4 g to 4 g + 3.
  for (int c = 0; c < 4; ++c) {
    const __m512i low_even = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x88);
    const __m512i low_odd = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xdd);
    const __m512i high_even = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x88);
    const __m512i high_odd = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xdd);
    _mm512_storeu_si512(out + c * kLanes, _mm512_shuffle_i32x4(low_even, high_even, 0x88));
    _mm512_storeu_si512(out + (8 + c) * kLanes, _mm512_shuffle_i32x4(low_even, high_even, 0xdd));
    _mm512_storeu_si512(out + (4 + c) * kLanes, _mm512_shuffle_i32x4(low_odd, high_odd, 0x88));
    _mm512_storeu_si512(out + (12 + c) * kLanes, _mm512_shuffle_i32x4(low_odd, high_odd, 0xdd));
  }
}

// Stores two consecutive dwords of each of 16 columns into a block in the layout kNarrow or kWide.
inline void store_dwords(__m512i first, __m512i second, Layout layout, int64_t dword, int32_t* panel) {
  if (layout == Layout::kNarrow) {
    panel += dword * kRowTile;
    _mm512_storeu_si512(panel, _mm512_inserti64x4(first, _mm512_castsi512_si256(second), 1));
    _mm512_storeu_si512(panel + kRowTile * kDwords, _mm512_shuffle_i64x2(first, second, 0xee));
  } else {
    _mm512_storeu_si512(panel + dword * kLanes, first);
    _mm512_storeu_si512(panel + (dword + 1) * kLanes, second);
  }
}

constexpr int kTogether = 4;  // vectors quantized at once; few, since rows 4 KiB apart share sets of L1

// Quantizes one block of up to kTogether vectors, `count` entries each, to rows of kDwords. Vectors are `stride` apart.
// The last dword is filled as if zeros followed the entries.
template <class Format>
void quantize_block(const typename Format::Source* source, int64_t stride, int64_t vectors, int64_t count,
                    Layout layout, int32_t* out, float* scales, float* offsets);

template <class Format>
void quantize_rows(const typename Format::Source* source, const Operand<Format>& out) {
  const int64_t stride = out.contracted;
  for (int64_t first = 0; first < out.vectors; first += kTogether) {
    const int64_t count = std::min<int64_t>(kTogether, out.vectors - first);
    for (int64_t block = 0; block < out.blocks(); ++block) {
      const int64_t at = block * out.padded() + first;
      quantize_block<Format>(source + first * stride + block * out.block_length(), stride, count,
                             out.block_entries(block), out.layout, out.dwords + at * kDwords, out.scales + at,
                             out.offsets + at);
    }
  }
}

template <class Format>
void quantize_wide_rows(const typename Format::Source* source, int64_t part, const Operand<Format>& out) {
  const int64_t stride = out.contracted, first = part * kLanes;
  const int64_t count = std::min<int64_t>(kLanes, out.vectors - first);
  for (int64_t block = 0; block < out.blocks(); ++block) {
    alignas(64) int32_t rows[kLanes * kDwords] = {};
    const int64_t at = block * out.padded() + first;
    for (int64_t i = 0; i < count; i += kTogether) {
      quantize_block<Format>(source + (first + i) * stride + block * out.block_length(), stride,
                             std::min<int64_t>(kTogether, count - i), out.block_entries(block), out.layout,
                             rows + i * kDwords, out.scales + at + i, out.offsets + at + i);
    }
    for (int64_t d = 0; d < kDwords; d += kLanes) {
      transpose_square(rows + d, kDwords, out.dwords + at * kDwords + d * kLanes);
    }
  }
}

}  // namespace dlrm::integer
