// Operators of linear layers whose matrix products go through int16, as PyTorch sees them; see int16.h.
//
// B samples, N outputs, K inputs of a layer.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "int16.h"

namespace dlrm {
namespace {

// Not where DLRM_KERNELS names lesser instructions.
bool has_int16() {
#if defined(__x86_64__)
  const char* asked = std::getenv("DLRM_KERNELS");
  if (asked != nullptr && *asked != 0 && std::string(asked) != "AVX-512") return false;
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

void check_matrix(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat, name, ": got ", tensor.scalar_type(), ", expected float32");
  TORCH_CHECK_VALUE(tensor.is_contiguous() && tensor.is_cpu(), name, ": expected a contiguous tensor on the CPU");
  TORCH_CHECK_VALUE(tensor.dim() == 2, name, ": got ", tensor.sizes(), ", expected a matrix");
}

void check_pair(const at::Tensor& left, const char* left_name, int64_t left_size, const at::Tensor& right,
                const char* right_name, int64_t right_size) {
  TORCH_CHECK(has_int16(), "int16 products: this CPU has no AVX-512 VNNI, or DLRM_KERNELS names lesser instructions");
  TORCH_CHECK_VALUE(left_size == right_size, left_name, " and ", right_name, ": got ", left.sizes(), " and ",
                    right.sizes(), ", which do not fit each other");
}

#if defined(__x86_64__)

constexpr int64_t kTasksPerThread = 2;
constexpr int64_t kSlice = 32 * int16::kBlock;  // samples at once in a weight's gradient: bounds the scratch memory

// Calls prepare(task) for all its tasks, and when these are done multiply(slot, task) for all of its own, as threads come
// free; calls at the same time have different slots. One parallel region: a thread that comes late is not waited for.
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

// Rows of a part of a product, so that there are several parts for each thread.
int64_t rows_of_part(int64_t rows, int64_t parts_beside) {
  const int64_t wanted = std::max<int64_t>(1, kTasksPerThread * at::get_num_threads() / parts_beside);
  const int64_t tiles = rows / wanted / int16::kRowTile;
  return std::clamp<int64_t>(tiles * int16::kRowTile, int16::kRowTile, int16::kRowChunk);
}

int64_t parts_of(int64_t size, int64_t part) { return (size + part - 1) / part; }

// An operand with the memory that it lies in.
struct Stored : int16::Operand {
  at::Tensor memory;

  Stored(int16::Layout layout, int64_t vectors, int64_t contracted)
      : int16::Operand{layout, vectors, contracted, nullptr, nullptr} {
    memory = at::empty({num_pairs() + num_scales()}, at::kInt);
    pairs = memory.mutable_data_ptr<int32_t>();
    scales = reinterpret_cast<float*>(pairs + num_pairs());
  }
};

at::Tensor partials() { return at::empty({at::get_num_threads(), int16::kPartialFloats}, at::kFloat); }

// out = left right^T, where prepare(part) quantizes a part of right; rows of left are quantized a few at a time by the
// thread that multiplies them.
template <class Prepare>
void multiply_rows(const at::Tensor& left, const int16::Operand& right, int64_t parts, Prepare prepare,
                   const int16::Output& output) {
  const int64_t rows = left.size(0), columns = right.vectors, own = rows_of_part(rows, 1);
  const float* source = left.const_data_ptr<float>();
  const at::Tensor memory = partials();
  std::vector<Stored> slots;
  for (int i = 0; i < at::get_num_threads(); ++i) slots.emplace_back(int16::Layout::kRows, own, right.contracted);
  share_out(parts, prepare, parts_of(rows, own), [&](int64_t slot, int64_t task) {
    int16::Operand part = slots[slot];
    part.vectors = std::min(own, rows - task * own);
    int16::quantize_rows(source + task * own * right.contracted, part);
    int16::Output here = output;
    here.out += task * own * output.stride;
    for (int64_t column = 0; column < columns; column += int16::kColumnChunk) {
      int16::multiply(part, right, 0, part.vectors, column, std::min<int64_t>(columns, column + int16::kColumnChunk),
                      here, memory.mutable_data_ptr<float>() + slot * int16::kPartialFloats);
    }
  });
}

void linear_into(at::Tensor& output, const at::Tensor& input, const at::Tensor& weight, const float* bias,
                 bool rectified) {
  const Stored right(int16::Layout::kWide, weight.size(0), weight.size(1));
  const float* source = weight.const_data_ptr<float>();
  multiply_rows(
      input, right, int16::wide_row_parts(right), [&](int64_t part) { int16::quantize_wide_rows(source, part, right); },
      {output.mutable_data_ptr<float>(), weight.size(0), bias, rectified, false});
}

void grad_input_into(at::Tensor& output, const at::Tensor& gradient, const at::Tensor& weight) {
  const Stored right(int16::Layout::kWide, weight.size(1), weight.size(0));
  const float* source = weight.const_data_ptr<float>();
  multiply_rows(
      gradient, right, int16::column_parts(right), [&](int64_t part) { int16::quantize_columns(source, part, right); },
      {output.mutable_data_ptr<float>(), weight.size(1), nullptr, false, false});
}

// out += gradient^T input of some samples, or = of the first.
void add_grad_weight(float* out, const float* gradient, int64_t outputs, const float* input, int64_t inputs,
                     int64_t samples, bool adds) {
  const Stored left(int16::Layout::kNarrow, outputs, samples), right(int16::Layout::kWide, inputs, samples);
  const int64_t left_parts = int16::column_parts(left), parts = left_parts + int16::column_parts(right);
  const int64_t across = parts_of(inputs, int16::kColumnChunk), own = rows_of_part(outputs, across);
  const at::Tensor memory = partials();
  const auto quantize = [&](int64_t part) {
    part < left_parts ? int16::quantize_columns(gradient, part, left)
                      : int16::quantize_columns(input, part - left_parts, right);
  };
  share_out(parts, quantize, parts_of(outputs, own) * across, [&](int64_t slot, int64_t task) {
    const int64_t row = task / across * own, column = task % across * int16::kColumnChunk;
    int16::multiply(left, right, row, std::min(outputs, row + own), column,
                    std::min<int64_t>(inputs, column + int16::kColumnChunk), {out, inputs, nullptr, false, adds},
                    memory.mutable_data_ptr<float>() + slot * int16::kPartialFloats);
  });
}

void grad_weight_into(at::Tensor& output, const at::Tensor& gradient, const at::Tensor& input) {
  const int64_t batch = input.size(0), outputs = gradient.size(1), inputs = input.size(1);
  for (int64_t first = 0; first < batch; first += kSlice) {
    add_grad_weight(output.mutable_data_ptr<float>(), gradient.const_data_ptr<float>() + first * outputs, outputs,
                    input.const_data_ptr<float>() + first * inputs, inputs, std::min(kSlice, batch - first), first > 0);
  }
}

#else

void linear_into(at::Tensor&, const at::Tensor&, const at::Tensor&, const float*, bool) {}
void grad_input_into(at::Tensor&, const at::Tensor&, const at::Tensor&) {}
void grad_weight_into(at::Tensor&, const at::Tensor&, const at::Tensor&) {}

#endif

// input[B, K] weight[N, K]^T + bias[N], then where `rectified` the larger of it and 0.
at::Tensor linear(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias, bool rectified) {
  check_matrix(input, "input");
  check_matrix(weight, "weight");
  check_pair(input, "input", input.size(1), weight, "weight", weight.size(1));
  TORCH_CHECK_VALUE(bias.scalar_type() == at::kFloat && bias.is_cpu() && bias.is_contiguous() && bias.dim() == 1 &&
                        bias.numel() == weight.size(0),
                    "bias: expected ", weight.size(0), " floats on the CPU");
  TORCH_CHECK_VALUE(weight.numel() > 0, "weight: got ", weight.sizes(), ", expected inputs and outputs");
  at::Tensor output = at::empty({input.size(0), weight.size(0)}, input.options());
  if (output.numel() > 0) linear_into(output, input, weight, bias.const_data_ptr<float>(), rectified);
  return output;
}

// gradient[B, N] weight[N, K]
at::Tensor grad_input(const at::Tensor& gradient, const at::Tensor& weight) {
  check_matrix(gradient, "gradient");
  check_matrix(weight, "weight");
  check_pair(gradient, "gradient", gradient.size(1), weight, "weight", weight.size(0));
  TORCH_CHECK_VALUE(weight.numel() > 0, "weight: got ", weight.sizes(), ", expected inputs and outputs");
  at::Tensor output = at::empty({gradient.size(0), weight.size(1)}, gradient.options());
  if (output.numel() > 0) grad_input_into(output, gradient, weight);
  return output;
}

// gradient[B, N]^T input[B, K]
at::Tensor grad_weight(const at::Tensor& gradient, const at::Tensor& input) {
  check_matrix(gradient, "gradient");
  check_matrix(input, "input");
  check_pair(gradient, "gradient", gradient.size(0), input, "input", input.size(0));
  if (gradient.size(0) == 0) return at::zeros({gradient.size(1), input.size(1)}, gradient.options());
  at::Tensor output = at::empty({gradient.size(1), input.size(1)}, gradient.options());
  if (output.numel() > 0) grad_weight_into(output, gradient, input);
  return output;
}

TORCH_LIBRARY_FRAGMENT(dlrm, m) {
  m.def("has_int16() -> bool", has_int16);
  m.def("int16_linear(Tensor input, Tensor weight, Tensor bias, bool rectified) -> Tensor");
  m.def("int16_grad_input(Tensor gradient, Tensor weight) -> Tensor");
  m.def("int16_grad_weight(Tensor gradient, Tensor input) -> Tensor");
}

TORCH_LIBRARY_IMPL(dlrm, CPU, m) {
  m.impl("int16_linear", linear);
  m.impl("int16_grad_input", grad_input);
  m.impl("int16_grad_weight", grad_weight);
}

}  // namespace
}  // namespace dlrm
