// What the kernels of Gaussian mixtures share: how components and points come in tiles, and the sums over dimensions.
//
// Exponentials are binary here. With kappa = sqrt(log2 e), a component is read as its mean, its root r kappa (see math/mixture.h) and its
// term log2 e times its normaliser, so that -t^2 + term is the binary logarithm of a density.
//
// Blocks divide the work in two ways. In the joint form, whose sums go over dimensions, a thread has a few points and components, and all
// threads go through the dimensions together (`over_dimensions`). Where each dimension counts by itself, a thread has a few points of one
// dimension, and goes through the components (`Lanes`).
#pragma once
#include "device.cuh"
//
#include "../math/mixture.h"

namespace fastvae::cuda {

constexpr double kLog2E = 1.44269504088896340736, kRootLog2E = 1.20112240878644982, kLog2 = 0.693147180559945309417;
constexpr int64_t kMaxParts = 16;  // into which sums are split at most, so that partial results have a bounded size

constexpr int kStep = 16;    // the number of dimensions that a block reads at a time
constexpr int kGroups = 16;  // adjacent threads that share points in over_dimensions
template <class C>
constexpr int kRows = sizeof(C) == 8 ? 4 : 8;  // points of a thread of Lanes, all of whose warp have the same ones
template <class C>
constexpr int kPoints = kWarps * kRows<C>;  // of a tile
template <class C>
constexpr int kOwn = kRows<C> / 2;  // points of a thread in over_dimensions
template <class C>
constexpr int kWidest = sizeof(C) == 8 ? 16 : 32;  // the maximum number of dimensions of a tile of Lanes
// The lengths of rows in shared memory, such that the rows of eight adjacent threads lie in different banks.
template <class C>
constexpr int kStepStride = kStep + 16 / int(sizeof(C));
template <class C>
constexpr int kPointStride = kPoints<C> + 16 / int(sizeof(C));

// A warp of Lanes is `groups` times `width` lanes: each group has all dimensions of a tile, and takes every groups-th component.
struct MixturePlan {
  int width, groups;
  int64_t dim_tiles, point_tiles, component_tiles;
  int64_t point_parts, points_each, component_parts, components_each;  // how many parts there are, and the tiles of each
  uint32_t first, second, items;  // items before the second and the third kind, and all
  uint32_t ends[4];               // of the kinds of results that the last items write
  int64_t at[4], bytes;           // offsets in the scratch
  int blocks;
  bool wide;
};

FASTVAE_DEVICE float two_to(float x) { return math::exp2_approximately(x); }
FASTVAE_DEVICE double two_to(double x) { return ::exp2(x); }
FASTVAE_DEVICE float larger(float a, float b) { return fmaxf(a, b); }
FASTVAE_DEVICE double larger(double a, double b) { return fmax(a, b); }

template <class C>
FASTVAE_DEVICE C root_of(C logvar) {
  return math::half_inverse_root(logvar) * C(kRootLog2E);
}
template <class C>
FASTVAE_DEVICE C term_of(C logvar) {
  return math::log_normaliser(logvar) * C(kLog2E);
}

// Calls f with a null pointer to a floating-point type that is computed in C.
template <class C, class F>
FASTVAE_DEVICE void with_float_type(DType type, const F& f) {
  if constexpr (sizeof(C) == 8) {
    f(static_cast<const double*>(nullptr));
  } else {
    if (type == DType::f32) f(static_cast<const float*>(nullptr));
    else if (type == DType::f16) f(static_cast<const Half*>(nullptr));
    else f(static_cast<const BFloat16*>(nullptr));
  }
}

template <class C>
FASTVAE_DEVICE C load_float(const Operand& from, int64_t i) {
  C x(0);
  with_float_type<C>(from.type, [&](auto* as) { x = static_cast<C>(widened(__ldg(static_cast<decltype(as)>(from.data) + i))); });
  return x;
}

// Reads elements `d` to `d + 3` of a row; those from `end` on are 0.
template <class C>
FASTVAE_DEVICE void load_dims(const Operand& from, int64_t row, int64_t d, int64_t end, bool wide, C (&x)[kQuad]) {
  with_float_type<C>(from.type, [&](auto* as) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(as)>>;
    const T* p = static_cast<const T*>(from.data) + row * from.row_stride + d;
    if (wide && d + kQuad <= end) {
      Pack<T, kQuad> pack;
      pack.load(p);
#pragma unroll
      for (int j = 0; j < kQuad; ++j) x[j] = static_cast<C>(widened(pack.value[j]));
    } else {
#pragma unroll
      for (int j = 0; j < kQuad; ++j) x[j] = d + j < end ? static_cast<C>(widened(__ldg(p + j))) : C(0);
    }
  });
}

// The binary logarithm of a weight.
template <class C>
FASTVAE_DEVICE C log_weight_of(const GaussianMixtureArgs& args, int64_t point, int64_t component) {
  const Operand& from = args.log_weight;
  if (!from.data) return static_cast<C>(-::log2(static_cast<double>(args.components)));
  const int64_t at = point * from.row_stride + component;
  if (from.type == DType::f32) return static_cast<C>(__ldg(static_cast<const float*>(from.data) + at)) * C(kLog2E);
  return static_cast<C>(number_of_any(Numbers{from.data, from.type, 1}, at)) * C(kLog2E);
}

// The logarithm of a total and its incoming gradient, such that a point without density has no gradient, and none is NaN.
template <class C>
FASTVAE_DEVICE void make_usable(C& total, C& grad) {
  constexpr C most = math::largest<C>();
  if (total < -most) total = C(0), grad = C(0);
  else if (total > most) total = C(math::kInfiniteLogDensity);
}

// exp(value - total) for the binary logarithm `value` of a summand of a sum whose natural logarithm is `total`.
template <class C>
FASTVAE_DEVICE C share_of(C value, C total) {
  using P = math::Primitives<C>;
  return two_to(P::at_most(P::fma(-total, C(kLog2E), value), C(0)));
}

// 2^top * sum, the sum of powers of 2.
template <class C>
struct alignas(2 * sizeof(C)) PowerSum {
  C top = -math::largest<C>(), sum = C(0);  // below every finite summand, but finite

  template <int N>
  FASTVAE_DEVICE void add(const C (&x)[N]) {
    C higher = top;
#pragma unroll
    for (int i = 0; i < N; ++i) higher = larger(higher, x[i]);
    C more(0);
#pragma unroll
    for (int i = 0; i < N; ++i) more += two_to(x[i] - higher);
    sum = math::Primitives<C>::fma(sum, two_to(top - higher), more);
    top = higher;
  }
  FASTVAE_DEVICE void add(const PowerSum& other) {
    const C higher = larger(top, other.top);
    sum = sum * two_to(top - higher) + other.sum * two_to(other.top - higher);
    top = higher;
  }
  FASTVAE_DEVICE C log() const {
    using P = math::Primitives<C>;
    if (sum == C(0)) return C(-INFINITY);
    const C value = P::fma(top, C(kLog2), P::log(sum));
    return value > C(math::kInfiniteLogDensity) ? C(INFINITY) : value;
  }
};

template <class C, int kColumns, bool kShares>
constexpr int step_room() {
  return (kShares ? 3 : 1) * kPoints<C> * kStepStride<C> + (kShares ? 3 : 2) * kGroups * kColumns * kStepStride<C>;
}

// A tile of points and of kGroups * kColumns components in shared memory, kStep dimensions at a time. Points and components that do not
// exist are copies of the last ones. With kShares, it has the terms too, and the densities of each dimension with their gradients.
template <class C, int kColumns, bool kShares>
struct Steps {
  static constexpr int kComponents = kGroups * kColumns, kStride = kStepStride<C>, kQuads = kStep / kQuad;
  static constexpr int kPointTurns = (kPoints<C> * kQuads + kThreads - 1) / kThreads;
  static constexpr int kTurns = (kComponents * kQuads + kThreads - 1) / kThreads;
  static_assert(kComponents <= kThreads && kComponents * kQuads % kWarp == 0 && kQuads == 4);

  const int thread;
  C *z, *mu, *root, *term, *totals, *grads;
  C next_z[kPointTurns][kQuad], next_mu[kTurns][kQuad], next_logvar[kTurns][kQuad];

  explicit FASTVAE_DEVICE Steps(C* room)
      : thread(static_cast<int>(computed_here(threadIdx.x))), z(room), mu(z + kPoints<C> * kStride), root(mu + kComponents * kStride), term(root + kComponents * kStride),
        totals(term + kComponents * kStride), grads(totals + kPoints<C> * kStride) {}

  static FASTVAE_DEVICE const Quad<C>& at(const C* rows, int row, int d) { return *reinterpret_cast<const Quad<C>*>(rows + row * kStride + d); }
  static FASTVAE_DEVICE void put(C* rows, int i, const C (&x)[kQuad]) {
    Quad<C> all;
#pragma unroll
    for (int j = 0; j < kQuad; ++j) all.value[j] = x[j];
    *reinterpret_cast<Quad<C>*>(rows + i / kQuads * kStride + i % kQuads * kQuad) = all;
  }

  // Reads the dimensions from d on, which `store` then puts into shared memory: before the current ones are used.
  FASTVAE_DEVICE void fetch(const GaussianMixtureArgs& args, bool wide, int64_t first_point, int64_t first_component, int d) {
#pragma unroll
    for (int k = 0; k < kPointTurns; ++k) {
      const int i = thread + k * kThreads;
      if (i >= kPoints<C> * kQuads) break;
      const int64_t row = first_point + i / kQuads;
      load_dims(args.z, row < args.points ? row : args.points - 1, d + i % kQuads * kQuad, args.dims, wide, next_z[k]);
    }
#pragma unroll
    for (int k = 0; k < kTurns; ++k) {
      const int i = thread + k * kThreads;
      if (i >= kComponents * kQuads) break;
      const int64_t place = first_component + i / kQuads, row = place < args.components ? place : args.components - 1;
      load_dims(args.mu, row, d + i % kQuads * kQuad, args.dims, wide, next_mu[k]);
      load_dims(args.logvar, row, d + i % kQuads * kQuad, args.dims, wide, next_logvar[k]);
    }
  }

  // Adds the terms of each component to `base`, unless kShares.
  FASTVAE_DEVICE void store(int dims, int d, double* base) {
#pragma unroll
    for (int k = 0; k < kPointTurns; ++k) {
      const int i = thread + k * kThreads;
      if (i < kPoints<C> * kQuads) put(z, i, next_z[k]);
    }
#pragma unroll
    for (int k = 0; k < kTurns; ++k) {
      const int i = thread + k * kThreads;
      if (i >= kComponents * kQuads) break;
      C x[kQuad], sum(0);
#pragma unroll
      for (int j = 0; j < kQuad; ++j) x[j] = root_of(next_logvar[k][j]);
      put(root, i, x);
      put(mu, i, next_mu[k]);
#pragma unroll
      for (int j = 0; j < kQuad; ++j) {
        x[j] = term_of(next_logvar[k][j]);
        if (d + i % kQuads * kQuad + j < dims) sum += x[j];
      }
      if constexpr (kShares) {
        put(term, i, x);
      } else {
        sum += __shfl_xor_sync(0xffffffff, sum, 1);
        sum += __shfl_xor_sync(0xffffffff, sum, 2);
        if (i % kQuads == 0) base[i / kQuads] += static_cast<double>(sum);
      }
    }
  }

  FASTVAE_DEVICE void store_values(const C* values, const C* gradients, int64_t points, int64_t dims, int64_t first_point, int d) {
#pragma unroll 1
    for (int i = thread; i < kPoints<C> * kStep; i += kThreads) {
      const int64_t row = first_point + i / kStep;
      C total(0), grad(0);
      if (row < points && d + i % kStep < dims) {
        total = __ldg(values + row * dims + d + i % kStep);
        grad = __ldg(gradients + row * dims + d + i % kStep);
        make_usable(total, grad);
      }
      totals[i / kStep * kStride + i % kStep] = total;
      grads[i / kStep * kStride + i % kStep] = grad;
    }
  }
};

// Sums t^2 over all dimensions, for the points first_point + place * kOwn + i and the components first_component + group + j * kGroups,
// where threadIdx.x = place * kGroups + group, and the terms of each component into `base`. All threads of a block call this; `room` has
// step_room numbers.
template <class C, int kColumns>
FASTVAE_DEVICE void over_dimensions(const GaussianMixtureArgs& args, bool wide, int64_t first_point, int64_t first_component, C* room,
                                    double* base, C (&squares)[kOwn<C>][kColumns]) {
  using P = math::Primitives<C>;
  using S = Steps<C, kColumns, false>;
  S steps(room);
  const int group = steps.thread % kGroups, place = steps.thread / kGroups, dims = static_cast<int>(args.dims);
#pragma unroll
  for (int i = 0; i < kOwn<C>; ++i)
#pragma unroll
    for (int j = 0; j < kColumns; ++j) squares[i][j] = C(0);
  steps.fetch(args, wide, first_point, first_component, 0);
  __syncthreads();
  if (steps.thread < S::kComponents) base[steps.thread] = 0;
  int d = 0;
#pragma unroll 1
  do {
    __syncthreads();
    steps.store(dims, d, base);
    __syncthreads();
    d += kStep;
    if (d < dims) steps.fetch(args, wide, first_point, first_component, d);
#pragma unroll 1
    for (int k = 0; k < kStep; k += kQuad) {
      Quad<C> x[kOwn<C>];
#pragma unroll
      for (int i = 0; i < kOwn<C>; ++i) x[i] = S::at(steps.z, place * kOwn<C> + i, k);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const Quad<C> mean = S::at(steps.mu, group + j * kGroups, k), inverse = S::at(steps.root, group + j * kGroups, k);
#pragma unroll
        for (int i = 0; i < kOwn<C>; ++i)
#pragma unroll
          for (int e = 0; e < kQuad; ++e) {
            const C t = (x[i].value[e] - mean.value[e]) * inverse.value[e];
            squares[i][j] = P::fma(t, t, squares[i][j]);
          }
      }
    }
  } while (d < dims);
}

// A thread's place where each dimension counts by itself.
struct Lanes {
  int warp, d, group;  // the dimension in the tile; `group` is at least plan.groups if the lane has none

  explicit FASTVAE_DEVICE Lanes(const MixturePlan& plan) {
    const int thread = static_cast<int>(computed_here(threadIdx.x)), lane = thread % kWarp;
    warp = thread / kWarp;
    group = lane / plan.width;
    d = lane - group * plan.width;
  }
};

// Components of a tile in the dimensions from `begin` on, in shared memory: number m in dimension d is at m * width + d. Those that do not
// exist are copies of the last one, with the density 0. (Means and roots of their own could make a NaN of an infinite point.)
template <class C>
struct Components {
  C *mu, *root, *term;

  FASTVAE_DEVICE Components(C* room, int count, int width) : mu(room), root(mu + count * width), term(root + count * width) {}

  // `with_weights`: adds the logarithms of the weights to the terms. Returns whether a square might be infinite: not if means, roots and
  // points are all below `kFar`.
  FASTVAE_DEVICE bool read(const GaussianMixtureArgs& args, bool wide, int64_t first, int count, int64_t begin, int width, bool with_weights) {
    const int quads = (width + kQuad - 1) / kQuad;
    const int64_t end = begin + width < args.dims ? begin + width : args.dims;
    bool far = false;
#pragma unroll 1
    for (int i = static_cast<int>(computed_here(threadIdx.x)); i < count * quads; i += kThreads) {
      const int m = i / quads, d = (i - m * quads) * kQuad;
      const bool real = first + m < args.components;
      const int64_t row = real ? first + m : args.components - 1;
      C mean[kQuad], logvar[kQuad];
      load_dims(args.mu, row, begin + d, end, wide, mean);
      load_dims(args.logvar, row, begin + d, end, wide, logvar);
      const C weight = with_weights ? log_weight_of<C>(args, 0, row) : C(0);
#pragma unroll
      for (int j = 0; j < kQuad; ++j) {
        if (d + j >= width) continue;
        const C inverse = root_of(logvar[j]);
        far |= !(math::Primitives<C>::abs(mean[j]) < C(kFar)) || !(inverse < C(kFar));
        mu[m * width + d + j] = mean[j];
        root[m * width + d + j] = inverse;
        term[m * width + d + j] = real ? term_of(logvar[j]) + weight : C(-INFINITY);
      }
    }
    return far;
  }

  static constexpr float kFar = 0x1p31f;
};

// Reads the logarithms of the weights of a tile, which differ between points: component m and point p are at m * kPointStride + p.
template <class C>
FASTVAE_DEVICE void read_weights(const GaussianMixtureArgs& args, int64_t first_point, int64_t first_component, int count, C* out) {
#pragma unroll 1
  for (int i = static_cast<int>(computed_here(threadIdx.x)); i < count * kPoints<C>; i += kThreads) {
    const int p = i / count, m = i - p * count;
    const int64_t point = first_point + p < args.points ? first_point + p : args.points - 1;
    const int64_t component = first_component + m < args.components ? first_component + m : args.components - 1;
    out[m * kPointStride<C> + p] = log_weight_of<C>(args, point, component);
  }
}

// ---------------------------------------------------------------------------------------------------------------------------------

inline int64_t parts_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

// The width of the tiles of `dims` dimensions for which the fewest lanes have nothing to do, where a group takes `turn` components at a time
// out of `count`.
inline void choose_width(MixturePlan& plan, int64_t dims, int widest, int turn, int count) {
  double best = 0;
  for (int64_t tiles = parts_of(std::max<int64_t>(dims, 1), widest), last = tiles + 7; tiles <= last; ++tiles) {
    const int width = static_cast<int>(parts_of(std::max<int64_t>(dims, 1), tiles)), groups = kWarp / width;
    const double busy = static_cast<double>(dims) / static_cast<double>(tiles * kWarp) * groups *
                        (static_cast<double>(count) / static_cast<double>(parts_of(count, turn * groups) * turn * groups));
    if (plan.width && busy <= best * 1.05) continue;  // wider tiles read less
    best = busy;
    plan.width = width;
    plan.groups = groups;
    plan.dim_tiles = parts_of(dims, width);
  }
}

// Cuts `tiles` into at most kMaxParts parts, about `wanted` of them.
inline void cut(int64_t tiles, int64_t wanted, int64_t& parts, int64_t& each) {
  each = std::max<int64_t>(1, parts_of(tiles, std::max<int64_t>(1, std::min(wanted, kMaxParts))));
  parts = parts_of(tiles, each);
}

inline bool reads_wide(const GaussianMixtureArgs& args) {
  const auto fits = [](const Operand& view) {
    const int64_t bytes = cpu::item_size(view.type), aligned = std::min<int64_t>(16, kQuad * bytes);
    return reinterpret_cast<uintptr_t>(view.data) % aligned == 0 && view.row_stride * bytes % aligned == 0;
  };
  return fits(args.z) && fits(args.mu) && fits(args.logvar);
}

}  // namespace fastvae::cuda
