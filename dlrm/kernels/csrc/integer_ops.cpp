// Operators of linear layers whose matrix products go through int16 or int8, as PyTorch sees them; see integer.h.
//
// Shapes: B samples, N outputs, K inputs of a layer.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "integer.h"

namespace dlrm {
namespace {

// Whether DLRM_KERNELS is unset, or names an instruction set that begins with `instructions`.
bool may_use(const char* instructions) {
  const char* asked = std::getenv("DLRM_KERNELS");
  return asked == nullptr || *asked == 0 || std::string(asked).rfind(instructions, 0) == 0;
}

bool has_vnni() {
#if defined(__x86_64__)
  if (!may_use("AVX-512")) return false;
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

void check_matrix(const at::Tensor& tensor, const char* name, at::ScalarType type) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == type, name, ": got ", tensor.scalar_type(), ", expected ",
                   type == at::kFloat ? "float32" : "bfloat16");
  TORCH_CHECK_VALUE(tensor.is_contiguous() && tensor.is_cpu(), name, ": expected a contiguous tensor on the CPU");
  TORCH_CHECK_VALUE(tensor.dim() == 2, name, ": got ", tensor.sizes(), ", expected a matrix");
}

// Checks two matrices that are to be multiplied: dimension left_dim of one is as large as right_dim of the other.
void check_pair(const at::Tensor& left, const char* left_name, int64_t left_dim, const at::Tensor& right,
                const char* right_name, int64_t right_dim, at::ScalarType type) {
  check_matrix(left, left_name, type);
  check_matrix(right, right_name, type);
  TORCH_CHECK(has_vnni(), "integer products: this CPU has no AVX-512 VNNI, or DLRM_KERNELS names lesser instructions");
  TORCH_CHECK_VALUE(left.size(left_dim) == right.size(right_dim), left_name, " and ", right_name, ": got ",
                    left.sizes(), " and ", right.sizes(), ", which do not fit each other");
}

void check_bias(const at::Tensor& bias, const char* name, int64_t outputs) {
  TORCH_CHECK_VALUE(bias.scalar_type() == at::kFloat && bias.is_cpu() && bias.is_contiguous() && bias.dim() == 1 &&
                        bias.numel() == outputs,
                    name, ": expected ", outputs, " floats on the CPU");
}

#if defined(__x86_64__)

using integer::After;
using integer::BFloat16;
using integer::Layout;
using integer::Operand;
using integer::Output;

constexpr int64_t kTasksPerThread = 2;
constexpr int64_t kBlocksOfSlice = 32;  // blocks of samples multiplied at once for a weight's gradient: bounds memory

// Calls prepare(task) for each of `preparations` tasks; when all are done, multiply(slot, task) for each of `products`
// tasks. A thread takes the next task when it has done one. Calls that run at the same time have different slots.
//
// Both phases are one parallel region with one counter: a thread that starts late finds its tasks taken, and nobody
// waits for it. Threads wait only while a preparation is still running.
template <class Prepare, class Multiply>
void share_out(int64_t preparations, Prepare prepare, int64_t products, Multiply multiply) {
  const int64_t tasks = preparations + products;
  std::atomic<int64_t> next{0}, prepared{0};
  at::parallel_for(0, std::min<int64_t>(tasks, at::get_num_threads()), 1, [&](int64_t slot, int64_t) {
    int64_t task = next++;
    for (; task < preparations; task = next++) {
      prepare(task);
      prepared.fetch_add(1, std::memory_order_release);
    }
    while (prepared.load(std::memory_order_acquire) < preparations) std::this_thread::yield();
    for (; task < tasks; task = next++) multiply(slot, task - preparations);
  });
}

// Rows of a part of a product, such that there are several parts for each thread.
int64_t rows_of_part(int64_t rows, int64_t parts_beside) {
  const int64_t wanted = std::max<int64_t>(1, kTasksPerThread * at::get_num_threads() / parts_beside);
  const int64_t tiles = rows / wanted / integer::kRowTile;
  return std::clamp<int64_t>(tiles * integer::kRowTile, integer::kRowTile, integer::kRowChunk);
}

int64_t parts_of(int64_t size, int64_t part) { return (size + part - 1) / part; }

template <class Value>
const Value* values(const at::Tensor& tensor) {
  return static_cast<const Value*>(tensor.const_data_ptr());
}

bool has_bf16() {
  static const bool has = may_use("AVX-512 BF16") && __builtin_cpu_supports("avx512bf16");
  return has;
}

template <class Format, class Value>
void multiply(const Operand<Format>& left, const Operand<Format>& right, int64_t first, int64_t stop, int64_t column,
              int64_t column_stop, const Output<Value>& output, float* partial) {
  if constexpr (std::is_same_v<Value, BFloat16>) {
    if (has_bf16()) {
      return integer::with_bf16::multiply(left, right, first, stop, column, column_stop, output, partial);
    }
  }
  integer::without_bf16::multiply(left, right, first, stop, column, column_stop, output, partial);
}

// An operand with its memory.
template <class Format>
struct Stored : Operand<Format> {
  at::Tensor memory;

  Stored(Layout layout, int64_t vectors, int64_t contracted)
      : Operand<Format>{layout, vectors, contracted, nullptr, nullptr, nullptr, nullptr} {
    memory = at::empty({this->num_dwords() + 3 * this->num_scales()}, at::kInt);
    this->dwords = memory.mutable_data_ptr<int32_t>();
    this->scales = reinterpret_cast<float*>(this->dwords + this->num_dwords());
    this->offsets = this->scales + this->num_scales();
    this->sums = this->offsets + this->num_scales();
  }
};

at::Tensor partials() { return at::empty({at::get_num_threads(), integer::kPartialFloats}, at::kFloat); }

// out = left right^T. prepare(part) quantizes one of the `parts` of right; the rows of left are quantized by the thread
// that multiplies them, a few at a time, so that they are in its caches.
template <class Format, class Prepare, class Value>
void multiply_rows(const at::Tensor& left, const Operand<Format>& right, int64_t parts, Prepare prepare,
                   const Output<Value>& output) {
  const int64_t rows = left.size(0), columns = right.vectors, own = rows_of_part(rows, 1);
  const auto* source = values<typename Format::Source>(left);
  const at::Tensor memory = partials();
  std::vector<Stored<Format>> slots;
  for (int i = 0; i < at::get_num_threads(); ++i) slots.emplace_back(Layout::kRows, own, right.contracted);
  share_out(parts, prepare, parts_of(rows, own), [&](int64_t slot, int64_t task) {
    Operand<Format> part = slots[slot];
    part.vectors = std::min(own, rows - task * own);
    integer::quantize_rows(source + task * own * right.contracted, part);
    Output<Value> here = output;
    here.out += task * own * output.stride;
    for (int64_t column = 0; column < columns; column += integer::kColumnChunk) {
      multiply(part, right, 0, part.vectors, column, std::min<int64_t>(columns, column + integer::kColumnChunk), here,
               memory.mutable_data_ptr<float>() + slot * integer::kPartialFloats);
    }
  });
}

template <class Format>
void linear_into(at::Tensor& output, const at::Tensor& input, const at::Tensor& weight, const float* bias,
                 bool rectified) {
  using Value = typename Format::Source;
  const Stored<Format> right(Layout::kWide, weight.size(0), weight.size(1));
  const auto quantize = [&](int64_t part) { integer::quantize_wide_rows(values<Value>(weight), part, right); };
  multiply_rows(input, right, integer::wide_row_parts(right), quantize,
                Output<Value>{static_cast<Value*>(output.mutable_data_ptr()), weight.size(0), bias,
                              rectified ? After::kRectify : After::kNothing});
}

template <class Format>
void grad_input_into(at::Tensor& output, const at::Tensor& gradient, const at::Tensor& weight, After after) {
  using Value = typename Format::Source;
  const Stored<Format> right(Layout::kWide, weight.size(1), weight.size(0));
  const auto quantize = [&](int64_t part) { integer::quantize_columns(values<Value>(weight), part, right); };
  multiply_rows(gradient, right, integer::column_parts(right), quantize,
                Output<Value>{static_cast<Value*>(output.mutable_data_ptr()), weight.size(1), nullptr, after});
}

// out += gradient^T input over some samples, and bias += the sum of their gradients; = for the first samples, if not
// `adds`.
template <class Format>
void add_grad_parameters(float* out, float* bias, const typename Format::Source* gradient, int64_t outputs,
                         const typename Format::Source* input, int64_t inputs, int64_t samples, bool adds) {
  const Stored<Format> left(Layout::kNarrow, outputs, samples), right(Layout::kWide, inputs, samples);
  const int64_t left_parts = integer::column_parts(left), parts = left_parts + integer::column_parts(right);
  const int64_t across = parts_of(inputs, integer::kColumnChunk), own = rows_of_part(outputs, across);
  const at::Tensor memory = partials();
  const auto quantize = [&](int64_t part) {
    part < left_parts ? integer::quantize_columns(gradient, part, left)
                      : integer::quantize_columns(input, part - left_parts, right);
  };
  share_out(parts, quantize, parts_of(outputs, own) * across, [&](int64_t slot, int64_t task) {
    const int64_t row = task / across * own, column = task % across * integer::kColumnChunk;
    multiply(left, right, row, std::min(outputs, row + own), column,
             std::min<int64_t>(inputs, column + integer::kColumnChunk),
             Output<float>{out, inputs, nullptr, After::kNothing, adds},
             memory.mutable_data_ptr<float>() + slot * integer::kPartialFloats);
  });
  if (!adds) std::fill_n(bias, outputs, 0.0f);
  for (int64_t block = 0; block < left.blocks(); ++block) {
    for (int64_t n = 0; n < outputs; ++n) bias[n] += left.sums[block * left.padded() + n];
  }
}

template <class Format>
void grad_parameters_into(at::Tensor& grad_weight, at::Tensor& grad_bias, const at::Tensor& gradient,
                          const at::Tensor& input) {
  using Value = typename Format::Source;
  constexpr int64_t kSlice = kBlocksOfSlice * Operand<Format>::kBlock;
  const int64_t batch = input.size(0), outputs = gradient.size(1), inputs = input.size(1);
  for (int64_t first = 0; first < batch; first += kSlice) {
    add_grad_parameters<Format>(grad_weight.mutable_data_ptr<float>(), grad_bias.mutable_data_ptr<float>(),
                                values<Value>(gradient) + first * outputs, outputs,
                                values<Value>(input) + first * inputs, inputs, std::min(kSlice, batch - first),
                                first > 0);
  }
}

#else

template <class Format>
void linear_into(at::Tensor&, const at::Tensor&, const at::Tensor&, const float*, bool) {}
template <class Format>
void grad_input_into(at::Tensor&, const at::Tensor&, const at::Tensor&, After) {}
template <class Format>
void grad_parameters_into(at::Tensor&, at::Tensor&, const at::Tensor&, const at::Tensor&) {}

#endif

template <class Format>
constexpr at::ScalarType kType = std::is_same_v<Format, integer::Int8> ? at::kBFloat16 : at::kFloat;

// Returns input[B, K] weight[N, K]^T + bias[N], with a ReLU if `rectified`.
template <class Format>
at::Tensor linear(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias, bool rectified) {
  check_pair(input, "input", 1, weight, "weight", 1, kType<Format>);
  check_bias(bias, "bias", weight.size(0));
  TORCH_CHECK_VALUE(weight.numel() > 0, "weight: got ", weight.sizes(), ", expected inputs and outputs");
  at::Tensor output = at::empty({input.size(0), weight.size(0)}, input.options());
  if (output.numel() > 0) linear_into<Format>(output, input, weight, bias.const_data_ptr<float>(), rectified);
  return output;
}

// Returns gradient[B, N] weight[N, K].
template <class Format>
at::Tensor grad_input(const at::Tensor& gradient, const at::Tensor& weight) {
  check_pair(gradient, "gradient", 1, weight, "weight", 0, kType<Format>);
  TORCH_CHECK_VALUE(weight.numel() > 0, "weight: got ", weight.sizes(), ", expected inputs and outputs");
  at::Tensor output = at::empty({gradient.size(0), weight.size(1)}, gradient.options());
  if (output.numel() > 0) grad_input_into<Format>(output, gradient, weight, After::kNothing);
  return output;
}

// output[B, K] = gradient[B, N] weight[N, K], but 0 where output <= 0: the gradient before the ReLU that gave `output`.
template <class Format>
void masked_grad_input_(const at::Tensor& gradient, const at::Tensor& weight, at::Tensor output) {
  check_pair(gradient, "gradient", 1, weight, "weight", 0, kType<Format>);
  check_matrix(output, "output", kType<Format>);
  TORCH_CHECK_VALUE(output.size(0) == gradient.size(0) && output.size(1) == weight.size(1), "output: got ",
                    output.sizes(), ", expected [", gradient.size(0), ", ", weight.size(1), "]");
  TORCH_CHECK_VALUE(weight.numel() > 0, "weight: got ", weight.sizes(), ", expected inputs and outputs");
  if (output.numel() > 0) grad_input_into<Format>(output, gradient, weight, After::kMask);
}

// grad_weight[N, K] = gradient[B, N]^T input[B, K], grad_bias[N] = the sum of the gradients
template <class Format>
void grad_parameters(const at::Tensor& gradient, const at::Tensor& input, at::Tensor grad_weight,
                     at::Tensor grad_bias) {
  check_pair(gradient, "gradient", 0, input, "input", 0, kType<Format>);
  check_matrix(grad_weight, "grad_weight", at::kFloat);
  TORCH_CHECK_VALUE(grad_weight.size(0) == gradient.size(1) && grad_weight.size(1) == input.size(1),
                    "grad_weight: got ", grad_weight.sizes(), ", expected [", gradient.size(1), ", ", input.size(1),
                    "]");
  check_bias(grad_bias, "grad_bias", gradient.size(1));
  if (gradient.size(0) == 0 || grad_weight.numel() == 0) {
    grad_weight.zero_();
    at::sum_out(grad_bias, gradient, 0, false, at::kFloat);
  } else {
    grad_parameters_into<Format>(grad_weight, grad_bias, gradient, input);
  }
}

TORCH_LIBRARY_FRAGMENT(dlrm, m) {
  m.def("has_vnni() -> bool", has_vnni);
  m.def("int16_linear(Tensor input, Tensor weight, Tensor bias, bool rectified) -> Tensor");
  m.def("int16_grad_input(Tensor gradient, Tensor weight) -> Tensor");
  m.def("int16_masked_grad_input_(Tensor gradient, Tensor weight, Tensor(a!) output) -> ()");
  m.def("int16_grad_parameters(Tensor gradient, Tensor input, Tensor(a!) grad_weight, Tensor(b!) grad_bias) -> ()");
  m.def("int8_linear(Tensor input, Tensor weight, Tensor bias, bool rectified) -> Tensor");
  m.def("int8_grad_input(Tensor gradient, Tensor weight) -> Tensor");
  m.def("int8_masked_grad_input_(Tensor gradient, Tensor weight, Tensor(a!) output) -> ()");
  m.def("int8_grad_parameters(Tensor gradient, Tensor input, Tensor(a!) grad_weight, Tensor(b!) grad_bias) -> ()");
}

TORCH_LIBRARY_IMPL(dlrm, CPU, m) {
  m.impl("int16_linear", linear<integer::Int16>);
  m.impl("int16_grad_input", grad_input<integer::Int16>);
  m.impl("int16_masked_grad_input_", masked_grad_input_<integer::Int16>);
  m.impl("int16_grad_parameters", grad_parameters<integer::Int16>);
  m.impl("int8_linear", linear<integer::Int8>);
  m.impl("int8_grad_input", grad_input<integer::Int8>);
  m.impl("int8_masked_grad_input_", masked_grad_input_<integer::Int8>);
  m.impl("int8_grad_parameters", grad_parameters<integer::Int8>);
}

}  // namespace
}  // namespace dlrm
