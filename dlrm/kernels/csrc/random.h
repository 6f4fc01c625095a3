// Random numbers for the first weights of tables: those of PyTorch's CPU generator, a vector at a time.
#pragma once

#include <algorithm>
#include <cstdint>

#include "rows.h"

namespace dlrm::DLRM_INSTRUCTION_SET {
namespace {

constexpr int kStateWords = 624;
constexpr int kShift = 397;

// MT19937 (Matsumoto and Nishimura, 1998).
inline uint32_t twist(uint32_t high, uint32_t low) {
  const uint32_t mixed = (high & 0x80000000u) | (low & 0x7fffffffu);
  return (mixed >> 1) ^ (-(low & 1u) & 0x9908b0dfu);
}

// Replaces all 624 words of the state by the next 624. Of the new words, each depends on none nearer than 227 places
// before it, so the compiler can make several at a time.
inline void advance(uint32_t* state) {
  for (int k = 0; k < kStateWords - kShift; ++k) state[k] = state[k + kShift] ^ twist(state[k], state[k + 1]);
  for (int k = kStateWords - kShift; k < kStateWords - 1; ++k) {
    state[k] = state[k + kShift - kStateWords] ^ twist(state[k], state[k + 1]);
  }
  state[kStateWords - 1] = state[kShift - 1] ^ twist(state[kStateWords - 1], state[0]);
}

void draw(float* values, int64_t size, uint32_t seed, float low, float high) {
  alignas(kCacheLine) uint32_t state[kStateWords];
  state[0] = seed;
  for (uint32_t k = 1; k < kStateWords; ++k) state[k] = 1812433253u * (state[k - 1] ^ (state[k - 1] >> 30)) + k;
  const float range = high - low;
  for (int64_t first = 0; first < size; first += kStateWords) {
    advance(state);
    const int64_t count = std::min<int64_t>(kStateWords, size - first);
    for (int64_t k = 0; k < count; ++k) {
      uint32_t word = state[k];
      word ^= word >> 11;
      word ^= (word << 7) & 0x9d2c5680u;
      word ^= (word << 15) & 0xefc60000u;
      word ^= word >> 18;
      const float share = static_cast<float>(static_cast<int32_t>(word & 0xffffffu)) * 0x1p-24f;
      values[first + k] = share * range + low;  // rounded once where there is FMA, as in PyTorch's own build
    }
  }
}

}  // namespace
}  // namespace dlrm::DLRM_INSTRUCTION_SET
