// Computes samples z and the KL of a posterior in one pass over it.
#include "latents.cuh"

namespace fastvae::cuda {
namespace {

// Along gridDim.y, each block takes `draws_each` draws, and the first one also computes the KL.
struct SamplePlan {
  Plan plan;
  int64_t draws_each;
  int draw_blocks;
};

constexpr int resident(int64_t item_size) { return item_size == 8 ? 1 : 4; }

// Whether the kernel for units of n elements takes every form of the scale, or only the plain one. With eight elements, the others would
// spill registers.
constexpr bool takes_forms(int n) { return n <= 4; }

template <class T, int N, bool kWhole>
__global__ void __launch_bounds__(kThreads, resident(sizeof(T)))
    sample_kernel(const __grid_constant__ SampleArgs args, const __grid_constant__ SamplePlan how) {
  using C = Compute<T>;
  using P = math::Primitives<C>;
  FASTVAE_SHARED(C, scratch, 2 * kThreads / kWarp);
  const Plan& plan = how.plan;
  const int lane = threadIdx.x & (plan.lanes - 1);
  const int64_t first_draw = blockIdx.y * how.draws_each;
  const int64_t last_draw = first_draw + how.draws_each < args.draws ? first_draw + how.draws_each : args.draws;
  const bool wants_kl = blockIdx.y == 0 && (args.row_kl.data || args.element_kl.data);
  const bool sums = blockIdx.y == 0 && args.row_kl.data;
  const NoiseKey key(args.noise);
  const math::PhiloxKeys keys(key.seed);
  if (args.used_seed && blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) {
    args.used_seed[0] = static_cast<int64_t>(key.seed);
    args.used_seed[1] = static_cast<int64_t>(key.offset);
  }

  int turn = 0;
  for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
    const Part part(plan, item, args.size);
    const int64_t row = part.row;
    C sum(0);
    if (row < args.rows) {
      const T *mu = row_of<T>(args.mu, part), *logvar = row_of<T>(args.logvar, part), *eps = row_of<T>(args.eps, part);
      const T *prior_mu = row_of<T>(args.prior_mu, part), *prior_logvar = row_of<T>(args.prior_logvar, part);
      T* z = row_of<T>(args.z, part);
      const uint64_t counter = first_counter(args, part);
#pragma unroll 1
      for (uint32_t i = uint32_t(lane) * N; i < part.count; i += uint32_t(plan.lanes) * N) {
        const uint32_t left = part.count - i;
        C m[N], sigma[N];
        {
          C v[N], kl[N];
          read<T, N, kWhole>(mu + i, left, m);
          read<T, N, kWhole>(logvar + i, left, v);
          if constexpr (takes_forms(N)) apply(args.form, m, v);
          if (prior_mu && wants_kl) {
            C pm[N], pv[N];
            read<T, N, kWhole>(prior_mu + i, left, pm);
            read<T, N, kWhole>(prior_logvar + i, left, pv);
            if constexpr (takes_forms(N)) apply(args.form, pm, pv);
#pragma unroll
            for (int j = 0; j < N; ++j) {
              kl[j] = math::prior_kl(m[j], v[j], pm[j], pv[j]).value;
              sigma[j] = P::exp(C(0.5f) * v[j]);
            }
          } else {
#pragma unroll
            for (int j = 0; j < N; ++j) {
              const auto parts = P::exp_parts(C(0.5f) * v[j]);
              kl[j] = math::standard_kl(m[j], parts).value;
              sigma[j] = parts.exp;
            }
          }
          if (wants_kl) {
            if (args.element_kl.data) write<C, N, kWhole>(row_of<C>(args.element_kl, part) + i, left, kl);
#pragma unroll
            for (int j = 0; j < N; ++j) sum += kWhole || uint32_t(j) < left ? kl[j] : C(0);
          }
        }
#pragma unroll 1
        for (int64_t draw = first_draw; draw < last_draw; ++draw) {
          C noise[N];
          if (eps) read<T, N, kWhole>(eps + draw * args.eps_draw_stride + i, left, noise);
          else normals(key, keys, draw, counter + i / 4, noise);
#pragma unroll
          for (int j = 0; j < N; ++j) noise[j] = P::fma(sigma[j], noise[j], m[j]);
          write<T, N, kWhole>(z + draw * args.z_draw_stride + i, left, noise);
        }
      }
    }
    if (!sums) continue;
    sum = group_sum(sum, plan.lanes, scratch + (turn ^= kThreads / kWarp));
    if (lane != 0 || row >= args.rows) continue;
    if (plan.splits > 1) static_cast<C*>(args.workspace.scratch)[item] = sum;
    else static_cast<C*>(args.row_kl.data)[row] = sum;
  }

  if (!sums || plan.splits == 1 || !is_last_block(args.workspace.counter, gridDim.x)) return;
  const C* partials = static_cast<const C*>(args.workspace.scratch);
  for (int64_t row = threadIdx.x / kWarp; row < args.rows; row += kThreads / kWarp) {
    C total(0);
#pragma unroll 4
    for (int i = threadIdx.x % kWarp; i < plan.splits; i += kWarp) total += load_written(partials + row * plan.splits + i);
    total = group_sum(total, kWarp, static_cast<C*>(nullptr));
    if (threadIdx.x % kWarp == 0) static_cast<C*>(args.row_kl.data)[row] = total;
  }
}

// ---------------------------------------------------------------------------------------------------------------------------------

bool is_whole(const SampleArgs& args) {
  const int unit = whole_unit(cpu::item_size(args.mu.type));
  return (takes_forms(unit) || args.form.is_plain()) && allows(args, unit) && allows(args.z, args.size, unit) && args.z_draw_stride % unit == 0 &&
         allows(args.element_kl, args.size, unit);
}

SamplePlan sample_plan(const SampleArgs& args) {
  SamplePlan how{};
  const int64_t item_size = cpu::item_size(args.mu.type), at_a_time = slots(resident(item_size));
  const int unit = is_whole(args) ? whole_unit(item_size) : 4;
  how.plan = plan_for(args.rows, args.size, unit, 1, at_a_time, turns(unit));
  // Draws are distributed over blocks if the rows alone would leave the device partly idle.
  const int64_t groups = std::max<int64_t>(1, std::min({args.draws, 2 * at_a_time / how.plan.blocks, int64_t(65535)}));
  how.draws_each = (args.draws + groups - 1) / groups;
  how.draw_blocks = static_cast<int>(how.draws_each ? (args.draws + how.draws_each - 1) / how.draws_each : 1);
  return how;
}

}  // namespace

int64_t sample_scratch(const SampleArgs& args) {
  const SamplePlan how = sample_plan(args);
  return args.row_kl.data && how.plan.splits > 1 ? how.plan.items * int64_t(sizeof(double)) : 0;
}

cudaError_t sample(const SampleArgs& args, cudaStream_t stream) {
  const SamplePlan how = sample_plan(args);
  return with_types(args.mu.type, is_whole(args), [&](auto type, auto whole) {
    using T = decltype(type);
    constexpr int N = whole ? whole_unit(sizeof(T)) : 4;
    return FASTVAE_LAUNCH((sample_kernel<T, N, decltype(whole)::value>), dim3(how.plan.blocks, how.draw_blocks), stream, args, how);
  });
}

}  // namespace fastvae::cuda
