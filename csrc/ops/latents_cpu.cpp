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

std::tuple<Tensor, Tensor, Tensor> sample_cpu(const Tensor& mu, const Tensor& logvar, const OptionalTensor& prior_mu,
                                              const OptionalTensor& prior_logvar, std::optional<int64_t> samples,
                                              const OptionalTensor& seed, int64_t row_offset, const OptionalTensor& eps,
                                              OptionalGenerator generator) {
  const Posterior posterior(mu, logvar, prior_mu, prior_logvar);
  const Draws draws(posterior.mu, samples, eps);
  const bool many = samples.has_value();
  const Tensor used_seed = eps ? at::empty({0}, at::kLong) : seed ? seed->contiguous() : seed_from(generator);

  cpu::SampleArgs args{};
  fill(args, posterior);
  fill_noise(args, used_seed, row_offset, draws.eps, many);
  fill_z(args, draws.z, many);
  std::vector<double> kl(args.rows);
  args.row_kl = kl.data();
  cpu::kernels().sample(args);
  // An op must not return one of its inputs.
  return {draws.z, from_doubles(kl, {args.rows}, row_dtype(mu.scalar_type())), seed && !eps ? used_seed.clone() : used_seed};
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
  fill(args, posterior);
  fill_noise(args, seed, row_offset, noise, many);
  args.draws = samples.value_or(1);
  if (grad_z) fill_grad_z(args, grad, many);
  if (grad_kl) args.grad_kl = per_row(*grad_kl);
  Tensors gradients = fill_gradients(args, posterior.mu, noise, needs, many);
  cpu::kernels().sample_grad(args);
  return gradients;
}

Tensor kl_cpu(const Tensor& mu, const Tensor& logvar, const OptionalTensor& prior_mu, const OptionalTensor& prior_logvar,
              bool per_element) {
  const Posterior posterior(mu, logvar, prior_mu, prior_logvar);
  const auto dtype = row_dtype(mu.scalar_type());
  cpu::SampleArgs args{};
  fill(args, posterior);
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
  fill(args, posterior);
  const bool per_element = is_per_element(grad_kl, mu);
  const Tensor dense = per_element ? dense_rows(grad_kl, at::MemoryFormat::Contiguous) : grad_kl;
  args.grad_kl = per_element ? operand(dense) : per_row(dense);
  Tensors gradients = fill_gradients(args, posterior.mu, Tensor(), needs, false);
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
