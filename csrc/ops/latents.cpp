// fastvae::reparameterize_kl and fastvae::gaussian_kl: autograd and fake kernels, the same on every device.
#include "latents_views.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace fastvae {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

int64_t needs_of(const Tensor& mu, const Tensor& logvar, const OptionalTensor& prior_mu, const OptionalTensor& prior_logvar,
                 const OptionalTensor& eps) {
  return kMu * mu.requires_grad() | kLogvar * logvar.requires_grad() | kPriorMu * needs_grad(prior_mu) |
         kPriorLogvar * needs_grad(prior_logvar) | kEps * needs_grad(eps);
}

struct Sample : torch::autograd::Function<Sample> {
  static variable_list forward(AutogradContext* ctx, const Tensor& mu, const Tensor& logvar, const OptionalTensor& prior_mu,
                               const OptionalTensor& prior_logvar, std::optional<int64_t> samples, const OptionalTensor& seed,
                               int64_t row_offset, const OptionalTensor& eps, OptionalGenerator generator) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    static const auto forward_op = op<SampleForward>("fastvae::reparameterize_kl_forward");
    auto [z, kl, used_seed] =
        forward_op.call(mu, logvar, prior_mu, prior_logvar, samples, seed, row_offset, eps, std::move(generator));
    ctx->set_materialize_grads(false);
    ctx->saved_data["samples"] = samples;
    ctx->saved_data["row_offset"] = row_offset;
    ctx->saved_data["needs"] = needs_of(mu, logvar, prior_mu, prior_logvar, eps);
    ctx->save_for_backward({mu, logvar, prior_mu.value_or(Tensor()), prior_logvar.value_or(Tensor()), used_seed,
                            eps.value_or(Tensor())});
    return {z, kl};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    int64_t needs = ctx->saved_data["needs"].toInt();
    if (!grads[0].defined()) needs &= ~kEps;
    if (!grads[0].defined() && !grads[1].defined()) needs = 0;
    Tensors gradients;
    if (needs) {
      const at::AutoDispatchBelowADInplaceOrView guard;
      static const auto backward_op = op<SampleBackward>("fastvae::reparameterize_kl_backward");
      gradients = backward_op.call(optional(grads[0]), optional(grads[1]), saved[0], saved[1], optional(saved[2]),
                                   optional(saved[3]), ctx->saved_data["samples"].toOptional<int64_t>(), saved[4],
                                   ctx->saved_data["row_offset"].toInt(), optional(saved[5]), needs);
    }
    return placed(std::move(gradients), needs, 9, {0, 1, 2, 3, 7});
  }
};

struct Kl : torch::autograd::Function<Kl> {
  static Tensor forward(AutogradContext* ctx, const Tensor& mu, const Tensor& logvar, const OptionalTensor& prior_mu,
                        const OptionalTensor& prior_logvar, bool per_element) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    static const auto forward_op = op<KlForward>("fastvae::gaussian_kl_forward");
    ctx->saved_data["needs"] = needs_of(mu, logvar, prior_mu, prior_logvar, {});
    ctx->save_for_backward({mu, logvar, prior_mu.value_or(Tensor()), prior_logvar.value_or(Tensor())});
    return forward_op.call(mu, logvar, prior_mu, prior_logvar, per_element);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const int64_t needs = ctx->saved_data["needs"].toInt();
    const auto run = [&] {
      const at::AutoDispatchBelowADInplaceOrView guard;
      static const auto backward_op = op<KlBackward>("fastvae::gaussian_kl_backward");
      return backward_op.call(grads[0], saved[0], saved[1], optional(saved[2]), optional(saved[3]), needs);
    };
    return placed(run(), needs, 5, {0, 1, 2, 3});
  }
};

std::tuple<Tensor, Tensor> sample_without_graph(const Tensor& mu, const Tensor& logvar, const OptionalTensor& prior_mu,
                                                const OptionalTensor& prior_logvar, std::optional<int64_t> samples,
                                                const OptionalTensor& seed, int64_t row_offset, const OptionalTensor& eps,
                                                OptionalGenerator generator) {
  static const auto forward_op = op<SampleForward>("fastvae::reparameterize_kl_forward");
  auto [z, kl, used_seed] =
      forward_op.call(mu, logvar, prior_mu, prior_logvar, samples, seed, row_offset, eps, std::move(generator));
  return {z, kl};
}

std::tuple<Tensor, Tensor> sample_autograd(const Tensor& mu, const Tensor& logvar, const OptionalTensor& prior_mu,
                                           const OptionalTensor& prior_logvar, std::optional<int64_t> samples,
                                           const OptionalTensor& seed, int64_t row_offset, const OptionalTensor& eps,
                                           OptionalGenerator generator) {
  for (const OptionalTensor& t : {OptionalTensor(mu), OptionalTensor(logvar), prior_mu, prior_logvar, eps}) refuse_tangent(t);
  if (!c10::GradMode::is_enabled() || !needs_of(mu, logvar, prior_mu, prior_logvar, eps)) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return sample_without_graph(mu, logvar, prior_mu, prior_logvar, samples, seed, row_offset, eps, std::move(generator));
  }
  const auto out = Sample::apply(mu, logvar, prior_mu, prior_logvar, samples, seed, row_offset, eps, std::move(generator));
  return {out[0], out[1]};
}

Tensor kl_without_graph(const Tensor& mu, const Tensor& logvar, const OptionalTensor& prior_mu, const OptionalTensor& prior_logvar,
                        bool per_element) {
  static const auto forward_op = op<KlForward>("fastvae::gaussian_kl_forward");
  return forward_op.call(mu, logvar, prior_mu, prior_logvar, per_element);
}

Tensor kl_autograd(const Tensor& mu, const Tensor& logvar, const OptionalTensor& prior_mu, const OptionalTensor& prior_logvar,
                   bool per_element) {
  for (const OptionalTensor& t : {OptionalTensor(mu), OptionalTensor(logvar), prior_mu, prior_logvar}) refuse_tangent(t);
  if (!c10::GradMode::is_enabled() || !needs_of(mu, logvar, prior_mu, prior_logvar, {})) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return kl_without_graph(mu, logvar, prior_mu, prior_logvar, per_element);
  }
  return Kl::apply(mu, logvar, prior_mu, prior_logvar, per_element);
}

Tensor empty_as(const Tensor& like, c10::SymIntArrayRef sizes, at::ScalarType dtype) {
  return at::empty_symint(sizes, like.options().dtype(dtype));
}

Tensor kl_meta(const Tensor& mu, const Tensor&, const OptionalTensor&, const OptionalTensor&, bool per_element) {
  const auto sizes = mu.sym_sizes();
  return empty_as(mu, per_element ? sizes : sizes.slice(0, 1), row_dtype(mu.scalar_type()));
}

std::tuple<Tensor, Tensor, Tensor> sample_meta(const Tensor& mu, const Tensor& logvar, const OptionalTensor&, const OptionalTensor&,
                                               std::optional<int64_t> samples, const OptionalTensor&, int64_t,
                                               const OptionalTensor& eps, OptionalGenerator) {
  std::vector<c10::SymInt> sizes;
  if (samples) sizes.emplace_back(*samples);
  sizes.insert(sizes.end(), mu.sym_sizes().begin(), mu.sym_sizes().end());
  return {empty_as(mu, sizes, mu.scalar_type()), kl_meta(mu, logvar, {}, {}, false), empty_as(mu, {eps ? 0 : 2}, at::kLong)};
}

Tensors gradients_meta(const Tensor& mu, int64_t needs, const OptionalTensor& eps) {
  Tensors gradients;
  for (int64_t bit = kMu; bit <= kPriorLogvar; bit <<= 1)
    if (needs & bit) gradients.push_back(empty_as(mu, mu.sym_sizes(), mu.scalar_type()));
  if (needs & kEps) gradients.push_back(empty_as(mu, eps->sym_sizes(), mu.scalar_type()));
  return gradients;
}

Tensors sample_grad_meta(const OptionalTensor&, const OptionalTensor&, const Tensor& mu, const Tensor&, const OptionalTensor&,
                         const OptionalTensor&, std::optional<int64_t>, const Tensor&, int64_t, const OptionalTensor& eps,
                         int64_t needs) {
  return gradients_meta(mu, needs, eps);
}

Tensors kl_grad_meta(const Tensor&, const Tensor& mu, const Tensor&, const OptionalTensor&, const OptionalTensor&, int64_t needs) {
  return gradients_meta(mu, needs, {});
}

void check(const Tensor& mu, const OptionalTensor& other, const char* name) {
  if (!other) return;
  TORCH_CHECK_VALUE(other->sizes() == mu.sizes(), "fastvae: `", name, "` must have the shape of `mu` ", mu.sizes(), ", got ",
                    other->sizes());
  TORCH_CHECK_TYPE(other->scalar_type() == mu.scalar_type(), "fastvae: `", name, "` must be ", mu.scalar_type(), ", got ",
                   other->scalar_type());
}

Tensor dense(const Tensor& t) { return dense_rows(t, at::MemoryFormat::Contiguous); }

}  // namespace

Posterior::Posterior(const Tensor& mu_, const Tensor& logvar_, const OptionalTensor& prior_mu_, const OptionalTensor& prior_logvar_) {
  TORCH_CHECK_VALUE(mu_.dim() >= 1, "fastvae: `mu` needs a batch dimension");
  TORCH_CHECK_TYPE(c10::isFloatingType(mu_.scalar_type()), "fastvae: `mu` must be floating point, got ", mu_.scalar_type());
  check(mu_, logvar_, "logvar");
  check(mu_, prior_mu_, "prior_mu");
  check(mu_, prior_logvar_, "prior_logvar");
  TORCH_CHECK_VALUE(prior_mu_.has_value() == prior_logvar_.has_value(), "fastvae: `prior_mu` and `prior_logvar` go together");
  mu = dense(mu_);
  logvar = dense(logvar_);
  if (prior_mu_) {
    prior_mu = dense(*prior_mu_);
    prior_logvar = dense(*prior_logvar_);
  }
}

Draws::Draws(const Tensor& mu, std::optional<int64_t> samples, const OptionalTensor& eps_) {
  TORCH_CHECK_VALUE(!samples || *samples >= 1, "fastvae::reparameterize_kl: `samples` must be at least 1, got ", *samples);
  std::vector<int64_t> sizes = mu.sizes().vec();
  if (samples) sizes.insert(sizes.begin(), *samples);
  z = pooled_empty(sizes, mu);
  if (!eps_) return;
  TORCH_CHECK_VALUE(eps_->sizes() == z.sizes() && eps_->scalar_type() == mu.scalar_type(),
                    "fastvae::reparameterize_kl: `eps` must be ", mu.scalar_type(), " of the shape ", z.sizes());
  eps = eps_->contiguous();
}

TORCH_LIBRARY_IMPL(fastvae, CompositeExplicitAutograd, m) {
  m.impl("reparameterize_kl", sample_without_graph);
  m.impl("gaussian_kl", kl_without_graph);
}
TORCH_LIBRARY_IMPL(fastvae, Autograd, m) {
  m.impl("reparameterize_kl", sample_autograd);
  m.impl("gaussian_kl", kl_autograd);
}
TORCH_LIBRARY_IMPL(fastvae, Meta, m) {
  m.impl("reparameterize_kl_forward", sample_meta);
  m.impl("reparameterize_kl_backward", sample_grad_meta);
  m.impl("gaussian_kl_forward", kl_meta);
  m.impl("gaussian_kl_backward", kl_grad_meta);
}

}  // namespace fastvae
