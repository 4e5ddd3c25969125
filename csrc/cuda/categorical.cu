// The categorical likelihood: computes the nll of each row of positions, the loss and, if requested, the gradient. The logits of a
// position are read twice, first for their sum and then, from the cache, for the gradient.
#include "rows.cuh"

namespace fastvae::cuda {
namespace {

constexpr int kUnroll = 2;  // the number of accesses that a thread has in flight

constexpr int resident(int64_t item_size) { return item_size == 8 ? 2 : 4; }

int unit_of(const CategoricalArgs& args) {
  const int unit = static_cast<int>(16 / cpu::item_size(args.params[0].type));
  const auto wide = [&](auto view) {
    view.run_stride = 0;
    return allows(view, args.classes, unit);
  };
  return wide(args.params[0]) && wide(args.grads[0]) ? unit : 1;
}

TilePlan plan_for(const CategoricalArgs& args) {
  const int64_t slots = fastvae::cuda::slots(resident(cpu::item_size(args.params[0].type)));
  TilePlan plan{};
  static_cast<Plan&>(plan) = fastvae::cuda::plan_for(args.rows * args.positions, args.classes, unit_of(args), kUnroll, slots);
  cut_into_tiles(plan, args.rows, args.positions, kThreads / plan.lanes, slots);
  return plan;
}

// The sum of exp(x) over some logits, stored as exp(top) * sum.
template <class C>
struct Scaled {
  C top = C(-3e38f), sum = C(0);  // below any logit, but finite, because -inf - -inf is NaN

  FASTVAE_DEVICE void add(const Scaled& other) {
    using P = math::Primitives<C>;
    const C higher = top < other.top ? other.top : top;
    sum = sum * P::exp(top - higher) + other.sum * P::exp(other.top - higher);
    top = higher;
  }
};

// Combines the sums of all threads of a group and returns the total to each of them. `scratch` has two numbers for each warp.
template <class C>
FASTVAE_DEVICE Scaled<C> group_total(Scaled<C> mine, int lanes, C* scratch) {
  for (int offset = (lanes < kWarp ? lanes : kWarp) / 2; offset > 0; offset /= 2) {
    Scaled<C> other;
    other.top = __shfl_xor_sync(0xffffffff, mine.top, offset);
    other.sum = __shfl_xor_sync(0xffffffff, mine.sum, offset);
    mine.add(other);
  }
  if (lanes <= kWarp) return mine;
  const int warp = threadIdx.x / kWarp, first = threadIdx.x / lanes * (lanes / kWarp);
  __syncthreads();  // all threads must have read what the previous call left in `scratch`
  if (threadIdx.x % kWarp == 0) scratch[2 * warp] = mine.top, scratch[2 * warp + 1] = mine.sum;
  __syncthreads();
  Scaled<C> all;
  for (int i = first; i < first + lanes / kWarp; ++i) {
    Scaled<C> one;
    one.top = scratch[2 * i], one.sum = scratch[2 * i + 1];
    all.add(one);
  }
  return all;
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads, resident(sizeof(T)))
    categorical_kernel(const __grid_constant__ CategoricalArgs args, const __grid_constant__ TilePlan plan) {
  using C = Compute<T>;
  using P = math::Primitives<C>;
  FASTVAE_SHARED(double, sums, kThreads);
  FASTVAE_SHARED(C, total_scratch, 2 * kThreads / kWarp);
  FASTVAE_SHARED(double, row_scratch, 2 * kThreads / kWarp);
  FASTVAE_SHARED(double, loss_scratch, kThreads / kWarp);
  const int lane = threadIdx.x & (plan.lanes - 1), place = threadIdx.x >> plan.lanes_log2;
  const int its_row = place / plan.width, its_position = place - its_row * plan.width;
  const bool values = args.loss.data;
  const uint32_t classes = static_cast<uint32_t>(args.classes), step = uint32_t(plan.lanes) * N;

  double loss = 0;
  int turn = 0;
  for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
    const TileItem part(plan, item, args.positions);
    const int64_t row = part.first_row + its_row;
    const bool has_row = its_row < plan.rows_each && row < args.rows;
    double sum = 0;
    C weight = static_cast<C>(args.weight);
    if (has_row && (args.grad_loss.data || args.grad_nll.data))
      weight = static_cast<C>(row_factor(args.grad_loss, args.grad_nll, args.weight, row));

    for (int64_t begin = part.begin; begin < part.end; begin += plan.width) {
      const int64_t position = begin + its_position;
      const bool inside = has_row && position < part.end;
      int64_t target = args.ignored;
      if (inside) target = __ldg(static_cast<const long long*>(args.target.data) + cpu::target_row(args, row) * args.target.row_stride + position);
      const C own_weight = inside ? weight_of<C>(args.weights, cpu::target_row(args, row), position) : C(1);
      const bool counted = inside && target != args.ignored && own_weight != C(0), exists = target >= 0 && target < args.classes;
      const T* logits = static_cast<const T*>(args.params[0].data) + row * args.params[0].row_stride + position * args.classes;
      const uint32_t own = exists ? static_cast<uint32_t>(target) : classes;

      // The target's class is left out of this sum, so that a confident, correct prediction does not lose the digits of its nll and of
      // its gradient, p - 1.
      Scaled<C> others;
#pragma unroll 1
      for (uint32_t i = uint32_t(lane) * N; counted && i < classes; i += step * kUnroll) {
        Pack<T, N> packs[kUnroll];
        C x[kUnroll][N], top = others.top;
#pragma unroll
        for (int u = 0; u < kUnroll; ++u)
          if (i + u * step < classes) packs[u].load(logits + (i + u * step));
#pragma unroll
        for (int u = 0; u < kUnroll; ++u)
#pragma unroll
          for (int j = 0; j < N; ++j) {
            const bool other = i + u * step < classes && i + u * step + j != own;
            x[u][j] = other ? widened(packs[u].value[j]) : C(-INFINITY);
            top = top < x[u][j] ? x[u][j] : top;
          }
        C more(0);
#pragma unroll
        for (int u = 0; u < kUnroll; ++u)
#pragma unroll
          for (int j = 0; j < N; ++j) more += P::exp(x[u][j] - top);
        others.sum = P::fma(others.sum, P::exp(others.top - top), more);
        others.top = top;
      }
      others = group_total(others, plan.lanes, total_scratch);
      T* grads = static_cast<T*>(args.grads[0].data);
      if (grads) grads += row * args.grads[0].row_stride + position * args.classes;
      if (!counted) {
        if (!inside || !grads) continue;
#pragma unroll 1
        for (uint32_t i = uint32_t(lane) * N; i < classes; i += step) {
          Pack<T, N> pack;
          C zero[N] = {};
          pack.fill(zero);
          pack.store(grads + i);
        }
        continue;
      }

      // The logit of a class that does not exist must not be read; the nll and the gradients of such a target are NaN.
      const C a = exists ? static_cast<C>(widened(__ldg(logits + own))) : C(NAN);
      const C top = others.top < a ? a : others.top, rest = others.sum * P::exp(others.top - top), total = P::exp(a - top) + rest;
      if (lane == 0)
        sum += own_weight * (static_cast<double>(top - a) + static_cast<double>(a >= others.top ? P::log1p(rest) : P::log(total)));
      if (!grads) continue;
      const C scale = weight * own_weight / total, own_grad = -(weight * own_weight * (rest / total));
#pragma unroll 1
      for (uint32_t i = uint32_t(lane) * N; i < classes; i += step * kUnroll) {
        Pack<T, N> packs[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u)
          if (i + u * step < classes) packs[u].load(logits + (i + u * step));
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          if (i + u * step >= classes) break;
          C grad[N];
#pragma unroll
          for (int j = 0; j < N; ++j) {
            const C p = P::exp_bounded(widened(packs[u].value[j]) - top) * scale;
            grad[j] = i + u * step + j == own ? own_grad : p;
          }
          Pack<T, N> pack;
          pack.fill(grad);
          pack.store(grads + (i + u * step));
        }
      }
    }
    if (values)
      loss += finish_item(args, plan, item, part.first_row, lane == 0 ? place : -1, sum, sums, row_scratch + (turn ^= kThreads / kWarp));
  }
  if (values)
    finish<double>(args, plan, false, loss, loss_scratch,
                   [&](int64_t row, double sum, double) { return put_row(args, row, sum, beta_of(args) * kl_of(args, row)); });
}

template <class T>
cudaError_t launch(const CategoricalArgs& args, cudaStream_t stream) {
  const TilePlan plan = plan_for(args);
  if (unit_of(args) == 1) return FASTVAE_LAUNCH((categorical_kernel<T, 1>), plan.blocks, stream, args, plan);
  return FASTVAE_LAUNCH((categorical_kernel<T, 16 / sizeof(T)>), plan.blocks, stream, args, plan);
}

}  // namespace

int64_t categorical_scratch(const CategoricalArgs& args) { return scratch_of(args, plan_for(args)); }

cudaError_t categorical(const CategoricalArgs& args, cudaStream_t stream) {
  switch (args.params[0].type) {
    case DType::f32: return launch<float>(args, stream);
    case DType::f64: return launch<double>(args, stream);
    case DType::f16: return launch<Half>(args, stream);
    default: return launch<BFloat16>(args, stream);
  }
}

}  // namespace fastvae::cuda
