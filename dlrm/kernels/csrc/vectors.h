// Vectors of floats, as wide as the registers of the instruction set that is compiled for. They are written with the
// compiler's vector extension, so that the same source becomes AVX-512, AVX2 with FMA, or the architecture's baseline.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512BF16__)
#define DLRM_INSTRUCTION_SET avx512_bf16
#define DLRM_LANES 16
#elif defined(__AVX512F__)
#define DLRM_INSTRUCTION_SET avx512
#define DLRM_LANES 16
#elif defined(__AVX2__)
#define DLRM_INSTRUCTION_SET avx2
#define DLRM_LANES 8
#else
#define DLRM_INSTRUCTION_SET baseline
#define DLRM_LANES 4
#endif

namespace dlrm::DLRM_INSTRUCTION_SET {

constexpr int kLanes = DLRM_LANES;
typedef float Floats __attribute__((vector_size(4 * DLRM_LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * DLRM_LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * DLRM_LANES)));

struct BFloat16 {
  uint16_t bits;
};

template <class V>
inline V load_bits(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline Floats load(const float* from) { return load_bits<Floats>(from); }
inline Floats load(const BFloat16* from) {
#if defined(__AVX512F__)  // GCC makes four instructions of the other branch
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  return (Floats)_mm512_slli_epi32(bits, 16);
#else
  return (Floats)(__builtin_convertvector(load_bits<Halves>(from), Words) << 16);
#endif
}
inline float load_one(const float* from) { return *from; }
inline float load_one(const BFloat16* from) {
  const uint32_t bits = uint32_t{from->bits} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline void store(float* to, Floats v) { std::memcpy(to, &v, sizeof v); }
inline void store(BFloat16* to, Floats v) {
#if defined(__AVX512BF16__)
  const __m256bh rounded = _mm512_cvtneps_pbh((__m512)v);  // rounds like the other branch, but subnormals become 0
  std::memcpy(to, &rounded, sizeof rounded);
#else
  const Words bits = (Words)v;
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  const Words is_nan = (Words)(v != v);
  const Halves halves = __builtin_convertvector((is_nan & 0x7fc0) | (~is_nan & rounded), Halves);
  std::memcpy(to, &halves, sizeof halves);
#endif
}
inline void store_one(float* to, float value) { *to = value; }
inline void store_one(BFloat16* to, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  to->bits = value != value ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// All lanes hold `value`.
inline Floats fill(float value) { return value - Floats{}; }

// Walks positions 0 to size: vector(i) for each whole register, from position i on, then one(i) for each position left.
template <class Vector, class One>
inline void over(int64_t size, Vector vector, One one) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) vector(i);
  for (; i < size; ++i) one(i);
}

namespace detail {
// The step of a sum by halves. a and b consist of groups of S lanes; each group holds the parts of one sum. The result
// holds the groups of a, then those of b, with S / 2 lanes each.
template <int S, int... O>
inline Floats halve(Floats a, Floats b, std::integer_sequence<int, O...>) {
  constexpr int h = S / 2;
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (O / h * S + O % h)...) +
         __builtin_shufflevector(a, b, (O / h * S + O % h + h)...);
#else
  constexpr Words first = {(O / h * S + O % h)...}, second = {(O / h * S + O % h + h)...};
  return __builtin_shuffle(a, b, first) + __builtin_shuffle(a, b, second);
#endif
}

template <int N, int S>
inline Floats sum_lanes(const Floats* v) {
  if constexpr (N == 1) {
    return *v;
  } else {
    return halve<S>(sum_lanes<N / 2, S * 2>(v), sum_lanes<N / 2, S * 2>(v + N / 2),
                    std::make_integer_sequence<int, kLanes>{});
  }
}

template <int S>
inline float sum_of(Floats v) {
  if constexpr (S == 1) {
    return v[0];
  } else {
    return sum_of<S / 2>(halve<S>(v, v, std::make_integer_sequence<int, kLanes>{}));
  }
}
}  // namespace detail

// Lane i of the result is the sum of the lanes of v[i].
inline Floats sum_lanes(const Floats (&v)[kLanes]) { return detail::sum_lanes<kLanes, 2>(v); }
// The sum of v's lanes.
inline float sum_lanes(Floats v) { return detail::sum_of<kLanes>(v); }

}  // namespace dlrm::DLRM_INSTRUCTION_SET
