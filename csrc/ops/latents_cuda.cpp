// The CUDA kernels of fastvae::reparameterize_kl_* and gaussian_kl_*.
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <torch/library.h>

#include "common_cuda.h"
#include "latents_views.h"

namespace fastvae {
namespace {

void fill(cuda::Latents& args, const Posterior& posterior, const OnDevice& device) {
  device.expect(posterior.logvar, "logvar");
  if (posterior.prior_mu.defined()) {
    device.expect(posterior.prior_mu, "prior_mu");
    device.expect(posterior.prior_logvar, "prior_logvar");
  }
  posterior.fill(args);
}

// The seed is on the device and is never copied to the host.
cuda::NoiseSource noise_from(const Tensor& seed, int64_t row_offset, const OnDevice& device) {
  check_seed(seed);
  device.expect(seed, "seed");
  cuda::NoiseSource noise;
  noise.tensor = seed.const_data_ptr<int64_t>();
  noise.row_offset = row_offset;
  return noise;
}

// The noise of the generator: its numbers, or, while a graph is captured, the addresses where each replay finds them.
cuda::NoiseSource noise_from(const OptionalGenerator& generator, int64_t draws, int64_t row_offset, const OnDevice& device) {
  auto* source = at::get_generator_or_default<at::CUDAGeneratorImpl>(generator, at::cuda::detail::getDefaultCUDAGenerator());
  // A generator made for "cuda" has no index, and torch uses it on every GPU.
  if (source->device().has_index()) device.expect(source->device(), "generator");
  at::PhiloxCudaState state;
  {
    const std::lock_guard<std::mutex> lock(source->mutex_);
    state = source->philox_cuda_state(4 * static_cast<uint64_t>(draws));
  }
  cuda::NoiseSource noise;
  noise.captured = state.captured_;
  noise.row_offset = row_offset;
  if (state.captured_) {
    noise.seed_pointer = state.seed_.ptr;
    noise.offset_pointer = state.offset_.ptr;
    noise.offset_intragraph = state.offset_intragraph_;
  } else {
    noise.seed = state.seed_.val;
    noise.offset = state.offset_.val;
  }
  return noise;
}

void run(cuda::SampleArgs& args, const OnDevice& device) {
  const Scratch scratch(cuda::sample_scratch(args), device);
  args.workspace = scratch.workspace();
  check_launch(cuda::sample(args, device));
}

// Where the kernel writes the KL of rows or elements.
Tensor kl_result(cuda::SampleArgs& args, const Posterior& posterior, bool per_element) {
  const auto options = posterior.mu.options().dtype(row_dtype(posterior.mu.scalar_type()));
  const Tensor kl = per_element ? uninitialized(posterior.mu.sizes(), options) : uninitialized({posterior.mu.size(0)}, options);
  if (per_element) args.element_kl = result(kl);
  else args.row_kl = output(kl);
  return kl;
}

// The gradient by the KL of rows or elements. `dense` keeps the memory that the kernel reads.
void fill_grad_kl(cuda::SampleGradArgs& args, const Tensor& grad_kl, const Posterior& posterior, Tensor& dense) {
  if (is_per_element(grad_kl, posterior.mu)) {
    dense = dense_rows(grad_kl, at::MemoryFormat::Contiguous);
    args.element_grad_kl = operand(dense);
  } else {
    args.grad_kl = numbers(grad_kl, "grad_kl");
  }
}

std::tuple<Tensor, Tensor, Tensor> sample_cuda(FASTVAE_POSTERIOR, bool per_element, FASTVAE_NOISE) {
  const OnDevice device(mu);
  device.expect(eps, "eps");
  const Posterior posterior(FASTVAE_POSTERIOR_ARGS);
  const Draws draws(posterior.mu, samples, eps);
  const bool many = samples.has_value();
  const Tensor used_seed = uninitialized({eps ? 0 : 2}, mu.options().dtype(at::kLong));
  const Tensor given_seed = seed ? seed->contiguous() : Tensor();

  cuda::SampleArgs args;
  fill(args, posterior, device);
  fill_z(args, draws.z, many);
  if (eps) {
    fill_eps(args, draws.eps, many);
  } else {
    args.noise = seed ? noise_from(given_seed, row_offset, device) : noise_from(generator, args.draws, row_offset, device);
    args.used_seed = used_seed.mutable_data_ptr<int64_t>();
  }
  const Tensor kl = kl_result(args, posterior, per_element);
  run(args, device);
  return {draws.z, kl, used_seed};
}

Tensors sample_grad_cuda(const OptionalTensor& grad_z, const OptionalTensor& grad_kl, FASTVAE_POSTERIOR,
                         std::optional<int64_t> samples, const Tensor& seed, int64_t row_offset, const OptionalTensor& eps, int64_t needs) {
  const OnDevice device(mu);
  device.expect(grad_z, "grad_z");
  device.expect(grad_kl, "grad_kl");
  device.expect(eps, "eps");
  const Posterior posterior(FASTVAE_POSTERIOR_ARGS);
  const bool many = samples.has_value();
  const Tensor noise = eps ? eps->contiguous() : Tensor();
  const Tensor grad = grad_z ? grad_z->contiguous() : Tensor();

  cuda::SampleGradArgs args;
  fill(args, posterior, device);
  args.draws = samples.value_or(1);
  if (eps) fill_eps(args, noise, many);
  else args.noise = noise_from(seed, row_offset, device);
  if (grad_z) fill_grad_z(args, grad, many);
  Tensor dense;
  if (grad_kl) fill_grad_kl(args, *grad_kl, posterior, dense);
  Tensors gradients = fill_gradients(args, posterior, noise, needs, many);
  check_launch(cuda::sample_grad(args, device));
  return gradients;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> log_probs_cuda(FASTVAE_DENSITIES, FASTVAE_DRAWS) {
  const OnDevice device(mu);
  device.expect(eps, "eps");
  const Posterior posterior(mu, logvar, prior_mu, prior_logvar, form, constants, {});
  const Draws draws(posterior.mu, samples, eps);
  const auto options = mu.options().dtype(row_dtype(mu.scalar_type()));
  const Tensor log_q = uninitialized({samples, mu.size(0)}, options), log_p = uninitialized({samples, mu.size(0)}, options);
  const Tensor used_seed = uninitialized({eps ? 0 : 2}, mu.options().dtype(at::kLong));
  const Tensor given_seed = seed ? seed->contiguous() : Tensor();

  cuda::LogProbArgs args;
  fill(args, posterior, device);
  fill_z(args, draws.z, true);
  if (eps) {
    fill_eps(args, draws.eps, true);
  } else {
    args.noise = seed ? noise_from(given_seed, row_offset, device) : noise_from(generator, args.draws, row_offset, device);
    args.used_seed = used_seed.mutable_data_ptr<int64_t>();
  }
  args.log_q = output(log_q);
  args.log_p = output(log_p);
  check_launch(cuda::log_probs(args, device));
  return {draws.z, log_q, log_p, used_seed};
}

Tensors log_probs_grad_cuda(const OptionalTensor& grad_z, const OptionalTensor& grad_log_q, const OptionalTensor& grad_log_p,
                            FASTVAE_DENSITIES, int64_t samples, const Tensor& seed, int64_t row_offset, const OptionalTensor& eps,
                            int64_t needs) {
  const OnDevice device(mu);
  device.expect(grad_z, "grad_z");
  device.expect(grad_log_q, "grad_log_q");
  device.expect(grad_log_p, "grad_log_p");
  device.expect(eps, "eps");
  const Posterior posterior(mu, logvar, prior_mu, prior_logvar, form, constants, {});
  const auto dense = [](const OptionalTensor& t) { return t ? t->contiguous() : Tensor(); };
  const Tensor noise = dense(eps), by_z = dense(grad_z), by_q = dense(grad_log_q), by_p = dense(grad_log_p);

  cuda::LogProbGradArgs args;
  fill(args, posterior, device);
  args.draws = samples;
  args.stl = stl;
  if (eps) fill_eps(args, noise, true);
  else args.noise = noise_from(seed, row_offset, device);
  if (grad_z) fill_grad_z(args, by_z, true);
  if (grad_log_q) args.grad_log_q = numbers(by_q.view({-1}), "grad_log_q");
  if (grad_log_p) args.grad_log_p = numbers(by_p.view({-1}), "grad_log_p");
  Tensors gradients = fill_gradients(args, posterior, needs);
  check_launch(cuda::log_probs_grad(args, device));
  return gradients;
}

Tensor kl_cuda(FASTVAE_POSTERIOR, bool per_element) {
  const OnDevice device(mu);
  const Posterior posterior(FASTVAE_POSTERIOR_ARGS);
  cuda::SampleArgs args;
  fill(args, posterior, device);
  const Tensor kl = kl_result(args, posterior, per_element);
  run(args, device);
  return kl;
}

Tensors kl_grad_cuda(const Tensor& grad_kl, FASTVAE_POSTERIOR, int64_t needs) {
  const OnDevice device(mu);
  device.expect(grad_kl, "grad_kl");
  const Posterior posterior(FASTVAE_POSTERIOR_ARGS);
  cuda::SampleGradArgs args;
  fill(args, posterior, device);
  Tensor dense;
  fill_grad_kl(args, grad_kl, posterior, dense);
  Tensors gradients = fill_gradients(args, posterior, Tensor(), needs, false);
  check_launch(cuda::sample_grad(args, device));
  return gradients;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastvae, CUDA, m) {
  m.impl("reparameterize_kl_forward", sample_cuda);
  m.impl("reparameterize_kl_backward", sample_grad_cuda);
  m.impl("sample_log_probs_forward", log_probs_cuda);
  m.impl("sample_log_probs_backward", log_probs_grad_cuda);
  m.impl("gaussian_kl_forward", kl_cuda);
  m.impl("gaussian_kl_backward", kl_grad_cuda);
}

}  // namespace fastvae
