// What the operators call: serial loops over a part of the work, compiled once for each instruction set.
//
// B samples, F features, D columns of a table, V vectors that interact, P = V * (V - 1) / 2 pairs.
#pragma once

#include <cstdint>

namespace dlrm {

enum class Scalar : int { kFloat, kBFloat16 };
enum class Integer : int { kInt32, kInt64 };
enum class Optimizer : int { kSgd, kAdagrad, kRowwiseAdagrad };

// Ids of bag (f, b) are values[offsets[f * B + b]] to values[offsets[f * B + b + 1]], exclusive.
struct Ids {
  const void* values;
  Integer value_type;
  const void* offsets;
  Integer offset_type;
};

// Tables end to end in one array of weights, one feature each. Pooled rows have total_dim columns.
struct Tables {
  int64_t num_features;
  int64_t batch_size;
  int64_t total_dim;
  const int64_t* weight_offsets;  // F: where a feature's table begins in the weights
  const int64_t* rows;            // F
  const int64_t* dim_offsets;     // F + 1: columns of a feature in the pooled rows
};

// An id outside its table; feature is -1 where there is none.
struct BadId {
  int64_t feature = -1;
  int64_t id = 0;
};

struct Update {
  Optimizer optimizer;
  float learning_rate;
  float eps;
  float* weights;
  float* state;                  // squares: one for each weight (Adagrad), or for each row; null for SGD
  const int64_t* state_offsets;  // F: where a table's begin
  const void* const* gradients;  // B: each sample's row of total_dim
  Scalar gradient_type;
  float gradient_scale;  // gradients count so many times
};

// A vector of a sample: column `column` and on of row b of a matrix `stride` wide.
struct Source {
  void* data;
  Scalar type;
  int64_t stride;
};
struct Vector {
  int32_t source;
  int64_t column;
};

struct Interaction {
  int64_t num_vectors;
  int64_t dim;
  const Source* sources;
  const Vector* vectors;  // V; the first is the dense vector
};

struct Kernels {
  const char* name;
  // Pooled rows of samples [first, stop), to rows at `stride`.
  BadId (*pool)(const Tables&, const Ids&, const float* weights, void* pooled, Scalar, int64_t stride, int64_t first,
                int64_t stop);
  // Updates those rows of a feature's table whose number is `part` modulo `parts`, in the order of the bags.
  void (*update)(const Tables&, const Ids&, const Update&, int64_t feature, int64_t part, int64_t parts);
  // Rows [first, stop) of the output [B, D + P]: the dense vector, then each pair's dot product.
  void (*interact)(const Interaction&, void* output, Scalar, int64_t first, int64_t stop);
  // Gradients of the vectors, into `gradients`, of the same layout as interaction.sources.
  void (*interact_backward)(const Interaction&, const Source* gradients, const void* gradient, Scalar, int64_t first,
                            int64_t stop);
  // values[i] += bias, then where `rectified` the larger of it and 0, for rows [first, stop) of a matrix `columns` wide.
  void (*add_bias)(void* values, Scalar, const float* bias, bool rectified, int64_t columns, int64_t first, int64_t stop);
  // gradient[i] = 0 where output[i] is not positive (unless output is null); sums over rows [first, stop) into sums.
  void (*mask)(void* gradient, const void* output, Scalar, float* sums, int64_t columns, int64_t first, int64_t stop);
  // Uniform in [low, high): the floats that PyTorch's CPU generator gives from `seed`.
  void (*draw)(float* values, int64_t size, uint32_t seed, float low, float high);
};

namespace baseline {
extern const Kernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_bf16 {
extern const Kernels kernels;
}
#endif

}  // namespace dlrm
