// Quantization of fp32 to int16, see integer.h. Compiled for AVX-512 with VNNI only.
#include <immintrin.h>

#include <cmath>

#include "integer_quantize.h"

namespace dlrm::integer {
namespace {

constexpr int kBlock = Operand<Int16>::kBlock;

// 46340 = floor(sqrt(2^31)); rounding adds at most sqrt(kBlock) / 2 to a norm.
constexpr float kMaxNorm = 46330.0f - 0.5f * 16;
constexpr float kMaxEntry = 32767.0f;
constexpr float kMaxFactor = 1e37f;  // its inverse, the scale, is not subnormal

__m512i to_int(__m512 x, __m512 factor) { return _mm512_cvtps_epi32(_mm512_mul_ps(x, factor)); }

// The factor that each lane's entries are multiplied by; 0 if all of them are 0.
__m512 quantizing_factors(__m512 largest, __m512 squares) {
  // Squares of tiny or huge entries leave fp32's range. Then 16 times the largest entry bounds the norm.
  const __mmask16 sound = _mm512_cmp_ps_mask(squares, _mm512_set1_ps(1e-30f), _CMP_GT_OQ) &
                          _mm512_cmp_ps_mask(squares, _mm512_set1_ps(1e37f), _CMP_LT_OQ);
  const __m512 most = _mm512_mask_mov_ps(_mm512_set1_ps(kMaxNorm / 16), sound, _mm512_set1_ps(kMaxNorm));
  const __m512 by_norm = _mm512_div_ps(most, _mm512_mask_sqrt_ps(largest, sound, squares));
  const __m512 by_entry = _mm512_div_ps(_mm512_set1_ps(kMaxEntry), largest);
  const __m512 factors = _mm512_min_ps(_mm512_min_ps(by_norm, by_entry), _mm512_set1_ps(kMaxFactor));
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(largest, _mm512_setzero_ps(), _CMP_GT_OQ), factors);
}

// The inverse of each factor; NaN if an entry is infinite or NaN, so that the product shows it.
__m512 scales_of(__m512 factors, __m512 largest, __m512 squares) {
  const __mmask16 has_any = _mm512_cmp_ps_mask(factors, _mm512_setzero_ps(), _CMP_GT_OQ);
  const __m512 scales = _mm512_maskz_div_ps(has_any, _mm512_set1_ps(1.0f), factors);
  const __mmask16 broken = _mm512_cmp_ps_mask(squares, squares, _CMP_UNORD_Q) |
                           _mm512_cmp_ps_mask(largest, _mm512_set1_ps(INFINITY), _CMP_EQ_OQ);
  return _mm512_mask_mov_ps(scales, broken, _mm512_set1_ps(NAN));
}

// The largest magnitude and the sum of squares of a row. Prefetches the row that is quantized kTogether rows later.
void measure_row(const float* source, int64_t stride, int64_t count, float& largest, float& squares) {
  __m512 top[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()}, sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    for (int u = 0; u < 2; ++u) {
      const __m512 x = _mm512_loadu_ps(source + i + u * kLanes);
      __builtin_prefetch(source + i + u * kLanes + kTogether * stride);
      top[u] = _mm512_max_ps(top[u], _mm512_abs_ps(x));
      sum[u] = _mm512_fmadd_ps(x, x, sum[u]);
    }
  }
  for (; i < count; i += kLanes) {
    const __m512 x = _mm512_maskz_loadu_ps(live_lanes(count - i), source + i);
    top[0] = _mm512_max_ps(top[0], _mm512_abs_ps(x));
    sum[0] = _mm512_fmadd_ps(x, x, sum[0]);
  }
  largest = _mm512_reduce_max_ps(_mm512_max_ps(top[0], top[1]));
  squares = _mm512_reduce_add_ps(_mm512_add_ps(sum[0], sum[1]));
}

void store_int16(__m512i q, int16_t* out) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi32_epi16(q));
}

// Writes a zero after an odd last entry.
void quantize_row(const float* source, int64_t count, __m512 factors, int16_t* out) {
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    for (int u = 0; u < 2; ++u) {
      store_int16(to_int(_mm512_loadu_ps(source + i + u * kLanes), factors), out + i + u * kLanes);
    }
  }
  for (; i < count; i += kLanes) {
    store_int16(to_int(_mm512_maskz_loadu_ps(live_lanes(count - i), source + i), factors), out + i);
  }
}

// Pairs of the row at `at` and the next one, for 16 columns. Rows from number `rows` on count as zeros.
inline __m512i quantize_pairs(const float* at, int64_t stride, int64_t rows, __mmask16 live, __m512 factors) {
  const __m512i even = to_int(_mm512_maskz_loadu_ps(rows > 0 ? live : 0, at), factors);
  const __m512i odd = to_int(_mm512_maskz_loadu_ps(rows > 1 ? live : 0, at + stride), factors);
  return _mm512_mask_blend_epi16(0xAAAAAAAA, even, _mm512_slli_epi32(odd, 16));
}

// The largest magnitude, the sum of squares and the sum of each column, for up to kColumnGroup columns.
void measure_columns(const float* source, int64_t stride, int64_t rows, int64_t columns, __m512* largest,
                     __m512* squares, __m512* sums) {
  const int64_t used = (columns + kLanes - 1) / kLanes;
  for (int64_t v = 0; v < used; ++v) largest[v] = squares[v] = sums[v] = _mm512_setzero_ps();
  for (int64_t r = 0; r < rows; r += 2) {
    for (int64_t v = 0; v < used; ++v) {
      const float* at = source + r * stride + v * kLanes;
      const __mmask16 live = live_lanes(columns - v * kLanes);
      const __m512 x = _mm512_maskz_loadu_ps(live, at), y = _mm512_maskz_loadu_ps(r + 1 < rows ? live : 0, at + stride);
      largest[v] = _mm512_max_ps(largest[v], _mm512_max_ps(_mm512_abs_ps(x), _mm512_abs_ps(y)));
      squares[v] = _mm512_fmadd_ps(x, x, _mm512_fmadd_ps(y, y, squares[v]));
      sums[v] = _mm512_add_ps(sums[v], _mm512_add_ps(x, y));
    }
  }
}

void quantize_panel(const float* source, int64_t stride, int64_t rows, __mmask16 live, __m512 factors, Layout layout,
                    int32_t* panel) {
  for (int64_t r = 0; r < rows; r += 4) {
    const float* at = source + r * stride;
    for (int64_t ahead = 16; ahead < 20; ++ahead) __builtin_prefetch(at + ahead * stride);
    store_dwords(quantize_pairs(at, stride, rows - r, live, factors),
                quantize_pairs(at + 2 * stride, stride, rows - r - 2, live, factors), layout, r / 2, panel);
  }
}

}  // namespace

// Computes the factors of all vectors at once, since divisions are slow.
template <>
void quantize_block<Int16>(const float* source, int64_t stride, int64_t vectors, int64_t count, Layout, int32_t* out,
                           float* scales, float*) {
  alignas(64) float largest[kLanes] = {}, squares[kLanes] = {}, factors[kLanes];
  for (int64_t i = 0; i < vectors; ++i) measure_row(source + i * stride, stride, count, largest[i], squares[i]);
  const __m512 top = _mm512_load_ps(largest), sum = _mm512_load_ps(squares), all = quantizing_factors(top, sum);
  _mm512_store_ps(factors, all);
  _mm512_mask_storeu_ps(scales, live_lanes(vectors), scales_of(all, top, sum));
  for (int64_t i = 0; i < vectors; ++i) {
    quantize_row(source + i * stride, count, _mm512_set1_ps(factors[i]), reinterpret_cast<int16_t*>(out + i * kDwords));
  }
}

template <>
void quantize_columns(const float* source, int64_t part, const Operand<Int16>& out) {
  constexpr int kMost = kColumnGroup / kLanes;
  const int64_t groups = column_parts(out) / out.blocks(), block = part / groups, first = part % groups * kColumnGroup;
  const int64_t columns = std::min<int64_t>(kColumnGroup, out.vectors - first), stride = out.vectors;
  const int64_t rows = out.block_entries(block), at = block * out.padded() + first;
  source += block * out.block_length() * stride + first;
  __m512 largest[kMost], squares[kMost], sums[kMost];
  measure_columns(source, stride, rows, columns, largest, squares, sums);
  for (int64_t v = 0; v * kLanes < columns; ++v) {
    const __m512 factors = quantizing_factors(largest[v], squares[v]);
    _mm512_storeu_ps(out.scales + at + v * kLanes, scales_of(factors, largest[v], squares[v]));
    if (out.layout == Layout::kNarrow) _mm512_storeu_ps(out.sums + at + v * kLanes, sums[v]);
    quantize_panel(source + v * kLanes, stride, rows, live_lanes(columns - v * kLanes), factors, out.layout,
                   out.dwords + (at + v * kLanes) * kDwords);
  }
}

template void quantize_rows(const float*, const Operand<Int16>&);
template void quantize_wide_rows(const float*, int64_t, const Operand<Int16>&);

}  // namespace dlrm::integer
