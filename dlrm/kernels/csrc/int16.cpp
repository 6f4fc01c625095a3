// The loops of int16.h. Compiled for AVX-512 with VNNI only.
#include "int16.h"

#include <immintrin.h>

#include <cmath>

namespace dlrm::int16 {
namespace {

// 46340 = floor(sqrt(2^31)); rounding adds at most sqrt(kBlock) / 2 to a norm.
constexpr float kMaxNorm = 46330.0f - 0.5f * 16;
constexpr float kMaxEntry = 32767.0f;
constexpr float kMaxFactor = 1e37f;  // what it is undone by is no subnormal
constexpr int kTogether = 4;         // vectors quantized together; few, since rows 4 KiB apart share L1's sets

// ---- Quantization ----

__mmask16 live_lanes(int64_t rest) { return rest >= kLanes ? 0xffff : rest <= 0 ? 0 : (1u << rest) - 1; }

__m512i to_int(__m512 x, __m512 factor) { return _mm512_cvtps_epi32(_mm512_mul_ps(x, factor)); }

// The factor by lane; 0 where all entries are 0.
__m512 quantizing_factors(__m512 largest, __m512 squares) {
  // Squares of tiny or huge entries leave fp32's range: 16 times the largest entry bounds the norm then.
  const __mmask16 sound = _mm512_cmp_ps_mask(squares, _mm512_set1_ps(1e-30f), _CMP_GT_OQ) &
                          _mm512_cmp_ps_mask(squares, _mm512_set1_ps(1e37f), _CMP_LT_OQ);
  const __m512 most = _mm512_mask_mov_ps(_mm512_set1_ps(kMaxNorm / 16), sound, _mm512_set1_ps(kMaxNorm));
  const __m512 by_norm = _mm512_div_ps(most, _mm512_mask_sqrt_ps(largest, sound, squares));
  const __m512 by_entry = _mm512_div_ps(_mm512_set1_ps(kMaxEntry), largest);
  const __m512 factors = _mm512_min_ps(_mm512_min_ps(by_norm, by_entry), _mm512_set1_ps(kMaxFactor));
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(largest, _mm512_setzero_ps(), _CMP_GT_OQ), factors);
}

// What the factors are undone by; NaN where an entry was infinite or NaN, so that it shows in the product.
__m512 scales_of(__m512 factors, __m512 largest, __m512 squares) {
  const __mmask16 has_any = _mm512_cmp_ps_mask(factors, _mm512_setzero_ps(), _CMP_GT_OQ);
  const __m512 scales = _mm512_maskz_div_ps(has_any, _mm512_set1_ps(1.0f), factors);
  const __mmask16 broken = _mm512_cmp_ps_mask(squares, squares, _CMP_UNORD_Q) |
                           _mm512_cmp_ps_mask(largest, _mm512_set1_ps(INFINITY), _CMP_EQ_OQ);
  return _mm512_mask_mov_ps(scales, broken, _mm512_set1_ps(NAN));
}

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

// Writes zeros behind an odd last entry.
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

// One block of a few vectors: their factors together, division being slow.
void quantize_block(const float* source, int64_t stride, int64_t vectors, int64_t count, int32_t* out, float* scales) {
  alignas(64) float largest[kLanes] = {}, squares[kLanes] = {}, factors[kLanes];
  for (int64_t i = 0; i < vectors; ++i) measure_row(source + i * stride, stride, count, largest[i], squares[i]);
  const __m512 top = _mm512_load_ps(largest), sum = _mm512_load_ps(squares), all = quantizing_factors(top, sum);
  _mm512_store_ps(factors, all);
  _mm512_mask_storeu_ps(scales, live_lanes(vectors), scales_of(all, top, sum));
  for (int64_t i = 0; i < vectors; ++i) {
    quantize_row(source + i * stride, count, _mm512_set1_ps(factors[i]), reinterpret_cast<int16_t*>(out + i * kPairs));
  }
}

// A square of dwords: rows of 16 at `stride` to rows at kLanes.
void transpose_square(const int32_t* rows, int64_t stride, int32_t* out) {
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
  // a[4 g + c]: of rows 4 g .. 4 g + 3, columns c, 4 + c, 8 + c, 12 + c.
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

// The pairs of row `at` and the next, 16 columns; zeros for rows that are not there.
inline __m512i quantize_pairs(const float* at, int64_t stride, int64_t rows, __mmask16 live, __m512 factors) {
  const __m512i even = to_int(_mm512_maskz_loadu_ps(rows > 0 ? live : 0, at), factors);
  const __m512i odd = to_int(_mm512_maskz_loadu_ps(rows > 1 ? live : 0, at + stride), factors);
  return _mm512_mask_blend_epi16(0xAAAAAAAA, even, _mm512_slli_epi32(odd, 16));
}

// Two consecutive pairs of 16 columns.
inline void store_pairs(__m512i first, __m512i second, Layout layout, int64_t pair, int32_t* panel) {
  if (layout == Layout::kNarrow) {
    panel += pair * kRowTile;
    _mm512_storeu_si512(panel, _mm512_inserti64x4(first, _mm512_castsi512_si256(second), 1));
    _mm512_storeu_si512(panel + kRowTile * kPairs, _mm512_shuffle_i64x2(first, second, 0xee));
  } else {
    _mm512_storeu_si512(panel + pair * kLanes, first);
    _mm512_storeu_si512(panel + (pair + 1) * kLanes, second);
  }
}

// Rows of up to kColumnGroup columns: the largest entry and the sum of squares of each column.
void measure_columns(const float* source, int64_t stride, int64_t rows, int64_t columns, __m512* largest,
                     __m512* squares) {
  const int64_t used = (columns + kLanes - 1) / kLanes;
  for (int64_t v = 0; v < used; ++v) largest[v] = squares[v] = _mm512_setzero_ps();
  for (int64_t r = 0; r < rows; r += 2) {
    for (int64_t v = 0; v < used; ++v) {
      const float* at = source + r * stride + v * kLanes;
      const __mmask16 live = live_lanes(columns - v * kLanes);
      const __m512 x = _mm512_maskz_loadu_ps(live, at), y = _mm512_maskz_loadu_ps(r + 1 < rows ? live : 0, at + stride);
      largest[v] = _mm512_max_ps(largest[v], _mm512_max_ps(_mm512_abs_ps(x), _mm512_abs_ps(y)));
      squares[v] = _mm512_fmadd_ps(x, x, _mm512_fmadd_ps(y, y, squares[v]));
    }
  }
}

void quantize_panel(const float* source, int64_t stride, int64_t rows, __mmask16 live, __m512 factors, Layout layout,
                    int32_t* panel) {
  for (int64_t r = 0; r < rows; r += 4) {
    const float* at = source + r * stride;
    for (int64_t ahead = 16; ahead < 20; ++ahead) __builtin_prefetch(at + ahead * stride);
    store_pairs(quantize_pairs(at, stride, rows - r, live, factors),
                quantize_pairs(at + 2 * stride, stride, rows - r - 2, live, factors), layout, r / 2, panel);
  }
}

// ---- Product ----

// What becomes of a tile's sums. Blocks add up in `partial`, compact so that it stays in L2; the last goes out.
struct Finish {
  const float* left_scales;
  const float* right_scales;
  const Output& output;
  int64_t column;
  float* partial;
  bool first, last;
};

// A row of what the first block is added to.
inline __m512 begin(const Finish& finish, __mmask16 live, int64_t column, const float* out) {
  if (finish.output.adds) return _mm512_maskz_loadu_ps(live, out);
  if (finish.output.bias != nullptr) return _mm512_maskz_loadu_ps(live, finish.output.bias + column);
  return _mm512_setzero_ps();
}

template <int kVectors>
inline void finish_row(const __m512i* sums, int row, const Finish& finish, const __mmask16* live, float* out) {
  const __m512 left_scale = _mm512_set1_ps(finish.left_scales[row]);
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    float* partial = finish.partial + (row * kVectors + v) * kLanes;
    const __m512 base = finish.first ? begin(finish, live[v], finish.column + v * kLanes, out + v * kLanes)
                                     : _mm512_load_ps(partial);
    const __m512 scale = _mm512_mul_ps(left_scale, _mm512_loadu_ps(finish.right_scales + v * kLanes));
    __m512 y = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[v]), scale, base);
    if (!finish.last) {
      _mm512_store_ps(partial, y);
      continue;
    }
    // In this order NaN stays NaN.
    if (finish.output.rectified) y = _mm512_max_ps(_mm512_setzero_ps(), y);
    _mm512_mask_storeu_ps(out + v * kLanes, live[v], y);
  }
}

// The sums of one tile over `pairs` pairs. In assembly, since GCC moves sums between registers in the loop.
// Row i, pair p of left lies at dword i * kRowStep + p * kPairStep; right is [vector][pair][16].
// Meanwhile the next tile's left rows are fetched, which follow this tile's.
#define LOAD(vector, to) "vmovdqu64 " #vector "*" PANEL "(%%rcx), %%" to "\n\t"
#define ZERO(to) "vpxord %" #to ", %" #to ", %" #to "\n\t"
#define BROADCAST(row, to) "vpbroadcastd " #row "*%c[row](%%rax), %%" to "\n\t"
#define DOT(by, vector, to) "vpdpwssd %%" by ", %%" vector ", %" #to "\n\t"
#define ROW3(i, to, x, y, z) BROADCAST(i, to) DOT(to, "zmm0", x) DOT(to, "zmm1", y) DOT(to, "zmm2", z)
#define ROW2(i, to, x, y) BROADCAST(i, to) DOT(to, "zmm0", x) DOT(to, "zmm1", y)
#define TEXT(x) TEXT_(x)
#define TEXT_(x) #x
#define PANEL TEXT(DLRM_INT16_BLOCK) "*32"
#define NEXT TEXT(DLRM_INT16_BLOCK) "*16"
#define LOOP_HEAD                                                                                       \
  "mov %[a], %%rax\n\tmov %[b], %%rcx\n\tmov %[n], %%rdx\n\tlea " NEXT "(%%rax), %%rsi\n\t"            \
  ".p2align 6\n1:\n\t"
#define LOOP_TAIL                                                                                       \
  "prefetcht0 (%%rsi)\n\tadd $32, %%rsi\n\tadd %[pair], %%rax\n\tadd $64, %%rcx\n\tdec %%rdx\n\t"       \
  "jnz 1b\n\t"
#define OUT(i, v) "=&v"(sums[i][v])

template <int kVectors, int kRowStep, int kPairStep>
struct Dot;

template <int kRowStep, int kPairStep>
struct Dot<3, kRowStep, kPairStep> {
  static inline void run(const int32_t* left, const int32_t* right, int64_t pairs, __m512i (&sums)[kRowTile][3]) {
    asm volatile(
        ZERO(0) ZERO(1) ZERO(2) ZERO(3) ZERO(4) ZERO(5) ZERO(6) ZERO(7) ZERO(8) ZERO(9) ZERO(10) ZERO(11)
        ZERO(12) ZERO(13) ZERO(14) ZERO(15) ZERO(16) ZERO(17) ZERO(18) ZERO(19) ZERO(20) ZERO(21) ZERO(22) ZERO(23)
        LOOP_HEAD
        LOAD(0, "zmm0") LOAD(1, "zmm1") LOAD(2, "zmm2")
        ROW3(0, "zmm3", 0, 1, 2) ROW3(1, "zmm4", 3, 4, 5) ROW3(2, "zmm5", 6, 7, 8) ROW3(3, "zmm6", 9, 10, 11)
        ROW3(4, "zmm3", 12, 13, 14) ROW3(5, "zmm4", 15, 16, 17) ROW3(6, "zmm5", 18, 19, 20) ROW3(7, "zmm6", 21, 22, 23)
        LOOP_TAIL
        : OUT(0, 0), OUT(0, 1), OUT(0, 2), OUT(1, 0), OUT(1, 1), OUT(1, 2), OUT(2, 0), OUT(2, 1), OUT(2, 2),
          OUT(3, 0), OUT(3, 1), OUT(3, 2), OUT(4, 0), OUT(4, 1), OUT(4, 2), OUT(5, 0), OUT(5, 1), OUT(5, 2),
          OUT(6, 0), OUT(6, 1), OUT(6, 2), OUT(7, 0), OUT(7, 1), OUT(7, 2)
        : [a] "r"(left), [b] "r"(right), [n] "r"(pairs), [row] "i"(kRowStep * 4), [pair] "i"(kPairStep * 4)
        : "rax", "rcx", "rdx", "rsi", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "memory", "cc");
  }
};

template <int kRowStep, int kPairStep>
struct Dot<2, kRowStep, kPairStep> {
  static inline void run(const int32_t* left, const int32_t* right, int64_t pairs, __m512i (&sums)[kRowTile][2]) {
    asm volatile(
        ZERO(0) ZERO(1) ZERO(2) ZERO(3) ZERO(4) ZERO(5) ZERO(6) ZERO(7) ZERO(8) ZERO(9) ZERO(10) ZERO(11)
        ZERO(12) ZERO(13) ZERO(14) ZERO(15)
        LOOP_HEAD
        LOAD(0, "zmm0") LOAD(1, "zmm1")
        ROW2(0, "zmm2", 0, 1) ROW2(1, "zmm3", 2, 3) ROW2(2, "zmm4", 4, 5) ROW2(3, "zmm5", 6, 7)
        ROW2(4, "zmm2", 8, 9) ROW2(5, "zmm3", 10, 11) ROW2(6, "zmm4", 12, 13) ROW2(7, "zmm5", 14, 15)
        LOOP_TAIL
        : OUT(0, 0), OUT(0, 1), OUT(1, 0), OUT(1, 1), OUT(2, 0), OUT(2, 1), OUT(3, 0), OUT(3, 1),
          OUT(4, 0), OUT(4, 1), OUT(5, 0), OUT(5, 1), OUT(6, 0), OUT(6, 1), OUT(7, 0), OUT(7, 1)
        : [a] "r"(left), [b] "r"(right), [n] "r"(pairs), [row] "i"(kRowStep * 4), [pair] "i"(kPairStep * 4)
        : "rax", "rcx", "rdx", "rsi", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "memory", "cc");
  }
};

template <int kRowStep, int kPairStep>
struct Dot<1, kRowStep, kPairStep> {
  static inline void run(const int32_t* left, const int32_t* right, int64_t pairs, __m512i (&sums)[kRowTile][1]) {
    for (int i = 0; i < kRowTile; ++i) sums[i][0] = _mm512_setzero_si512();
    for (int64_t p = 0; p < pairs; ++p) {
      const __m512i columns = _mm512_loadu_si512(right + p * kLanes);
      for (int i = 0; i < kRowTile; ++i) {
        sums[i][0] = _mm512_dpwssd_epi32(sums[i][0], _mm512_set1_epi32(left[i * kRowStep + p * kPairStep]), columns);
      }
    }
  }
};

#undef LOAD
#undef ZERO
#undef BROADCAST
#undef DOT
#undef ROW3
#undef ROW2
#undef OUT
#undef TEXT
#undef TEXT_
#undef PANEL
#undef NEXT
#undef LOOP_HEAD
#undef LOOP_TAIL

// One tile: kRowTile rows, live_rows of them stored, by kVectors registers of columns.
template <int kVectors, int kRowStep, int kPairStep>
void tile(const int32_t* left, const int32_t* right, int64_t pairs, int64_t live_rows, const __mmask16* live,
          const Finish& finish, float* out) {
  const int64_t stride = finish.output.stride;
  __m512i sums[kRowTile][kVectors];
  if (finish.last) {
    for (int i = 0; i < live_rows; ++i) {
      for (int v = 0; v < kVectors; ++v) __builtin_prefetch(out + i * stride + v * kLanes, 1);
    }
  }
  Dot<kVectors, kRowStep, kPairStep>::run(left, right, pairs, sums);
#pragma GCC unroll 8
  for (int i = 0; i < kRowTile; ++i) {
    if (i < live_rows) finish_row<kVectors>(sums[i], i, finish, live, out + i * stride);
  }
}

template <int kVectors, int kRowStep, int kPairStep>
void strip(const Operand& left, const Operand& right, int64_t block, int64_t row, int64_t stop, int64_t column,
           const Output& output, float* partial) {
  const int64_t pairs = (left.block_entries(block) + 1) / 2, blocks = left.blocks();
  const int64_t left_at = block * left.padded(), right_at = block * right.padded() + column;
  __mmask16 live[kVectors];
  for (int v = 0; v < kVectors; ++v) live[v] = live_lanes(right.vectors - column - v * kLanes);
  for (; row < stop; row += kRowTile) {
    const Finish finish{left.scales + left_at + row, right.scales + right_at, output, column, partial, block == 0,
                        block == blocks - 1};
    tile<kVectors, kRowStep, kPairStep>(left.pairs + (left_at + row) * kPairs, right.pairs + right_at * kPairs, pairs,
                                        std::min<int64_t>(kRowTile, stop - row), live, finish,
                                        output.out + row * output.stride + column);
    partial += kRowTile * kVectors * kLanes;
  }
}

template <int kRowStep, int kPairStep>
void multiply_part(const Operand& left, const Operand& right, int64_t row, int64_t stop, int64_t first_column,
                   int64_t column_stop, const Output& output, float* partial) {
  for (int64_t block = 0; block < left.blocks(); ++block) {
    for (int64_t column = first_column, width; column < column_stop; column += width * kLanes) {
      const int64_t rest = (column_stop - column + kLanes - 1) / kLanes;
      width = rest == 4 ? 2 : std::min<int64_t>(3, rest);  // 2 + 2 registers are faster than 3 + 1
      const auto run = width == 3   ? strip<3, kRowStep, kPairStep>
                       : width == 2 ? strip<2, kRowStep, kPairStep>
                                    : strip<1, kRowStep, kPairStep>;
      run(left, right, block, row, stop, column, output, partial + kRowChunk * (column - first_column));
    }
  }
}

}  // namespace

void quantize_rows(const float* source, const Operand& out) {
  const int64_t stride = out.contracted;
  for (int64_t first = 0; first < out.vectors; first += kTogether) {
    const int64_t count = std::min<int64_t>(kTogether, out.vectors - first);
    for (int64_t block = 0; block < out.blocks(); ++block) {
      const int64_t at = block * out.padded() + first;
      quantize_block(source + first * stride + block * out.block_length(), stride, count, out.block_entries(block),
                     out.pairs + at * kPairs, out.scales + at);
    }
  }
}

void quantize_wide_rows(const float* source, int64_t part, const Operand& out) {
  const int64_t stride = out.contracted, first = part * kLanes;
  const int64_t count = std::min<int64_t>(kLanes, out.vectors - first);
  for (int64_t block = 0; block < out.blocks(); ++block) {
    alignas(64) int32_t rows[kLanes * kPairs] = {};
    const int64_t at = block * out.padded() + first;
    for (int64_t i = 0; i < count; i += kTogether) {
      quantize_block(source + (first + i) * stride + block * out.block_length(), stride,
                     std::min<int64_t>(kTogether, count - i), out.block_entries(block), rows + i * kPairs,
                     out.scales + at + i);
    }
    for (int64_t p = 0; p < kPairs; p += kLanes) transpose_square(rows + p, kPairs, out.pairs + at * kPairs + p * kLanes);
  }
}

void quantize_columns(const float* source, int64_t part, const Operand& out) {
  constexpr int kMost = kColumnGroup / kLanes;
  const int64_t groups = column_parts(out) / out.blocks(), block = part / groups, first = part % groups * kColumnGroup;
  const int64_t columns = std::min<int64_t>(kColumnGroup, out.vectors - first), stride = out.vectors;
  const int64_t rows = out.block_entries(block), at = block * out.padded() + first;
  source += block * out.block_length() * stride + first;
  __m512 largest[kMost], squares[kMost];
  measure_columns(source, stride, rows, columns, largest, squares);
  for (int64_t v = 0; v * kLanes < columns; ++v) {
    const __m512 factors = quantizing_factors(largest[v], squares[v]);
    _mm512_storeu_ps(out.scales + at + v * kLanes, scales_of(factors, largest[v], squares[v]));
    quantize_panel(source + v * kLanes, stride, rows, live_lanes(columns - v * kLanes), factors, out.layout,
                   out.pairs + (at + v * kLanes) * kPairs);
  }
}

void multiply(const Operand& left, const Operand& right, int64_t first, int64_t stop, int64_t column,
              int64_t column_stop, const Output& output, float* partial) {
  const auto run = left.layout == Layout::kRows ? multiply_part<kPairs, 1> : multiply_part<1, kRowTile>;
  run(left, right, first, stop, column, column_stop, output, partial);
}

}  // namespace dlrm::int16
