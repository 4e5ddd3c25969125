// The CUDA kernels of fastvae::nll_elements_forward and nll_elements_backward.
#include <ATen/ops/sum.h>
#include <torch/library.h>

#include "counts_cuda.h"
#include "nll_elements.h"
#include "nll_views.h"

namespace fastvae {
namespace {

std::tuple<Tensor, Tensors> elements_forward_cuda(std::string_view likelihood, at::TensorList params, const Tensor& target,
                                                  at::ArrayRef<double> constants, double factor, int64_t needs,
                                                  const OptionalTensor& weight) {
  const auto& variant = likelihood_variant(likelihood);
  check_nll_elements(variant, params, target, constants, weight);
  const OnDevice device(target);
  for (const auto& p : params) device.expect(p, "params");
  device.expect(weight, "weight");
  const Tensor& lead = params[0];
  const auto dtype = row_dtype(lead.scalar_type());
  const auto options = lead.options().dtype(dtype);
  const auto order = memory_order(lead);
  Tensor values = pooled_empty(lead.sizes(), options, order);
  Tensors derivatives, kept;
  for (int i = 0; i < variant.tensors; ++i)
    if (needs >> i & 1) derivatives.push_back(pooled_empty(lead.sizes(), options, order));
  auto derivative = derivatives.begin();
  if (variant.elementwise()) {
    cuda::NllArgs args;
    // The kernel writes derivatives in the params' type, and half precision could not hold them.
    const Tensor wide = lead.to(dtype, /*non_blocking=*/false, /*copy=*/false, order);
    const Tensor data = c10::isReducedFloatingType(target.scalar_type()) ? target.to(dtype) : target;
    fill_elements(args, variant, {wide}, data, 0, weight, kept);
    const auto norm = normaliser(variant, constants, 0);
    std::copy_n(norm.constants, cuda::kMaxConstants, args.constants);
    if (needs) args.grads[0] = result(*derivative);
    args.values = result(values);
    args.weight = factor;
    launch(args, cuda::nll_scratch, cuda::nll, device);
  } else {
    cuda::CountArgs args;
    fill_count_inputs(args, variant, params, target, constants, weight, kept);
    for (int i = 0; i < variant.tensors; ++i)
      if (needs >> i & 1) grad_of(args, variant, i) = result(*derivative++);
    args.values = result(values);
    args.weight = factor;
    launch_counts(args, variant, device);
  }
  return {std::move(values), std::move(derivatives)};
}

void check_grad(const Tensor& grad, at::TensorList derivatives) {
  if (derivatives.empty()) return;
  const Tensor& lead = derivatives[0];
  TORCH_CHECK_VALUE(grad.sizes() == lead.sizes(), "fastvae::nll_elements_backward: `grad` must have the shape ", lead.sizes(), ", got ",
                    grad.sizes());
  TORCH_CHECK_TYPE(grad.scalar_type() == lead.scalar_type(), "fastvae::nll_elements_backward: `grad` must be ", lead.scalar_type(),
                   ", got ", grad.scalar_type());
}

// Torch's own ops take as long as the memory does.
Tensors elements_backward_cuda(const Tensor& grad, at::TensorList derivatives, int64_t shared, at::ScalarType dtype) {
  check_grad(grad, derivatives);
  Tensors gradients;
  for (int64_t i = 0; i < int64_t(derivatives.size()); ++i) {
    const Tensor scaled = derivatives[i].mul(grad);
    gradients.push_back(i == shared ? scaled.sum(0) : scaled.to(dtype));
  }
  return gradients;
}

Tensors elements_backward_in_place_cuda(const Tensor& grad, at::TensorList derivatives, int64_t shared) {
  check_grad(grad, derivatives);
  for (const auto& derivative : derivatives) derivative.mul_(grad);
  return shared >= 0 ? Tensors{derivatives[shared].sum(0)} : Tensors();
}

}  // namespace

TORCH_LIBRARY_IMPL(fastvae, CUDA, m) {
  m.impl("nll_elements_forward", elements_forward_cuda);
  m.impl("nll_elements_backward", elements_backward_cuda);
  m.impl("nll_elements_backward_", elements_backward_in_place_cuda);
}

}  // namespace fastvae
