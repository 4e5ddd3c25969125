// Converts the arguments of fastvae::reparameterize_kl_* and gaussian_kl_* into the plain structs that all kernels take.
#pragma once
#include "buffer_pool.h"
#include "latents.h"

namespace fastvae {

// The form that the kernels take, from its name and its constants:
//   "logvar" ()   "logvar_clamp" (low, high)   "logvar_bounds" (low, high)   "log_std" (soft clamp or 0, eps)   "softplus" (eps)
//   "variance" (eps)
ScaleForm scale_form(std::string_view name, at::ArrayRef<double> constants);

// The checked posterior and prior, and the tensors that own the memory that the kernels read.
struct Posterior {
  Tensor mu, logvar, prior_mu, prior_logvar;
  ScaleForm form;
  double posterior_weight = 1, prior_weight = 1;
  // The shapes of packed heads; without one, the gradients have the shape of mu.
  std::optional<std::vector<int64_t>> head, prior_head;

  explicit Posterior(FASTVAE_POSTERIOR);

  template <class Latents>
  void fill(Latents& args) const {
    args.form = form;
    args.rows = mu.size(0);
    args.size = event_size(mu);
    args.mu = operand(mu);
    args.logvar = operand(logvar);
    if (prior_mu.defined()) {
      args.prior_mu = operand(prior_mu);
      args.prior_logvar = operand(prior_logvar);
    }
  }
};

// The first or the second half of a packed head.
inline Tensor half_of(const Tensor& head, int64_t which) {
  const int64_t half = head.size(1) / 2;
  return head.narrow(1, which * half, half);
}

// Tensors (K, B, ...) with `many` draws, or (B, ...). The kernels get the first draw and the stride to the next.
inline cpu::Operand first_draw(const Tensor& t, bool many) { return operand(many ? t.select(0, 0) : t); }
inline cpu::Result first_draw_result(const Tensor& t, bool many) { return result(many ? t.select(0, 0) : t); }
inline int64_t draw_stride(const Tensor& t, bool many) { return many ? t.stride(0) : 0; }

// z, not written yet, and eps, if it is passed, checked against z.
struct Draws {
  Tensor z, eps;

  Draws(const Tensor& mu, std::optional<int64_t> samples, const OptionalTensor& eps);
};

template <class Latents>
void fill_eps(Latents& args, const Tensor& eps, bool many) {
  args.eps = first_draw(eps, many);
  args.eps_draw_stride = draw_stride(eps, many);
}

template <class SampleArgs>
void fill_z(SampleArgs& args, const Tensor& z, bool many) {
  args.draws = many ? z.size(0) : 1;
  args.z = first_draw_result(z, many);
  args.z_draw_stride = draw_stride(z, many);
}

// `grad_z`, which is contiguous, must live until the kernel is launched.
template <class SampleGradArgs>
void fill_grad_z(SampleGradArgs& args, const Tensor& grad_z, bool many) {
  args.grad_z = first_draw(grad_z, many);
  args.grad_z_draw_stride = draw_stride(grad_z, many);
}

// Creates the gradients of the posterior and the prior that `needs` selects.
template <class GradArgs>
Tensors fill_gradients(GradArgs& args, const Posterior& posterior, int64_t needs) {
  const Tensor& mu = posterior.mu;
  Tensors gradients;
  const auto wanted = [&](int64_t bit, cpu::Result& view) {
    if (!(needs & bit)) return;
    gradients.push_back(pooled_empty(mu.sizes(), mu));
    view = result(gradients.back());
  };
  const auto pair = [&](int64_t bit, const std::optional<std::vector<int64_t>>& head, cpu::Result& first, cpu::Result& second) {
    if (!head) {
      wanted(bit, first);
      wanted(bit << 1, second);
    } else if (needs & bit) {
      gradients.push_back(pooled_empty(*head, mu));
      first = result(half_of(gradients.back(), 0));
      second = result(half_of(gradients.back(), 1));
    }
  };
  pair(kMu, posterior.head, args.grad_mu, args.grad_logvar);
  pair(kPriorMu, posterior.prior_head, args.grad_prior_mu, args.grad_prior_logvar);
  return gradients;
}

// The same, and the gradient of eps.
template <class SampleGradArgs>
Tensors fill_gradients(SampleGradArgs& args, const Posterior& posterior, const Tensor& eps, int64_t needs, bool many) {
  Tensors gradients = fill_gradients(args, posterior, needs);
  args.posterior_weight = posterior.posterior_weight;
  args.prior_weight = posterior.prior_weight;
  if (needs & kEps) {
    gradients.push_back(pooled_empty(eps.sizes(), posterior.mu));
    args.grad_eps = first_draw_result(gradients.back(), many);
    args.grad_eps_draw_stride = draw_stride(gradients.back(), many);
  }
  return gradients;
}

// The incoming gradient of gaussian_kl may have one value per element instead of one per row.
inline bool is_per_element(const Tensor& grad_kl, const Tensor& mu) { return grad_kl.dim() != 1 || mu.dim() == 1; }

inline void check_seed(const Tensor& seed) {
  TORCH_CHECK_VALUE(seed.scalar_type() == at::kLong && seed.numel() == 2 && seed.is_contiguous(),
                    "fastvae: `seed` must be a (2,) int64 tensor");
}

}  // namespace fastvae
