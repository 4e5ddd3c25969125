// The backward of a reconstruction loss whose gradient the forward has already computed. It scales that gradient, unless the factor is 1,
// and computes the small gradients: those of the scalar, of the KL and of beta, and those that `small` holds.
#include "device.cuh"

namespace fastvae::cuda {
namespace {

constexpr int kUnroll = 4;

// The first `row_blocks` blocks compute the small gradients, for `rows_each` rows each. The other blocks scale according to `plan`, which
// treats all rows as a single one if they share a factor (`uniform`).
struct BackwardPlan {
  int row_blocks;
  int64_t rows_each;
  bool uniform;
  double over_weight;
  Plan plan;
};

constexpr int resident(int64_t item_size) { return item_size == 8 ? 2 : 4; }

FASTVAE_DEVICE double factor_of(const NllBackwardArgs& args, const BackwardPlan& how, int64_t row) {
  double factor = args.grad_loss.data ? number(args.grad_loss, row) : 0.0;
  if (args.grad_nll.data) factor += number(args.grad_nll, row) * how.over_weight;
  return factor;
}

__device__ void small_gradients(const NllBackwardArgs& args, const BackwardPlan& how) {
  FASTVAE_SHARED(double, scalar_scratch, kThreads / kWarp);
  FASTVAE_SHARED(double, beta_scratch, kThreads / kWarp);
  const int64_t begin = blockIdx.x * how.rows_each, end = begin + how.rows_each < args.rows ? begin + how.rows_each : args.rows;
  const bool scalar = args.scalar_gradient.data, beta = args.beta_gradient.data;
  const double kl_factor = args.beta.data ? number(args.beta) : 1.0;
  double scalar_sum = 0, beta_sum = 0;
  for (const SmallGradient& one : args.small) {
#pragma unroll 1
    for (int64_t i = blockIdx.x * kThreads + threadIdx.x; i < one.count; i += how.row_blocks * kThreads) {
      const double factor = factor_of(args, how, how.uniform ? 0 : i);
      if (one.result.data == one.gradient.data && factor == 1.0) continue;
      put_any(one.result, i, factor * number_of_any({one.gradient.data, one.gradient.type, 1}, i));
    }
  }
#pragma unroll 1
  for (int64_t row = begin + threadIdx.x; row < end; row += kThreads) {
    const double by_loss = row_factor(args.grad_loss, Numbers(), args.weight, row);
    if (args.kl_gradient.data) put(args.kl_gradient, row, kl_factor * by_loss);
    if (scalar) scalar_sum += (by_loss + row_factor(Numbers(), args.grad_nll, 1, row)) * number(args.scalar_rows, row);
    if (beta) beta_sum += by_loss * number(args.kl, row);
  }
  if (!scalar && !beta) return;

  scalar_sum = group_sum(scalar_sum, kThreads, scalar_scratch);
  beta_sum = group_sum(beta_sum, kThreads, beta_scratch);
  if (how.row_blocks > 1) {
    double* partials = static_cast<double*>(args.workspace.scratch);
    if (threadIdx.x == 0) {
      partials[blockIdx.x] = scalar_sum;
      partials[how.row_blocks + blockIdx.x] = beta_sum;
    }
    if (!is_last_block(args.workspace.counter, how.row_blocks)) return;
    scalar_sum = sum_written(partials, how.row_blocks, scalar_scratch);
    beta_sum = sum_written(partials + how.row_blocks, how.row_blocks, beta_scratch);
  }
  if (threadIdx.x != 0) return;
  if (scalar) put(args.scalar_gradient, scalar_sum);
  if (beta) put(args.beta_gradient, beta_sum);
}

template <class T, int N>
FASTVAE_DEVICE void scale_part(const T* in, T* out, uint32_t count, uint32_t first, uint32_t step, Compute<T> factor) {
#pragma unroll 1
  for (uint32_t i = first; i < count; i += step * kUnroll) {
    Pack<T, N> packs[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (i + u * step < count) packs[u].load_own(in + (i + u * step));
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (i + u * step >= count) break;
      Compute<T> scaled[N];
#pragma unroll
      for (int j = 0; j < N; ++j) scaled[j] = widened(packs[u].value[j]) * factor;
      packs[u].fill(scaled);
      packs[u].store(out + (i + u * step));
    }
  }
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads, resident(sizeof(T)))
    nll_backward_kernel(const __grid_constant__ NllBackwardArgs args, const __grid_constant__ BackwardPlan how) {
  using C = Compute<T>;
  if (int(blockIdx.x) < how.row_blocks) return small_gradients(args, how);
  const Plan& plan = how.plan;
  const bool in_place = args.results[0].data == args.gradients[0].data;
  const int64_t size = how.uniform ? args.rows * args.size : args.size;
  const int lane = threadIdx.x & (plan.lanes - 1);
  for (int64_t item = blockIdx.x - how.row_blocks; item < plan.items; item += gridDim.x - how.row_blocks) {
    const Part part(plan, item, size);
    const int64_t row = part.row;
    if (row >= (how.uniform ? 1 : args.rows)) continue;
    const double factor = factor_of(args, how, row);
    if (in_place && factor == 1.0) {
      if (how.uniform) return;
      continue;
    }
    for (int k = 0; k < kMaxParams && args.gradients[k].data; ++k) {
      const int64_t offset = row * size + part.begin;
      const T* in = static_cast<const T*>(args.gradients[k].data) + offset;
      T* out = static_cast<T*>(args.results[k].data) + offset;
      scale_part<T, N>(in, out, part.count, uint32_t(lane) * N, uint32_t(plan.lanes) * N, static_cast<C>(factor));
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------------------

bool is_uniform(const NllBackwardArgs& args) {
  return (!args.grad_loss.data || args.grad_loss.stride == 0) && (!args.grad_nll.data || args.grad_nll.stride == 0);
}

int unit_of(const NllBackwardArgs& args) {
  const int unit = static_cast<int>(16 / cpu::item_size(args.gradients[0].type));
  const int64_t size = is_uniform(args) ? args.rows * args.size : args.size;
  for (int k = 0; k < kMaxParams; ++k) {
    Operand in = args.gradients[k];
    Result out = args.results[k];
    in.row_stride = out.row_stride = size;
    if (!allows(in, size, unit) || !allows(out, size, unit)) return 1;
  }
  return unit;
}

BackwardPlan backward_plan(const NllBackwardArgs& args) {
  BackwardPlan how{};
  const int64_t numbers = std::max({args.rows, args.small[0].count, args.small[1].count});
  if (args.scalar_gradient.data || args.kl_gradient.data || args.beta_gradient.data || args.small[0].gradient.data) {
    how.row_blocks = static_cast<int>(std::min<int64_t>(std::max<int64_t>(1, (numbers + 4 * kThreads - 1) / (4 * kThreads)), 64));
    how.rows_each = (args.rows + how.row_blocks - 1) / how.row_blocks;
  }
  how.uniform = is_uniform(args);
  how.over_weight = 1 / args.weight;
  if (!args.gradients[0].data || args.rows * args.size == 0) return how;
  const int64_t at_a_time = slots(resident(cpu::item_size(args.gradients[0].type)));
  // Often the factor is 1 and the launch of the blocks is all that it costs, so this uses half as many blocks as other kernels.
  how.plan = plan_for(how.uniform ? 1 : args.rows, how.uniform ? args.rows * args.size : args.size, unit_of(args), kUnroll,
                      std::max<int64_t>(1, at_a_time / 2));
  if (how.plan.splits == 1) how.plan.blocks = static_cast<int>(std::min<int64_t>(how.plan.blocks, 2 * at_a_time));
  return how;
}

template <class T>
cudaError_t launch(const NllBackwardArgs& args, const BackwardPlan& how, cudaStream_t stream) {
  const int blocks = how.row_blocks + how.plan.blocks;
  if (unit_of(args) == 1) return FASTVAE_LAUNCH((nll_backward_kernel<T, 1>), blocks, stream, args, how);
  return FASTVAE_LAUNCH((nll_backward_kernel<T, 16 / sizeof(T)>), blocks, stream, args, how);
}

}  // namespace

int64_t nll_backward_scratch(const NllBackwardArgs& args) {
  const BackwardPlan how = backward_plan(args);
  if (how.row_blocks < 2 || (!args.scalar_gradient.data && !args.beta_gradient.data)) return 0;
  return 2 * how.row_blocks * int64_t(sizeof(double));
}

cudaError_t nll_backward(const NllBackwardArgs& args, cudaStream_t stream) {
  const BackwardPlan how = backward_plan(args);
  if (how.row_blocks + how.plan.blocks == 0) return cudaSuccess;
  switch (args.gradients[0].type) {
    case DType::f32: return launch<float>(args, how, stream);
    case DType::f64: return launch<double>(args, how, stream);
    case DType::f16: return launch<Half>(args, how, stream);
    default: return launch<BFloat16>(args, how, stream);
  }
}

}  // namespace fastvae::cuda
