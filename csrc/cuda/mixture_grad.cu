// The gradients of a Gaussian mixture's log-density, for which all densities are computed again. An item takes a part of the points and a
// part of the components, tile by tile. It first computes the shares of the components in the joint densities, and then, in tiles of
// dimensions, those in the densities of each dimension and the sums over points and over components. Those of all parts are added by
// items of a second kind.
#include "mixture.cuh"

namespace fastvae::cuda {
namespace {

constexpr int kColumns = 2;                       // components of a thread in the joint form
constexpr int kComponents = kGroups * kColumns;  // of a tile
constexpr int kTurn = kComponents / kWarps;       // components of which a warp is the only one to add to their sums, until the next turn
static_assert(kComponents == kWarp);

template <class C>
constexpr int resident() {
  return sizeof(C) == 8 ? 1 : 2;
}

// How many sums over points each component has in each dimension. With share w, they are those of w t, w t^2 and, in the densities of each
// dimension, w without the joint share.
template <bool kEach>
constexpr int kSums = kEach ? 3 : 2;

template <class C, bool kEach>
constexpr int kRoom =
    std::max(step_room<C, kColumns, kEach>(), (3 + kSums<kEach>)*kComponents * kWidest<C>) / kQuad;

// What the blocks leave each other.
template <class C>
struct GradScratch {
  C* points;      // (component_parts, points, dims)
  C* components;  // (point_parts, kSums, components, dims)
  C* shares;      // (point_parts, components): the sums of the joint shares

  FASTVAE_DEVICE GradScratch(const GaussianMixtureGradArgs& args, const MixturePlan& plan) {
    char* bytes = static_cast<char*>(args.workspace.scratch);
    points = reinterpret_cast<C*>(bytes + plan.at[0]);
    components = reinterpret_cast<C*>(bytes + plan.at[1]);
    shares = reinterpret_cast<C*>(bytes + plan.at[2]);
  }
};

template <class C>
FASTVAE_DEVICE void accumulate(C* sum, bool begins, C more) {
  *sum = begins ? more : *sum + more;
}

template <class C, bool kEach>
struct GradShared {
  C* room;
  C* shares;       // of component m and point p in the joint density, times its gradient: at m * kPointStride + p
  C* log_weights;  // the same places; only if kWeights
  double* base;
  uint32_t* far;
};

// The joint shares of a tile. The gradients of weights that differ between points are complete here. (Those of the densities of each
// dimension, kShares, take the place of the weights themselves, which are read later.)
template <class C, bool kEach, bool kShares>
FASTVAE_DEVICE void shares_of_tile(const GaussianMixtureGradArgs& args, const MixturePlan& plan, const GradShared<C, kEach>& shared,
                                   int64_t first_point, int64_t first_component) {
  const int thread = static_cast<int>(computed_here(threadIdx.x)), group = thread % kGroups, place = thread / kGroups;
  const auto at = [&](int i, int j) { return (group + j * kGroups) * kPointStride<C> + place * kOwn<C> + i; };
  const auto point_of = [&](int i) { return first_point + place * kOwn<C> + i; };
  const auto component_of = [&](int j) { return first_component + group + j * kGroups; };
  const auto weight = [&](int i, int j) {
    if (component_of(j) >= args.components) return C(-INFINITY);
    return log_weight_of<C>(args, point_of(i) < args.points ? point_of(i) : args.points - 1, component_of(j));
  };
  if (args.grad_joint.data) {
    C squares[kOwn<C>][kColumns];
    over_dimensions<C, kColumns>(args, plan.wide, first_point, first_component, shared.room, shared.base, squares);
#pragma unroll
    for (int i = 0; i < kOwn<C>; ++i) {
      const int64_t row = point_of(i) < args.points ? point_of(i) : args.points - 1;
      C total = __ldg(static_cast<const C*>(args.joint) + row), grad = static_cast<C>(number(args.grad_joint, row));
      make_usable(total, grad);
      if (point_of(i) >= args.points) grad = C(0);
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
        shared.shares[at(i, j)] =
            share_of(static_cast<C>(shared.base[group + j * kGroups]) + weight(i, j) - squares[i][j], total) * grad;
    }
  } else {
#pragma unroll 1
    for (int i = thread; i < kComponents * kPointStride<C>; i += kThreads) shared.shares[i] = C(0);
  }
  if (!args.of_rows || !args.grad_log_weight.data) return;
  __syncthreads();
  constexpr int kPairs = kOwn<C> * kColumns;
  if constexpr (kShares) {
    using P = math::Primitives<C>;
    using S = Steps<C, kColumns, true>;
    const int dims = static_cast<int>(args.dims);
    S steps(shared.room);
#pragma unroll 1
    for (int pair = 0; pair < kPairs; ++pair) shared.log_weights[at(pair % kOwn<C>, pair / kOwn<C>)] = C(0);
#pragma unroll 1
    for (int d = 0; d < dims; d += kStep) {
      steps.fetch(args, plan.wide, first_point, first_component, d);
      steps.store(dims, d, shared.base);
      steps.store_values(static_cast<const C*>(args.per_dimension), static_cast<const C*>(args.grad_per_dimension), args.points, args.dims,
                         first_point, d);
      __syncthreads();
#pragma unroll 1
      for (int pair = 0; pair < kPairs; ++pair) {
        const int i = pair % kOwn<C>, j = pair / kOwn<C>, p = place * kOwn<C> + i, m = group + j * kGroups;
        const C own = weight(i, j);
        C sum(0);
#pragma unroll 1
        for (int k = 0; k < kStep; k += kQuad) {
          const Quad<C> x = S::at(steps.z, p, k), mean = S::at(steps.mu, m, k), inverse = S::at(steps.root, m, k);
          const Quad<C> term = S::at(steps.term, m, k), total = S::at(steps.totals, p, k), grad = S::at(steps.grads, p, k);
#pragma unroll
          for (int e = 0; e < kQuad; ++e) {
            const C t = (x.value[e] - mean.value[e]) * inverse.value[e];
            sum = P::fma(share_of(P::fma(-t, t, term.value[e] + own), total.value[e]), grad.value[e], sum);
          }
        }
        shared.log_weights[at(i, j)] += sum;
      }
      __syncthreads();
    }
  }
#pragma unroll 1
  for (int pair = 0; pair < kPairs; ++pair) {
    const int i = pair % kOwn<C>, j = pair / kOwn<C>;
    C sum = shared.shares[at(i, j)];
    if constexpr (kShares) sum += shared.log_weights[at(i, j)];
    if (point_of(i) < args.points && component_of(j) < args.components)
      put_any(args.grad_log_weight, point_of(i) * args.components + component_of(j), static_cast<double>(sum));
  }
  __syncthreads();
}

// The sums of a tile of points, components and dimensions. `begins` says which of the parts' sums begin here.
template <class C, bool kEach, bool kWeights>
FASTVAE_DEVICE void sums_of_tile(const GaussianMixtureGradArgs& args, const MixturePlan& plan, const GradShared<C, kEach>& shared,
                                 int64_t first_point, int64_t first_component, int64_t begin, C* of_points, bool points_begin,
                                 C* of_components, bool components_begin) {
  using P = math::Primitives<C>;
  const Lanes lanes(plan);
  const int width = plan.width, own_row = lanes.warp * kRows<C>;
  const int64_t d = begin + lanes.d;
  const bool inside = lanes.group < plan.groups && d < args.dims;
  Components<C> components(shared.room, kComponents, width);
  C* sums = shared.room + 3 * kComponents * width;
  __syncthreads();
  if (threadIdx.x == 0) shared.far[0] = 0;
#pragma unroll 1
  for (int i = static_cast<int>(computed_here(threadIdx.x)); i < kSums<kEach> * kComponents * width; i += kThreads) sums[i] = C(0);
  bool far = components.read(args, plan.wide, first_component, kComponents, begin, width, !kWeights);

  C z[kRows<C>], total[kRows<C>], grad[kRows<C>], z_sums[kRows<C>];
#pragma unroll
  for (int i = 0; i < kRows<C>; ++i) {
    const int64_t point = first_point + own_row + i, row = point < args.points ? point : args.points - 1;
    z[i] = total[i] = grad[i] = z_sums[i] = C(0);
    if (!inside) continue;
    z[i] = load_float<C>(args.z, row * args.z.row_stride + d);
    far |= !(P::abs(z[i]) < C(Components<C>::kFar));
    if constexpr (kEach) {
      total[i] = __ldg(static_cast<const C*>(args.per_dimension) + row * args.dims + d);
      grad[i] = __ldg(static_cast<const C*>(args.grad_per_dimension) + row * args.dims + d);
      make_usable(total[i], grad[i]);
      if (point >= args.points) grad[i] = C(0);
    }
  }
  __syncthreads();
  if (far) atomicOr(shared.far, 1u);
  __syncthreads();

  // In each turn, every warp has other components, so that sums are added in a fixed order.
  const auto add = [&](auto with_far) {
#pragma unroll 1
    for (int turn = 0; turn < kWarps; ++turn) {
      const int first = (lanes.warp + turn) % kWarps * kTurn;
#pragma unroll 1
      for (int m = first + lanes.group; m < first + kTurn && lanes.group < plan.groups; m += plan.groups) {
        const int at = m * width + lanes.d;
        const C mean = components.mu[at], root = components.root[at];
        [[maybe_unused]] const C term = components.term[at];
        [[maybe_unused]] C all_own(0);
        C by_mean(0), by_logvar(0);
#pragma unroll
        for (int q = 0; q < kRows<C>; q += kQuad) {
          const Quad<C> joint = *reinterpret_cast<const Quad<C>*>(shared.shares + m * kPointStride<C> + own_row + q);
          [[maybe_unused]] Quad<C> weight;
          if constexpr (kWeights) weight = *reinterpret_cast<const Quad<C>*>(shared.log_weights + m * kPointStride<C> + own_row + q);
#pragma unroll
          for (int e = 0; e < kQuad; ++e) {
            const int i = q + e;
            C t = (z[i] - mean) * root, share = joint.value[e];
            if constexpr (kEach) {
              const C constant = kWeights ? term + weight.value[e] : term, own = share_of(P::fma(-t, t, constant), total[i]) * grad[i];
              all_own += own;
              share += own;
            }
            // An infinitely distant component has the share 0, and 0 times its distance must not be NaN.
            if constexpr (with_far) t = t * t > math::largest<C>() ? C(0) : t;
            const C p = share * t;
            z_sums[i] = P::fma(p, root, z_sums[i]);
            by_mean += p;
            by_logvar = P::fma(p, t, by_logvar);
          }
        }
        sums[at] += by_mean;
        sums[kComponents * width + at] += by_logvar;
        if constexpr (kEach) sums[2 * kComponents * width + at] += all_own;
      }
      __syncthreads();
    }
  };
  if (shared.far[0]) add(std::true_type());
  else add(std::false_type());

  for (int k = 1; k < plan.groups; ++k) {
    const unsigned source = (threadIdx.x + k * width) % kWarp;
#pragma unroll
    for (int i = 0; i < kRows<C>; ++i) {
      const C other = __shfl_sync(0xffffffff, z_sums[i], source);
      if (lanes.group == 0) z_sums[i] += other;
    }
  }
  if (lanes.group == 0 && inside) {
#pragma unroll
    for (int i = 0; i < kRows<C>; ++i) {
      const int64_t point = first_point + own_row + i;
      if (point < args.points) accumulate(of_points + point * args.dims + d, points_begin, z_sums[i]);
    }
  }
  const int64_t cells = args.components * args.dims;
#pragma unroll 1
  for (int i = static_cast<int>(computed_here(threadIdx.x)); i < kComponents * width; i += kThreads) {
    const int64_t component = first_component + i / width, dimension = begin + i % width;
    if (component >= args.components || dimension >= args.dims) continue;
#pragma unroll
    for (int s = 0; s < kSums<kEach>; ++s)
      accumulate(of_components + s * cells + component * args.dims + dimension, components_begin, sums[s * kComponents * width + i]);
  }
}

// Items of the first kind.
template <class C, bool kEach, bool kWeights>
FASTVAE_DEVICE void sums_of_parts(const GaussianMixtureGradArgs& args, const MixturePlan& plan, const GradShared<C, kEach>& shared,
                                  const GradScratch<C>& scratch, uint32_t item) {
  const uint32_t point_part = item / uint32_t(plan.component_parts), component_part = item - point_part * uint32_t(plan.component_parts);
  const auto tile_of = [&](int i) { return point_part * plan.points_each + i; };
  const auto column_of = [&](int i) { return component_part * plan.components_each + i; };
#pragma unroll 1
  for (int tile = 0; tile < plan.points_each && tile_of(tile) < plan.point_tiles; ++tile)
#pragma unroll 1
    for (int column = 0; column < plan.components_each && column_of(column) < plan.component_tiles; ++column) {
      const int64_t first_point = tile_of(tile) * kPoints<C>, first_component = column_of(column) * kComponents;
      shares_of_tile<C, kEach, kWeights>(args, plan, shared, first_point, first_component);
      if constexpr (kWeights) read_weights(args, first_point, first_component, kComponents, shared.log_weights);
      __syncthreads();
      if (args.grad_joint.data) {
        const int thread = static_cast<int>(computed_here(threadIdx.x)), m = thread / kWarps, part = thread % kWarps;
        const C* from = shared.shares + m * kPointStride<C> + part * kRows<C>;
        C sum(0);
#pragma unroll
        for (int i = 0; i < kRows<C>; ++i) sum += from[i];
#pragma unroll
        for (int offset = kWarps / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffff, sum, offset);
        if (part == 0 && first_component + m < args.components)
          accumulate(scratch.shares + point_part * args.components + first_component + m, tile == 0, sum);
      }
#pragma unroll 1
      for (int64_t begin = 0; begin < args.dims; begin += plan.width)
        sums_of_tile<C, kEach, kWeights>(args, plan, shared, first_point, first_component, begin,
                                         scratch.points + component_part * args.points * args.dims, column == 0,
                                         scratch.components + point_part * kSums<kEach> * args.components * args.dims, tile == 0);
      __syncthreads();
    }
}

// Sums `parts` numbers that lie `stride` apart.
template <class C>
FASTVAE_DEVICE C total_of_parts(const C* numbers, int64_t parts, int64_t stride) {
  C sum(0);
#pragma unroll 4
  for (int part = 0; part < static_cast<int>(parts); ++part) sum += load_written(numbers + part * stride);
  return sum;
}

// Items of the second kind: kThreads gradients of points, or of means and log-variances, or the gradients of kWarps shared weights.
template <class C, bool kEach>
FASTVAE_DEVICE void finish_grads(const GaussianMixtureGradArgs& args, const MixturePlan& plan, const GradScratch<C>& scratch, uint32_t item) {
  constexpr double kTwice = 2 * kLog2;
  const int64_t cells = args.components * args.dims, stride = kSums<kEach> * cells;
  const bool joint = args.grad_joint.data;
  if (item < plan.ends[0]) {
    const int64_t i = int64_t(item) * kThreads + threadIdx.x, count = args.points * args.dims;
    if (i < count) put_any(args.grad_z, i, -kTwice * static_cast<double>(total_of_parts(scratch.points + i, plan.component_parts, count)));
  } else if (item < plan.ends[1]) {
    const int64_t i = int64_t(item - plan.ends[0]) * kThreads + threadIdx.x;
    if (i >= cells) return;
    const int64_t component = i / args.dims;
    if (args.grad_mu.data) {
      const C root = root_of(load_float<C>(args.logvar, component * args.logvar.row_stride + (i - component * args.dims)));
      const C sum = total_of_parts(scratch.components + i, plan.point_parts, stride);
      put_any(args.grad_mu, i, kTwice * static_cast<double>(root) * static_cast<double>(sum));
    }
    if (args.grad_logvar.data) {
      double shares = joint ? static_cast<double>(total_of_parts(scratch.shares + component, plan.point_parts, args.components)) : 0;
      if (kEach) shares += static_cast<double>(total_of_parts(scratch.components + 2 * cells + i, plan.point_parts, stride));
      const C sum = total_of_parts(scratch.components + cells + i, plan.point_parts, stride);
      put_any(args.grad_logvar, i, kLog2 * static_cast<double>(sum) - 0.5 * shares);
    }
  } else {
    const int64_t component = int64_t(item - plan.ends[1]) * kWarps + threadIdx.x / kWarp;
    if (component >= args.components) return;
    C sum(0);
    if (kEach) {
      for (int64_t d = threadIdx.x % kWarp; d < args.dims; d += kWarp)
        sum += total_of_parts(scratch.components + 2 * cells + component * args.dims + d, plan.point_parts, stride);
      sum = group_sum(sum, kWarp, static_cast<C*>(nullptr));
    }
    if (threadIdx.x % kWarp != 0) return;
    if (joint) sum += total_of_parts(scratch.shares + component, plan.point_parts, args.components);
    put_any(args.grad_log_weight, component, static_cast<double>(sum));
  }
}

// kEach: the gradient is that of the densities of each dimension and perhaps of the joint one, and otherwise of the joint one alone.
// kWeights: the weights, or their gradients, differ between points. (For the joint density alone, that makes no difference.)
template <class C, bool kEach, bool kWeights>
__global__ void __launch_bounds__(kThreads, resident<C>())
    gaussian_mixture_grad_kernel(const __grid_constant__ GaussianMixtureGradArgs args, const __grid_constant__ MixturePlan plan) {
  FASTVAE_SHARED(Quad<C>, room, (kRoom<C, kEach>));
  FASTVAE_SHARED(Quad<C>, shares, kComponents* kPointStride<C> / kQuad);
  FASTVAE_SHARED(Quad<C>, log_weights, kWeights ? kComponents * kPointStride<C> / kQuad : 1);
  FASTVAE_SHARED(double, base, kComponents);
  FASTVAE_SHARED(uint32_t, far, 1);
  FASTVAE_SHARED(uint32_t, number, 1);
  const GradShared<C, kEach> shared{flat(room), flat(shares), flat(log_weights), base, far};
  const GradScratch<C> scratch(args, plan);
  uint32_t *taken = args.workspace.counter, *done = args.workspace.counter + 1;
  while (true) {
    if (threadIdx.x == 0) number[0] = take_number(taken, plan.items + gridDim.x - 1);
    __syncthreads();
    const uint32_t item = number[0];
    if (item >= plan.items) break;
    if (item < plan.first) {
      sums_of_parts<C, kEach, kWeights>(args, plan, shared, scratch, item);
    } else {
      wait_for(done, plan.first);
      finish_grads<C, kEach>(args, plan, scratch, item - plan.first);
    }
    __syncthreads();
    if (threadIdx.x == 0) take_number(done, plan.items - 1);
  }
}

template <class C>
MixturePlan plan_grads(const GaussianMixtureGradArgs& args) {
  const int64_t slots = fastvae::cuda::slots(resident<C>());
  const bool each = args.grad_per_dimension;
  MixturePlan plan{};
  choose_width(plan, args.dims, kWidest<C>, 1, kTurn);
  plan.point_tiles = parts_of(args.points, kPoints<C>);
  plan.component_tiles = parts_of(args.components, kComponents);
  cut(plan.point_tiles, kMaxParts, plan.point_parts, plan.points_each);
  cut(plan.component_tiles, parts_of(4 * slots, plan.point_parts), plan.component_parts, plan.components_each);
  plan.first = static_cast<uint32_t>(plan.point_parts * plan.component_parts);
  const auto items = [](bool wanted, int64_t count) { return static_cast<uint32_t>(wanted ? count : 0); };
  plan.ends[0] = items(args.grad_z.data, parts_of(args.points * args.dims, kThreads));
  plan.ends[1] = plan.ends[0] + items(args.grad_mu.data || args.grad_logvar.data, parts_of(args.components * args.dims, kThreads));
  plan.ends[2] = plan.ends[1] + items(args.grad_log_weight.data && !args.of_rows, parts_of(args.components, kWarps));
  plan.items = plan.first + plan.ends[2];
  plan.blocks = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(plan.items, slots)));
  plan.wide = reads_wide(args);
  plan.at[1] = plan.component_parts * args.points * args.dims * int64_t(sizeof(C));
  plan.at[2] = plan.at[1] + plan.point_parts * (each ? kSums<true> : kSums<false>)*args.components * args.dims * int64_t(sizeof(C));
  plan.bytes = plan.at[2] + plan.point_parts * args.components * int64_t(sizeof(C));
  plan.bytes = std::max<int64_t>(16, parts_of(plan.bytes, 8) * 8);  // the counters are needed in any case
  return plan;
}

MixturePlan plan_of(const GaussianMixtureGradArgs& args) {
  return args.z.type == DType::f64 ? plan_grads<double>(args) : plan_grads<float>(args);
}

template <class C>
cudaError_t launch_grads(const GaussianMixtureGradArgs& args, const MixturePlan& plan, cudaStream_t stream) {
  if (!args.grad_per_dimension)
    return FASTVAE_LAUNCH((gaussian_mixture_grad_kernel<C, false, false>), plan.blocks, stream, args, plan);
  if ((args.log_weight.data && args.log_weight.row_stride) || args.of_rows)
    return FASTVAE_LAUNCH((gaussian_mixture_grad_kernel<C, true, true>), plan.blocks, stream, args, plan);
  return FASTVAE_LAUNCH((gaussian_mixture_grad_kernel<C, true, false>), plan.blocks, stream, args, plan);
}

}  // namespace

int64_t gaussian_mixture_grad_scratch(const GaussianMixtureGradArgs& args) { return plan_of(args).bytes; }

cudaError_t gaussian_mixture_grad(const GaussianMixtureGradArgs& args, cudaStream_t stream) {
  if (args.points == 0) return cudaSuccess;
  const MixturePlan plan = plan_of(args);
  return args.z.type == DType::f64 ? launch_grads<double>(args, plan, stream) : launch_grads<float>(args, plan, stream);
}

}  // namespace fastvae::cuda
