// The loops. Compiled once for each instruction set; see kernels.h.
#include "kernels.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "vectors.h"
#if defined(__AVX512BF16__)
#include "bf16_interaction.h"
#endif

namespace dlrm::DLRM_INSTRUCTION_SET {
namespace {

constexpr int64_t kCacheLine = 64;
constexpr int64_t kRowsAhead = 12;
constexpr int64_t kIdsAhead = 8;

inline void fetch(const void* row, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += kCacheLine) __builtin_prefetch(static_cast<const char*>(row) + at, 0, 2);
}

// Calls body with pointers of the ids' and offsets' own types.
template <class Body>
auto with_ids(const Ids& ids, Body body) {
  const auto offsets = [&](auto* values) {
    return ids.offset_type == Integer::kInt32 ? body(values, static_cast<const int32_t*>(ids.offsets))
                                              : body(values, static_cast<const int64_t*>(ids.offsets));
  };
  return ids.value_type == Integer::kInt32 ? offsets(static_cast<const int32_t*>(ids.values))
                                           : offsets(static_cast<const int64_t*>(ids.values));
}

template <class Body>
auto with_scalar(Scalar type, const void* data, Body body) {
  return type == Scalar::kFloat ? body(static_cast<const float*>(data)) : body(static_cast<const BFloat16*>(data));
}

template <class Body>
auto with_scalar(Scalar type, void* data, Body body) {
  return type == Scalar::kFloat ? body(static_cast<float*>(data)) : body(static_cast<BFloat16*>(data));
}

// ---- Lookup ----

template <class Out>
void copy_row(Out* out, const float* row, int64_t dim) {
  over(
      dim, [&](int64_t i) { store(out + i, load(row + i)); }, [&](int64_t i) { store_one(out + i, row[i]); });
}

template <class Out, class Id>
void pool_rows(Out* out, const float* table, const Id* ids, int64_t count, int64_t dim) {
  constexpr int64_t kWide = 8 * kLanes;
  for (int64_t i = 0; i < std::min(count, kIdsAhead); ++i) fetch(table + ids[i] * dim, dim * 4);
  int64_t column = 0;
  for (; column + kWide <= dim; column += kWide) {
    Floats sums[8] = {};
    for (int64_t i = 0; i < count; ++i) {
      if (column == 0 && i + kIdsAhead < count) fetch(table + ids[i + kIdsAhead] * dim, dim * 4);
      const float* row = table + ids[i] * dim + column;
      for (int k = 0; k < 8; ++k) sums[k] += load(row + k * kLanes);
    }
    for (int k = 0; k < 8; ++k) store(out + column + k * kLanes, sums[k]);
  }
  for (; column + kLanes <= dim; column += kLanes) {
    Floats sum = {};
    for (int64_t i = 0; i < count; ++i) sum += load(table + ids[i] * dim + column);
    store(out + column, sum);
  }
  for (; column < dim; ++column) {
    float sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += table[ids[i] * dim + column];
    store_one(out + column, sum);
  }
}

template <class Id, class Offset, class Out>
BadId pool_samples(const Tables& tables, const Id* ids, const Offset* offsets, const float* weights, Out* pooled,
                   int64_t stride, int64_t first, int64_t stop) {
  const int64_t batch = tables.batch_size;
  int64_t fetched_b = first, fetched_f = std::min(kRowsAhead, tables.num_features);
  for (int64_t b = first; b < stop; ++b) {
    for (int64_t f = 0; f < tables.num_features; ++f) {
      if (fetched_f == tables.num_features) {
        fetched_f = 0;
        ++fetched_b;
      }
      if (fetched_b < stop && offsets[fetched_f * batch + fetched_b] < offsets[fetched_f * batch + fetched_b + 1]) {
        const int64_t dim = tables.dim_offsets[fetched_f + 1] - tables.dim_offsets[fetched_f];
        fetch(weights + tables.weight_offsets[fetched_f] + int64_t{ids[offsets[fetched_f * batch + fetched_b]]} * dim, dim * 4);
      }
      ++fetched_f;
      const int64_t dim = tables.dim_offsets[f + 1] - tables.dim_offsets[f];
      const int64_t begin = offsets[f * batch + b], end = offsets[f * batch + b + 1];
      for (int64_t i = begin; i < end; ++i) {
        if (static_cast<uint64_t>(ids[i]) >= static_cast<uint64_t>(tables.rows[f])) return {f, ids[i]};
      }
      const float* table = weights + tables.weight_offsets[f];
      Out* out = pooled + (b - first) * stride + tables.dim_offsets[f];
      if (end - begin == 1) {
        copy_row(out, table + ids[begin] * dim, dim);
      } else {
        pool_rows(out, table, ids + begin, end - begin, dim);
      }
    }
  }
  return {};
}

BadId pool(const Tables& tables, const Ids& ids, const float* weights, void* pooled, Scalar type, int64_t stride,
           int64_t first, int64_t stop) {
  return with_ids(ids, [&](auto* values, auto* offsets) {
    return with_scalar(
        type, pooled, [&](auto* out) { return pool_samples(tables, values, offsets, weights, out, stride, first, stop); });
  });
}

// ---- Update ----

template <class Gradient>
void step_sgd(float* row, const Gradient* gradient, int64_t dim, float rate) {
  over(
      dim, [&](int64_t i) { store(row + i, load(row + i) - rate * load(gradient + i)); },
      [&](int64_t i) { row[i] -= rate * load_one(gradient + i); });
}

inline Floats root(Floats v) {
  float lanes[kLanes];
  store(lanes, v);
  for (float& lane : lanes) lane = __builtin_sqrtf(lane);
  return load(lanes);
}

template <class Gradient>
void step_adagrad(float* row, float* squares, const Gradient* gradient, int64_t dim, float scale, float rate,
                  float eps) {
  over(
      dim,
      [&](int64_t i) {
        const Floats g = scale * load(gradient + i), sum = load(squares + i) + g * g;
        store(squares + i, sum);
        store(row + i, load(row + i) - rate * g / (root(sum) + eps));
      },
      [&](int64_t i) {
        const float g = scale * load_one(gradient + i);
        squares[i] += g * g;
        row[i] -= rate * g / (__builtin_sqrtf(squares[i]) + eps);
      });
}

template <class Gradient>
void step_rowwise_adagrad(float* row, float* square, const Gradient* gradient, int64_t dim, float scale, float rate,
                          float eps) {
  Floats sums = {};
  float sum = 0;
  over(
      dim,
      [&](int64_t i) {
        const Floats g = scale * load(gradient + i);
        sums += g * g;
      },
      [&](int64_t i) {
        const float g = scale * load_one(gradient + i);
        sum += g * g;
      });
  *square += (sum + sum_lanes(sums)) / dim;
  step_sgd(row, gradient, dim, scale * rate / (__builtin_sqrtf(*square) + eps));
}

template <class Gradient>
void step_row(const Update& update, int64_t feature, int64_t row, float* weights, const Gradient* gradient, int64_t dim) {
  float* state = update.state == nullptr ? nullptr : update.state + update.state_offsets[feature];
  const float scale = update.gradient_scale, rate = update.learning_rate;
  switch (update.optimizer) {
    case Optimizer::kSgd:
      return step_sgd(weights + row * dim, gradient, dim, scale * rate);
    case Optimizer::kAdagrad:
      return step_adagrad(weights + row * dim, state + row * dim, gradient, dim, scale, rate, update.eps);
    case Optimizer::kRowwiseAdagrad:
      return step_rowwise_adagrad(weights + row * dim, state + row, gradient, dim, scale, rate, update.eps);
  }
}

inline void fetch_state(const Update& update, int64_t feature, int64_t row, int64_t dim) {
  if (update.optimizer == Optimizer::kSgd) return;
  const int64_t width = update.optimizer == Optimizer::kAdagrad ? dim : 1;
  fetch(update.state + update.state_offsets[feature] + row * width, width * 4);
}

struct Lookup {
  uint32_t row;
  uint32_t bag;
};

// Puts lookups of one row side by side, in the order of their bags; rows stay in the order in which they first come, which
// is that of their gradients in memory.
class Grouping {
 public:
  void group(std::vector<Lookup>& lookups) {
    int bits = 4;
    while (lookups.size() >> (bits - 1) > 0) ++bits;  // at most half of the slots are taken
    slots_.assign(size_t{1} << bits, kFree);
    rows_.clear();
    group_of_.resize(lookups.size());
    for (size_t i = 0; i < lookups.size(); ++i) {
      const uint32_t row = lookups[i].row;
      size_t slot = (row * 0x9e3779b97f4a7c15u) >> (64 - bits);
      while (slots_[slot] != kFree && rows_[slots_[slot]].row != row) slot = (slot + 1) & (slots_.size() - 1);
      if (slots_[slot] == kFree) {
        slots_[slot] = rows_.size();
        rows_.push_back({row, 0});
      }
      group_of_[i] = slots_[slot];
      ++rows_[slots_[slot]].next;
    }
    if (rows_.size() == lookups.size()) return;
    uint32_t first = 0;
    for (Row& row : rows_) first += std::exchange(row.next, first);
    grouped_.resize(lookups.size());
    for (size_t i = 0; i < lookups.size(); ++i) grouped_[rows_[group_of_[i]].next++] = lookups[i];
    lookups.swap(grouped_);
  }

 private:
  static constexpr uint32_t kFree = ~uint32_t{0};
  struct Row {
    uint32_t row, next;  // how many lookups, then where the next one goes
  };
  std::vector<uint32_t> slots_, group_of_;  // both of places in rows_
  std::vector<Row> rows_;
  std::vector<Lookup> grouped_;
};

template <class Id, class Offset>
void collect(std::vector<Lookup>& lookups, const Id* ids, const Offset* offsets, int64_t batch, int64_t rows,
             int64_t part, int64_t parts) {
  lookups.clear();
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t i = offsets[b]; i < offsets[b + 1]; ++i) {
      const uint64_t row = static_cast<uint64_t>(ids[i]);
      if (row >= static_cast<uint64_t>(rows)) continue;  // the lookup has refused such ids
      if (parts == 1 || row % parts == static_cast<uint64_t>(part)) {
        lookups.push_back({static_cast<uint32_t>(row), static_cast<uint32_t>(b)});
      }
    }
  }
}

// One step a row, with the sum of its gradients.
template <class Gradient>
void step_rows(const Tables& tables, const Update& update, int64_t feature, std::vector<Lookup>& lookups) {
  thread_local Grouping grouping;
  thread_local std::vector<float> sum;
  const int64_t dim = tables.dim_offsets[feature + 1] - tables.dim_offsets[feature];
  float* weights = update.weights + tables.weight_offsets[feature];
  const bool is_linear = update.optimizer == Optimizer::kSgd;
  if (!is_linear) grouping.group(lookups);
  sum.resize(dim);
  const auto gradient_of = [&](int64_t i) {
    return static_cast<const Gradient*>(update.gradients[lookups[i].bag]) + tables.dim_offsets[feature];
  };
  const int64_t count = lookups.size();
  for (int64_t i = 0, next; i < count; i = next) {
    if (i + kIdsAhead < count) {
      fetch(weights + int64_t{lookups[i + kIdsAhead].row} * dim, dim * 4);
      fetch(gradient_of(i + kIdsAhead), dim * sizeof(Gradient));
      fetch_state(update, feature, lookups[i + kIdsAhead].row, dim);
    }
    const int64_t row = lookups[i].row;
    next = i + 1;
    if (is_linear || next == count || lookups[next].row != row) {
      step_row(update, feature, row, weights, gradient_of(i), dim);
      continue;
    }
    std::fill_n(sum.data(), dim, 0.0f);
    for (next = i; next < count && lookups[next].row == row; ++next) step_sgd(sum.data(), gradient_of(next), dim, -1.0f);
    step_row(update, feature, row, weights, static_cast<const float*>(sum.data()), dim);
  }
}

void update(const Tables& tables, const Ids& ids, const Update& update, int64_t feature, int64_t part, int64_t parts) {
  thread_local std::vector<Lookup> lookups;
  with_ids(ids, [&](auto* values, auto* offsets) {
    collect(lookups, values, offsets + feature * tables.batch_size, tables.batch_size, tables.rows[feature], part, parts);
  });
  const auto run = update.gradient_type == Scalar::kFloat ? step_rows<float> : step_rows<BFloat16>;
  run(tables, update, feature, lookups);
}

// ---- Interaction ----

constexpr int kTile = 4;                             // vectors on each side of a tile of products
constexpr int kRows = 3;                             // gradients of vectors that are summed up at once,
constexpr int kColumns = DLRM_LANES == 16 ? 8 : 4;   // so many registers of each

int64_t round_up(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

// A sample's vectors side by side, in floats, zeros after the end of each and after the last.
struct Sample {
  int64_t num_vectors, dim, width;
  std::vector<float> storage;
  float* vectors;

  explicit Sample(const Interaction& interaction)
      : num_vectors(interaction.num_vectors), dim(interaction.dim), width(round_up(dim, kLanes)) {
    const int64_t size = round_up(num_vectors, kTile * kRows) * width;
    storage.assign(size + kCacheLine / 4, 0.0f);
    const auto address = reinterpret_cast<uintptr_t>(storage.data());
    vectors = storage.data() + (round_up(address, kCacheLine) - address) / 4;
  }
  Sample(const Sample&) = delete;

  void read(const Interaction& interaction, int64_t b) {
    for (int64_t v = 0; v < num_vectors; ++v) {
      const Source& source = interaction.sources[interaction.vectors[v].source];
      with_scalar(source.type, source.data, [&](auto* data) {
        const auto* from = data + b * source.stride + interaction.vectors[v].column;
        float* to = vectors + v * width;
        over(
            dim, [&](int64_t i) { store(to + i, load(from + i)); }, [&](int64_t i) { to[i] = load_one(from + i); });
      });
    }
  }
};

// The products of vectors i, ... i + 3 with j, ... j + 3.
void multiply_tile(const Sample& sample, int64_t i, int64_t j, float (&products)[kTile * kTile]) {
  Floats sums[kTile][kTile] = {};
  const float *left = sample.vectors + i * sample.width, *right = sample.vectors + j * sample.width;
  for (int64_t d = 0; d < sample.width; d += kLanes) {
    Floats columns[kTile];
    for (int k = 0; k < kTile; ++k) columns[k] = load(right + k * sample.width + d);
    for (int r = 0; r < kTile; ++r) {
      const Floats row = load(left + r * sample.width + d);
      for (int k = 0; k < kTile; ++k) sums[r][k] += row * columns[k];
    }
  }
  const Floats* flat = &sums[0][0];
  for (int k = 0; k < kTile * kTile; k += kLanes) {
    store(products + k, sum_lanes(*reinterpret_cast<const Floats(*)[kLanes]>(flat + k)));
  }
}

// Where the product of vectors i < j stands among the pairs.
int64_t pair(int64_t i, int64_t j, int64_t num_vectors) { return i * (2 * num_vectors - i - 1) / 2 + j - i - 1; }

template <class Out>
void interact_samples(const Interaction& interaction, Out* output, int64_t first, int64_t stop) {
  const int64_t size = interaction.num_vectors, dim = interaction.dim;
  const int64_t width = dim + size * (size - 1) / 2;
  Sample sample(interaction);
  std::vector<float> row(width);
  for (int64_t b = first; b < stop; ++b) {
    sample.read(interaction, b);
    std::copy_n(sample.vectors, dim, row.data());
    float* pairs = row.data() + dim;
    for (int64_t i = 0; i < size; i += kTile) {
      for (int64_t j = i; j < size; j += kTile) {
        float products[kTile * kTile];
        multiply_tile(sample, i, j, products);
        for (int64_t r = i; r < std::min(i + kTile, size); ++r) {
          for (int64_t c = std::max(j, r + 1); c < std::min(j + kTile, size); ++c) {
            pairs[pair(r, c, size)] = products[(r - i) * kTile + c - j];
          }
        }
      }
    }
    copy_row(output + b * width, row.data(), width);
  }
}

void interact(const Interaction& interaction, void* output, Scalar type, int64_t first, int64_t stop) {
#if defined(__AVX512BF16__)
  if (bf16::fits(interaction, type)) return bf16::interact(interaction, static_cast<BFloat16*>(output), first, stop);
#endif
  with_scalar(type, output, [&](auto* out) { interact_samples(interaction, out, first, stop); });
}

// The gradients of the products as a symmetric matrix with zeros on its diagonal.
template <class Gradient>
void spread_pairs(const Gradient* pairs, int64_t size, int64_t stride, float* matrix) {
  for (int64_t i = 0; i < size; ++i) {
    matrix[i * stride + i] = 0;
    for (int64_t j = i + 1; j < size; ++j) matrix[i * stride + j] = matrix[j * stride + i] = load_one(pairs++);
  }
}

// sums[r] = the sum over j of matrix[r][j] * vector j, of columns d, ... of kRows vectors.
template <int N>
void combine(const Sample& sample, const float* matrix, int64_t stride, int64_t d, float* sums) {
  Floats parts[kRows][N] = {};
  for (int64_t j = 0; j < sample.num_vectors; ++j) {
    const float* vector = sample.vectors + j * sample.width + d;
    Floats columns[N];
    for (int k = 0; k < N; ++k) columns[k] = load(vector + k * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const float factor = matrix[r * stride + j];
      for (int k = 0; k < N; ++k) parts[r][k] += factor * columns[k];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int k = 0; k < N; ++k) store(sums + r * sample.width + d + k * kLanes, parts[r][k]);
  }
}

template <class Gradient>
void interact_backward_samples(const Interaction& interaction, const Source* gradients, const Gradient* gradient,
                               int64_t first, int64_t stop) {
  const int64_t size = interaction.num_vectors, dim = interaction.dim;
  const int64_t width = dim + size * (size - 1) / 2, stride = round_up(size, kRows);
  Sample sample(interaction);
  std::vector<float> matrix(stride * stride), sums(kRows * sample.width);
  for (int64_t b = first; b < stop; ++b) {
    const Gradient* own = gradient + b * width;
    sample.read(interaction, b);
    spread_pairs(own + dim, size, stride, matrix.data());
    for (int64_t i = 0; i < size; i += kRows) {
      int64_t d = 0;
      for (; d + kColumns * kLanes <= sample.width; d += kColumns * kLanes) {
        combine<kColumns>(sample, matrix.data() + i * stride, stride, d, sums.data());
      }
      for (; d < sample.width; d += kLanes) combine<1>(sample, matrix.data() + i * stride, stride, d, sums.data());
      if (i == 0) step_sgd(sums.data(), own, dim, -1.0f);
      for (int64_t v = i; v < std::min(i + kRows, size); ++v) {
        const Source& target = gradients[interaction.vectors[v].source];
        with_scalar(target.type, target.data, [&](auto* data) {
          copy_row(data + b * target.stride + interaction.vectors[v].column, sums.data() + (v - i) * sample.width, dim);
        });
      }
    }
  }
}

void interact_backward(const Interaction& interaction, const Source* gradients, const void* gradient, Scalar type,
                       int64_t first, int64_t stop) {
#if defined(__AVX512BF16__)
  if (bf16::fits(interaction, type)) {
    return bf16::interact_backward(interaction, gradients, static_cast<const BFloat16*>(gradient), first, stop);
  }
#endif
  with_scalar(type, gradient,
              [&](auto* own) { interact_backward_samples(interaction, gradients, own, first, stop); });
}

// ---- Between two matrix products ----

// NaN stays NaN, as in PyTorch: a run that diverges must not look well.
Floats larger(Floats a, Floats b) { return a < b ? b : a; }

template <class T>
void add_bias_rows(T* values, const float* bias, bool rectified, int64_t columns, int64_t first, int64_t stop) {
  const Floats least = fill(rectified ? 0.0f : -__builtin_inff());
  for (int64_t r = first; r < stop; ++r) {
    T* row = values + r * columns;
    over(
        columns, [&](int64_t i) { store(row + i, larger(load(row + i) + load(bias + i), least)); },
        [&](int64_t i) { store_one(row + i, std::max(load_one(row + i) + bias[i], least[0])); });
  }
}

void add_bias(void* values, Scalar type, const float* bias, bool rectified, int64_t columns, int64_t first,
              int64_t stop) {
  with_scalar(type, values, [&](auto* own) { add_bias_rows(own, bias, rectified, columns, first, stop); });
}

template <class T>
void mask_rows(T* gradient, const T* output, float* sums, int64_t columns, int64_t first, int64_t stop) {
  std::fill_n(sums, columns, 0.0f);
  for (int64_t r = first; r < stop; ++r) {
    T* row = gradient + r * columns;
    if (output == nullptr) {
      step_sgd(sums, row, columns, -1.0f);
      continue;
    }
    const T* own = output + r * columns;
    over(
        columns,
        [&](int64_t i) {
          const Floats kept = load(own + i) <= 0.0f ? Floats{} : load(row + i);
          store(row + i, kept);
          store(sums + i, load(sums + i) + kept);
        },
        [&](int64_t i) {
          const float kept = load_one(own + i) <= 0.0f ? 0.0f : load_one(row + i);
          store_one(row + i, kept);
          sums[i] += kept;
        });
  }
}

void mask(void* gradient, const void* output, Scalar type, float* sums, int64_t columns, int64_t first, int64_t stop) {
  with_scalar(type, gradient, [&](auto* own) {
    mask_rows(own, static_cast<decltype(own)>(const_cast<void*>(output)), sums, columns, first, stop);
  });
}

constexpr int kStateWords = 624;
constexpr int kShift = 397;

inline uint32_t twist(uint32_t high, uint32_t low) {
  const uint32_t mixed = (high & 0x80000000u) | (low & 0x7fffffffu);
  return (mixed >> 1) ^ (-(low & 1u) & 0x9908b0dfu);
}

// The next 624 states of MT19937 (Matsumoto and Nishimura, 1998). No number needs one of the 227 before it.
inline void advance(uint32_t* state) {
  for (int k = 0; k < kStateWords - kShift; ++k) state[k] = state[k + kShift] ^ twist(state[k], state[k + 1]);
  for (int k = kStateWords - kShift; k < kStateWords - 1; ++k)
    state[k] = state[k + kShift - kStateWords] ^ twist(state[k], state[k + 1]);
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
      values[first + k] = share * range + low;  // one rounding where there is FMA, as in PyTorch's own build
    }
  }
}

}  // namespace

const Kernels kernels = {
#if defined(__AVX512BF16__)
    "AVX-512 BF16",
#elif DLRM_LANES == 16
    "AVX-512",
#elif DLRM_LANES == 8
    "AVX2",
#else
    "baseline",
#endif
    pool, update, interact, interact_backward, add_bias, mask, draw};

}  // namespace dlrm::DLRM_INSTRUCTION_SET
