// Quantization of bfloat16 to int8, see integer.h. Compiled for AVX-512 with VNNI only.
//
// The largest and smallest entries are found by comparing bfloat16's bits as integers, without converting them. As
// unsigned integers, entries of one sign are in the order of their magnitudes, and all negative ones are above all
// others: the maximum is the most negative entry, if there is one. As signed integers, negative ones are below 0: the
// maximum is the largest positive entry.
#include <immintrin.h>

#include <cmath>

#include "integer_quantize.h"

namespace dlrm::integer {
namespace {

constexpr int kHalves = 2 * kLanes;     // bfloat16 in a register
constexpr int64_t kRowsOfRange = 8;     // rows whose range is found at once
constexpr float kUnsigned = 254.4f;     // less than 255, since the offset is rounded up
constexpr float kSigned = 127.0f;
constexpr float kMaxFactor = 1e37f;     // its inverse, the scale, is not subnormal
constexpr uint16_t kNotFinite = 0x7f80;  // bits, without the sign, of infinity; NaN is above

__mmask32 live_halves(int64_t rest) { return rest >= kHalves ? ~0u : rest <= 0 ? 0 : (1u << rest) - 1; }

// The largest bits seen so far, as unsigned integers (top) and as signed ones (high, at least 0).
struct Range {
  __m512i top = _mm512_setzero_si512(), high = _mm512_setzero_si512();

  void include(__m512i bits) {
    top = _mm512_max_epu16(top, bits);
    high = _mm512_max_epi16(high, bits);
  }
};

// Sums of 32 columns: of the entries in the lower half of each lane, and of those in the higher half.
struct Sums {
  __m512 low = _mm512_setzero_ps(), high = _mm512_setzero_ps();

  void include(__m512i bits) {
    low = _mm512_add_ps(low, _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)));
    high = _mm512_add_ps(high, _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(0xffff0000))));
  }

  // The sums of the first 16 columns (which = 0) or of the next 16 (1).
  __m512 of(int which) const {
    const __m512i order = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    return _mm512_permutex2var_ps(low, _mm512_add_epi32(order, _mm512_set1_epi32(8 * which)), high);
  }
};

// The largest of 32 unsigned numbers.
uint16_t reduce(__m512i halves) {
  const __m256i a = _mm256_max_epu16(_mm512_castsi512_si256(halves), _mm512_extracti64x4_epi64(halves, 1));
  const __m128i b = _mm_max_epu16(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  return ~_mm_extract_epi16(_mm_minpos_epu16(_mm_xor_si128(b, _mm_set1_epi32(-1))), 0);
}

// How 16 vectors are quantized: an entry becomes entry * factor + offset, and (that - offset) * scale is the entry
// again.
struct Quantization {
  __m512 factor, offset, scale;
};

// `top` and `high` are those of Range, for 16 vectors, in the lower half of each lane.
Quantization quantization_of(__m512i top, __m512i high, bool is_signed) {
  const __mmask16 has_negative = _mm512_cmpge_epu32_mask(top, _mm512_set1_epi32(0x8000));
  const __m512 low = _mm512_maskz_mov_ps(has_negative, _mm512_castsi512_ps(_mm512_slli_epi32(top, 16)));
  const __m512 most = _mm512_castsi512_ps(_mm512_slli_epi32(high, 16));
  // Half of the range for unsigned integers: all of it could be infinite.
  const __m512 half = _mm512_set1_ps(0.5f), range = _mm512_fmsub_ps(most, half, _mm512_mul_ps(low, half));
  const __m512 span = is_signed ? _mm512_max_ps(most, _mm512_sub_ps(_mm512_setzero_ps(), low)) : range;
  const __m512 wanted = _mm512_set1_ps(is_signed ? kSigned : kUnsigned / 2);
  const __mmask16 has_any = _mm512_cmp_ps_mask(span, _mm512_setzero_ps(), _CMP_GT_OQ);
  Quantization q;
  q.factor = _mm512_maskz_min_ps(has_any, _mm512_div_ps(wanted, span), _mm512_set1_ps(kMaxFactor));
  q.scale = _mm512_maskz_div_ps(has_any, _mm512_set1_ps(1.0f), q.factor);
  const __m512i magnitudes = _mm512_and_si512(top, _mm512_set1_epi32(0x7fff));
  const __mmask16 broken = _mm512_cmpge_epu32_mask(_mm512_max_epu32(magnitudes, high), _mm512_set1_epi32(kNotFinite));
  q.scale = _mm512_mask_mov_ps(q.scale, broken, _mm512_set1_ps(NAN));
  const __m512 zero = _mm512_roundscale_ps(_mm512_mul_ps(_mm512_sub_ps(_mm512_setzero_ps(), low), q.factor),
                                           _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
  q.offset = is_signed ? _mm512_setzero_ps() : zero;
  return q;
}

__m512i to_int(__m512i bits, __m512 factor, __m512 offset) {
  return _mm512_cvtps_epi32(_mm512_fmadd_ps(_mm512_castsi512_ps(bits), factor, offset));
}

// Adds the 4 bytes of each lane of `bytes` to that lane of `sum`.
__m512i add_bytes(__m512i sum, __m512i bytes) { return _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), bytes); }

// Returns the sum of what it writes, as signed bytes.
float quantize_row(const BFloat16* source, int64_t count, __m512 factor, __m512 offset, int8_t* out) {
  __m512i sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i += kHalves) {
    const __m512i bits = _mm512_maskz_loadu_epi16(live_halves(count - i), source + i);
    const __m512i even = to_int(_mm512_slli_epi32(bits, 16), factor, offset);
    const __m512i odd = to_int(_mm512_and_si512(bits, _mm512_set1_epi32(0xffff0000)), factor, offset);
    const __m512i low_byte = _mm512_set1_epi32(0xff);
    const __m512i pairs = _mm512_or_si512(_mm512_and_si512(even, low_byte), _mm512_slli_epi32(odd, 8));
    const __m256i bytes = _mm512_cvtepi32_epi16(pairs);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), bytes);
    sum = add_bytes(sum, _mm512_zextsi256_si512(bytes));
  }
  return static_cast<float>(_mm512_reduce_add_epi32(sum));
}

// The first (which = 0) or the next (1) 16 of 32 halves, each widened to 32 bits.
__m512i widen(const __m512i& halves, int which) {
  return _mm512_cvtepu16_epi32(which == 0 ? _mm512_castsi512_si256(halves) : _mm512_extracti64x4_epi64(halves, 1));
}

// Quantizes 4 rows from `at` on, of kPanels times 16 columns: each lane of a panel gets the 4 entries of its column.
// Rows from number `rows` on count as zeros.
template <int kPanels>
[[gnu::always_inline]] inline void quantize_fours(const BFloat16* at, int64_t stride, int64_t rows, __mmask32 live,
                                                  const Quantization* q, bool is_signed, __m512i* fours) {
  __m512i four[kPanels][4];
  for (int i = 0; i < 4; ++i) {
    const __m512i bits = _mm512_maskz_loadu_epi16(i < rows ? live : 0, at + i * stride);
    for (int p = 0; p < kPanels; ++p) {
      four[p][i] = to_int(_mm512_slli_epi32(widen(bits, p), 16), q[p].factor, q[p].offset);
    }
  }
  const __m512i by_column = _mm512_set4_epi32(0x0f0b0703, 0x0e0a0602, 0x0d090501, 0x0c080400);
  for (int p = 0; p < kPanels; ++p) {
    const __m512i a = _mm512_packs_epi32(four[p][0], four[p][1]), b = _mm512_packs_epi32(four[p][2], four[p][3]);
    fours[p] = _mm512_shuffle_epi8(is_signed ? _mm512_packs_epi16(a, b) : _mm512_packus_epi16(a, b), by_column);
  }
}

// Quantizes kPanels panels of 16 columns at once, so that each row's cache line is read once. `sums` are the sums of
// each column's integers, as signed bytes.
template <int kPanels>
void quantize_panels(const BFloat16* source, int64_t stride, int64_t rows, __mmask32 live, const Quantization* q,
                     Layout layout, int32_t* panels, __m512i* sums) {
  constexpr int64_t kAhead = 8;  // rows fetched before their turn; few, since rows 2 KiB apart share two sets of L1
  const bool is_signed = layout == Layout::kWide;
  for (int p = 0; p < kPanels; ++p) sums[p] = _mm512_setzero_si512();
  for (int64_t r = 0; r < rows; r += 8) {
    const BFloat16* at = source + r * stride;
    for (int64_t i = 0; i < 8; ++i) __builtin_prefetch(at + (kAhead + i) * stride);
    __m512i first[kPanels], second[kPanels];
    quantize_fours<kPanels>(at, stride, rows - r, live, q, is_signed, first);
    quantize_fours<kPanels>(at + 4 * stride, stride, rows - r - 4, live, q, is_signed, second);
    for (int p = 0; p < kPanels; ++p) {
      store_dwords(first[p], second[p], layout, r / 4, panels + p * kLanes * kDwords);
      sums[p] = add_bytes(add_bytes(sums[p], first[p]), second[p]);
    }
  }
}

}  // namespace

template <>
void quantize_block<Int8>(const BFloat16* source, int64_t stride, int64_t vectors, int64_t count, Layout layout,
                          int32_t* out, float* scales, float* offsets) {
  const bool is_signed = layout == Layout::kWide;
  alignas(64) uint32_t top[kLanes] = {}, high[kLanes] = {};
  for (int64_t i = 0; i < vectors; ++i) {
    Range range;
    for (int64_t k = 0; k < count; k += kHalves) {
      range.include(_mm512_maskz_loadu_epi16(live_halves(count - k), source + i * stride + k));
      __builtin_prefetch(source + (i + kTogether) * stride + k);
    }
    top[i] = reduce(range.top);
    high[i] = reduce(range.high);
  }
  const Quantization q = quantization_of(_mm512_load_si512(top), _mm512_load_si512(high), is_signed);
  alignas(64) float factors[kLanes], zeros[kLanes];
  _mm512_store_ps(factors, q.factor);
  _mm512_store_ps(zeros, q.offset);
  _mm512_mask_storeu_ps(scales, live_lanes(vectors), q.scale);
  for (int64_t i = 0; i < vectors; ++i) {
    const float sum = quantize_row(source + i * stride, count, _mm512_set1_ps(factors[i]), _mm512_set1_ps(zeros[i]),
                                   reinterpret_cast<int8_t*>(out + i * kDwords));
    offsets[i] = is_signed ? sum : zeros[i];
  }
}

template <>
void quantize_columns(const BFloat16* source, int64_t part, const Operand<Int8>& out) {
  const int64_t groups = column_parts(out) / out.blocks(), block = part / groups, first = part % groups * kColumnGroup;
  const int64_t columns = std::min<int64_t>(kColumnGroup, out.vectors - first), stride = out.vectors;
  const int64_t rows = out.block_entries(block), at = block * out.padded() + first;
  const bool is_signed = out.layout == Layout::kWide;
  source += block * out.block_length() * stride + first;
  Range ranges[kColumnGroup / kHalves];
  Sums sums_of_entries[kColumnGroup / kHalves];
  for (int64_t r = 0; r < rows; r += kRowsOfRange) {
    const int64_t stop = std::min(rows, r + kRowsOfRange);
    for (int64_t v = 0; v * kHalves < columns; ++v) {
      Range range = ranges[v];
      Sums sums = sums_of_entries[v];
      for (int64_t i = r; i < stop; ++i) {
        const BFloat16* here = source + i * stride + v * kHalves;
        __builtin_prefetch(here + kRowsOfRange * stride);
        const __m512i bits = _mm512_maskz_loadu_epi16(live_halves(columns - v * kHalves), here);
        range.include(bits);
        if (!is_signed) sums.include(bits);
      }
      ranges[v] = range;
      sums_of_entries[v] = sums;
    }
  }
  for (int64_t v = 0; v * kHalves < columns; ++v) {
    const int64_t rest = columns - v * kHalves, first_of_v = at + v * kHalves;
    const int panels = rest > kLanes ? 2 : 1;
    Quantization q[2];
    for (int p = 0; p < panels; ++p) {
      q[p] = quantization_of(widen(ranges[v].top, p), widen(ranges[v].high, p), is_signed);
    }
    __m512i sums[2];
    const auto run = panels == 2 ? quantize_panels<2> : quantize_panels<1>;
    run(source + v * kHalves, stride, rows, live_halves(rest), q, out.layout, out.dwords + first_of_v * kDwords, sums);
    for (int p = 0; p < panels; ++p) {
      const int64_t first = first_of_v + p * kLanes;
      _mm512_storeu_ps(out.scales + first, q[p].scale);
      _mm512_storeu_ps(out.offsets + first, is_signed ? _mm512_cvtepi32_ps(sums[p]) : q[p].offset);
      if (!is_signed) _mm512_storeu_ps(out.sums + first, sums_of_entries[v].of(p));
    }
  }
}

template void quantize_rows(const BFloat16*, const Operand<Int8>&);
template void quantize_wide_rows(const BFloat16*, int64_t, const Operand<Int8>&);

}  // namespace dlrm::integer
