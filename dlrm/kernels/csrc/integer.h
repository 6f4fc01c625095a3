// Matrix products through integers (AVX-512 VNNI): serial loops over a part of the work.
//
// An operand is quantized in blocks of at most kBlock entries along the contracted dimension, one scale for each block of
// a vector. Blocks are multiplied in int32, then scaled and added up in fp32. No sum overflows, whatever the data.
#pragma once

#include <algorithm>
#include <cstdint>

namespace dlrm::integer {

#define DLRM_BLOCK_DWORDS 96
constexpr int kDwords = DLRM_BLOCK_DWORDS;  // of a block: a tile of both operands stays in L1
constexpr int kLanes = 16;
constexpr int kRowTile = 8;
constexpr int kRowChunk = 128;     // of a part of a product at most
constexpr int kColumnChunk = 240;  // 5 times 3 registers
constexpr int kColumnGroup = 512;  // quantized at once: a block of them fits L2
constexpr int kPartialFloats = kRowChunk * (kColumnChunk + kLanes);

struct BFloat16 {
  uint16_t bits;
};

// fp32 through vpdpwssd. The scale makes a block's Euclidean norm at most 46,322, so that no sum of products exceeds
// 2^31, by Cauchy-Schwarz.
struct Int16 {
  using Source = float;
  static constexpr int kPerDword = 2;
};

// bfloat16 through vpdpbusd. Left operands are unsigned, with a number of their own that stands for 0 in each block; right
// ones are signed. A sum is at most 384 * 255 * 127, which fp32 holds exactly. Behind a block's last entry left operands
// may hold anything: right ones hold 0 there.
struct Int8 {
  using Source = BFloat16;
  static constexpr int kPerDword = 4;
};

// How dwords lie, each consecutive entries along the contracted dimension.
enum class Layout : int {
  kRows,    // [block][vector][dword]: left operands
  kNarrow,  // [block][vector / 8][dword][8]: left operands
  kWide,    // [block][vector / 16][dword][16]: right operands
};

template <class Format>
struct Operand {
  static constexpr int kBlock = kDwords * Format::kPerDword;

  Layout layout;
  int64_t vectors;     // along the dimension that is kept
  int64_t contracted;  // more than 0
  int32_t* dwords;     // num_dwords()
  float* scales;       // num_scales(): [block][vector]
  float* offsets;      // the same, Int8 only: of left operands what stands for 0, of right ones the sum of the entries
  float* sums;         // the same, kNarrow only: of the entries, not quantized

  int64_t padded() const { return (vectors + kLanes - 1) / kLanes * kLanes; }
  int64_t blocks() const { return (contracted + kBlock - 1) / kBlock; }
  // Whole dwords, at most kBlock entries, and such that the last block is not empty.
  int64_t block_length() const {
    return ((contracted + blocks() - 1) / blocks() + Format::kPerDword - 1) / Format::kPerDword * Format::kPerDword;
  }
  int64_t block_entries(int64_t block) const { return std::min(block_length(), contracted - block * block_length()); }
  int64_t num_scales() const { return blocks() * padded(); }
  int64_t num_dwords() const { return num_scales() * kDwords; }
};

// Source [vectors, contracted], contiguous, to kRows.
template <class Format>
void quantize_rows(const typename Format::Source* source, const Operand<Format>& out);
// The same to kWide: vectors 16 * part, ... of them.
template <class Format>
void quantize_wide_rows(const typename Format::Source* source, int64_t part, const Operand<Format>& out);
template <class Format>
int64_t wide_row_parts(const Operand<Format>& out) {
  return out.padded() / kLanes;
}
// Source [contracted, vectors], contiguous, to kNarrow or kWide: one block of kColumnGroup vectors.
template <class Format>
void quantize_columns(const typename Format::Source* source, int64_t part, const Operand<Format>& out);
template <>
void quantize_columns(const float* source, int64_t part, const Operand<Int16>& out);
template <>
void quantize_columns(const BFloat16* source, int64_t part, const Operand<Int8>& out);
template <class Format>
int64_t column_parts(const Operand<Format>& out) {
  return out.blocks() * ((out.vectors + kColumnGroup - 1) / kColumnGroup);
}

enum class After : int {
  kNothing,
  kRectify,  // the larger of it and 0
  kMask,     // 0 where what `out` held is 0 or less
};

// What becomes of the sums: scaled, then + bias, or added to what `out` holds (floats only), then `after`.
template <class Value>
struct Output {
  Value* out;  // float or BFloat16
  int64_t stride;
  const float* bias = nullptr;
  After after = After::kNothing;
  bool adds = false;
};

// out = left right^T, of rows [first, stop), at most kRowChunk, of left, and columns [column, column_stop), at most
// kColumnChunk, of right, which is kWide. `first` is a multiple of kRowTile, `column` of kLanes. `partial` is
// kPartialFloats of the caller's, 64-byte aligned.
//
// Compiled twice: with instructions that round to bfloat16, and without.
#define DLRM_MULTIPLY                                                                                             \
  template <class Format, class Value>                                                                            \
  void multiply(const Operand<Format>& left, const Operand<Format>& right, int64_t first, int64_t stop,           \
                int64_t column, int64_t column_stop, const Output<Value>& output, float* partial);
namespace with_bf16 {
DLRM_MULTIPLY
}
namespace without_bf16 {
DLRM_MULTIPLY
}
#undef DLRM_MULTIPLY

}  // namespace dlrm::integer
