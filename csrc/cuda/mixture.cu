// The log-density of a Gaussian mixture, jointly and in each dimension. The work is a list of items, which blocks take in order with a
// counter (as in counts.cuh): tiles of points and dimensions with a part of the components, tiles of points with a part of the components,
// and results, which need the sums of all parts.
#include "mixture.cuh"

namespace fastvae::cuda {
namespace {

constexpr int kColumns = 4;                       // components of a thread in the joint form
constexpr int kComponents = kGroups * kColumns;  // of a tile

template <class C>
constexpr int resident() {
  return sizeof(C) == 8 ? 1 : 2;
}

template <class C>
constexpr int kAtOnce = sizeof(C) == 8 ? 2 : 8;  // components that a thread of Lanes reads before it uses them

template <class C>
constexpr int kRoom = std::max(step_room<C, kColumns, false>(), 3 * kComponents * kWidest<C>) / kQuad;

// Items of the first kind: the sums of each point and dimension over a part of the components.
template <class C>
FASTVAE_DEVICE void each_of_tile(const GaussianMixtureArgs& args, const MixturePlan& plan, int64_t item, C* room, C* log_weights,
                                 PowerSum<C>* out) {
  using P = math::Primitives<C>;
  const int64_t part = item % plan.component_parts, rest = item / plan.component_parts;
  const int64_t dim_tile = rest % plan.dim_tiles, first_point = rest / plan.dim_tiles * kPoints<C>;
  const int64_t begin = dim_tile * plan.width, last_tile = std::min((part + 1) * plan.components_each, plan.component_tiles);
  const Lanes lanes(plan);
  const int64_t d = begin + lanes.d;
  const bool own_weights = args.log_weight.data && args.log_weight.row_stride;  // of each point
  Components<C> components(room, kComponents, plan.width);

  C z[kRows<C>];
  PowerSum<C> sums[kRows<C>];
#pragma unroll
  for (int i = 0; i < kRows<C>; ++i) {
    const int64_t point = first_point + lanes.warp * kRows<C> + i;
    z[i] = d < args.dims && lanes.group < plan.groups
               ? load_float<C>(args.z, (point < args.points ? point : args.points - 1) * args.z.row_stride + d)
               : C(0);
  }
#pragma unroll 1
  for (int64_t tile = part * plan.components_each; tile < last_tile; ++tile) {
    __syncthreads();
    components.read(args, plan.wide, tile * kComponents, kComponents, begin, plan.width, !own_weights);
    if (own_weights) read_weights(args, first_point, tile * kComponents, kComponents, log_weights);
    __syncthreads();
    const auto add = [&](auto with_weights) {
#pragma unroll 1
      for (int m = lanes.group < plan.groups ? lanes.group : kComponents; m < kComponents; m += kAtOnce<C> * plan.groups) {
        C mean[kAtOnce<C>], root[kAtOnce<C>], term[kAtOnce<C>];
        int own[kAtOnce<C>];
#pragma unroll
        for (int k = 0; k < kAtOnce<C>; ++k) {
          const int next = m + k * plan.groups;
          own[k] = next < kComponents ? next : kComponents - 1;
          const int at = own[k] * plan.width + lanes.d;
          mean[k] = components.mu[at];
          root[k] = components.root[at];
          term[k] = next < kComponents ? components.term[at] : C(-INFINITY);
        }
#pragma unroll
        for (int q = 0; q < kRows<C>; q += kQuad) {
          Quad<C> weight[kAtOnce<C>];
          if constexpr (with_weights) {
#pragma unroll
            for (int k = 0; k < kAtOnce<C>; ++k)
              weight[k] = *reinterpret_cast<const Quad<C>*>(log_weights + own[k] * kPointStride<C> + lanes.warp * kRows<C> + q);
          }
#pragma unroll
          for (int e = 0; e < kQuad; ++e) {
            C x[kAtOnce<C>];
#pragma unroll
            for (int k = 0; k < kAtOnce<C>; ++k) {
              const C t = (z[q + e] - mean[k]) * root[k];
              x[k] = P::fma(-t, t, with_weights ? term[k] + weight[k].value[e] : term[k]);
            }
            sums[q + e].add(x);
          }
        }
      }
    };
    if (own_weights) add(std::true_type());
    else add(std::false_type());
  }
  for (int k = 1; k < plan.groups; ++k) {
    const unsigned source = (threadIdx.x + k * plan.width) % kWarp;
#pragma unroll
    for (int i = 0; i < kRows<C>; ++i) {
      PowerSum<C> other;
      other.top = __shfl_sync(0xffffffff, sums[i].top, source);
      other.sum = __shfl_sync(0xffffffff, sums[i].sum, source);
      if (lanes.group == 0) sums[i].add(other);
    }
  }
  if (lanes.group != 0 || d >= args.dims) return;
#pragma unroll
  for (int i = 0; i < kRows<C>; ++i) {
    const int64_t point = first_point + lanes.warp * kRows<C> + i;
    if (point < args.points) out[(part * args.points + point) * args.dims + d] = sums[i];
  }
}

// Items of the second kind: the sums of each point over a part of the components.
template <class C>
FASTVAE_DEVICE void joint_of_tile(const GaussianMixtureArgs& args, const MixturePlan& plan, int64_t item, C* room, double* base,
                                  PowerSum<C>* out) {
  const int64_t part = item % plan.component_parts, first_point = item / plan.component_parts * kPoints<C>;
  const int64_t last_tile = std::min((part + 1) * plan.components_each, plan.component_tiles);
  const int thread = static_cast<int>(computed_here(threadIdx.x)), group = thread % kGroups, place = thread / kGroups;
  PowerSum<C> sums[kOwn<C>];
#pragma unroll 1
  for (int64_t tile = part * plan.components_each; tile < last_tile; ++tile) {
    C squares[kOwn<C>][kColumns];
    over_dimensions<C, kColumns>(args, plan.wide, first_point, tile * kComponents, room, base, squares);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const int64_t component = tile * kComponents + group + j * kGroups;
      const bool real = component < args.components;
      const C constant = static_cast<C>(base[group + j * kGroups]);
      C weight(0);
#pragma unroll
      for (int i = 0; i < kOwn<C>; ++i) {
        const int64_t point = first_point + place * kOwn<C> + i;
        if (real && (i == 0 || args.log_weight.row_stride))
          weight = log_weight_of<C>(args, point < args.points ? point : args.points - 1, component);
        squares[i][j] = real ? constant + weight - squares[i][j] : C(-INFINITY);
      }
    }
#pragma unroll
    for (int i = 0; i < kOwn<C>; ++i) sums[i].add(squares[i]);
  }
#pragma unroll
  for (int i = 0; i < kOwn<C>; ++i) {
#pragma unroll
    for (int offset = kGroups / 2; offset > 0; offset /= 2) {
      PowerSum<C> other;
      other.top = __shfl_xor_sync(0xffffffff, sums[i].top, offset);
      other.sum = __shfl_xor_sync(0xffffffff, sums[i].sum, offset);
      sums[i].add(other);
    }
    const int64_t point = first_point + place * kOwn<C> + i;
    if (group == 0 && point < args.points) out[part * args.points + point] = sums[i];
  }
}

// Items of the third kind: kThreads results.
template <class C>
FASTVAE_DEVICE void finish_values(const MixturePlan& plan, int64_t item, int64_t count, const PowerSum<C>* partials, void* out) {
  const int64_t i = item * kThreads + threadIdx.x;
  if (i >= count) return;
  PowerSum<C> sum;
  for (int64_t part = 0; part < plan.component_parts; ++part) {
    const PowerSum<C>* from = partials + part * count + i;
    PowerSum<C> other;
    other.top = load_written(&from->top);
    other.sum = load_written(&from->sum);
    sum.add(other);
  }
  static_cast<C*>(out)[i] = sum.log();
}

template <class C>
__global__ void __launch_bounds__(kThreads, resident<C>())
    gaussian_mixture_kernel(const __grid_constant__ GaussianMixtureValueArgs args, const __grid_constant__ MixturePlan plan) {
  FASTVAE_SHARED(Quad<C>, room, kRoom<C>);
  FASTVAE_SHARED(Quad<C>, log_weights, kComponents* kPointStride<C> / kQuad);
  FASTVAE_SHARED(double, base, kComponents);
  FASTVAE_SHARED(uint32_t, number, 1);
  uint32_t *taken = args.workspace.counter, *done = args.workspace.counter + 1;
  char* scratch = static_cast<char*>(args.workspace.scratch);
  auto *each = reinterpret_cast<PowerSum<C>*>(scratch + plan.at[0]), *joint = reinterpret_cast<PowerSum<C>*>(scratch + plan.at[1]);
  while (true) {
    if (threadIdx.x == 0) number[0] = take_number(taken, plan.items + gridDim.x - 1);
    __syncthreads();
    const uint32_t item = number[0];
    if (item >= plan.items) break;
    if (item < plan.first) {
      each_of_tile(args, plan, item, flat(room), flat(log_weights), each);
    } else if (item < plan.second) {
      joint_of_tile(args, plan, item - plan.first, flat(room), base, joint);
    } else {
      wait_for(done, plan.second);
      const uint32_t own = item - plan.second;
      if (own < plan.ends[0]) finish_values(plan, own, args.points * args.dims, each, args.per_dimension.data);
      else finish_values(plan, own - plan.ends[0], args.points, joint, args.joint.data);
    }
    __syncthreads();
    if (threadIdx.x == 0) take_number(done, plan.items - 1);
  }
}

template <class C>
MixturePlan plan_values(const GaussianMixtureValueArgs& args) {
  const int64_t slots = fastvae::cuda::slots(resident<C>());
  MixturePlan plan{};
  choose_width(plan, args.dims, kWidest<C>, kAtOnce<C>, kComponents);
  plan.point_tiles = parts_of(args.points, kPoints<C>);
  plan.component_tiles = parts_of(args.components, kComponents);
  const bool each = args.per_dimension.data, joint = args.joint.data;
  const int64_t tiles = plan.point_tiles * ((each ? plan.dim_tiles : 0) + (joint ? 1 : 0));
  cut(plan.component_tiles, parts_of(4 * slots, std::max<int64_t>(1, tiles)), plan.component_parts, plan.components_each);
  plan.first = static_cast<uint32_t>(each ? plan.point_tiles * plan.dim_tiles * plan.component_parts : 0);
  plan.second = plan.first + static_cast<uint32_t>(joint ? plan.point_tiles * plan.component_parts : 0);
  plan.ends[0] = static_cast<uint32_t>(each ? parts_of(args.points * args.dims, kThreads) : 0);
  plan.ends[1] = plan.ends[0] + static_cast<uint32_t>(joint ? parts_of(args.points, kThreads) : 0);
  plan.items = plan.second + plan.ends[1];
  plan.blocks = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(plan.items, slots)));
  plan.wide = reads_wide(args);
  plan.at[1] = each ? plan.component_parts * args.points * args.dims * int64_t(sizeof(PowerSum<C>)) : 0;
  plan.bytes = plan.at[1] + (joint ? plan.component_parts * args.points * int64_t(sizeof(PowerSum<C>)) : 0);
  return plan;
}

MixturePlan plan_of(const GaussianMixtureValueArgs& args) {
  return args.z.type == DType::f64 ? plan_values<double>(args) : plan_values<float>(args);
}

}  // namespace

int64_t gaussian_mixture_scratch(const GaussianMixtureValueArgs& args) { return plan_of(args).bytes; }

cudaError_t gaussian_mixture(const GaussianMixtureValueArgs& args, cudaStream_t stream) {
  const MixturePlan plan = plan_of(args);
  if (plan.items == 0) return cudaSuccess;
  if (args.z.type == DType::f64) return FASTVAE_LAUNCH((gaussian_mixture_kernel<double>), plan.blocks, stream, args, plan);
  return FASTVAE_LAUNCH((gaussian_mixture_kernel<float>), plan.blocks, stream, args, plan);
}

}  // namespace fastvae::cuda
