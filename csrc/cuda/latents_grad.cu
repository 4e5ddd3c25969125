// The backward pass of latents.cu. One pass combines the gradients by z and by the KL, and draws the noise again.
#include "latents.cuh"

namespace fastvae::cuda {
namespace {

constexpr int resident(int64_t item_size, bool prior) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  constexpr int most = 2;  // with three, nvcc's code for these GPUs spills registers
#else
  constexpr int most = 3;
#endif
  return item_size == 8 ? 1 : item_size == 2 || prior ? 2 : most;
}

template <class T, int N, bool kWhole, bool kPrior>
__global__ void __launch_bounds__(kThreads, resident(sizeof(T), kPrior))
    sample_grad_kernel(const __grid_constant__ SampleGradArgs args, const __grid_constant__ Plan plan) {
  using C = Compute<T>;
  using P = math::Primitives<C>;
  const int lane = threadIdx.x & (plan.lanes - 1);
  const NoiseKey key(args.noise);
  const math::PhiloxKeys keys(key.seed);
  const int64_t draws = args.grad_z.data ? args.draws : 0;
  // If no gradient of the KL was asked for, its derivatives are left out and not multiplied by 0, because they may overflow.
  const bool with_kl = args.grad_kl.data || args.element_grad_kl.data;
  const bool by_z_too = draws > 0;
  const auto add_kl = [&](C w, C grad, C sum) { return with_kl ? P::fma(w, grad, sum) : sum; };

  for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
    const Part part(plan, item, args.size);
    const int64_t row = part.row;
    if (row >= args.rows) continue;
    const T *mu = row_of<T>(args.mu, part), *logvar = row_of<T>(args.logvar, part), *eps = row_of<T>(args.eps, part);
    const T* grad_z = row_of<T>(args.grad_z, part);
    const uint64_t counter = first_counter(args, part);
    const C row_weight = args.grad_kl.data ? static_cast<C>(number(args.grad_kl, row)) : C(0);
#pragma unroll 1
    for (uint32_t i = uint32_t(lane) * N; i < part.count; i += uint32_t(plan.lanes) * N) {
      const uint32_t left = part.count - i;
      C m[N], v[N], d_mu[N], d_logvar[N];
      read<T, N, kWhole>(mu + i, left, m);
      read<T, N, kWhole>(logvar + i, left, v);
#pragma unroll
      for (int j = 0; j < N; ++j) d_mu[j] = d_logvar[j] = C(0);
#pragma unroll 1
      for (int64_t draw = 0; draw < draws; ++draw) {
        C by_z[N], noise[N];
        read<T, N, kWhole>(grad_z + draw * args.grad_z_draw_stride + i, left, by_z);
        if (eps) read<T, N, kWhole>(eps + draw * args.eps_draw_stride + i, left, noise);
        else normals(key, keys, draw, counter + i / 4, noise);
#pragma unroll
        for (int j = 0; j < N; ++j) {
          d_mu[j] += by_z[j];
          d_logvar[j] = P::fma(by_z[j], noise[j], d_logvar[j]);
        }
        if (args.grad_eps.data) {
#pragma unroll
          for (int j = 0; j < N; ++j) noise[j] = v[j];
          if (!args.form.is_plain()) one_by_one(noise, [&](int, C x) { return log_variance(args.form, x).value; });
#pragma unroll
          for (int j = 0; j < N; ++j) noise[j] = by_z[j] * P::exp(C(0.5f) * noise[j]);
          write<T, N, kWhole>(row_of<T>(args.grad_eps, part) + draw * args.grad_eps_draw_stride + i, left, noise);
        }
      }

      apply(args.form, m, v);
      // Without a gradient by z there is none by the scale either. The scale may be infinite, so it is not multiplied by 0.
      const auto half_of = [&](C sigma) { return by_z_too ? C(0.5f) * sigma : C(0); };
      C w[N];
#pragma unroll
      for (int j = 0; j < N; ++j) w[j] = row_weight;
      if (args.element_grad_kl.data) read<C, N, kWhole>(row_of<C>(args.element_grad_kl, part) + i, left, w);
      if constexpr (kPrior) {
        C pm[N], pv[N], d_prior_mu[N], d_prior_logvar[N];
        read<T, N, kWhole>(row_of<T>(args.prior_mu, part) + i, left, pm);
        read<T, N, kWhole>(row_of<T>(args.prior_logvar, part) + i, left, pv);
        apply(args.form, pm, pv);
        const C posterior_weight = C(args.posterior_weight), prior_weight = C(args.prior_weight);
#pragma unroll
        for (int j = 0; j < N; ++j) {
          const auto kl = math::prior_kl(m[j], v[j], pm[j], pv[j]);
          d_mu[j] = add_kl(posterior_weight * w[j], kl.d_mu, d_mu[j]);
          d_logvar[j] = add_kl(posterior_weight * w[j], kl.d_logvar, half_of(P::exp(C(0.5f) * v[j])) * d_logvar[j]);
          d_prior_mu[j] = add_kl(-prior_weight * w[j], kl.d_mu, C(0));
          d_prior_logvar[j] = add_kl(prior_weight * w[j], kl.d_prior_logvar, C(0));
        }
        chain(args.form, row_of<T>(args.prior_mu, part) + i, row_of<T>(args.prior_logvar, part) + i, left, d_prior_mu,
                            d_prior_logvar);
        if (args.grad_prior_mu.data) write<T, N, kWhole>(row_of<T>(args.grad_prior_mu, part) + i, left, d_prior_mu);
        if (args.grad_prior_logvar.data) write<T, N, kWhole>(row_of<T>(args.grad_prior_logvar, part) + i, left, d_prior_logvar);
      } else {
#pragma unroll
        for (int j = 0; j < N; ++j) {
          const auto sigma = P::exp_parts(C(0.5f) * v[j]);
          const auto kl = math::standard_kl(m[j], sigma);
          d_mu[j] = add_kl(w[j], kl.d_mu, d_mu[j]);
          d_logvar[j] = add_kl(w[j], kl.d_logvar, half_of(sigma.exp) * d_logvar[j]);
        }
      }
      chain(args.form, mu + i, logvar + i, left, d_mu, d_logvar);
      if (args.grad_mu.data) write<T, N, kWhole>(row_of<T>(args.grad_mu, part) + i, left, d_mu);
      if (args.grad_logvar.data) write<T, N, kWhole>(row_of<T>(args.grad_logvar, part) + i, left, d_logvar);
    }
  }
}

bool is_whole(const SampleGradArgs& args) {
  const int unit = whole_unit(cpu::item_size(args.mu.type));
  bool whole = allows(args, unit) && allows(args.grad_z, args.size, unit) && args.grad_z_draw_stride % unit == 0 &&
               allows(args.element_grad_kl, args.size, unit) && args.grad_eps_draw_stride % unit == 0;
  for (const Result* out : {&args.grad_mu, &args.grad_logvar, &args.grad_prior_mu, &args.grad_prior_logvar, &args.grad_eps})
    whole &= allows(*out, args.size, unit);
  return whole;
}

}  // namespace

cudaError_t sample_grad(const SampleGradArgs& args, cudaStream_t stream) {
  const bool is_whole_args = is_whole(args);
  if (args.rows == 0 || args.size == 0) return cudaSuccess;
  const int64_t item_size = cpu::item_size(args.mu.type), at_a_time = slots(resident(item_size, args.prior_mu.data));
  const int unit = is_whole_args ? whole_unit(item_size) : 4;
  const Plan plan = plan_for(args.rows, args.size, unit, 1, at_a_time, turns(unit));
  return with_types(args.mu.type, is_whole_args, [&](auto type, auto whole) {
    using T = decltype(type);
    constexpr int N = whole ? whole_unit(sizeof(T)) : 4;
    constexpr bool kWhole = decltype(whole)::value;
    if (args.prior_mu.data) return FASTVAE_LAUNCH((sample_grad_kernel<T, N, kWhole, true>), plan.blocks, stream, args, plan);
    return FASTVAE_LAUNCH((sample_grad_kernel<T, N, kWhole, false>), plan.blocks, stream, args, plan);
  });
}

}  // namespace fastvae::cuda
