// fastvae::nll_elements: autograd and fake kernels, the same on every device.
#include "nll_elements.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include "nll.h"

namespace fastvae {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

std::tuple<Tensor, Tensors> elements_forward_op(std::string_view likelihood, at::TensorList params, const Tensor& target,
                                       at::ArrayRef<double> constants, double factor, int64_t needs,
                                       const OptionalTensor& weight) {
  static const auto handle = op<NllElementsForward>("fastvae::nll_elements_forward");
  return handle.call(likelihood, params, target, constants, factor, needs, weight);
}

struct NllElementsFunction : torch::autograd::Function<NllElementsFunction> {
  static Tensor forward(AutogradContext* ctx, const std::string& likelihood, at::TensorList params, const Tensor& target,
                        at::ArrayRef<double> constants, double factor, const OptionalTensor& weight) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    int64_t needs = 0;
    for (size_t i = 0; i < params.size(); ++i) needs |= int64_t(params[i].requires_grad()) << i;
    auto [values, derivatives] = elements_forward_op(likelihood, params, target, constants, factor, needs, weight);
    ctx->set_materialize_grads(false);
    const int64_t shared = shared_param(params);
    ctx->saved_data["needs"] = needs;
    ctx->saved_data["params"] = static_cast<int64_t>(params.size());
    ctx->saved_data["shared"] = shared;
    ctx->saved_data["dtype"] = params[0].scalar_type();
    if (shared >= 0) ctx->saved_data["shared_dtype"] = params[shared].scalar_type();
    ctx->save_for_backward(std::move(derivatives));
    return values;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const int64_t params = ctx->saved_data["params"].toInt(), needs = ctx->saved_data["needs"].toInt();
    variable_list results(params + 5);  // likelihood, params..., target, constants, factor, weight
    const Tensor& grad = grads[0];
    if (!grad.defined()) return once_differentiable(std::move(results));

    Tensors derivatives = ctx->get_saved_variables();
    for (auto& d : derivatives) d = d.contiguous(memory_order(d));  // a copy only if a user's hook has replaced them
    const int64_t shared = ctx->saved_data["shared"].toInt();
    const auto dtype = ctx->saved_data["dtype"].toScalarType();
    // The position of the shared param among those that need a gradient.
    int64_t place = -1;
    if (shared >= 0 && needs >> shared & 1) {
      place = 0;
      for (int64_t i = 0; i < shared; ++i) place += needs >> i & 1;
    }
    static const auto new_tensors = op<NllElementsBackward>("fastvae::nll_elements_backward");
    static const auto in_place = op<NllElementsBackwardInPlace>("fastvae::nll_elements_backward_");
    Tensors gradients;
    {
      const at::AutoDispatchBelowADInplaceOrView guard;
      if (dtype != row_dtype(dtype) || traced(grad) || torch::autograd::get_current_graph_task_keep_graph()) {
        gradients = new_tensors.call(grad, derivatives, place, dtype);
      } else {
        // If the graph is freed, nobody else can read the saved tensors, so they become the result.
        gradients = derivatives;
        const Tensors sums = in_place.call(grad, gradients, place);
        if (place >= 0) gradients[place] = sums[0];
      }
      if (place >= 0) gradients[place] = gradients[place].to(ctx->saved_data["shared_dtype"].toScalarType());
    }
    size_t next = 0;
    for (int64_t i = 0; i < params; ++i)
      if (needs >> i & 1) results[1 + i] = gradients[next++];
    return once_differentiable(std::move(results));
  }
};

Tensor elements_without_graph(std::string_view likelihood, at::TensorList params, const Tensor& target, at::ArrayRef<double> constants,
                     double factor, const OptionalTensor& weight) {
  return std::get<0>(elements_forward_op(likelihood, params, target, constants, factor, 0, weight));
}

Tensor elements_autograd(std::string_view likelihood, at::TensorList params, const Tensor& target, at::ArrayRef<double> constants, double factor,
                         const OptionalTensor& weight) {
  bool needed = target.requires_grad();
  for (const auto& p : params) {
    refuse_tangent(p);
    needed |= p.requires_grad();
  }
  refuse_tangent(target);
  refuse_tangent(weight);
  TORCH_CHECK_VALUE(!needs_grad(weight) || !c10::GradMode::is_enabled(),
                    "fastvae::nll_elements: the `weight` has no gradient here; pass weight.detach()");
  if (!c10::GradMode::is_enabled() || !needed) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return elements_without_graph(likelihood, params, target, constants, factor, weight);
  }
  TORCH_CHECK_VALUE(!target.requires_grad(), "fastvae::nll_elements: the `target` of ", std::string(likelihood),
                    " has no gradient here; pass target.detach()");
  return NllElementsFunction::apply(std::string(likelihood), params, target, constants, factor, weight);
}

Tensor empty_elements(const Tensor& lead, at::ScalarType dtype) {
  return at::empty_like(lead, lead.options().dtype(dtype), memory_order(lead));
}

std::tuple<Tensor, Tensors> elements_forward_meta(std::string_view, at::TensorList params, const Tensor&, at::ArrayRef<double>, double,
                                         int64_t needs, const OptionalTensor&) {
  const Tensor& lead = params[0];
  const auto dtype = row_dtype(lead.scalar_type());
  Tensors derivatives;
  for (size_t i = 0; i < params.size(); ++i)
    if (needs >> i & 1) derivatives.push_back(empty_elements(lead, dtype));
  return {empty_elements(lead, dtype), derivatives};
}

Tensor empty_sum(const Tensor& derivative) { return at::empty_symint(derivative.sym_sizes().slice(1), derivative.options()); }

Tensors elements_backward_meta(const Tensor&, at::TensorList derivatives, int64_t shared, at::ScalarType dtype) {
  Tensors gradients;
  for (int64_t i = 0; i < int64_t(derivatives.size()); ++i)
    gradients.push_back(i == shared ? empty_sum(derivatives[i]) : empty_elements(derivatives[i], dtype));
  return gradients;
}

Tensors elements_backward_in_place_meta(const Tensor&, at::TensorList derivatives, int64_t shared) {
  return shared >= 0 ? Tensors{empty_sum(derivatives[shared])} : Tensors();
}

}  // namespace

bool gives_elements(const LikelihoodVariant& variant) { return variant.family == Family::counts && variant.constants == 1; }

void check_nll_elements(const LikelihoodVariant& variant, at::TensorList params, const Tensor& target, at::ArrayRef<double> constants,
                        const OptionalTensor& weight) {
  TORCH_CHECK_VALUE(gives_elements(variant), "fastvae::nll_elements: there is no kernel for the elements of ", std::string(variant.name));
  TORCH_CHECK_VALUE(int64_t(params.size()) == variant.tensors, "fastvae::nll_elements: ", std::string(variant.name), " takes ", variant.tensors,
                    " params, got ", params.size());
  check_nll(variant, params, target, constants, {}, {}, kNone, weight);
}

TORCH_LIBRARY_IMPL(fastvae, CompositeExplicitAutograd, m) { m.impl("nll_elements", elements_without_graph); }
TORCH_LIBRARY_IMPL(fastvae, Autograd, m) { m.impl("nll_elements", elements_autograd); }
TORCH_LIBRARY_IMPL(fastvae, Meta, m) {
  m.impl("nll_elements_forward", elements_forward_meta);
  m.impl("nll_elements_backward", elements_backward_meta);
  m.impl("nll_elements_backward_", elements_backward_in_place_meta);
}

}  // namespace fastvae
