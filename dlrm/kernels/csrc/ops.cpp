// The operators of kernels.h, as PyTorch sees them: arguments are checked, and the work is shared among threads.
//
// Shapes: B samples, F features, D columns of a table, V vectors that interact, P = V * (V - 1) / 2 pairs.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <string>
#include <vector>

#include "kernels.h"

namespace dlrm {
namespace {

constexpr int64_t kUnitsPerThread = 4;
constexpr int64_t kMostSamplesPerTask = 128;
constexpr int64_t kRowsPerSum = 256;

// The loops for the best instruction set that this CPU has, or for the lesser one that DLRM_KERNELS names.
const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
#if defined(__x86_64__)
    const char* asked = std::getenv("DLRM_KERNELS");
    const std::string most = asked == nullptr || *asked == 0 ? "AVX-512 BF16" : asked;
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool is_lesser = most == "baseline" || most == "AVX2";
    if (has_avx512 && __builtin_cpu_supports("avx512bf16") && most == "AVX-512 BF16") return avx512_bf16::kernels;
    if (has_avx512 && !is_lesser) return avx512::kernels;
    if (has_avx2 && most != "baseline") return avx2::kernels;
#endif
    return baseline::kernels;
  }();
  return chosen;
}

std::string instruction_set() { return kernels().name; }

// Samples of a task, such that there are several tasks for each thread.
int64_t samples_per_task(int64_t batch) {
  return std::clamp<int64_t>(batch / (kUnitsPerThread * at::get_num_threads()), 8, kMostSamplesPerTask);
}

// Calls body(first, stop) for tasks that cover [0, size). A thread takes the next task when it has done one, so that a
// core that is busy with something else, such as the next batch, does not hold up the others.
template <class Body>
void share(int64_t size, int64_t per_task, Body body) {
  const int64_t tasks = (size + per_task - 1) / per_task;
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(tasks, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    for (int64_t task; (task = next++) < tasks;) body(task * per_task, std::min(size, (task + 1) * per_task));
  });
}

Scalar scalar_of(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kBFloat16, name, ": got ",
                   tensor.scalar_type(), ", expected float32 or bfloat16");
  return tensor.scalar_type() == at::kFloat ? Scalar::kFloat : Scalar::kBFloat16;
}

Integer integer_of(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kInt || tensor.scalar_type() == at::kLong, name, ": got ",
                   tensor.scalar_type(), ", expected int32 or int64");
  return tensor.scalar_type() == at::kInt ? Integer::kInt32 : Integer::kInt64;
}

void check_contiguous(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_VALUE(tensor.is_contiguous() && tensor.is_cpu(), name, ": expected a contiguous tensor on the CPU");
}

// The tables and ids of a lookup, checked, with the tensors that hold them.
struct Lookups {
  at::Tensor ids, offsets, weight_offsets, rows, dim_offsets;
  Tables tables;
  Ids all;

  Lookups(const at::Tensor& ids_, const at::Tensor& offsets_, const at::Tensor& weights,
          const at::Tensor& weight_offsets_, const at::Tensor& rows_, const at::Tensor& dim_offsets_)
      : ids(ids_.contiguous()), offsets(offsets_.contiguous()), weight_offsets(weight_offsets_), rows(rows_),
        dim_offsets(dim_offsets_) {
    const int64_t features = rows.numel();
    for (const auto& [tensor, name] : {std::pair{&weight_offsets, "weight_offsets"}, {&rows, "rows"},
                                       {&dim_offsets, "dim_offsets"}}) {
      check_contiguous(*tensor, name);
      TORCH_CHECK_TYPE(tensor->scalar_type() == at::kLong, name, ": expected int64");
    }
    check_contiguous(weights, "weights");
    TORCH_CHECK_TYPE(weights.scalar_type() == at::kFloat, "weights: expected float32");
    TORCH_CHECK_VALUE(features > 0 && weight_offsets.numel() == features && dim_offsets.numel() == features + 1,
                      "weight_offsets, rows, dim_offsets: expected F, F and F + 1 numbers");
    TORCH_CHECK_VALUE((offsets.numel() - 1) % features == 0 && offsets.numel() > 0, "offsets: got ", offsets.numel(),
                      " numbers, expected a multiple of ", features, " features and one more");
    const int64_t* dims = dim_offsets.const_data_ptr<int64_t>();
    TORCH_CHECK_VALUE(dims[0] == 0, "dim_offsets: got ", dims[0], " first, expected 0");
    for (int64_t f = 0; f < features; ++f) {
      const int64_t size = rows.const_data_ptr<int64_t>()[f] * (dims[f + 1] - dims[f]);
      const int64_t start = weight_offsets.const_data_ptr<int64_t>()[f];
      TORCH_CHECK_VALUE(start >= 0 && size >= 0 && start + size <= weights.numel(), "weights: got ", weights.numel(),
                        " numbers, too few for feature ", f);
    }
    tables = {features, (offsets.numel() - 1) / features, dims[features], weight_offsets.const_data_ptr<int64_t>(),
              rows.const_data_ptr<int64_t>(), dims};
    all = {ids.const_data_ptr(), integer_of(ids, "ids"), offsets.const_data_ptr(), integer_of(offsets, "offsets")};
    check_offsets();
  }

  int64_t offset(int64_t bag) const {
    return all.offset_type == Integer::kInt32 ? static_cast<const int32_t*>(all.offsets)[bag]
                                              : static_cast<const int64_t*>(all.offsets)[bag];
  }

  void check_offsets() const {
    const int64_t bags = tables.num_features * tables.batch_size;
    bool ascending = offset(0) >= 0 && offset(bags) <= ids.numel();
    for (int64_t bag = 0; bag < bags; ++bag) ascending &= offset(bag) <= offset(bag + 1);
    TORCH_CHECK_VALUE(ascending, "offsets: expected ascending numbers from 0 to ", ids.numel());
  }
};

// The rows of all samples, cut into blocks: block k holds samples firsts[k] to firsts[k + 1]. Each is a matrix of its
// own, whose rows may be any distance apart.
struct Blocks {
  Scalar type;
  std::vector<at::Tensor> matrices;
  std::vector<int64_t> firsts;  // the first sample of each block, then the number of samples

  Blocks(at::TensorList given, const Tables& tables, const char* name) : matrices(given.vec()), firsts{0} {
    TORCH_CHECK_VALUE(!matrices.empty(), name, ": expected one matrix or more");
    type = scalar_of(matrices[0], name);
    for (const at::Tensor& matrix : matrices) {
      TORCH_CHECK_VALUE(matrix.is_cpu() && matrix.dim() == 2 && matrix.size(1) == tables.total_dim &&
                            matrix.scalar_type() == matrices[0].scalar_type() &&
                            (tables.total_dim < 2 || matrix.stride(1) == 1),
                        name, ": got ", matrix.sizes(), ", expected rows of ", tables.total_dim,
                        " numbers of one type");
      firsts.push_back(firsts.back() + matrix.size(0));
    }
    TORCH_CHECK_VALUE(firsts.back() == tables.batch_size, name, ": got ", firsts.back(), " rows, expected ",
                      tables.batch_size);
  }

  char* row(size_t block, int64_t sample) const {
    const at::Tensor& matrix = matrices[block];
    return static_cast<char*>(matrix.data_ptr()) + (sample - firsts[block]) * matrix.stride(0) * matrix.itemsize();
  }
};

// Fills the blocks `pooled` with the sums of each bag's rows.
void pool(const at::Tensor& weights, const at::Tensor& weight_offsets, const at::Tensor& rows,
          const at::Tensor& dim_offsets, const at::Tensor& ids, const at::Tensor& offsets, at::TensorList pooled) {
  const Lookups lookups(ids, offsets, weights, weight_offsets, rows, dim_offsets);
  const Tables& tables = lookups.tables;
  const Blocks blocks(pooled, tables, "pooled");
  std::atomic<int64_t> bad_feature{-1}, bad_id{0};
  share(tables.batch_size, samples_per_task(tables.batch_size), [&](int64_t first, int64_t stop) {
    for (size_t block = 0; block < blocks.matrices.size(); ++block) {
      const int64_t from = std::max(first, blocks.firsts[block]), to = std::min(stop, blocks.firsts[block + 1]);
      if (from >= to) continue;
      const BadId bad = kernels().pool(tables, lookups.all, weights.const_data_ptr<float>(), blocks.row(block, from),
                                       blocks.type, blocks.matrices[block].stride(0), from, to);
      if (bad.feature >= 0) {
        bad_id = bad.id;
        bad_feature = bad.feature;
      }
    }
  });
  TORCH_CHECK_INDEX(bad_feature < 0, "id ", bad_id.load(), " of feature ", bad_feature.load(),
                    " is outside its table of ", bad_feature < 0 ? 0 : tables.rows[bad_feature], " rows");
}

// The rows of a feature's table whose number is `part` modulo `parts`.
struct Unit {
  int64_t feature, part, parts;
};

// Units of nearly equal work, several for each thread. No row is in two of them, so threads need no locks.
std::vector<Unit> units_of(const Lookups& lookups) {
  const Tables& tables = lookups.tables;
  const int64_t most = std::max<int64_t>(1, lookups.ids.numel() / (kUnitsPerThread * at::get_num_threads()));
  std::vector<Unit> units;
  for (int64_t f = 0; f < tables.num_features; ++f) {
    const int64_t count = lookups.offset((f + 1) * tables.batch_size) - lookups.offset(f * tables.batch_size);
    const int64_t parts = std::max<int64_t>(1, count / most);
    for (int64_t part = 0; part < parts; ++part) units.push_back({f, part, parts});
  }
  return units;
}

void update(at::Tensor weights, std::optional<at::Tensor> state, const std::optional<at::Tensor>& state_offsets,
            const at::Tensor& weight_offsets, const at::Tensor& rows, const at::Tensor& dim_offsets,
            const at::Tensor& ids, const at::Tensor& offsets, at::TensorList gradients, int64_t optimizer,
            double learning_rate, double eps, double gradient_scale) {
  const Lookups lookups(ids, offsets, weights, weight_offsets, rows, dim_offsets);
  const Tables& tables = lookups.tables;
  TORCH_CHECK_VALUE(optimizer >= 0 && optimizer <= static_cast<int64_t>(Optimizer::kRowwiseAdagrad), "optimizer: got ",
                    optimizer);
  const auto kind = static_cast<Optimizer>(optimizer);
  const Blocks blocks(gradients, tables, "gradients");
  std::vector<const void*> rows_of_gradients(tables.batch_size);
  for (size_t block = 0; block < blocks.matrices.size(); ++block) {
    for (int64_t b = blocks.firsts[block]; b < blocks.firsts[block + 1]; ++b) {
      rows_of_gradients[b] = blocks.row(block, b);
    }
  }
  TORCH_CHECK_VALUE((kind == Optimizer::kSgd) == !state.has_value() && state.has_value() == state_offsets.has_value(),
                    "state: expected one, with its offsets, unless the optimizer is SGD");
  if (state.has_value()) {
    check_contiguous(*state, "state");
    check_contiguous(*state_offsets, "state_offsets");
    TORCH_CHECK_VALUE(state_offsets->scalar_type() == at::kLong && state_offsets->numel() == tables.num_features,
                      "state_offsets: expected ", tables.num_features, " of int64");
    for (int64_t f = 0; f < tables.num_features; ++f) {
      const int64_t width = kind == Optimizer::kAdagrad ? tables.dim_offsets[f + 1] - tables.dim_offsets[f] : 1;
      const int64_t start = state_offsets->const_data_ptr<int64_t>()[f], stop = start + tables.rows[f] * width;
      TORCH_CHECK_VALUE(start >= 0 && stop <= state->numel(), "state: got ", state->numel(), " numbers, expected ",
                        stop);
    }
  }
  const Update step{kind,
                    static_cast<float>(learning_rate),
                    static_cast<float>(eps),
                    weights.mutable_data_ptr<float>(),
                    state.has_value() ? state->mutable_data_ptr<float>() : nullptr,
                    state_offsets.has_value() ? state_offsets->const_data_ptr<int64_t>() : nullptr,
                    rows_of_gradients.data(),
                    blocks.type,
                    static_cast<float>(gradient_scale)};
  const std::vector<Unit> units = units_of(lookups);
  share(units.size(), 1, [&](int64_t i, int64_t) {
    kernels().update(tables, lookups.all, step, units[i].feature, units[i].part, units[i].parts);
  });
}

// The vectors that interact, checked: the dense matrix is the first, the others are blocks of columns of other
// matrices.
struct Vectors {
  std::vector<at::Tensor> matrices;
  std::vector<Source> sources;
  std::vector<Vector> vectors;
  Interaction interaction;

  // For each matrix but the first, `columns` holds the number of its vectors, then the first column of each.
  Vectors(std::vector<at::Tensor> given, at::IntArrayRef columns) : matrices(std::move(given)) {
    const int64_t batch = matrices[0].size(0), dim = matrices[0].size(1);
    vectors.push_back({0, 0});
    size_t at = 0;
    for (size_t m = 0; m < matrices.size(); ++m) {
      at::Tensor& matrix = matrices[m];
      TORCH_CHECK_VALUE(matrix.is_cpu() && matrix.dim() == 2 && matrix.size(0) == batch,
                        "vectors: expected matrices of ", batch, " rows on the CPU");
      matrix = matrix.contiguous();
      sources.push_back({matrix.data_ptr(), scalar_of(matrix, "vectors"), matrix.size(1)});
      if (m == 0) continue;
      TORCH_CHECK_VALUE(at < columns.size() && at + columns[at] < columns.size(), "columns: too few numbers");
      std::vector<int64_t> starts;
      for (int64_t left = columns[at++]; left > 0; --left, ++at) {
        TORCH_CHECK_VALUE(columns[at] >= 0 && columns[at] + dim <= matrix.size(1), "columns: got ", columns[at],
                          ", expected ", dim, " columns from there in a matrix of ", matrix.size(1));
        vectors.push_back({static_cast<int32_t>(m), columns[at]});
        starts.push_back(columns[at]);
      }
      std::sort(starts.begin(), starts.end());
      for (size_t i = 1; i < starts.size(); ++i) {
        TORCH_CHECK_VALUE(starts[i] - starts[i - 1] >= dim, "columns: vectors from ", starts[i - 1], " and ", starts[i],
                          " overlap, expected ", dim, " columns each");
      }
    }
    interaction = {static_cast<int64_t>(vectors.size()), dim, sources.data(), vectors.data()};
  }
  Vectors(const Vectors&) = delete;

  int64_t batch() const { return matrices[0].size(0); }
  // Whether each column of a matrix belongs to a vector; vectors do not overlap.
  bool is_covered(size_t m) const {
    const auto of_matrix = [m](const Vector& vector) { return vector.source == static_cast<int32_t>(m); };
    return std::count_if(vectors.begin(), vectors.end(), of_matrix) * interaction.dim == matrices[m].size(1);
  }
  int64_t out_features() const {
    return interaction.dim + interaction.num_vectors * (interaction.num_vectors - 1) / 2;
  }
};

std::vector<at::Tensor> all_of(const at::Tensor& dense, const at::TensorList& others) {
  TORCH_CHECK_VALUE(dense.dim() == 2, "dense: expected a matrix");
  std::vector<at::Tensor> matrices{dense};
  matrices.insert(matrices.end(), others.begin(), others.end());
  return matrices;
}

at::Tensor interact(const at::Tensor& dense, at::TensorList others, at::IntArrayRef columns) {
  const Vectors vectors(all_of(dense, others), columns);
  at::Tensor output = at::empty({vectors.batch(), vectors.out_features()}, dense.options());
  void* out = output.mutable_data_ptr();
  const Scalar type = scalar_of(output, "dense");
  share(vectors.batch(), samples_per_task(vectors.batch()), [&](int64_t first, int64_t stop) {
    kernels().interact(vectors.interaction, out, type, first, stop);
  });
  return output;
}

void run_interact_backward(const Vectors& vectors, const std::vector<Source>& targets, const at::Tensor& gradient) {
  const at::Tensor own = gradient.contiguous();
  TORCH_CHECK_VALUE(own.dim() == 2 && own.size(0) == vectors.batch() && own.size(1) == vectors.out_features(),
                    "gradient: got ", own.sizes(), ", expected ", vectors.batch(), " x ", vectors.out_features());
  const Scalar type = scalar_of(own, "gradient");
  share(vectors.batch(), samples_per_task(vectors.batch()), [&](int64_t first, int64_t stop) {
    kernels().interact_backward(vectors.interaction, targets.data(), own.const_data_ptr(), type, first, stop);
  });
}

// Memory for the gradients of a matrix, in the layout of `source`.
Source target_of(at::Tensor& memory, const Source& source) {
  return {memory.mutable_data_ptr(), source.type, source.stride};
}

std::vector<at::Tensor> interact_backward(const at::Tensor& gradient, const at::Tensor& dense, at::TensorList others,
                                          at::IntArrayRef columns) {
  const Vectors vectors(all_of(dense, others), columns);
  std::vector<at::Tensor> gradients;
  std::vector<Source> targets;
  for (size_t m = 0; m < vectors.matrices.size(); ++m) {
    const at::Tensor& matrix = vectors.matrices[m];
    gradients.push_back(vectors.is_covered(m) ? at::empty_like(matrix) : at::zeros_like(matrix));
    targets.push_back(target_of(gradients.back(), vectors.sources[m]));
  }
  run_interact_backward(vectors, targets, gradient);
  return gradients;
}

// Returns the gradient of the dense vectors. The gradients of the others are written over them.
at::Tensor interact_backward_in_place(const at::Tensor& gradient, const at::Tensor& dense, at::TensorList others,
                                      at::IntArrayRef columns) {
  for (const at::Tensor& matrix : others) check_contiguous(matrix, "others");
  const Vectors vectors(all_of(dense, others), columns);
  at::Tensor dense_gradient = at::empty_like(vectors.matrices[0]);
  std::vector<Source> targets = vectors.sources;
  targets[0] = target_of(dense_gradient, vectors.sources[0]);
  for (size_t m = 1; m < vectors.matrices.size(); ++m) {
    TORCH_CHECK_VALUE(vectors.is_covered(m), "columns: matrix ", m - 1, " has columns outside all vectors");
  }
  run_interact_backward(vectors, targets, gradient);
  return dense_gradient;
}

void add_bias(at::Tensor values, const at::Tensor& bias, bool rectified) {
  check_contiguous(values, "values");
  check_contiguous(bias, "bias");
  const int64_t columns = values.size(-1), rows = values.numel() / std::max<int64_t>(1, columns);
  TORCH_CHECK_VALUE(bias.scalar_type() == at::kFloat && bias.numel() == columns, "bias: expected ", columns, " floats");
  const Scalar type = scalar_of(values, "values");
  share(rows, samples_per_task(rows), [&](int64_t first, int64_t stop) {
    kernels().add_bias(values.mutable_data_ptr(), type, bias.const_data_ptr<float>(), rectified, columns, first, stop);
  });
}

// Returns the sum of the rows of the masked gradient. Rows are summed in blocks of kRowsPerSum, then blocks are: the
// result is the same for any number of threads.
at::Tensor mask(at::Tensor gradient, const std::optional<at::Tensor>& output) {
  check_contiguous(gradient, "gradient");
  const int64_t rows = gradient.size(0), columns = gradient.size(1), blocks = (rows + kRowsPerSum - 1) / kRowsPerSum;
  if (output.has_value()) {
    check_contiguous(*output, "output");
    TORCH_CHECK_VALUE(output->sizes() == gradient.sizes() && output->scalar_type() == gradient.scalar_type(),
                      "output: expected the gradient's shape and type");
  }
  at::Tensor sums = at::empty({std::max<int64_t>(1, blocks), columns}, gradient.options().dtype(at::kFloat));
  if (blocks == 0) return sums.zero_().sum(0);
  const void* own = output.has_value() ? output->const_data_ptr() : nullptr;
  const Scalar type = scalar_of(gradient, "gradient");
  share(rows, kRowsPerSum, [&](int64_t first, int64_t stop) {
    float* sum = sums.mutable_data_ptr<float>() + first / kRowsPerSum * columns;
    kernels().mask(gradient.mutable_data_ptr(), own, type, sum, columns, first, stop);
  });
  return sums.sum(0);
}

void draw(at::Tensor values, int64_t seed, double low, double high) {
  check_contiguous(values, "values");
  TORCH_CHECK_TYPE(values.scalar_type() == at::kFloat, "values: got ", values.scalar_type(), ", expected float32");
  kernels().draw(values.mutable_data_ptr<float>(), values.numel(), static_cast<uint32_t>(seed), static_cast<float>(low),
                 static_cast<float>(high));
}

TORCH_LIBRARY(dlrm, m) {
  m.def("instruction_set() -> str", instruction_set);
  m.def(
      "pool(Tensor weights, Tensor weight_offsets, Tensor rows, Tensor dim_offsets, Tensor ids, Tensor offsets, "
      "Tensor(a!)[] pooled) -> ()");
  m.def(
      "update(Tensor(a!) weights, Tensor(b!)? state, Tensor? state_offsets, Tensor weight_offsets, Tensor rows, "
      "Tensor dim_offsets, Tensor ids, Tensor offsets, Tensor[] gradients, int optimizer, float learning_rate, "
      "float eps, float gradient_scale=1.0) -> ()");
  m.def("interact(Tensor dense, Tensor[] others, int[] columns) -> Tensor");
  m.def("interact_backward(Tensor gradient, Tensor dense, Tensor[] others, int[] columns) -> Tensor[]");
  m.def("interact_backward_(Tensor gradient, Tensor dense, Tensor(a!)[] others, int[] columns) -> Tensor");
  m.def("add_bias_(Tensor(a!) values, Tensor bias, bool rectified) -> ()");
  m.def("mask_(Tensor(a!) gradient, Tensor? output) -> Tensor");
  m.def("draw_(Tensor(a!) values, int seed, float low, float high) -> ()");
}

TORCH_LIBRARY_IMPL(dlrm, CPU, m) {
  m.impl("pool", pool);
  m.impl("update", update);
  m.impl("interact", interact);
  m.impl("interact_backward", interact_backward);
  m.impl("interact_backward_", interact_backward_in_place);
  m.impl("add_bias_", add_bias);
  m.impl("mask_", mask);
  m.impl("draw_", draw);
}

}  // namespace
}  // namespace dlrm
