// The CPU kernels of fastvae::reparameterize_kl_* and gaussian_kl_*.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu_kernels.h"
#include "latents_views.h"

namespace fastvae {
namespace {

constexpr uint64_t kSeedMask = ~uint64_t(0) >> 1;  // seeds and offsets are non-negative int64 numbers

Tensor seed_from(const OptionalGenerator& generator) {
  auto* source = at::get_generator_or_default<at::CPUGeneratorImpl>(generator, at::detail::getDefaultCPUGenerator());
  Tensor seed = at::empty({2}, at::kLong);
  auto* words = seed.mutable_data_ptr<int64_t>();
  const std::lock_guard<std::mutex> lock(source->mutex_);
  // The draw of torch.randint(0, 2^63 - 1), as on every other backend, so that one manual_seed gives the same noise on all.
  for (int i = 0; i < 2; ++i) words[i] = static_cast<int64_t>(source->random64() % kSeedMask);
  return seed;
}

void fill(cpu::Latents& args, const Posterior& posterior) {
  posterior.fill(args);
  args.in_double = posterior.mu.scalar_type() == at::kDouble;
}

void fill_noise(cpu::Latents& args, const Tensor& seed, int64_t row_offset, const Tensor& eps, bool many) {
  if (eps.defined()) return fill_eps(args, eps, many);
  check_seed(seed);
  const auto* words = seed.const_data_ptr<int64_t>();
  args.key = {uint64_t(words[0]) & kSeedMask, uint64_t(words[1]) & kSeedMask, uint64_t(row_offset)};
}

// Where the kernel writes the KL of rows or elements.
class KlResult {
 public:
  KlResult(cpu::SampleArgs& args, const Posterior& posterior, bool per_element) : dtype_(row_dtype(posterior.mu.scalar_type())) {
    if (per_element) {
      elements_ = pooled_empty(posterior.mu.sizes(), posterior.mu.options().dtype(dtype_));
      args.element_kl = result(elements_);
    } else {
      rows_.resize(args.rows);
      args.row_kl = rows_.data();
    }
  }

  Tensor tensor() const { return elements_.defined() ? elements_ : from_doubles(rows_, {int64_t(rows_.size())}, dtype_); }

 private:
  at::ScalarType dtype_;
  Tensor elements_;
  std::vector<double> rows_;
};

std::tuple<Tensor, Tensor, Tensor> sample_cpu(FASTVAE_POSTERIOR, bool per_element, FASTVAE_NOISE) {
  const Posterior posterior(FASTVAE_POSTERIOR_ARGS);
  const Draws draws(posterior.mu, samples, eps);
  const bool many = samples.has_value();
  const Tensor used_seed = eps ? at::empty({0}, at::kLong) : seed ? seed->contiguous() : seed_from(generator);

  cpu::SampleArgs args{};
  fill(args, posterior);
  fill_noise(args, used_seed, row_offset, draws.eps, many);
  fill_z(args, draws.z, many);
  const KlResult kl(args, posterior, per_element);
  cpu::kernels().sample(args);
  // An op must not return one of its inputs.
  return {draws.z, kl.tensor(), seed && !eps ? used_seed.clone() : used_seed};
}

// The gradient by the KL of rows or elements. `dense` keeps the memory that the kernel reads.
cpu::Operand kl_gradient(const Tensor& grad_kl, const Posterior& posterior, Tensor& dense) {
  if (!is_per_element(grad_kl, posterior.mu)) return {grad_kl.const_data_ptr(), dtype_of(grad_kl), grad_kl.stride(0), 1, 0};
  dense = dense_rows(grad_kl, at::MemoryFormat::Contiguous);
  return operand(dense);
}

Tensors sample_grad_cpu(const OptionalTensor& grad_z, const OptionalTensor& grad_kl, FASTVAE_POSTERIOR,
                        std::optional<int64_t> samples, const Tensor& seed, int64_t row_offset, const OptionalTensor& eps, int64_t needs) {
  const Posterior posterior(FASTVAE_POSTERIOR_ARGS);
  const bool many = samples.has_value();
  const Tensor noise = eps ? eps->contiguous() : Tensor();
  const Tensor grad = grad_z ? grad_z->contiguous() : Tensor();

  cpu::SampleGradArgs args{};
  fill(args, posterior);
  fill_noise(args, seed, row_offset, noise, many);
  args.draws = samples.value_or(1);
  if (grad_z) fill_grad_z(args, grad, many);
  Tensor dense;
  if (grad_kl) args.grad_kl = kl_gradient(*grad_kl, posterior, dense);
  Tensors gradients = fill_gradients(args, posterior, noise, needs, many);
  cpu::kernels().sample_grad(args);
  return gradients;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> log_probs_cpu(FASTVAE_DENSITIES, FASTVAE_DRAWS) {
  const Posterior posterior(mu, logvar, prior_mu, prior_logvar, form, constants, {});
  const Draws draws(posterior.mu, samples, eps);
  const Tensor used_seed = eps ? at::empty({0}, at::kLong) : seed ? seed->contiguous() : seed_from(generator);
  cpu::LogProbArgs args{};
  fill(args, posterior);
  fill_noise(args, used_seed, row_offset, draws.eps, true);
  fill_z(args, draws.z, true);
  std::vector<double> log_q(samples * args.rows), log_p(samples * args.rows);
  args.log_q = log_q.data();
  args.log_p = log_p.data();
  cpu::kernels().log_probs(args);
  const auto dtype = row_dtype(mu.scalar_type());
  return {draws.z, from_doubles(log_q, {samples, args.rows}, dtype), from_doubles(log_p, {samples, args.rows}, dtype),
          seed && !eps ? used_seed.clone() : used_seed};
}

Tensors log_probs_grad_cpu(const OptionalTensor& grad_z, const OptionalTensor& grad_log_q, const OptionalTensor& grad_log_p,
                           FASTVAE_DENSITIES, int64_t samples, const Tensor& seed, int64_t row_offset, const OptionalTensor& eps,
                           int64_t needs) {
  const Posterior posterior(mu, logvar, prior_mu, prior_logvar, form, constants, {});
  const Tensor noise = eps ? eps->contiguous() : Tensor(), grad = grad_z ? grad_z->contiguous() : Tensor();
  cpu::LogProbGradArgs args{};
  fill(args, posterior);
  fill_noise(args, seed, row_offset, noise, true);
  args.draws = samples;
  args.stl = stl;
  if (grad_z) fill_grad_z(args, grad, true);
  std::vector<double> by_q, by_p;
  if (grad_log_q) args.grad_log_q = (by_q = to_doubles(grad_log_q->reshape(-1))).data();
  if (grad_log_p) args.grad_log_p = (by_p = to_doubles(grad_log_p->reshape(-1))).data();
  Tensors gradients = fill_gradients(args, posterior, needs);
  cpu::kernels().log_probs_grad(args);
  return gradients;
}

Tensor kl_cpu(FASTVAE_POSTERIOR, bool per_element) {
  const Posterior posterior(FASTVAE_POSTERIOR_ARGS);
  cpu::SampleArgs args{};
  fill(args, posterior);
  const KlResult kl(args, posterior, per_element);
  cpu::kernels().sample(args);
  return kl.tensor();
}

Tensors kl_grad_cpu(const Tensor& grad_kl, FASTVAE_POSTERIOR, int64_t needs) {
  const Posterior posterior(FASTVAE_POSTERIOR_ARGS);
  cpu::SampleGradArgs args{};
  fill(args, posterior);
  Tensor dense;
  args.grad_kl = kl_gradient(grad_kl, posterior, dense);
  Tensors gradients = fill_gradients(args, posterior, Tensor(), needs, false);
  cpu::kernels().sample_grad(args);
  return gradients;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastvae, CPU, m) {
  m.impl("reparameterize_kl_forward", sample_cpu);
  m.impl("reparameterize_kl_backward", sample_grad_cpu);
  m.impl("sample_log_probs_forward", log_probs_cpu);
  m.impl("sample_log_probs_backward", log_probs_grad_cpu);
  m.impl("gaussian_kl_forward", kl_cpu);
  m.impl("gaussian_kl_backward", kl_grad_cpu);
}

}  // namespace fastvae
