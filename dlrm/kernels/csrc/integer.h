// Matrix products through integers (AVX-512 VNNI). Each call does a part of the work on one thread.
//
// Each vector of an operand is cut into blocks of at most kBlock entries along the contracted dimension, and each block
// is quantized with a scale of its own. Blocks are multiplied in int32, then scaled and summed in fp32. No sum
// overflows, whatever the data.
#pragma once

#include <algorithm>
#include <cstdint>

namespace dlrm::integer {

#define DLRM_BLOCK_DWORDS 96
constexpr int kDwords = DLRM_BLOCK_DWORDS;  // of a block; few, so that a tile of both operands stays in L1
constexpr int kLanes = 16;
constexpr int kRowTile = 8;        // rows of a tile
constexpr int kRowChunk = 128;     // rows of a part of a product, at most
constexpr int kColumnChunk = 240;  // columns of a part of a product: 5 times 3 registers
constexpr int kColumnGroup = 512;  // columns quantized at once: a block of them fits L2
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

// bfloat16 through vpdpbusd. Left operands are unsigned: each block has an offset, the number that stands for 0. Right
// operands are signed. A sum is at most 384 * 255 * 127, which fp32 holds exactly. After a block's last entry left
// operands may hold anything, since right ones hold 0 there.
struct Int8 {
  using Source = BFloat16;
  static constexpr int kPerDword = 4;
};

// The order of an operand's dwords. A dword holds consecutive entries along the contracted dimension.
enum class Layout : int {
  kRows,    // [block][vector][dword]: left operands
  kNarrow,  // [block][vector / 8][dword][8]: left operands
  kWide,    // [block][vector / 16][dword][16]: right operands
};

template <class Format>
struct Operand {
  static constexpr int kBlock = kDwords * Format::kPerDword;

  Layout layout;
  int64_t vectors;     // size of the dimension that is kept
  int64_t contracted;  // size of the dimension that is summed over; more than 0
  int32_t* dwords;     // num_dwords() of them
  float* scales;       // [block][vector], num_scales() of them
  float* offsets;      // likewise, Int8 only: what stands for 0 (left operands), the sum of the integers (right ones)
  float* sums;         // likewise, kNarrow only: the sum of the entries before they are quantized

  int64_t padded() const { return (vectors + kLanes - 1) / kLanes * kLanes; }
  int64_t blocks() const { return (contracted + kBlock - 1) / kBlock; }
  // Entries of a block: whole dwords, at most kBlock, chosen so that the last block is not empty.
  int64_t block_length() const {
    return ((contracted + blocks() - 1) / blocks() + Format::kPerDword - 1) / Format::kPerDword * Format::kPerDword;
  }
  int64_t block_entries(int64_t block) const { return std::min(block_length(), contracted - block * block_length()); }
  int64_t num_scales() const { return blocks() * padded(); }
  int64_t num_dwords() const { return num_scales() * kDwords; }
};

// Quantizes source [vectors, contracted], contiguous, to the layout kRows.
template <class Format>
void quantize_rows(const typename Format::Source* source, const Operand<Format>& out);
// The same to the layout kWide, for the 16 vectors from number 16 * part on.
template <class Format>
void quantize_wide_rows(const typename Format::Source* source, int64_t part, const Operand<Format>& out);
template <class Format>
int64_t wide_row_parts(const Operand<Format>& out) {
  return out.padded() / kLanes;
}
// Quantizes source [contracted, vectors], contiguous, to the layout kNarrow or kWide: one block of kColumnGroup
// vectors.
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
  kRectify,  // ReLU
  kMask,     // 0 where `out` held 0 or less: the gradient of a ReLU
};

// What happens to the sums: they are scaled; the bias, or what `out` holds (floats only), is added; then comes `after`.
template <class Value>
struct Output {
  Value* out;  // float or BFloat16
  int64_t stride;
  const float* bias = nullptr;
  After after = After::kNothing;
  bool adds = false;
};

// out = left right^T for a part of the product: rows [first, stop) of left, at most kRowChunk, by rows
// [column, column_stop) of right, at most kColumnChunk. Right is kWide. `first` is a multiple of kRowTile, `column` of
// kLanes. `partial` is scratch memory of kPartialFloats, aligned to 64 bytes.
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
