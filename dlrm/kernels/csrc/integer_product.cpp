// The products that integer.h declares. Compiled for AVX-512 with VNNI only, twice: with BF16 and without.
#include <immintrin.h>

#include <type_traits>

#include "integer_quantize.h"

namespace dlrm::integer {
namespace {

// Where a tile's sums go. The blocks are summed in `partial`, which is compact, so that it stays in L2. The last block
// goes to the output in one of three ways.
enum class End { kPartial, kPlain, kRectified, kMasked };

// What a tile's sums are scaled by, and what they are added to.
struct Finish {
  const float *left_scales, *left_offsets, *right_scales, *right_offsets;
  const float* base;  // added to each row: the bias, the earlier blocks' sum, or the output
  int64_t base_stride;
  float* partial;
};

inline __m512 load(const float* from, __mmask16 live) { return _mm512_maskz_loadu_ps(live, from); }
inline __m512 load(const BFloat16* from, __mmask16 live) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(live, from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}

inline void store(float* to, __mmask16 live, __m512 y) { _mm512_mask_storeu_ps(to, live, y); }
inline void store(BFloat16* to, __mmask16 live, __m512 y) {
#if defined(__AVX512BF16__)
  _mm256_mask_storeu_epi16(to, live, (__m256i)_mm512_cvtneps_pbh(y));  // subnormals become 0
#else
  const __m512i bits = _mm512_castps_si512(y);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);  // ties to even
  const __mmask16 is_nan = _mm512_cmp_ps_mask(y, y, _CMP_UNORD_Q);
  const __m512i sound = _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), is_nan, _mm512_set1_epi32(0x7fc0));
  _mm256_mask_storeu_epi16(to, live, _mm512_cvtepi32_epi16(sound));
#endif
}

// Finishes one row of a tile. It runs beside the next tile's products, in the same out-of-order window: each
// instruction more delays these, so there are few, and no branch within a row.
template <bool kHasZeros, End kEnd, int kVectors, class Value>
inline void finish_row(const __m512i* sums, int row, const Finish& finish, const __mmask16* live, Value* out) {
  const __m512 left_scale = _mm512_set1_ps(finish.left_scales[row]), zero = _mm512_set1_ps(finish.left_offsets[row]);
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    // Rounded towards zero, a product that overflows is the largest float. With infinity a sum of 0 would become NaN.
    const __m512 scale = _mm512_mul_round_ps(left_scale, _mm512_loadu_ps(finish.right_scales + v * kLanes),
                                             _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
    __m512 sum = _mm512_cvtepi32_ps(sums[v]);
    if constexpr (kHasZeros) sum = _mm512_fnmadd_ps(zero, _mm512_loadu_ps(finish.right_offsets + v * kLanes), sum);
    const __m512 base = load(finish.base + row * finish.base_stride + v * kLanes, live[v]);
    __m512 y = _mm512_fmadd_ps(sum, scale, base);
    // With the operands in this order NaN stays NaN; below, an output that is NaN lets gradients pass.
    if constexpr (kEnd == End::kRectified) y = _mm512_max_ps(_mm512_setzero_ps(), y);
    if constexpr (kEnd == End::kMasked) {
      const __m512 output = load(out + v * kLanes, live[v]);
      y = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(output, _mm512_setzero_ps(), _CMP_NLE_UQ), y);
    }
    if constexpr (kEnd == End::kPartial) {
      _mm512_store_ps(finish.partial + (row * kVectors + v) * kLanes, y);
    } else {
      store(out + v * kLanes, live[v], y);
    }
  }
}

// The sums of one tile over `dwords` dwords: 8 rows by 1 to 3 registers of columns. In assembly, because GCC moves sums
// between registers within the loop. Each turn of it loads one dword of the columns, broadcasts one dword of each row
// in turn, and multiplies: 8 rows x 3 registers of sums + 3 of columns + 4 of broadcasts = 31 of the 32 registers.
//
// Row i, dword d of left lies at i * kRowStep + d * kDwordStep; right is [vector][dword][16]. Meanwhile the left rows
// of the next tile, which follow this tile's, are prefetched.
#define LOAD(vector, to) "vmovdqu64 " #vector "*" PANEL "(%%rcx), %%" to "\n\t"
#define ZERO(to) "vpxord %" #to ", %" #to ", %" #to "\n\t"
#define BROADCAST(row, to) "vpbroadcastd " #row "*%c[row](%%rax), %%" to "\n\t"
#define WSSD(left, right, to) "vpdpwssd %%" left ", %%" right ", %" #to "\n\t"
#define BUSD(left, right, to) "vpdpbusd %%" right ", %%" left ", %" #to "\n\t"  // the last but one is unsigned
#define ROW3(DOT, i, to, x, y, z) BROADCAST(i, to) DOT(to, "zmm0", x) DOT(to, "zmm1", y) DOT(to, "zmm2", z)
#define ROW2(DOT, i, to, x, y) BROADCAST(i, to) DOT(to, "zmm0", x) DOT(to, "zmm1", y)
#define TEXT(x) TEXT_(x)
#define TEXT_(x) #x
#define PANEL TEXT(DLRM_BLOCK_DWORDS) "*64"
#define NEXT TEXT(DLRM_BLOCK_DWORDS) "*32"
#define LOOP_HEAD                                                                                       \
  "mov %[a], %%rax\n\tmov %[b], %%rcx\n\tmov %[n], %%rdx\n\tlea " NEXT "(%%rax), %%rsi\n\t"            \
  ".p2align 6\n1:\n\t"
#define LOOP_TAIL                                                                                       \
  "prefetcht0 (%%rsi)\n\tadd $32, %%rsi\n\tadd %[step], %%rax\n\tadd $64, %%rcx\n\tdec %%rdx\n\t"       \
  "jnz 1b\n\t"
#define OUT(i, v) "=&v"(sums[i][v])

#define TILE3(DOT)                                                                                              \
  asm volatile(                                                                                                 \
      ZERO(0) ZERO(1) ZERO(2) ZERO(3) ZERO(4) ZERO(5) ZERO(6) ZERO(7) ZERO(8) ZERO(9) ZERO(10) ZERO(11)         \
      ZERO(12) ZERO(13) ZERO(14) ZERO(15) ZERO(16) ZERO(17) ZERO(18) ZERO(19) ZERO(20) ZERO(21) ZERO(22) ZERO(23) \
      LOOP_HEAD                                                                                                 \
      LOAD(0, "zmm0") LOAD(1, "zmm1") LOAD(2, "zmm2")                                                           \
      ROW3(DOT, 0, "zmm3", 0, 1, 2) ROW3(DOT, 1, "zmm4", 3, 4, 5)                                               \
      ROW3(DOT, 2, "zmm5", 6, 7, 8) ROW3(DOT, 3, "zmm6", 9, 10, 11)                                             \
      ROW3(DOT, 4, "zmm3", 12, 13, 14) ROW3(DOT, 5, "zmm4", 15, 16, 17)                                         \
      ROW3(DOT, 6, "zmm5", 18, 19, 20) ROW3(DOT, 7, "zmm6", 21, 22, 23)                                         \
      LOOP_TAIL                                                                                                 \
      : OUT(0, 0), OUT(0, 1), OUT(0, 2), OUT(1, 0), OUT(1, 1), OUT(1, 2), OUT(2, 0), OUT(2, 1), OUT(2, 2),      \
        OUT(3, 0), OUT(3, 1), OUT(3, 2), OUT(4, 0), OUT(4, 1), OUT(4, 2), OUT(5, 0), OUT(5, 1), OUT(5, 2),      \
        OUT(6, 0), OUT(6, 1), OUT(6, 2), OUT(7, 0), OUT(7, 1), OUT(7, 2)                                        \
      : [a] "r"(left), [b] "r"(right), [n] "r"(dwords), [row] "i"(kRowStep * 4), [step] "i"(kDwordStep * 4)     \
      : "rax", "rcx", "rdx", "rsi", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "memory", "cc")

#define TILE2(DOT)                                                                                              \
  asm volatile(                                                                                                 \
      ZERO(0) ZERO(1) ZERO(2) ZERO(3) ZERO(4) ZERO(5) ZERO(6) ZERO(7) ZERO(8) ZERO(9) ZERO(10) ZERO(11)         \
      ZERO(12) ZERO(13) ZERO(14) ZERO(15)                                                                       \
      LOOP_HEAD                                                                                                 \
      LOAD(0, "zmm0") LOAD(1, "zmm1")                                                                           \
      ROW2(DOT, 0, "zmm2", 0, 1) ROW2(DOT, 1, "zmm3", 2, 3) ROW2(DOT, 2, "zmm4", 4, 5)                          \
      ROW2(DOT, 3, "zmm5", 6, 7) ROW2(DOT, 4, "zmm2", 8, 9) ROW2(DOT, 5, "zmm3", 10, 11)                        \
      ROW2(DOT, 6, "zmm4", 12, 13) ROW2(DOT, 7, "zmm5", 14, 15)                                                 \
      LOOP_TAIL                                                                                                 \
      : OUT(0, 0), OUT(0, 1), OUT(1, 0), OUT(1, 1), OUT(2, 0), OUT(2, 1), OUT(3, 0), OUT(3, 1), OUT(4, 0),      \
        OUT(4, 1), OUT(5, 0), OUT(5, 1), OUT(6, 0), OUT(6, 1), OUT(7, 0), OUT(7, 1)                             \
      : [a] "r"(left), [b] "r"(right), [n] "r"(dwords), [row] "i"(kRowStep * 4), [step] "i"(kDwordStep * 4)     \
      : "rax", "rcx", "rdx", "rsi", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "memory", "cc")

template <class Format>
inline __m512i dot(__m512i sums, __m512i left, __m512i right) {
  if constexpr (std::is_same_v<Format, Int8>) return _mm512_dpbusd_epi32(sums, left, right);
  return _mm512_dpwssd_epi32(sums, left, right);
}

template <class Format, int kVectors, int kRowStep, int kDwordStep>
inline void add_products(const int32_t* left, const int32_t* right, int64_t dwords,
                         __m512i (&sums)[kRowTile][kVectors]) {
  constexpr bool is_int8 = std::is_same_v<Format, Int8>;
  if constexpr (kVectors == 3 && is_int8) {
    TILE3(BUSD);
  } else if constexpr (kVectors == 3) {
    TILE3(WSSD);
  } else if constexpr (kVectors == 2 && is_int8) {
    TILE2(BUSD);
  } else if constexpr (kVectors == 2) {
    TILE2(WSSD);
  } else {
    for (int i = 0; i < kRowTile; ++i) sums[i][0] = _mm512_setzero_si512();
    for (int64_t d = 0; d < dwords; ++d) {
      const __m512i columns = _mm512_loadu_si512(right + d * kLanes);
      for (int i = 0; i < kRowTile; ++i) {
        sums[i][0] = dot<Format>(sums[i][0], _mm512_set1_epi32(left[i * kRowStep + d * kDwordStep]), columns);
      }
    }
  }
}

#undef LOAD
#undef ZERO
#undef BROADCAST
#undef WSSD
#undef BUSD
#undef TILE3
#undef TILE2
#undef ROW3
#undef ROW2
#undef OUT
#undef TEXT
#undef TEXT_
#undef PANEL
#undef NEXT
#undef LOOP_HEAD
#undef LOOP_TAIL

// One tile: kRowTile rows by kVectors registers of columns. Only the first live_rows rows are stored.
template <class Format, int kVectors, int kRowStep, int kDwordStep, End kEnd, class Value>
void tile(const int32_t* left, const int32_t* right, int64_t dwords, int64_t live_rows, const __mmask16* live,
          const Finish& finish, Value* out, int64_t stride) {
  __m512i sums[kRowTile][kVectors];
  if constexpr (kEnd != End::kPartial) {
    for (int i = 0; i < live_rows; ++i) {
      for (int v = 0; v < kVectors; ++v) __builtin_prefetch(out + i * stride + v * kLanes, 1);
    }
  }
  add_products<Format, kVectors, kRowStep, kDwordStep>(left, right, dwords, sums);
  const auto finish_rows = [&]<bool kHasZeros>() {
#pragma GCC unroll 8
    for (int i = 0; i < kRowTile; ++i) {
      if (i == live_rows) return;
      finish_row<kHasZeros, kEnd, kVectors>(sums[i], i, finish, live, out + i * stride);
    }
  };
  // If no entry is negative, as after a ReLU, all offsets are 0 and nothing has to be subtracted.
  const __m256 zeros = _mm256_loadu_ps(finish.left_offsets);
  if (std::is_same_v<Format, Int8> && _mm256_cmp_ps_mask(zeros, _mm256_setzero_ps(), _CMP_NEQ_UQ) != 0) {
    finish_rows.template operator()<true>();
  } else {
    finish_rows.template operator()<false>();
  }
}

alignas(64) constexpr float kNothing[3 * kLanes] = {};

// A strip of a product: rows [row, stop) by kVectors registers of columns, for one block.
template <class Format, int kVectors, int kRowStep, int kDwordStep, class Value>
void strip(const Operand<Format>& left, const Operand<Format>& right, int64_t block, int64_t row, int64_t stop,
           int64_t column, const Output<Value>& output, float* partial) {
  const int64_t dwords = (left.block_entries(block) + Format::kPerDword - 1) / Format::kPerDword;
  const int64_t left_at = block * left.padded(), right_at = block * right.padded() + column;
  __mmask16 live[kVectors];
  for (int v = 0; v < kVectors; ++v) live[v] = live_lanes(right.vectors - column - v * kLanes);
  Value* out = output.out + row * output.stride + column;
  Finish finish{left.scales + left_at + row, left.offsets + left_at + row, right.scales + right_at,
                right.offsets + right_at,    kNothing,                     0,
                partial};
  if (block > 0) {
    finish.base = partial;
    finish.base_stride = kVectors * kLanes;
  } else if (output.bias != nullptr) {
    finish.base = output.bias + column;
  }
  if constexpr (std::is_same_v<Value, float>) {
    if (block == 0 && output.adds) {
      finish.base = out;
      finish.base_stride = output.stride;
    }
  }
  auto run = tile<Format, kVectors, kRowStep, kDwordStep, End::kPartial, Value>;
  if (block == left.blocks() - 1) {
    run = output.after == After::kRectify ? tile<Format, kVectors, kRowStep, kDwordStep, End::kRectified, Value>
          : output.after == After::kMask  ? tile<Format, kVectors, kRowStep, kDwordStep, End::kMasked, Value>
                                          : tile<Format, kVectors, kRowStep, kDwordStep, End::kPlain, Value>;
  }
  for (; row < stop; row += kRowTile) {
    run(left.dwords + (left_at + row) * kDwords, right.dwords + right_at * kDwords, dwords,
        std::min<int64_t>(kRowTile, stop - row), live, finish, out, output.stride);
    finish.left_scales += kRowTile;
    finish.left_offsets += kRowTile;
    finish.base += kRowTile * finish.base_stride;
    finish.partial += kRowTile * kVectors * kLanes;
    out += kRowTile * output.stride;
  }
}

template <class Format, int kRowStep, int kDwordStep, class Value>
void multiply_part(const Operand<Format>& left, const Operand<Format>& right, int64_t row, int64_t stop,
                   int64_t first_column, int64_t column_stop, const Output<Value>& output, float* partial) {
  for (int64_t block = 0; block < left.blocks(); ++block) {
    for (int64_t column = first_column, width; column < column_stop; column += width * kLanes) {
      const int64_t rest = (column_stop - column + kLanes - 1) / kLanes;
      width = rest == 4 ? 2 : std::min<int64_t>(3, rest);  // 2 + 2 registers are faster than 3 + 1
      const auto run = width == 3   ? strip<Format, 3, kRowStep, kDwordStep, Value>
                       : width == 2 ? strip<Format, 2, kRowStep, kDwordStep, Value>
                                    : strip<Format, 1, kRowStep, kDwordStep, Value>;
      run(left, right, block, row, stop, column, output, partial + kRowChunk * (column - first_column));
    }
  }
}

}  // namespace

#if defined(__AVX512BF16__)
namespace with_bf16 {
#else
namespace without_bf16 {
#endif

template <class Format, class Value>
void multiply(const Operand<Format>& left, const Operand<Format>& right, int64_t first, int64_t stop, int64_t column,
              int64_t column_stop, const Output<Value>& output, float* partial) {
  const auto run = left.layout == Layout::kRows ? multiply_part<Format, kDwords, 1, Value>
                                                : multiply_part<Format, 1, kRowTile, Value>;
  run(left, right, first, stop, column, column_stop, output, partial);
}

#define DLRM_MULTIPLY(Format, Value)                                                                             \
  template void multiply(const Operand<Format>&, const Operand<Format>&, int64_t, int64_t, int64_t, int64_t,     \
                         const Output<Value>&, float*)
#if !defined(__AVX512BF16__)
DLRM_MULTIPLY(Int16, float);
DLRM_MULTIPLY(Int8, float);
#endif
DLRM_MULTIPLY(Int8, BFloat16);
#undef DLRM_MULTIPLY

}  // namespace with_bf16, or without_bf16

}  // namespace dlrm::integer
