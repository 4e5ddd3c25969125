// The likelihoods with independent elements. One pass over a reconstruction computes the nll of each row, the loss and, where wanted, the
// gradient. The likelihoods are divided into shares, and the file of each share includes this one.
#pragma once
#include "rows.cuh"
//
#include "../math/continuous.h"
#include "../math/counts.h"
#include "../math/discretized.h"

namespace fastvae::cuda {

// `unroll` is the number of accesses to each operand that a thread has in flight at a time. `resident` is the number of blocks that share
// the registers of a multiprocessor.
constexpr int unroll(int params, int unit) { return (unit == 1 ? 4 : 2) / params; }

// The N of kernels whose elements have weights; others access N elements at a time.
constexpr int kWeighted = 0;

template <class L>
constexpr int resident(int64_t item_size, int unit) {
  constexpr bool is_long = std::is_same_v<L, math::Poisson> || std::is_same_v<L, math::ContinuousBernoulli> ||
                           std::is_same_v<L, math::StudentT>;
  // These are long only where a thread takes one element at a time.
  const bool is_long_alone = std::is_same_v<L, math::DiscretizedLogistic> || std::is_same_v<L, math::PoissonRate> ||
                             (std::is_same_v<L, math::Gaussian> && item_size == 2);
  // A thread takes four or eight of them at a time, and may write their values.
  const bool is_long_side_by_side = std::is_same_v<L, math::PoissonRate> && item_size <= 4;
  const int most = item_size == 8 ? 2 : L::params > 1 || is_long || is_long_side_by_side || unit == 1 ? 3 : 4;
  return (is_long && (item_size == 2 || unit == 1)) || (is_long_alone && unit == 1) ? 2 : most;
}

// The number of elements in a wide access. It covers 128 bits, unless a thread's registers cannot hold that many elements side by side.
template <class L>
constexpr int widest(int64_t item_size) {
  return std::is_same_v<L, math::DiscretizedLogistic> && item_size == 2 ? 4 : static_cast<int>(16 / item_size);
}

// Accumulates the logarithmic terms of many elements, so that they need only one logarithm.
template <class L, class C>
using Logs = std::conditional_t<std::is_same_v<L, math::DiscretizedLogistic>, math::LogisticLogs<C>, math::Log1pSum<C>>;

// Calls f with an object of the likelihood's struct.
template <class F>
auto with_likelihood(Element element, const F& f) {
  switch (element) {
#define FASTVAE_ELEMENT(name, Struct) \
  case Element::name: return f(math::Struct());
#include "../likelihoods.def"
    default: return f(math::Bernoulli());  // `none` cannot occur: variants without an element do not come here
  }
}

// Loads U packs of data that start at i and lie `step` elements apart, as far as they lie before `count`, and converts their values.
template <class D, class C, int N, int U>
struct Data {
  Pack<D, N> packs[U];
  Converter<D, C> convert;

  FASTVAE_DEVICE explicit Data(DType type) : convert(type) {}
  FASTVAE_DEVICE void load(const char* data, uint32_t i, uint32_t step, uint32_t count) {
#pragma unroll
    for (int u = 0; u < U; ++u)
      if (i + u * step < count) packs[u].load(reinterpret_cast<const D*>(data) + (i + u * step));
  }
  FASTVAE_DEVICE C value(int u, int j) const { return convert(packs[u].value[j]); }
};

template <class C, int U>
struct Data<Any, C, 1, U> {
  C values[U];
  DType type;

  FASTVAE_DEVICE explicit Data(DType type_) : type(type_) {}
  template <class D>
  FASTVAE_DEVICE void load_as(const char* data, uint32_t i, uint32_t step, uint32_t count) {
    Data<D, C, 1, U> typed(type);
    typed.load(data, i, step, count);
#pragma unroll
    for (int u = 0; u < U; ++u) values[u] = typed.value(u, 0);
  }
  FASTVAE_DEVICE void load(const char* data, uint32_t i, uint32_t step, uint32_t count) {
    switch (type) {
      case DType::f32: return load_as<float>(data, i, step, count);
      case DType::f64: return load_as<double>(data, i, step, count);
      case DType::f16: return load_as<Half>(data, i, step, count);
      case DType::bf16: return load_as<BFloat16>(data, i, step, count);
      case DType::byte: return load_as<uint8_t>(data, i, step, count);
      case DType::i32: return load_as<int32_t>(data, i, step, count);
      case DType::i64: return load_as<int64_t>(data, i, step, count);
      case DType::u16: return load_as<uint16_t>(data, i, step, count);
      default: return load_as<Byte>(data, i, step, count);
    }
  }
  FASTVAE_DEVICE C value(int u, int) const { return values[u]; }
};

// Whether the value of each element can be asked for.
template <class L, class T>
constexpr bool kValues = std::is_same_v<L, math::PoissonRate> && std::is_same_v<T, Compute<T>>;

// Computes this thread's elements of a part of a row. Returns the sum of their nll without the normaliser and writes the gradients.
template <class L, class T, class D, int N>
FASTVAE_DEVICE Compute<T> part_of_row(const NllArgs& args, const Part& part, int lane, int lanes,
                                      const Compute<T>* constants, Compute<T> factor, const Runs& runs, Compute<T>& scale_grad) {
  using C = Compute<T>;
  constexpr int U = unroll(L::params, N);
  constexpr bool kRuns = L::params > 1;  // the params may come from a packed head
  const int64_t row = part.row, begin = part.begin;
  const uint32_t count = part.count;
  const T* param[L::params];
  T* grad[L::params];
#pragma unroll
  for (int k = 0; k < L::params; ++k) {
    param[k] = static_cast<const T*>(args.params[k].data) + row * args.params[k].row_stride + (kRuns ? 0 : begin);
    grad[k] = static_cast<T*>(args.grads[k].data);
    if (grad[k]) grad[k] += row * args.grads[k].row_stride + (kRuns ? 0 : begin);
  }
  const int64_t target_begin = cpu::target_row(args, row) * args.target.row_stride + begin;
  const char* target = static_cast<const char*>(args.target.data) + target_begin * cpu::item_size(args.target.type);

  C sum(0);
  const uint32_t step = uint32_t(lanes) * N;
#pragma unroll 1
  for (uint32_t i = uint32_t(lane) * N; i < count; i += step * U) {
    const auto place = [&](int u) { return kRuns ? runs(begin + (i + u * step)) : static_cast<int64_t>(i + u * step); };
    // All loads come before the first use, so that all of them are in flight at the same time.
    Pack<T, N> params[L::params][U];
    Data<D, C, N, U> data(args.target.type);
#pragma unroll
    for (int k = 0; k < L::params; ++k)
#pragma unroll
      for (int u = 0; u < U; ++u)
        if (i + u * step < count) params[k][u].load(param[k] + place(u));
    data.load(target, i, step, count);

    Logs<L, C> logs;
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (i + u * step >= count) break;
      C grads[L::params][N], values[N];
#pragma unroll
      for (int j = 0; j < N; ++j) {
        C p[L::params], d[L::params];
#pragma unroll
        for (int k = 0; k < L::params; ++k) p[k] = widened(params[k][u].value[j]);
        const C t = data.value(u, j);
        C value;
        if constexpr (L::has_scale_grad) {
          C own_scale_grad;
          value = L::element(p, t, constants, d, logs, own_scale_grad);
          scale_grad += own_scale_grad;
        } else {
          value = L::element(p, t, constants, d, logs);
        }
        if constexpr (math::has_ends<L, C>) {
          if (value != value) value = L::at_ends(p, t, value);
        }
        sum += value;
        if constexpr (kValues<L, T>) values[j] = value * factor;
#pragma unroll
        for (int k = 0; k < L::params; ++k) grads[k][j] = d[k] * factor;
      }
      if constexpr (kValues<L, T>) {
        if (args.values.data) {
          Pack<T, N> pack;
          pack.fill(values);
          pack.store(static_cast<T*>(args.values.data) + row * args.values.row_stride + begin + place(u));
        }
      }
#pragma unroll
      for (int k = 0; k < L::params; ++k) {
        if (!grad[k]) continue;
        Pack<T, N> pack;
        pack.fill(grads[k]);
        pack.store(grad[k] + place(u));
      }
    }
    static_assert(N * U <= Logs<L, C>::most, "more factors than it can hold");
    if constexpr (L::has_log1p) sum += logs.value();
  }
  return sum;
}

// The same where elements have weights, in which case the sum includes the normaliser, and scale_grad is the derivative by the scale. It
// takes one element after another, and has kernels of its own, so that weights take no registers from the others.
template <class L, class T, class D>
FASTVAE_DEVICE Compute<T> weighted_part_of_row(const NllArgs& args, const Part& part, int lane, int lanes,
                                               const math::Normaliser<Compute<T>>& same, Compute<T> factor, const Runs& runs,
                                               Compute<T>& scale_grad) {
  using C = Compute<T>;
  const int64_t row = part.row, data_row = cpu::target_row(args, row), begin = part.begin;
  const int64_t target_begin = data_row * args.target.row_stride + begin;
  const char* target = static_cast<const char*>(args.target.data) + target_begin * cpu::item_size(args.target.type);
  C sum(0);
#pragma unroll 1
  for (uint32_t i = lane; i < part.count; i += lanes) {
    const int64_t place = L::params > 1 ? runs(begin + i) : begin + i;
    C p[L::params], d[L::params];
#pragma unroll
    for (int k = 0; k < L::params; ++k)
      p[k] = widened(__ldg(static_cast<const T*>(args.params[k].data) + (row * args.params[k].row_stride + place)));
    Data<D, C, 1, 1> data(args.target.type);
    data.load(target, i, 0, part.count);
    const C t = data.value(0, 0);
    Logs<L, C> logs;
    C value, own_scale_grad(0);
    if constexpr (L::has_scale_grad) value = L::element(p, t, same.constants, d, logs, own_scale_grad);
    else value = L::element(p, t, same.constants, d, logs);
    if constexpr (math::has_ends<L, C>) {
      if (value != value) value = L::at_ends(p, t, value);
    }
    if constexpr (L::has_log1p) value += logs.value();
    const C own = weight_of<C>(args.weights, data_row, begin + i);
    const bool kept = own != C(0);
    if constexpr (math::has_scale<L>) scale_grad += kept ? L::scalar_grad(C(1), value, own_scale_grad) * own : C(0);
    sum += kept ? (value + same.per_element) * own : C(0);
    if constexpr (kValues<L, T>) {
      if (args.values.data) static_cast<T*>(args.values.data)[row * args.values.row_stride + place] = kept ? value * own * factor : C(0);
    }
#pragma unroll
    for (int k = 0; k < L::params; ++k) {
      T* grad = static_cast<T*>(args.grads[k].data);
      if (grad) grad[row * args.grads[k].row_stride + place] = narrowed<T>(kept ? d[k] * own * factor : C(0));
    }
  }
  return sum;
}

// Writes the results of a row whose elements sum to `value`, and returns its part of the loss.
template <class L, bool kWeights, class C>
FASTVAE_DEVICE double finish_row(const NllArgs& args, int64_t row, double value, double scale_grad, C normaliser, double weighted_kl) {
  if constexpr (kWeights) {
    if (args.scalar_rows.data) put(args.scalar_rows, row, scale_grad);
    return put_row(args, row, value, weighted_kl);
  }
  if constexpr (math::has_scale<L>) {
    if (args.scalar_rows.data) put(args.scalar_rows, row, L::scalar_grad(static_cast<double>(args.size), value, scale_grad));
  }
  return put_row(args, row, value + static_cast<double>(args.size) * static_cast<double>(normaliser), weighted_kl);
}

template <class L, class T, class D, int N>
__global__ void __launch_bounds__(kThreads, resident<L>(sizeof(T), N == kWeighted ? 1 : N))
    nll_kernel(const __grid_constant__ NllArgs args, const __grid_constant__ Plan plan, const __grid_constant__ Runs place) {
  using C = Compute<T>;
  FASTVAE_SHARED(C, row_scratch, 2 * kThreads / kWarp);
  FASTVAE_SHARED(double, loss_scratch, kThreads / kWarp);
  const int lane = threadIdx.x & (plan.lanes - 1);
  const bool values = args.loss.data, scale_grads = (L::has_scale_grad || N == kWeighted) && args.scalar_rows.data;

  math::Normaliser<C> same = {static_cast<C>(args.normaliser), {}};
#pragma unroll
  for (int i = 0; i < kMaxConstants; ++i) same.constants[i] = static_cast<C>(args.constants[i]);
  if constexpr (math::has_scale<L>) {
    same.constants[0] = math::bounded_root(same.constants[0]);
    if (args.scalar.data) same = math::at_scale<L>(same, static_cast<C>(number(args.scalar)));
  }

  // beta is read here, and the KL of a row before its elements, so that both have arrived when the elements are done.
  const double beta = values ? beta_of(args) : 0;
  double loss = 0;  // the loss of the rows whose first lane is this thread
  int turn = 0;
  for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
    const Part part(plan, item, args.size);
    const int64_t row = part.row;
    C sum(0), scale_grad(0);
    double kl = 0;
    if (row < args.rows) {
      if (values && lane == 0 && plan.splits == 1) kl = kl_of(args, row);
      C factor = static_cast<C>(args.weight);
      if (args.grad_loss.data || args.grad_nll.data)
        factor = static_cast<C>(row_factor(args.grad_loss, args.grad_nll, args.weight, row));
      if constexpr (N == kWeighted) sum = weighted_part_of_row<L, T, D>(args, part, lane, plan.lanes, same, factor, place, scale_grad);
      else sum = part_of_row<L, T, D, N>(args, part, lane, plan.lanes, same.constants, factor, place, scale_grad);
    }
    if (!values) continue;
    sum = group_sum(sum, plan.lanes, row_scratch + (turn ^= kThreads / kWarp));
    if (scale_grads) scale_grad = group_sum(scale_grad, plan.lanes, row_scratch + (turn ^= kThreads / kWarp));
    if (lane != 0 || row >= args.rows) continue;
    if (plan.splits > 1) {
      C* partials = static_cast<C*>(args.workspace.scratch);
      partials[item] = sum;
      if (scale_grads) partials[plan.items + item] = scale_grad;
    } else {
      loss += finish_row<L, N == kWeighted>(args, row, sum, scale_grad, same.per_element, beta * kl);
    }
  }
  if (values)
    finish<C>(args, plan, scale_grads, loss, loss_scratch,
              [&](int64_t row, double sum, double scale_grad) {
                return finish_row<L, N == kWeighted>(args, row, sum, scale_grad, same.per_element, beta * kl_of(args, row));
              });
}

// ---------------------------------------------------------------------------------------------------------------------------------

constexpr bool counts(DType type) {
  return type == DType::byte || type == DType::u16 || type == DType::i32 || type == DType::i64;
}

// The number of elements in a wide access if all operands allow one, otherwise 1.
template <class L>
int unit_of(const NllArgs& args) {
  if (args.weights.data) return 1;
  constexpr bool levels = std::is_same_v<L, math::DiscretizedLogistic>;  // levels have a single type
  const int unit = widest<L>(cpu::item_size(args.params[0].type));
  bool wide = (levels || !counts(args.target.type)) && allows(args.target, args.size, unit) && allows(args.values, args.size, unit);
  for (int k = 0; k < kMaxParams; ++k) wide &= allows(args.params[k], args.size, unit) && allows(args.grads[k], args.size, unit);
  return wide ? unit : 1;
}

template <class L>
Plan plan_for(const NllArgs& args) {
  const int unit = unit_of<L>(args);
  return plan_for(args.rows, args.size, unit, unroll(L::params, unit), slots(resident<L>(cpu::item_size(args.params[0].type), unit)));
}

template <class L, class T, class D, int N>
cudaError_t launch_nll(const NllArgs& args, const Plan& plan, cudaStream_t stream) {
  return FASTVAE_LAUNCH((nll_kernel<L, T, D, N>), plan.blocks, stream, args, plan, Runs(args.params[0]));
}

template <class L, class T>
cudaError_t launch_nll(const NllArgs& args, cudaStream_t stream) {
  const Plan plan = plan_for<L>(args);
  constexpr int N = widest<L>(sizeof(T));
  const bool wide = unit_of<L>(args) != 1;
  using Unknown = std::conditional_t<std::is_same_v<L, math::DiscretizedLogistic>, uint8_t, Any>;
  if (args.weights.data) return launch_nll<L, T, Unknown, kWeighted>(args, plan, stream);
  if constexpr (std::is_same_v<L, math::DiscretizedLogistic>) {
    return wide ? launch_nll<L, T, uint8_t, N>(args, plan, stream) : launch_nll<L, T, uint8_t, 1>(args, plan, stream);
  } else {
    if (!wide) return launch_nll<L, T, Any, 1>(args, plan, stream);
    switch (args.target.type) {
      case DType::u8: case DType::boolean: return launch_nll<L, T, Byte, N>(args, plan, stream);
      case DType::f32: return launch_nll<L, T, float, N>(args, plan, stream);
      default: return launch_nll<L, T, T, N>(args, plan, stream);
    }
  }
}

template <class L>
cudaError_t launch_nll(const NllArgs& args, cudaStream_t stream) {
  switch (args.params[0].type) {
    case DType::f32: return launch_nll<L, float>(args, stream);
    case DType::f64: return launch_nll<L, double>(args, stream);
    case DType::f16: return launch_nll<L, Half>(args, stream);
    default: return launch_nll<L, BFloat16>(args, stream);
  }
}

// The list of likelihoods is divided into shares with a file each, so that they compile in parallel. Share i has every kShares-th
// likelihood from the i-th on.
constexpr int kShares = 6;

template <int kShare>
cudaError_t launch_share(const NllArgs& args, cudaStream_t stream) {
  switch (args.element) {
#define FASTVAE_ELEMENT(name, Struct)                                                                    \
  case Element::name:                                                                                    \
    if constexpr (int(Element::name) % kShares == kShare) return launch_nll<math::Struct>(args, stream); \
    break;
#include "../likelihoods.def"
    case Element::none: break;
  }
  return cudaErrorInvalidValue;
}

extern template cudaError_t launch_share<0>(const NllArgs&, cudaStream_t);
extern template cudaError_t launch_share<1>(const NllArgs&, cudaStream_t);
extern template cudaError_t launch_share<2>(const NllArgs&, cudaStream_t);
extern template cudaError_t launch_share<3>(const NllArgs&, cudaStream_t);
extern template cudaError_t launch_share<4>(const NllArgs&, cudaStream_t);
extern template cudaError_t launch_share<5>(const NllArgs&, cudaStream_t);

}  // namespace fastvae::cuda
