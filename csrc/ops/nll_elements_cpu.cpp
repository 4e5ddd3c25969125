// The CPU kernels of fastvae::nll_elements_forward and nll_elements_backward.
#include <torch/library.h>

#include "buffer_pool.h"
#include "counts.h"
#include "cpu_kernels.h"
#include "nll_elements.h"

namespace fastvae {
namespace {

void evaluate_each(const LikelihoodRow& row, at::TensorList params, const Tensor& target, at::ArrayRef<double> constants, double weight,
                   int64_t needs, const Tensor& values, const Tensors& derivatives) {
  const Tensor lead = dense_rows(params[0], at::MemoryFormat::Contiguous), data = dense_rows(target, at::MemoryFormat::Contiguous);
  std::vector<double> nll(lead.size(0));
  cpu::NllArgs args{};
  args.element = row.element;
  args.in_double = lead.scalar_type() == at::kDouble;
  args.rows = lead.size(0);
  args.size = event_size(lead);
  args.params[0] = operand(lead);
  args.target = count_operand(data);
  const auto norm = normaliser(row, constants, 0);
  std::copy_n(norm.constants, cpu::kMaxConstants, args.constants);
  if (needs) args.slopes[0] = result(derivatives[0]);
  args.weight = &weight;
  args.row_nll = nll.data();
  args.values = result(values);
  cpu::kernels().nll(args);
}

std::tuple<Tensor, Tensors> elements_forward_cpu(std::string_view likelihood, at::TensorList params, const Tensor& target,
                                        at::ArrayRef<double> constants, double weight, int64_t needs) {
  const auto& row = likelihood_row(likelihood);
  check_nll_elements(row, params, target, constants);
  const Tensor& lead = params[0];
  const auto dtype = row_dtype(lead.scalar_type());
  Tensor values = pooled_empty(lead.sizes(), lead.options().dtype(dtype));
  Tensors derivatives;
  for (int i = 0; i < row.tensors; ++i)
    if (needs >> i & 1) derivatives.push_back(pooled_empty(lead.sizes(), lead.options().dtype(dtype)));
  const auto evaluate = row.elementwise() ? evaluate_each : evaluate_count_elements;
  evaluate(row, params, target, constants, weight, needs, values, derivatives);
  return {std::move(values), std::move(derivatives)};
}

// `grad` as the kernel reads it: of each element, or of each row where it was expanded. `kept` holds what it points into.
cpu::Operand factor_of(const Tensor& grad, Tensor& kept) {
  bool per_row = true;
  for (int64_t i = 1; i < grad.dim(); ++i) per_row &= grad.stride(i) == 0 || grad.size(i) == 1;
  kept = per_row ? grad : dense_rows(grad, at::MemoryFormat::Contiguous);
  if (per_row) return {kept.const_data_ptr(), dtype_of(kept), kept.stride(0), 1, 0};
  return operand(kept);
}

// Fills in what is scaled, into `out`, or summed up.
Tensors scale_derivatives(const Tensor& grad, at::TensorList derivatives, at::TensorList out, int64_t shared) {
  Tensors sums;
  if (derivatives.empty()) return sums;
  const Tensor& lead = derivatives[0];
  TORCH_CHECK_VALUE(grad.sizes() == lead.sizes(), "fastvae::nll_elements_backward: `grad` must have the shape ", lead.sizes(), ", got ",
                    grad.sizes());
  Tensor kept;
  cpu::ScaleElementsArgs args{};
  args.in_double = lead.scalar_type() == at::kDouble;
  args.rows = lead.size(0);
  args.size = event_size(lead);
  args.factor = factor_of(grad, kept);
  args.count = static_cast<int>(derivatives.size());
  std::vector<double> total(shared >= 0 ? args.size : 0);
  for (int i = 0; i < args.count; ++i) {
    args.in[i] = operand(derivatives[i]);
    if (i == shared) args.sums[i] = total.data();
    else args.out[i] = result(out[i]);
  }
  cpu::kernels().scale_elements(args);
  if (shared >= 0) sums.push_back(from_doubles(total, lead.sizes().slice(1), lead.scalar_type()));
  return sums;
}

Tensors elements_backward_cpu(const Tensor& grad, at::TensorList derivatives, int64_t shared, at::ScalarType dtype) {
  Tensors gradients;
  for (int64_t i = 0; i < int64_t(derivatives.size()); ++i)
    gradients.push_back(i == shared ? Tensor() : pooled_empty(derivatives[i].sizes(), derivatives[i].options().dtype(dtype)));
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
