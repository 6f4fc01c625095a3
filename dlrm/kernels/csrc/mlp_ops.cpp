// All layers of an MLP, forward and backward; see dlrm/kernels/mlp.py. The loop over layers is in C++ because each
// operator empties the caches, so that the Python interpreter would need a while to call the next one.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <vector>

namespace dlrm {
namespace {

using at::Tensor;
using Formats = c10::List<std::string>;  // for each layer: int16, int8, or empty for no integers

// Operators are called through the dispatcher, so that a profile shows each of them.
template <class Signature>
c10::TypedOperatorHandle<Signature> find(const std::string& name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(("dlrm::" + name).c_str(), "").typed<Signature>();
}

struct IntegerProducts {
  c10::TypedOperatorHandle<Tensor(const Tensor&, const Tensor&, const Tensor&, bool)> linear;
  c10::TypedOperatorHandle<Tensor(const Tensor&, const Tensor&)> grad_input;
  c10::TypedOperatorHandle<void(const Tensor&, const Tensor&, Tensor)> masked_grad_input_;
  c10::TypedOperatorHandle<void(const Tensor&, const Tensor&, Tensor, Tensor)> grad_parameters;

  explicit IntegerProducts(const std::string& format)
      : linear(find<Tensor(const Tensor&, const Tensor&, const Tensor&, bool)>(format + "_linear")),
        grad_input(find<Tensor(const Tensor&, const Tensor&)>(format + "_grad_input")),
        masked_grad_input_(find<void(const Tensor&, const Tensor&, Tensor)>(format + "_masked_grad_input_")),
        grad_parameters(find<void(const Tensor&, const Tensor&, Tensor, Tensor)>(format + "_grad_parameters")) {}
};

const IntegerProducts& products_of(const std::string& format) {
  static const IntegerProducts int16("int16"), int8("int8");
  TORCH_CHECK_VALUE(format == "int16" || format == "int8", "formats: got ", format,
                    ", expected int16, int8 or nothing");
  return format == "int16" ? int16 : int8;
}

// While this lives, operators run without autograd and autocast.
struct Below {
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

void check_list(size_t size, size_t expected, const char* name) {
  TORCH_CHECK_VALUE(size > 0 && size == expected, name, ": got ", size, ", expected ", expected,
                    ", for one layer or more");
}

void add_bias(Tensor& values, const Tensor& bias) {
  static const auto op = find<void(Tensor, const Tensor&, bool)>("add_bias_");
  op.call(values, bias, true);
}

// Sets the gradient to 0 where `output` <= 0, if there is one, and returns its sum over the batch.
Tensor mask(const Tensor& gradient, const std::optional<Tensor>& output) {
  static const auto op = find<Tensor(Tensor, const std::optional<Tensor>&)>("mask_");
  return op.call(gradient, output);
}

// Returns the output of each layer.
std::vector<Tensor> mlp(const Tensor& input, at::TensorList weights, at::TensorList biases, const Formats& formats) {
  const Below below;
  check_list(biases.size(), weights.size(), "biases");
  check_list(formats.size(), weights.size(), "formats");
  std::vector<Tensor> outputs;
  for (size_t layer = 0; layer < weights.size(); ++layer) {
    const Tensor& given = layer == 0 ? input : outputs.back();
    const std::string format = formats.get(layer);
    if (!format.empty()) {
      outputs.push_back(products_of(format).linear.call(given, weights[layer], biases[layer], true));
    } else {
      Tensor output = at::mm(given, weights[layer].t());
      add_bias(output, biases[layer]);
      outputs.push_back(std::move(output));
    }
  }
  return outputs;
}

// Returns the input's gradient if it is needed. Gradients of the parameters go to `gradients`: weight and bias of each
// layer in turn.
//
// With integer products, the gradient before a hidden layer's ReLU is written over that layer's output, which backward
// needs no more. The output's version is bumped, so that autograd refuses to use it again.
std::vector<Tensor> mlp_backward(const Tensor& grad_output, const Tensor& input, at::TensorList outputs,
                                 at::TensorList weights, at::TensorList gradients, const Formats& formats,
                                 bool needs_input) {
  const Below below;
  check_list(outputs.size(), weights.size(), "outputs");
  check_list(gradients.size(), 2 * weights.size(), "gradients");
  check_list(formats.size(), weights.size(), "formats");
  for (size_t layer = 0; layer < weights.size(); ++layer) {
    const Tensor &weight = gradients[2 * layer], &bias = gradients[2 * layer + 1];
    TORCH_CHECK_VALUE(weight.sizes() == weights[layer].sizes() && bias.sizes() == weights[layer].sizes().slice(0, 1),
                      "gradients: got ", weight.sizes(), " and ", bias.sizes(), " for a weight of ",
                      weights[layer].sizes());
  }
  Tensor gradient = grad_output.to(outputs.back().scalar_type(), false, /*copy=*/true, at::MemoryFormat::Contiguous);
  std::optional<Tensor> sums = mask(gradient, outputs.back());
  for (size_t layer = weights.size(); layer-- > 0;) {
    const Tensor &given = layer == 0 ? input : outputs[layer - 1], &weight = weights[layer];
    Tensor grad_weight = gradients[2 * layer], grad_bias = gradients[2 * layer + 1];
    const std::string format = formats.get(layer);
    if (!format.empty()) {
      const IntegerProducts& products = products_of(format);
      products.grad_parameters.call(gradient, given, grad_weight, grad_bias);
      if (layer > 0) {
        products.masked_grad_input_.call(gradient, weight, given);
        given.unsafeGetTensorImpl()->bump_version();
        gradient = given;
        sums.reset();
      } else if (needs_input) {
        return {products.grad_input.call(gradient, weight)};
      }
    } else {
      if (gradient.scalar_type() == at::kFloat) {
        at::mm_out(grad_weight, gradient.t(), given);
      } else {
        grad_weight.copy_(at::mm(gradient.t(), given));
      }
      grad_bias.copy_(sums.has_value() ? *sums : mask(gradient, std::nullopt));
      if (layer > 0) {
        gradient = at::mm(gradient, weight);
        sums = mask(gradient, given);
      } else if (needs_input) {
        return {at::mm(gradient, weight)};
      }
    }
  }
  return {};
}

TORCH_LIBRARY_FRAGMENT(dlrm, m) {
  m.def("mlp(Tensor input, Tensor[] weights, Tensor[] biases, str[] formats) -> Tensor[]");
  m.def(
      "mlp_backward(Tensor grad_output, Tensor input, Tensor(a!)[] outputs, Tensor[] weights, Tensor(b!)[] gradients, "
      "str[] formats, bool needs_input) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(dlrm, CPU, m) {
  m.impl("mlp", mlp);
  m.impl("mlp_backward", mlp_backward);
}

}  // namespace
}  // namespace dlrm
