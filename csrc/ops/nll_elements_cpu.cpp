// The CPU kernels of fastvae::nll_elements_forward and nll_elements_backward.
#include <torch/library.h>

#include "buffer_pool.h"
#include "counts.h"
#include "cpu_kernels.h"
#include "nll_elements.h"

namespace fastvae {
namespace {

void evaluate_each(const LikelihoodVariant& variant, at::TensorList params, const Tensor& target, at::ArrayRef<double> constants, double factor,
                   int64_t needs, const OptionalTensor& weight, const Tensor& values, const Tensors& derivatives) {
  const auto order = memory_order(params[0]);
  const Tensor lead = dense_rows(params[0], order), data = dense_rows(target, order);
  std::vector<double> nll(lead.size(0));
  Tensors kept;
  cpu::NllArgs args{};
  args.element = variant.element;
  args.in_double = lead.scalar_type() == at::kDouble;
  args.rows = lead.size(0);
  args.size = event_size(lead);
  args.params[0] = operand(lead);
  args.target = count_operand(data);
  const auto norm = normaliser(variant, constants, 0);
  std::copy_n(norm.constants, cpu::kMaxConstants, args.constants);
  if (needs) args.grads[0] = result(derivatives[0]);
  args.weight = &factor;
  args.weights = weights_view(weight, target.sizes(), order, kept);
  args.row_nll = nll.data();
  args.values = result(values);
  cpu::kernels().nll(args);
}

std::tuple<Tensor, Tensors> elements_forward_cpu(std::string_view likelihood, at::TensorList params, const Tensor& target,
                                        at::ArrayRef<double> constants, double factor, int64_t needs,
                                        const OptionalTensor& weight) {
  const auto& variant = likelihood_variant(likelihood);
  check_nll_elements(variant, params, target, constants, weight);
  const Tensor& lead = params[0];
  const auto options = lead.options().dtype(row_dtype(lead.scalar_type()));
  const auto order = memory_order(lead);
  Tensor values = pooled_empty(lead.sizes(), options, order);
  Tensors derivatives;
  for (int i = 0; i < variant.tensors; ++i)
    if (needs >> i & 1) derivatives.push_back(pooled_empty(lead.sizes(), options, order));
  const auto evaluate = variant.elementwise() ? evaluate_each : evaluate_count_elements;
  evaluate(variant, params, target, constants, factor, needs, weight, values, derivatives);
  return {std::move(values), std::move(derivatives)};
}

// Writes the scaled derivatives to `out` and returns the sum over rows. `grad` is read in place, also if it was expanded per row.
Tensors scale_derivatives(const Tensor& grad, at::TensorList derivatives, at::TensorList out, int64_t shared) {
  Tensors sums;
  if (derivatives.empty()) return sums;
  const Tensor& lead = derivatives[0];
  TORCH_CHECK_VALUE(grad.sizes() == lead.sizes(), "fastvae::nll_elements_backward: `grad` must have the shape ", lead.sizes(), ", got ",
                    grad.sizes());
  TORCH_CHECK_TYPE(grad.scalar_type() == lead.scalar_type(), "fastvae::nll_elements_backward: `grad` must be ", lead.scalar_type(),
                   ", got ", grad.scalar_type());
  bool per_row = true;
  for (int64_t i = 1; i < grad.dim(); ++i) per_row &= grad.stride(i) == 0 || grad.size(i) == 1;
  const auto order = memory_order(lead);
  const Tensor factor = per_row ? grad : dense_rows(grad, order);
  cpu::ScaleElementsArgs args{};
  args.in_double = lead.scalar_type() == at::kDouble;
  args.rows = lead.size(0);
  args.size = event_size(lead);
  args.factor = factor.const_data_ptr();
  args.factor_stride = factor.stride(0);
  args.factor_per_row = per_row;
  std::vector<double> total(shared >= 0 ? args.size : 0);
  const int count = static_cast<int>(derivatives.size());
  for (int first = 0; first < count; first += cpu::kMaxParams) {  // a kernel takes so many at a time
    args.count = std::min(cpu::kMaxParams, count - first);
    for (int i = 0; i < args.count; ++i) {
      const Tensor& derivative = derivatives[first + i];
      TORCH_CHECK_VALUE(derivative.is_contiguous(order) && derivative.sizes() == lead.sizes() && derivative.scalar_type() == lead.scalar_type(),
                        "fastvae::nll_elements_backward: `derivatives` must be dense, of one shape, order and type");
      const bool summed = first + i == shared;
      args.in[i] = derivative.const_data_ptr();
      args.sums[i] = summed ? total.data() : nullptr;
      args.out[i] = summed ? cpu::Result{} : result(out[first + i]);
    }
    cpu::kernels().scale_elements(args);
  }
  if (shared >= 0) sums.push_back(from_doubles(total, lead.sizes().slice(1), lead.scalar_type()));
  return sums;
}

Tensors elements_backward_cpu(const Tensor& grad, at::TensorList derivatives, int64_t shared, at::ScalarType dtype) {
  Tensors gradients;
  for (int64_t i = 0; i < int64_t(derivatives.size()); ++i)
    gradients.push_back(i == shared ? Tensor()
                                    : pooled_empty(derivatives[i].sizes(), derivatives[i].options().dtype(dtype), memory_order(derivatives[i])));
  Tensors sums = scale_derivatives(grad, derivatives, gradients, shared);
  if (shared >= 0) gradients[shared] = std::move(sums[0]);
  return gradients;
}

Tensors elements_backward_in_place_cpu(const Tensor& grad, at::TensorList derivatives, int64_t shared) {
  return scale_derivatives(grad, derivatives, derivatives, shared);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastvae, CPU, m) {
  m.impl("nll_elements_forward", elements_forward_cpu);
  m.impl("nll_elements_backward", elements_backward_cpu);
  m.impl("nll_elements_backward_", elements_backward_in_place_cpu);
}

}  // namespace fastvae
