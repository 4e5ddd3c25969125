// Draws several samples from a posterior with their log-densities, and computes the gradients. Rows are not split over blocks: the rows of
// all draws keep the device busy.
#include "latents.cuh"

namespace fastvae::cuda {
namespace {

constexpr int kUnit = 4;  // the number of elements that a thread processes at a time: those of one counter
constexpr double kHalfLog2Pi = 0.91893853320467274178;

constexpr int resident(int64_t item_size) { return item_size == 8 ? 1 : 3; }
constexpr int grad_resident(int64_t item_size) { return item_size == 8 ? 1 : 2; }

Plan plan_of(const Latents& args, int64_t rows, int64_t slots) {
  Plan plan = plan_for(rows, args.size, kUnit, 1, slots, turns(kUnit));
  if (plan.splits > 1) {
    plan.splits = 1;
    plan.split_size = args.size;
    plan.items = rows;
    count_blocks(plan, slots);
  }
  return plan;
}

// The mean and log sigma^2 of kUnit elements.
template <class T, class C>
FASTVAE_DEVICE void read_moments(const ScaleForm& form, const T* mu, const T* logvar, uint32_t left, C (&m)[kUnit], C (&v)[kUnit]) {
  read<T, kUnit, false>(mu, left, m);
  read<T, kUnit, false>(logvar, left, v);
  apply(form, m, v);
}

// The work of an item is one draw of a few rows.
template <class T>
__global__ void __launch_bounds__(kThreads, resident(sizeof(T)))
    log_probs_kernel(const __grid_constant__ LogProbArgs args, const __grid_constant__ Plan plan) {
  using C = Compute<T>;
  using P = math::Primitives<C>;
  FASTVAE_SHARED(C, scratch, 4 * kThreads / kWarp);
  const int lane = threadIdx.x & (plan.lanes - 1);
  const NoiseKey key(args.noise);
  const math::PhiloxKeys keys(key.seed);
  if (args.used_seed && blockIdx.x == 0 && threadIdx.x == 0) {
    args.used_seed[0] = static_cast<int64_t>(key.seed);
    args.used_seed[1] = static_cast<int64_t>(key.offset);
  }

  int turn = 0;
  for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
    Part part(plan, item, args.size);
    const int64_t place = part.row, draw = place / args.rows;  // in (draws, rows)
    part.row = place - draw * args.rows;
    C of_q(0), of_p(0);  // -2 times the log-densities, without their constants
    if (draw < args.draws) {
      const T *mu = row_of<T>(args.mu, part), *logvar = row_of<T>(args.logvar, part), *eps = row_of<T>(args.eps, part);
      const T *prior_mu = row_of<T>(args.prior_mu, part), *prior_logvar = row_of<T>(args.prior_logvar, part);
      T* z = row_of<T>(args.z, part) + draw * args.z_draw_stride;
      const uint64_t counter = first_counter(args, part);
#pragma unroll 1
      for (uint32_t i = uint32_t(lane) * kUnit; i < part.count; i += uint32_t(plan.lanes) * kUnit) {
        const uint32_t left = part.count - i;
        C m[kUnit], v[kUnit], noise[kUnit];
        read_moments(args.form, mu + i, logvar + i, left, m, v);
        if (eps) read<T, kUnit, false>(eps + draw * args.eps_draw_stride + i, left, noise);
        else normals(key, keys, draw, counter + i / 4, noise);
#pragma unroll
        for (int j = 0; j < kUnit; ++j) {
          of_q += uint32_t(j) < left ? P::fma(noise[j], noise[j], v[j]) : C(0);
          m[j] = P::fma(P::exp(C(0.5f) * v[j]), noise[j], m[j]);
        }
        write<T, kUnit, false>(z + i, left, m);
        if (prior_mu) {
          C pm[kUnit], pv[kUnit];
          read_moments(args.form, prior_mu + i, prior_logvar + i, left, pm, pv);
#pragma unroll
          for (int j = 0; j < kUnit; ++j) {
            const C root = math::inverse_root(C(0.5f) * pv[j]), standard = (m[j] - pm[j]) * root * root;
            of_p += uint32_t(j) < left ? P::fma(standard, standard, pv[j]) : C(0);
          }
        } else {
#pragma unroll
          for (int j = 0; j < kUnit; ++j) of_p += uint32_t(j) < left ? m[j] * m[j] : C(0);
        }
      }
    }
    turn ^= 2 * kThreads / kWarp;
    of_q = group_sum(of_q, plan.lanes, scratch + turn);
    of_p = group_sum(of_p, plan.lanes, scratch + turn + kThreads / kWarp);
    if (lane != 0 || draw >= args.draws) continue;
    const C constant = C(kHalfLog2Pi) * static_cast<C>(args.size);
    static_cast<C*>(args.log_q.data)[place] = P::fma(C(-0.5f), of_q, -constant);
    static_cast<C*>(args.log_p.data)[place] = P::fma(C(-0.5f), of_p, -constant);
  }
}

template <class T, bool kPrior>
__global__ void __launch_bounds__(kThreads, grad_resident(sizeof(T)))
    log_probs_grad_kernel(const __grid_constant__ LogProbGradArgs args, const __grid_constant__ Plan plan) {
  using C = Compute<T>;
  using P = math::Primitives<C>;
  const int lane = threadIdx.x & (plan.lanes - 1);
  const NoiseKey key(args.noise);
  const math::PhiloxKeys keys(key.seed);
  const bool path = args.grad_log_q.data && args.stl;

  for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
    const Part part(plan, item, args.size);
    const int64_t row = part.row;
    if (row >= args.rows) continue;
    const T *mu = row_of<T>(args.mu, part), *logvar = row_of<T>(args.logvar, part), *eps = row_of<T>(args.eps, part);
    const T *prior_mu = row_of<T>(args.prior_mu, part), *prior_logvar = row_of<T>(args.prior_logvar, part);
    const T* grad_z = row_of<T>(args.grad_z, part);
    const uint64_t counter = first_counter(args, part);
#pragma unroll 1
    for (uint32_t i = uint32_t(lane) * kUnit; i < part.count; i += uint32_t(plan.lanes) * kUnit) {
      const uint32_t left = part.count - i;
      C m[kUnit], v[kUnit], pm[kUnit], pv[kUnit];
      read_moments(args.form, mu + i, logvar + i, left, m, v);
      if constexpr (kPrior) read_moments(args.form, prior_mu + i, prior_logvar + i, left, pm, pv);
      // The sums over draws: d z; eps d z, with the terms that log sigma gets directly; those of log q by z for `stl`; and the gradients of the
      // prior.
      C by_z[kUnit] = {}, by_scale[kUnit] = {}, by_q[kUnit] = {}, by_pm[kUnit] = {}, by_pv[kUnit] = {};
#pragma unroll 1
      for (int64_t draw = 0; draw < args.draws; ++draw) {
        C noise[kUnit], d[kUnit] = {};
        if (eps) read<T, kUnit, false>(eps + draw * args.eps_draw_stride + i, left, noise);
        else normals(key, keys, draw, counter + i / 4, noise);
        if (grad_z) read<T, kUnit, false>(grad_z + draw * args.grad_z_draw_stride + i, left, d);
        const int64_t place = draw * args.rows + row;
        const C of_q = args.grad_log_q.data ? static_cast<C>(number(args.grad_log_q, place)) : C(0);
        const C of_p = args.grad_log_p.data ? static_cast<C>(number(args.grad_log_p, place)) : C(0);
#pragma unroll
        for (int j = 0; j < kUnit; ++j) {
          const C sigma = P::exp(C(0.5f) * v[j]);
          if (args.grad_log_p.data) {
            const C z = P::fma(sigma, noise[j], m[j]);
            if constexpr (kPrior) {
              const C root = math::inverse_root(C(0.5f) * pv[j]), standard = (z - pm[j]) * root * root, slope = of_p * standard * root * root;
              d[j] -= slope;
              by_pm[j] += slope;
              by_pv[j] += C(0.5f) * of_p * P::fma(standard, standard, C(-1));
            } else {
              d[j] -= of_p * z;
            }
          }
          by_z[j] += d[j];
          // A gradient of 0 stays 0 if sigma is infinite.
          const C of_sigma = d[j] * noise[j], finite = of_sigma == C(0) ? C(0) : sigma;
          by_scale[j] += P::fma(finite, of_sigma, -(path ? of_q * noise[j] * noise[j] : of_q));
          if (path) by_q[j] += of_q * noise[j];
        }
      }
#pragma unroll
      for (int j = 0; j < kUnit; ++j) {
        if (path && by_q[j] != C(0)) by_z[j] -= by_q[j] / P::exp(C(0.5f) * v[j]);  // log q by z is -eps / sigma
        by_scale[j] *= C(0.5f);
      }
      chain(args.form, mu + i, logvar + i, left, by_z, by_scale);
      if (args.grad_mu.data) write<T, kUnit, false>(row_of<T>(args.grad_mu, part) + i, left, by_z);
      if (args.grad_logvar.data) write<T, kUnit, false>(row_of<T>(args.grad_logvar, part) + i, left, by_scale);
      if constexpr (kPrior) {
        chain(args.form, prior_mu + i, prior_logvar + i, left, by_pm, by_pv);
        if (args.grad_prior_mu.data) write<T, kUnit, false>(row_of<T>(args.grad_prior_mu, part) + i, left, by_pm);
        if (args.grad_prior_logvar.data) write<T, kUnit, false>(row_of<T>(args.grad_prior_logvar, part) + i, left, by_pv);
      }
    }
  }
}

template <class F>
cudaError_t with_type(DType type, const F& f) {
  switch (type) {
    case DType::f32: return f(float());
    case DType::f64: return f(double());
    case DType::f16: return f(Half());
    default: return f(BFloat16());
  }
}

}  // namespace

cudaError_t log_probs(const LogProbArgs& args, cudaStream_t stream) {
  const Plan plan = plan_of(args, args.draws * args.rows, slots(resident(cpu::item_size(args.mu.type))));
  return with_type(args.mu.type, [&](auto type) {
    return FASTVAE_LAUNCH((log_probs_kernel<decltype(type)>), plan.blocks, stream, args, plan);
  });
}

cudaError_t log_probs_grad(const LogProbGradArgs& args, cudaStream_t stream) {
  if (args.rows == 0 || args.size == 0) return cudaSuccess;
  const Plan plan = plan_of(args, args.rows, slots(grad_resident(cpu::item_size(args.mu.type))));
  return with_type(args.mu.type, [&](auto type) {
    using T = decltype(type);
    if (args.prior_mu.data) return FASTVAE_LAUNCH((log_probs_grad_kernel<T, true>), plan.blocks, stream, args, plan);
    return FASTVAE_LAUNCH((log_probs_grad_kernel<T, false>), plan.blocks, stream, args, plan);
  });
}

}  // namespace fastvae::cuda
