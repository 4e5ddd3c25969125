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

int64_t needs_of(const Tensor& mu, const OptionalTensor& logvar, const OptionalTensor& prior_mu, const OptionalTensor& prior_logvar,
                 const OptionalTensor& eps) {
  return kMu * mu.requires_grad() | kLogvar * needs_grad(logvar) | kPriorMu * needs_grad(prior_mu) |
         kPriorLogvar * needs_grad(prior_logvar) | kEps * needs_grad(eps);
}

// The form of the scale and the balance, for the backward. What is as usual is not saved, because every entry of saved_data costs time.
struct SavedForm {
  std::string form = "logvar";
  std::vector<double> constants;
  std::optional<double> balance;

  static void save(AutogradContext* ctx, std::string_view form, at::ArrayRef<double> constants, std::optional<double> balance) {
    if (form != "logvar") {
      ctx->saved_data["form"] = std::string(form);
      ctx->saved_data["constants"] = constants.vec();
    }
    if (balance) ctx->saved_data["balance"] = *balance;
  }

  explicit SavedForm(const AutogradContext* ctx) {
    const auto& data = ctx->saved_data;
    if (const auto found = data.find("form"); found != data.end()) {
      form = found->second.toStringRef();
      constants = data.at("constants").toDoubleVector();
    }
    if (const auto found = data.find("balance"); found != data.end()) balance = found->second.toDouble();
  }
};

struct Sample : torch::autograd::Function<Sample> {
  static variable_list forward(AutogradContext* ctx, FASTVAE_POSTERIOR, bool per_element, FASTVAE_NOISE) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    static const auto forward_op = op<SampleForward>("fastvae::reparameterize_kl_forward");
    auto [z, kl, used_seed] = forward_op.call(FASTVAE_POSTERIOR_ARGS, per_element, FASTVAE_NOISE_ARGS);
    ctx->set_materialize_grads(false);
    SavedForm::save(ctx, form, constants, balance);
    ctx->saved_data["samples"] = samples;
    ctx->saved_data["row_offset"] = row_offset;
    ctx->saved_data["needs"] = needs_of(mu, logvar, prior_mu, prior_logvar, eps);
    ctx->save_for_backward({mu, logvar.value_or(Tensor()), prior_mu.value_or(Tensor()), prior_logvar.value_or(Tensor()), used_seed,
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
      const SavedForm how(ctx);
      gradients = backward_op.call(optional(grads[0]), optional(grads[1]), saved[0], optional(saved[1]), optional(saved[2]),
                                   optional(saved[3]), how.form, how.constants, how.balance,
                                   ctx->saved_data["samples"].toOptional<int64_t>(), saved[4],
                                   ctx->saved_data["row_offset"].toInt(), optional(saved[5]), needs);
    }
    return placed(std::move(gradients), needs, 13, {0, 1, 2, 3, 11});
  }
};

struct Kl : torch::autograd::Function<Kl> {
  static Tensor forward(AutogradContext* ctx, FASTVAE_POSTERIOR, bool per_element) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    static const auto forward_op = op<KlForward>("fastvae::gaussian_kl_forward");
    SavedForm::save(ctx, form, constants, balance);
    ctx->saved_data["needs"] = needs_of(mu, logvar, prior_mu, prior_logvar, {});
    ctx->save_for_backward({mu, logvar.value_or(Tensor()), prior_mu.value_or(Tensor()), prior_logvar.value_or(Tensor())});
    return forward_op.call(FASTVAE_POSTERIOR_ARGS, per_element);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const int64_t needs = ctx->saved_data["needs"].toInt();
    const auto run = [&] {
      const at::AutoDispatchBelowADInplaceOrView guard;
      static const auto backward_op = op<KlBackward>("fastvae::gaussian_kl_backward");
      const SavedForm how(ctx);
      return backward_op.call(grads[0], saved[0], optional(saved[1]), optional(saved[2]), optional(saved[3]), how.form,
                              how.constants, how.balance, needs);
    };
    return placed(run(), needs, 8, {0, 1, 2, 3});
  }
};

struct LogProbs : torch::autograd::Function<LogProbs> {
  static variable_list forward(AutogradContext* ctx, FASTVAE_DENSITIES, FASTVAE_DRAWS) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    static const auto forward_op = op<LogProbsForward>("fastvae::sample_log_probs_forward");
    auto [z, log_q, log_p, used_seed] =
        forward_op.call(FASTVAE_DENSITIES_ARGS, samples, seed, row_offset, eps, std::move(generator));
    ctx->set_materialize_grads(false);
    SavedForm::save(ctx, form, constants, {});
    ctx->saved_data["stl"] = stl;
    ctx->saved_data["samples"] = samples;
    ctx->saved_data["row_offset"] = row_offset;
    ctx->saved_data["needs"] = needs_of(mu, logvar, prior_mu, prior_logvar, {});
    ctx->save_for_backward({mu, logvar.value_or(Tensor()), prior_mu.value_or(Tensor()), prior_logvar.value_or(Tensor()), used_seed,
                            eps.value_or(Tensor())});
    return {z, log_q, log_p};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const bool any = grads[0].defined() || grads[1].defined() || grads[2].defined();
    const int64_t needs = any ? ctx->saved_data["needs"].toInt() : 0;
    Tensors gradients;
    if (needs) {
      const at::AutoDispatchBelowADInplaceOrView guard;
      static const auto backward_op = op<LogProbsBackward>("fastvae::sample_log_probs_backward");
      const SavedForm how(ctx);
      gradients = backward_op.call(optional(grads[0]), optional(grads[1]), optional(grads[2]), saved[0], optional(saved[1]),
                                   optional(saved[2]), optional(saved[3]), how.form, how.constants, ctx->saved_data["stl"].toBool(),
                                   ctx->saved_data["samples"].toInt(), saved[4], ctx->saved_data["row_offset"].toInt(),
                                   optional(saved[5]), needs);
    }
    return placed(std::move(gradients), needs, 12, {0, 1, 2, 3});
  }
};

std::tuple<Tensor, Tensor, Tensor> log_probs_without_graph(FASTVAE_DENSITIES, FASTVAE_DRAWS) {
  static const auto forward_op = op<LogProbsForward>("fastvae::sample_log_probs_forward");
  auto [z, log_q, log_p, used_seed] =
      forward_op.call(FASTVAE_DENSITIES_ARGS, samples, seed, row_offset, eps, std::move(generator));
  return {z, log_q, log_p};
}

std::tuple<Tensor, Tensor, Tensor> log_probs_autograd(FASTVAE_DENSITIES, FASTVAE_DRAWS) {
  for (const OptionalTensor& t : {OptionalTensor(mu), logvar, prior_mu, prior_logvar, eps}) refuse_tangent(t);
  TORCH_CHECK_VALUE(!c10::GradMode::is_enabled() || !needs_grad(eps), "fastvae::sample_log_probs: `eps` has no gradient here");
  if (!c10::GradMode::is_enabled() || !needs_of(mu, logvar, prior_mu, prior_logvar, {})) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return log_probs_without_graph(FASTVAE_DENSITIES_ARGS, samples, seed, row_offset, eps, std::move(generator));
  }
  const auto out = LogProbs::apply(FASTVAE_DENSITIES_ARGS, samples, seed, row_offset, eps, std::move(generator));
  return {out[0], out[1], out[2]};
}

std::tuple<Tensor, Tensor> sample_without_graph(FASTVAE_POSTERIOR, bool per_element, FASTVAE_NOISE) {
  static const auto forward_op = op<SampleForward>("fastvae::reparameterize_kl_forward");
  auto [z, kl, used_seed] = forward_op.call(FASTVAE_POSTERIOR_ARGS, per_element, FASTVAE_NOISE_ARGS);
  return {z, kl};
}

std::tuple<Tensor, Tensor> sample_autograd(FASTVAE_POSTERIOR, bool per_element, FASTVAE_NOISE) {
  for (const OptionalTensor& t : {OptionalTensor(mu), logvar, prior_mu, prior_logvar, eps}) refuse_tangent(t);
  if (!c10::GradMode::is_enabled() || !needs_of(mu, logvar, prior_mu, prior_logvar, eps)) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return sample_without_graph(FASTVAE_POSTERIOR_ARGS, per_element, FASTVAE_NOISE_ARGS);
  }
  const auto out = Sample::apply(FASTVAE_POSTERIOR_ARGS, per_element, FASTVAE_NOISE_ARGS);
  return {out[0], out[1]};
}

Tensor kl_without_graph(FASTVAE_POSTERIOR, bool per_element) {
  static const auto forward_op = op<KlForward>("fastvae::gaussian_kl_forward");
  return forward_op.call(FASTVAE_POSTERIOR_ARGS, per_element);
}

Tensor kl_autograd(FASTVAE_POSTERIOR, bool per_element) {
  for (const OptionalTensor& t : {OptionalTensor(mu), logvar, prior_mu, prior_logvar}) refuse_tangent(t);
  if (!c10::GradMode::is_enabled() || !needs_of(mu, logvar, prior_mu, prior_logvar, {})) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return kl_without_graph(FASTVAE_POSTERIOR_ARGS, per_element);
  }
  return Kl::apply(FASTVAE_POSTERIOR_ARGS, per_element);
}

Tensor empty_as(const Tensor& like, c10::SymIntArrayRef sizes, at::ScalarType dtype) {
  return at::empty_symint(sizes, like.options().dtype(dtype));
}

// The shape of z for one draw, where mu may be a packed head.
std::vector<c10::SymInt> latent_sizes(const Tensor& mu, const OptionalTensor& logvar) {
  std::vector<c10::SymInt> sizes = mu.sym_sizes().vec();
  if (!logvar) sizes[1] = sizes[1] / 2;
  return sizes;
}

Tensor kl_meta(FASTVAE_POSTERIOR, bool per_element) {
  const auto sizes = latent_sizes(mu, logvar);
  return empty_as(mu, c10::SymIntArrayRef(sizes).slice(0, per_element ? sizes.size() : 1), row_dtype(mu.scalar_type()));
}

std::tuple<Tensor, Tensor, Tensor> sample_meta(FASTVAE_POSTERIOR, bool per_element, FASTVAE_NOISE) {
  auto sizes = latent_sizes(mu, logvar);
  if (samples) sizes.insert(sizes.begin(), *samples);
  return {empty_as(mu, sizes, mu.scalar_type()), kl_meta(FASTVAE_POSTERIOR_ARGS, per_element), empty_as(mu, {eps ? 0 : 2}, at::kLong)};
}

Tensors gradients_meta(const Tensor& mu, const OptionalTensor& prior_mu, int64_t needs, const OptionalTensor& eps) {
  Tensors gradients;
  for (int64_t bit = kMu; bit <= kPriorLogvar; bit <<= 1) {
    if (!(needs & bit)) continue;
    // The halves of a pair have one shape, which may differ from that of the other pair if one of them is a packed head.
    gradients.push_back(empty_as(mu, (bit >= kPriorMu ? *prior_mu : mu).sym_sizes(), mu.scalar_type()));
  }
  if (needs & kEps) gradients.push_back(empty_as(mu, eps->sym_sizes(), mu.scalar_type()));
  return gradients;
}

Tensors sample_grad_meta(const OptionalTensor&, const OptionalTensor&, FASTVAE_POSTERIOR, std::optional<int64_t>, const Tensor&, int64_t,
                         const OptionalTensor& eps, int64_t needs) {
  return gradients_meta(mu, prior_mu, needs, eps);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> log_probs_meta(FASTVAE_DENSITIES, FASTVAE_DRAWS) {
  auto sizes = latent_sizes(mu, logvar);
  sizes.insert(sizes.begin(), samples);
  const auto rows = c10::SymIntArrayRef(sizes).slice(0, 2);
  const auto dtype = row_dtype(mu.scalar_type());
  return {empty_as(mu, sizes, mu.scalar_type()), empty_as(mu, rows, dtype), empty_as(mu, rows, dtype),
          empty_as(mu, {eps ? 0 : 2}, at::kLong)};
}

Tensors log_probs_grad_meta(const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, FASTVAE_DENSITIES, int64_t,
                            const Tensor&, int64_t, const OptionalTensor&, int64_t needs) {
  return gradients_meta(mu, prior_mu, needs, {});
}

Tensors kl_grad_meta(const Tensor&, FASTVAE_POSTERIOR, int64_t needs) { return gradients_meta(mu, prior_mu, needs, {}); }

void check(const Tensor& mu, const Tensor& other, const char* name) {
  TORCH_CHECK_VALUE(other.sizes() == mu.sizes(), "fastvae: `", name, "` must have the shape of `mu` ", mu.sizes(), ", got ",
                    other.sizes());
  TORCH_CHECK_TYPE(other.scalar_type() == mu.scalar_type(), "fastvae: `", name, "` must be ", mu.scalar_type(), ", got ",
                   other.scalar_type());
}

Tensor dense(const Tensor& t) { return dense_rows(t, at::MemoryFormat::Contiguous); }

}  // namespace

ScaleForm scale_form(std::string_view name, at::ArrayRef<double> constants) {
  ScaleForm form;
  const auto of = [&](ScaleForm::Kind kind, size_t count) {
    TORCH_CHECK_VALUE(constants.size() == count, "fastvae: the form ", name, " has ", count, " constants, got ", constants.size());
    form.kind = kind;
    for (size_t i = 0; i < count; ++i) form.constants[i] = constants[i];
  };
  if (name == "logvar") {
    of(ScaleForm::logvar, 0);
  } else if (name == "logvar_clamp") {
    of(ScaleForm::clamped, 2);
  } else if (name == "logvar_bounds") {
    of(ScaleForm::bounded, 2);
    const double half = (constants[1] - constants[0]) / 2;
    form.constants[0] = constants[0] + half;
    form.constants[1] = half;
    form.constants[2] = 1 / half;
  } else if (name == "log_std") {
    of(ScaleForm::log_std, 2);
    form.soft = constants[0];
    if (constants[1] > 0) {
      form.kind = ScaleForm::shifted_log_std;
      form.constants[0] = std::log(constants[1]);
    }
  } else if (name == "softplus") {
    of(ScaleForm::softplus, 1);
  } else if (name == "variance") {
    of(ScaleForm::logvar, 1);
    if (constants[0] > 0) {
      form.kind = ScaleForm::shifted_variance;
      form.constants[0] = std::log(constants[0]);
    }
  } else {
    TORCH_CHECK_VALUE(false, "fastvae: unknown form of the scale: ", name);
  }
  return form;
}

Posterior::Posterior(FASTVAE_POSTERIOR) : form(scale_form(form, constants)) {
  TORCH_CHECK_VALUE(mu.dim() >= 1, "fastvae: `mu` needs a batch dimension");
  TORCH_CHECK_TYPE(c10::isFloatingType(mu.scalar_type()), "fastvae: `mu` must be floating point, got ", mu.scalar_type());
  const auto is_head = [](const Tensor& t) { return t.dim() >= 2 && t.size(1) % 2 == 0; };
  Tensor mean = mu, scale = logvar.value_or(Tensor());
  if (!logvar) {
    TORCH_CHECK_VALUE(is_head(mu), "fastvae: without `logvar`, `mu` must be a packed head (B, 2 L, ...), got ", mu.sizes());
    head = mu.sizes().vec();
    mean = half_of(mu, 0);
    scale = half_of(mu, 1);
  }
  check(mean, scale, "logvar");
  this->mu = dense(mean);
  this->logvar = dense(scale);
  if (balance) {
    TORCH_CHECK_VALUE(prior_mu, "fastvae: `balance` needs a prior");
    prior_weight = *balance;
    posterior_weight = 1 - *balance;
  }
  TORCH_CHECK_VALUE(prior_mu || !prior_logvar, "fastvae: `prior_mu` and `prior_logvar` go together");
  if (!prior_mu) return;
  Tensor prior_mean = *prior_mu, prior_scale = prior_logvar.value_or(Tensor());
  if (!prior_logvar) {
    TORCH_CHECK_VALUE(!logvar && is_head(*prior_mu), "fastvae: `prior_mu` and `prior_logvar` go together");
    prior_head = prior_mu->sizes().vec();
    prior_mean = half_of(*prior_mu, 0);
    prior_scale = half_of(*prior_mu, 1);
  }
  check(mean, prior_mean, "prior_mu");
  check(mean, prior_scale, "prior_logvar");
  this->prior_mu = dense(prior_mean);
  this->prior_logvar = dense(prior_scale);
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
  m.impl("sample_log_probs", log_probs_without_graph);
  m.impl("gaussian_kl", kl_without_graph);
}
TORCH_LIBRARY_IMPL(fastvae, Autograd, m) {
  m.impl("reparameterize_kl", sample_autograd);
  m.impl("sample_log_probs", log_probs_autograd);
  m.impl("gaussian_kl", kl_autograd);
}
TORCH_LIBRARY_IMPL(fastvae, Meta, m) {
  m.impl("reparameterize_kl_forward", sample_meta);
  m.impl("reparameterize_kl_backward", sample_grad_meta);
  m.impl("sample_log_probs_forward", log_probs_meta);
  m.impl("sample_log_probs_backward", log_probs_grad_meta);
  m.impl("gaussian_kl_forward", kl_meta);
  m.impl("gaussian_kl_backward", kl_grad_meta);
}

}  // namespace fastvae
