// The loops that the operators of ops.cpp call. Each call does a part of the work on one thread. The loops are compiled
// once for each instruction set.
//
// Shapes: B samples, F features, D columns of a table, V vectors that interact, P = V * (V - 1) / 2 pairs.
#pragma once

#include <cstdint>

namespace dlrm {

enum class Scalar : int { kFloat, kBFloat16 };
enum class Integer : int { kInt32, kInt64 };
enum class Optimizer : int { kSgd, kAdagrad, kRowwiseAdagrad };

// The ids of bag (f, b) are values[offsets[f * B + b]] to values[offsets[f * B + b + 1]], the latter excluded.
struct Ids {
  const void* values;
  Integer value_type;
  const void* offsets;
  Integer offset_type;
};

// Tables that lie one after the other in one array of weights, one for each feature. A pooled row has total_dim
// columns.
struct Tables {
  int64_t num_features;
  int64_t batch_size;
  int64_t total_dim;
  const int64_t* weight_offsets;  // F: where each feature's table begins in the weights
  const int64_t* rows;            // F: rows of each feature's table
  const int64_t* dim_offsets;     // F + 1: where each feature's columns begin in a pooled row
};

// An id outside its table; `feature` is -1 if there is none.
struct BadId {
  int64_t feature = -1;
  int64_t id = 0;
};

struct Update {
  Optimizer optimizer;
  float learning_rate;
  float eps;
  float* weights;
  float* state;                  // sums of squares: one for each weight (Adagrad) or each row; null for SGD
  const int64_t* state_offsets;  // F: where the state of each feature's table begins
  const void* const* gradients;  // B: the gradient of each sample's pooled row, total_dim columns
  Scalar gradient_type;
  float gradient_scale;  // gradients are multiplied by this
};

// A matrix with a row for each sample. Vector `v` of sample b begins at row b, column `v.column` of sources[v.source].
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
  // Writes the pooled rows of samples [first, stop): the first to `pooled`, the next ones `stride` numbers apart. Stops
  // at an id outside its table.
  BadId (*pool)(const Tables&, const Ids&, const float* weights, void* pooled, Scalar, int64_t stride, int64_t first,
                int64_t stop);
  // Updates those looked-up rows of a feature's table whose number is `part` modulo `parts`. A row's gradients are
  // summed in the order of the bags, so the result is the same for any number of parts.
  void (*update)(const Tables&, const Ids&, const Update&, int64_t feature, int64_t part, int64_t parts);
  // Writes rows [first, stop) of the output [B, D + P]: the dense vector, then each pair's dot product.
  void (*interact)(const Interaction&, void* output, Scalar, int64_t first, int64_t stop);
  // Writes the gradients of the vectors to `gradients`, which have the layout of interaction.sources.
  void (*interact_backward)(const Interaction&, const Source* gradients, const void* gradient, Scalar, int64_t first,
                            int64_t stop);
  // values += bias, then ReLU if `rectified`, for rows [first, stop) of a matrix that is `columns` wide.
  void (*add_bias)(void* values, Scalar, const float* bias, bool rectified, int64_t columns, int64_t first,
                   int64_t stop);
  // gradient = 0 where output <= 0, unless `output` is null; then sums = the sum of the gradient's rows [first, stop).
  void (*mask)(void* gradient, const void* output, Scalar, float* sums, int64_t columns, int64_t first, int64_t stop);
  // Writes floats uniform in [low, high): those that PyTorch's CPU generator gives from `seed`.
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
