// fastvae::gaussian_mixture_log_prob: autograd and fake kernels, the same on every device.
#include "mixture.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace fastvae {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

std::tuple<Tensor, Tensor> mixture_forward_op(const Tensor& z, const Tensor& mu, const Tensor& logvar, const OptionalTensor& log_weight,
                                              bool joint, bool per_dimension) {
  static const auto handle = op<MixtureForward>("fastvae::gaussian_mixture_log_prob_forward");
  return handle.call(z, mu, logvar, log_weight, joint, per_dimension);
}

struct Mixture : torch::autograd::Function<Mixture> {
  static variable_list forward(AutogradContext* ctx, const Tensor& z, const Tensor& mu, const Tensor& logvar,
                               const OptionalTensor& log_weight, bool joint, bool per_dimension) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [joint_value, each_value] = mixture_forward_op(z, mu, logvar, log_weight, joint, per_dimension);
    ctx->set_materialize_grads(false);
    ctx->saved_data["needs"] = kPoints * z.requires_grad() | kMeans * mu.requires_grad() | kLogvars * logvar.requires_grad() |
                               kLogWeights * needs_grad(log_weight);
    ctx->saved_data["joint"] = joint;
    ctx->saved_data["per_dimension"] = per_dimension;
    ctx->save_for_backward({z, mu, logvar, log_weight.value_or(Tensor()), joint_value, each_value});
    return {joint_value, each_value};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    int64_t needs = ctx->saved_data["needs"].toInt();
    // The output that was not requested is empty, and so is its gradient.
    const auto grad_joint = ctx->saved_data["joint"].toBool() ? optional(grads[0]) : OptionalTensor();
    const auto grad_each = ctx->saved_data["per_dimension"].toBool() ? optional(grads[1]) : OptionalTensor();
    if (!grad_joint && !grad_each) needs = 0;
    Tensors gradients;
    if (needs) {
      const at::AutoDispatchBelowADInplaceOrView guard;
      static const auto backward_op = op<MixtureBackward>("fastvae::gaussian_mixture_log_prob_backward");
      gradients =
          backward_op.call(grad_joint, grad_each, saved[0], saved[1], saved[2], optional(saved[3]), saved[4], saved[5], needs);
    }
    return placed(std::move(gradients), needs, 6, {0, 1, 2, 3});
  }
};

std::tuple<Tensor, Tensor> mixture_autograd(const Tensor& z, const Tensor& mu, const Tensor& logvar, const OptionalTensor& log_weight,
                                            bool joint, bool per_dimension) {
  for (const OptionalTensor& t : {OptionalTensor(z), OptionalTensor(mu), OptionalTensor(logvar), log_weight}) refuse_tangent(t);
  const bool needed = z.requires_grad() || mu.requires_grad() || logvar.requires_grad() || needs_grad(log_weight);
  if (!c10::GradMode::is_enabled() || !needed) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return mixture_forward_op(z, mu, logvar, log_weight, joint, per_dimension);
  }
  const auto out = Mixture::apply(z, mu, logvar, log_weight, joint, per_dimension);
  return {out[0], out[1]};
}

std::tuple<Tensor, Tensor> mixture_meta(const Tensor& z, const Tensor&, const Tensor&, const OptionalTensor&, bool joint,
                                        bool per_dimension) {
  const auto options = z.options().dtype(row_dtype(z.scalar_type()));
  const auto sizes = z.sym_sizes();
  const c10::SymInt zero = 0;
  return {at::empty_symint(joint ? sizes.slice(0, 1) : c10::SymIntArrayRef(&zero, 1), options),
          at::empty_symint(per_dimension ? sizes : c10::SymIntArrayRef(&zero, 1), options)};
}

Tensors mixture_grad_meta(const OptionalTensor&, const OptionalTensor&, const Tensor& z, const Tensor& mu, const Tensor& logvar,
                          const OptionalTensor& log_weight, const Tensor&, const Tensor&, int64_t needs) {
  Tensors gradients;
  const auto wanted = [&](int64_t bit, const Tensor& like) {
    if (needs & bit) gradients.push_back(at::empty_symint(like.sym_sizes(), like.options()));
  };
  wanted(kPoints, z);
  wanted(kMeans, mu);
  wanted(kLogvars, logvar);
  if (needs & kLogWeights) wanted(kLogWeights, *log_weight);
  return gradients;
}

}  // namespace

void check_mixture(const Tensor& z, const Tensor& mu, const Tensor& logvar, const OptionalTensor& log_weight) {
  const auto check = [](bool fits, const char* name, const char* shape, const Tensor& t) {
    TORCH_CHECK_VALUE(fits, "fastvae::gaussian_mixture_log_prob: `", name, "` must have shape ", shape, ", got ", t.sizes());
  };
  check(z.dim() == 2, "z", "(B, D)", z);
  check(mu.dim() == 2 && mu.size(0) > 0 && mu.size(1) == z.size(1), "mu", "(M, D)", mu);
  check(logvar.sizes() == mu.sizes(), "logvar", "(M, D)", logvar);
  const auto float_type = z.scalar_type();
  TORCH_CHECK_TYPE(c10::isFloatingType(float_type) && mu.scalar_type() == float_type && logvar.scalar_type() == float_type,
                   "fastvae::gaussian_mixture_log_prob: `z`, `mu` and `logvar` must have one floating dtype");
  if (!log_weight) return;
  const Tensor& w = *log_weight;
  const bool shared = w.dim() == 1 && w.size(0) == mu.size(0);
  check(shared || (w.dim() == 2 && w.size(0) == z.size(0) && w.size(1) == mu.size(0)), "log_weight", "(M,) or (B, M)", w);
  TORCH_CHECK_TYPE(c10::isFloatingType(w.scalar_type()), "fastvae::gaussian_mixture_log_prob: `log_weight` must be floating point");
}

TORCH_LIBRARY_IMPL(fastvae, CompositeExplicitAutograd, m) { m.impl("gaussian_mixture_log_prob", mixture_forward_op); }
TORCH_LIBRARY_IMPL(fastvae, Autograd, m) { m.impl("gaussian_mixture_log_prob", mixture_autograd); }
TORCH_LIBRARY_IMPL(fastvae, Meta, m) {
  m.impl("gaussian_mixture_log_prob_forward", mixture_meta);
  m.impl("gaussian_mixture_log_prob_backward", mixture_grad_meta);
}

}  // namespace fastvae
