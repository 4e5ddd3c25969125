// The CPU kernels of fastvae::reparameterize_kl_* and gaussian_kl_*.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "buffer_pool.h"
#include "cpu_kernels.h"
#include "latents.h"

namespace fastvae {
namespace {

constexpr uint64_t kSeedMask = ~uint64_t(0) >> 1;  // seeds and offsets fit a positive int64

void check(const Tensor& mu, const OptionalTensor& other, const char* name) {
  if (!other) return;
  TORCH_CHECK_VALUE(other->sizes() == mu.sizes(), "fastvae: `", name, "` must have the shape of `mu` ", mu.sizes(), ", got ",
                    other->sizes());
  TORCH_CHECK_TYPE(other->scalar_type() == mu.scalar_type(), "fastvae: `", name, "` must be ", mu.scalar_type(), ", got ",
                   other->scalar_type());
}

// What the kernels read, and the tensors that keep it alive.
struct Posterior {
  Tensor mu, logvar, prior_mu, prior_logvar;

  Posterior(const Tensor& mu_, const Tensor& logvar_, const OptionalTensor& prior_mu_, const OptionalTensor& prior_logvar_) {
    TORCH_CHECK_VALUE(mu_.dim() >= 1, "fastvae: `mu` needs a batch dimension");
    TORCH_CHECK_TYPE(c10::isFloatingType(mu_.scalar_type()), "fastvae: `mu` must be floating point, got ", mu_.scalar_type());
    check(mu_, logvar_, "logvar");
    check(mu_, prior_mu_, "prior_mu");
    check(mu_, prior_logvar_, "prior_logvar");
    TORCH_CHECK_VALUE(prior_mu_.has_value() == prior_logvar_.has_value(), "fastvae: `prior_mu` and `prior_logvar` go together");
    const auto dense = [](const Tensor& t) { return dense_rows(t, at::MemoryFormat::Contiguous); };
    mu = dense(mu_);
    logvar = dense(logvar_);
    if (prior_mu_) {
      prior_mu = dense(*prior_mu_);
      prior_logvar = dense(*prior_logvar_);
    }
  }

  void fill(cpu::Latents& args) const {
    args.in_double = mu.scalar_type() == at::kDouble;
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

Tensor seed_from(const OptionalGenerator& generator) {
  auto* source = at::get_generator_or_default<at::CPUGeneratorImpl>(generator, at::detail::getDefaultCPUGenerator());
  Tensor seed = at::empty({2}, at::kLong);
  auto* words = seed.mutable_data_ptr<int64_t>();
  const std::lock_guard<std::mutex> lock(source->mutex_);
  for (int i = 0; i < 2; ++i) words[i] = static_cast<int64_t>(source->random64() & kSeedMask);
  return seed;
}

void fill_noise(cpu::Latents& args, const Tensor& seed, int64_t row_offset, const Tensor& eps, bool many) {
  if (eps.defined()) {
    args.eps = operand(many ? eps.select(0, 0) : eps);
    args.eps_draw_stride = many ? eps.stride(0) : 0;
  } else {
    TORCH_CHECK_VALUE(seed.scalar_type() == at::kLong && seed.numel() == 2 && seed.is_contiguous(),
                      "fastvae: `seed` must be a (2,) int64 tensor");
    const auto* words = seed.const_data_ptr<int64_t>();
    args.key = {uint64_t(words[0]) & kSeedMask, uint64_t(words[1]) & kSeedMask, uint64_t(row_offset)};
  }
}

// A (K, B, ...) or (B, ...) tensor, contiguous, with at least one draw to point at.
Tensor draws_of(const Tensor& mu, std::optional<int64_t> samples) {
  std::vector<int64_t> sizes = mu.sizes().vec();
  if (samples) sizes.insert(sizes.begin(), *samples);
  return pooled_empty(sizes, mu);
}

cpu::Operand first_draw(const Tensor& t, bool many) { return operand(many ? t.select(0, 0) : t); }
cpu::Result first_draw_result(const Tensor& t, bool many) { return result(many ? t.select(0, 0) : t); }

std::tuple<Tensor, Tensor, Tensor> sample_cpu(const Tensor& mu, const Tensor& logvar, const OptionalTensor& prior_mu,
                                              const OptionalTensor& prior_logvar, std::optional<int64_t> samples,
                                              const OptionalTensor& seed, int64_t row_offset, const OptionalTensor& eps,
                                              OptionalGenerator generator) {
  const Posterior posterior(mu, logvar, prior_mu, prior_logvar);
  const bool many = samples.has_value();
  TORCH_CHECK_VALUE(!many || *samples >= 1, "fastvae::reparameterize_kl: `samples` must be at least 1, got ", *samples);
  const Tensor z = draws_of(posterior.mu, samples);
  TORCH_CHECK_VALUE(!eps || (eps->sizes() == z.sizes() && eps->scalar_type() == mu.scalar_type()),
                    "fastvae::reparameterize_kl: `eps` must be ", mu.scalar_type(), " of the shape ", z.sizes());
  const Tensor noise = eps ? eps->contiguous() : Tensor();
  const Tensor used_seed = eps ? at::empty({0}, at::kLong) : seed ? seed->contiguous() : seed_from(generator);

  cpu::SampleArgs args{};
  posterior.fill(args);
  fill_noise(args, used_seed, row_offset, noise, many);
  args.draws = samples.value_or(1);
  args.z = first_draw_result(z, many);
  args.z_draw_stride = many ? z.stride(0) : 0;
  std::vector<double> kl(args.rows);
  args.row_kl = kl.data();
  cpu::kernels().sample(args);
  // An op must not return what it was given.
  return {z, from_doubles(kl, {args.rows}, row_dtype(mu.scalar_type())), seed && !eps ? used_seed.clone() : used_seed};
}

Tensors gradients_for(cpu::SampleGradArgs& args, const Tensor& mu, const Tensor& eps, int64_t needs, bool many) {
  Tensors gradients;
  const auto wanted = [&](int64_t bit, cpu::Result& view) {
    if (!(needs & bit)) return;
    gradients.push_back(pooled_empty(mu.sizes(), mu));
    view = result(gradients.back());
  };
  wanted(kMu, args.grad_mu);
  wanted(kLogvar, args.grad_logvar);
  wanted(kPriorMu, args.grad_prior_mu);
  wanted(kPriorLogvar, args.grad_prior_logvar);
  if (needs & kEps) {
    gradients.push_back(pooled_empty(eps.sizes(), mu));
    args.grad_eps = first_draw_result(gradients.back(), many);
    args.grad_eps_draw_stride = many ? gradients.back().stride(0) : 0;
  }
  return gradients;
}

cpu::Operand per_row(const Tensor& t) { return {t.const_data_ptr(), dtype_of(t), t.stride(0), 1, 0}; }

Tensors sample_grad_cpu(const OptionalTensor& grad_z, const OptionalTensor& grad_kl, const Tensor& mu, const Tensor& logvar,
                        const OptionalTensor& prior_mu, const OptionalTensor& prior_logvar, std::optional<int64_t> samples,
                        const Tensor& seed, int64_t row_offset, const OptionalTensor& eps, int64_t needs) {
  const Posterior posterior(mu, logvar, prior_mu, prior_logvar);
  const bool many = samples.has_value();
  const Tensor noise = eps ? eps->contiguous() : Tensor();
  const Tensor grad = grad_z ? grad_z->contiguous() : Tensor();

  cpu::SampleGradArgs args{};
  posterior.fill(args);
  fill_noise(args, seed, row_offset, noise, many);
  args.draws = samples.value_or(1);
  if (grad_z) {
    args.grad_z = first_draw(grad, many);
    args.grad_z_draw_stride = many ? grad.stride(0) : 0;
  }
  if (grad_kl) args.grad_kl = per_row(*grad_kl);
  Tensors gradients = gradients_for(args, posterior.mu, noise, needs, many);
  cpu::kernels().sample_grad(args);
  return gradients;
}

Tensor kl_cpu(const Tensor& mu, const Tensor& logvar, const OptionalTensor& prior_mu, const OptionalTensor& prior_logvar,
              bool per_element) {
  const Posterior posterior(mu, logvar, prior_mu, prior_logvar);
  const auto dtype = row_dtype(mu.scalar_type());
  cpu::SampleArgs args{};
  posterior.fill(args);
  Tensor elements;
  std::vector<double> kl;
  if (per_element) {
    elements = at::empty(mu.sizes(), mu.options().dtype(dtype));
    args.element_kl = result(elements);
  } else {
    kl.resize(args.rows);
    args.row_kl = kl.data();
  }
  cpu::kernels().sample(args);
  return per_element ? elements : from_doubles(kl, {args.rows}, dtype);
}

Tensors kl_grad_cpu(const Tensor& grad_kl, const Tensor& mu, const Tensor& logvar, const OptionalTensor& prior_mu,
                    const OptionalTensor& prior_logvar, int64_t needs) {
  const Posterior posterior(mu, logvar, prior_mu, prior_logvar);
  cpu::SampleGradArgs args{};
  posterior.fill(args);
  const bool per_element = grad_kl.dim() != 1 || mu.dim() == 1;
  const Tensor dense = per_element ? dense_rows(grad_kl, at::MemoryFormat::Contiguous) : grad_kl;
  args.grad_kl = per_element ? operand(dense) : per_row(dense);
  Tensors gradients = gradients_for(args, posterior.mu, Tensor(), needs, false);
  cpu::kernels().sample_grad(args);
  return gradients;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastvae, CPU, m) {
  m.impl("reparameterize_kl_forward", sample_cpu);
  m.impl("reparameterize_kl_backward", sample_grad_cpu);
  m.impl("gaussian_kl_forward", kl_cpu);
  m.impl("gaussian_kl_backward", kl_grad_cpu);
}

}  // namespace fastvae
