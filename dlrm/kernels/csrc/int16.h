// Matrix products of fp32 tensors through int16 operands and vpdpwssd (AVX-512 VNNI): serial loops over a part of the work.
//
// An operand is quantized in blocks of at most kBlock entries along the contracted dimension, one scale for each block of
// a vector. The scale makes the block's Euclidean norm at most kMaxNorm, so by Cauchy-Schwarz no int32 sum of products
// overflows, whatever the data. Blocks are scaled and added up in fp32.
#pragma once

#include <algorithm>
#include <cstdint>

namespace dlrm::int16 {

#define DLRM_INT16_BLOCK 192
constexpr int kBlock = DLRM_INT16_BLOCK;  // a tile of both operands stays in L1
constexpr int kPairs = kBlock / 2;
constexpr int kLanes = 16;
constexpr int kRowTile = 8;
constexpr int kRowChunk = 128;     // of a part of a product at most
constexpr int kColumnChunk = 240;  // 5 times 3 registers
constexpr int kColumnGroup = 512;  // quantized at once: a block of them fits L2
constexpr int kPartialFloats = kRowChunk * (kColumnChunk + kLanes);

// How the pairs lie: entries 2 p and 2 p + 1 along the contracted dimension, in one dword.
enum class Layout : int {
  kRows,    // [block][vector][pair]: left operands
  kNarrow,  // [block][vector / 8][pair][8]: left operands
  kWide,    // [block][vector / 16][pair][16]: right operands
};

struct Operand {
  Layout layout;
  int64_t vectors;     // along the dimension that is kept
  int64_t contracted;  // more than 0
  int32_t* pairs;      // num_pairs()
  float* scales;       // num_scales(): [block][vector]

  int64_t padded() const { return (vectors + kLanes - 1) / kLanes * kLanes; }
  int64_t blocks() const { return (contracted + kBlock - 1) / kBlock; }
  // Even, at most kBlock, and such that the last block is not empty.
  int64_t block_length() const { return ((contracted + blocks() - 1) / blocks() + 1) / 2 * 2; }
  int64_t block_entries(int64_t block) const { return std::min(block_length(), contracted - block * block_length()); }
  int64_t num_scales() const { return blocks() * padded(); }
  int64_t num_pairs() const { return num_scales() * kPairs; }
};

// Source [vectors, contracted], contiguous, to kRows.
void quantize_rows(const float* source, const Operand& out);
// The same to kWide: vectors 16 * part, ... of them.
void quantize_wide_rows(const float* source, int64_t part, const Operand& out);
inline int64_t wide_row_parts(const Operand& out) { return out.padded() / kLanes; }
// Source [contracted, vectors], contiguous, to kNarrow or kWide: one block of kColumnGroup vectors.
void quantize_columns(const float* source, int64_t part, const Operand& out);
inline int64_t column_parts(const Operand& out) {
  return out.blocks() * ((out.vectors + kColumnGroup - 1) / kColumnGroup);
}

// What becomes of the sums: scaled, then + bias, then max(0, .), or added to what `out` holds.
struct Output {
  float* out;
  int64_t stride;
  const float* bias;  // or null
  bool rectified;
  bool adds;
};

// out = left right^T, of rows [first, stop), at most kRowChunk, of left, and columns [column, column_stop), at most
// kColumnChunk, of right, which is kWide. `first` is a multiple of kRowTile, `column` of kLanes. `partial` is
// kPartialFloats of the caller's, 64-byte aligned.
void multiply(const Operand& left, const Operand& right, int64_t first, int64_t stop, int64_t column,
              int64_t column_stop, const Output& output, float* partial);

}  // namespace dlrm::int16
