// fastvae::sparse_linear: autograd and fake kernels, the same on every device.
#include "sparse.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace fastvae {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

Tensor sparse_linear_forward_op(const Tensor& values, const Tensor& starts, const Tensor& columns, const Tensor& weight,
                                const OptionalTensor& bias) {
  static const auto handle = op<SparseLinearForward>("fastvae::sparse_linear_forward");
  return handle.call(values, starts, columns, weight, bias);
}

struct SparseLinear : torch::autograd::Function<SparseLinear> {
  static Tensor forward(AutogradContext* ctx, const Tensor& values, const Tensor& starts, const Tensor& columns, const Tensor& weight,
                        const OptionalTensor& bias) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->saved_data["needs"] = kWeight * weight.requires_grad() | kBias * needs_grad(bias);
    ctx->save_for_backward({values, starts, columns, weight});
    return sparse_linear_forward_op(values, starts, columns, weight, bias);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const int64_t needs = ctx->saved_data["needs"].toInt();
    const at::AutoDispatchBelowADInplaceOrView guard;
    static const auto backward_op = op<SparseLinearBackward>("fastvae::sparse_linear_backward");
    return placed(backward_op.call(grads[0], saved[0], saved[1], saved[2], saved[3], needs), needs, 5, {3, 4});
  }
};

Tensor sparse_linear_autograd(const Tensor& values, const Tensor& starts, const Tensor& columns, const Tensor& weight,
                              const OptionalTensor& bias) {
  for (const OptionalTensor& t : {OptionalTensor(values), OptionalTensor(weight), bias}) refuse_tangent(t);
  TORCH_CHECK_VALUE(!c10::GradMode::is_enabled() || !values.requires_grad(),
                    "fastvae::sparse_linear: `values` requires a gradient, which this op does not provide");
  if (!c10::GradMode::is_enabled() || !(weight.requires_grad() || needs_grad(bias))) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return sparse_linear_forward_op(values, starts, columns, weight, bias);
  }
  return SparseLinear::apply(values, starts, columns, weight, bias);
}

Tensor sparse_linear_meta(const Tensor&, const Tensor& starts, const Tensor&, const Tensor& weight, const OptionalTensor&) {
  return at::empty_symint({starts.sym_size(0) - 1, weight.sym_size(0)}, weight.options());
}

Tensors sparse_linear_grad_meta(const Tensor& grad, const Tensor&, const Tensor&, const Tensor&, const Tensor& weight, int64_t needs) {
  Tensors gradients;
  if (needs & kWeight) gradients.push_back(at::empty_symint({weight.sym_size(1), weight.sym_size(0)}, weight.options()).t());
  if (needs & kBias) gradients.push_back(at::empty_symint({weight.sym_size(0)}, grad.options()));
  return gradients;
}

}  // namespace

void check_sparse_linear(const Tensor& values, const Tensor& starts, const Tensor& columns, const Tensor& weight,
                         const OptionalTensor& bias) {
  TORCH_CHECK_VALUE(weight.dim() == 2, "fastvae::sparse_linear: `weight` must have shape (O, I), got ", weight.sizes());
  TORCH_CHECK_VALUE(values.dim() == 1 && columns.sizes() == values.sizes(),
                    "fastvae::sparse_linear: `values` and `columns` must have one size, got ", values.sizes(), " and ", columns.sizes());
  TORCH_CHECK_VALUE(starts.dim() == 1 && starts.size(0) > 0, "fastvae::sparse_linear: `starts` must have shape (B + 1,), got ",
                    starts.sizes());
  TORCH_CHECK_VALUE(!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0)),
                    "fastvae::sparse_linear: `bias` must have one value per row of `weight`");
  const auto type = weight.scalar_type();
  TORCH_CHECK_TYPE((type == at::kFloat || type == at::kDouble) && values.scalar_type() == type && (!bias || bias->scalar_type() == type),
                   "fastvae::sparse_linear: `values`, `weight` and `bias` must all be float32 or all float64");
  TORCH_CHECK_TYPE(starts.scalar_type() == at::kLong && columns.scalar_type() == at::kLong,
                   "fastvae::sparse_linear: `starts` and `columns` must be int64");
}

TORCH_LIBRARY_IMPL(fastvae, CompositeExplicitAutograd, m) { m.impl("sparse_linear", sparse_linear_forward_op); }
TORCH_LIBRARY_IMPL(fastvae, Autograd, m) { m.impl("sparse_linear", sparse_linear_autograd); }
TORCH_LIBRARY_IMPL(fastvae, Meta, m) {
  m.impl("sparse_linear_forward", sparse_linear_meta);
  m.impl("sparse_linear_backward", sparse_linear_grad_meta);
}

}  // namespace fastvae
