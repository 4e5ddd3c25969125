// The likelihoods with independent elements. One pass over a reconstruction computes the nll of each row and, where wanted, the
// gradient.
#include "../math/continuous.h"
#include "../math/counts.h"

#include <ATen/Parallel.h>

#include <cmath>
#include <vector>

#include "staging.h"

namespace fastvae::cpu::FASTVAE_ISA {
namespace {

struct BlockSums {
  double nll, scale_grad, weights = 0;
};

// Whether `element` returns the whole value of an element, to which neither a normaliser nor a logarithm is added later. Only these
// likelihoods return values per element. Their `element` is so long that it is compiled as few times as possible: its loop is not
// unrolled by four, and the pointers decide at run time whether gradients are stored.
template <class L>
constexpr bool kWhole = false;
template <>
constexpr bool kWhole<math::PoissonRate> = true;

// The sum of n elements, where `L::at_ends` gives the values of elements with infinite params.
template <class L, class C>
double at_ends(const C* const (&param)[kMaxParams], const C* target, const Vec<C>* constant, int64_t n) {
  using V = Vec<C>;
  Sum<C> sum;
  for (int64_t i = 0; i < n; i += V::size()) {
    const int64_t lanes = std::min<int64_t>(V::size(), n - i);
    V p[L::params], d[L::params];
    for (int k = 0; k < L::params; ++k) p[k] = load_lanes(param[k] + i, lanes);
    const V t = load_lanes(target + i, lanes);
    math::Log1pSum<V> logs;
    const V value = L::element(p, t, constant, d, logs);
    sum.add_lanes(L::at_ends(p, t, value) + logs.value(), lanes);
  }
  return sum.total();
}

// Computes n elements and returns their sums. grad[k] receives the weighted derivatives by param k unless it is null, and `values` the
// weighted values. If kQuick is set and a log-scale is too low for L::quick, the results are invalid and the first sum is NaN.
template <class L, class C, bool kGrads, bool kQuick>
BlockSums block_as(const C* const (&param)[kMaxParams], const C* target, C* const (&grad)[kMaxParams], C* values,
                const double* constants, double weight, int64_t n) {
  using V = Vec<C>;
  using P = math::Primitives<V>;
  constexpr int64_t W = V::size();
  V constant[L::constants + 1];
  for (int i = 0; i < L::constants; ++i) constant[i] = V(static_cast<C>(constants[i]));
  if constexpr (math::has_scale<L>) constant[0] = V(math::bounded_root(static_cast<C>(constants[0])));
  const V w(static_cast<C>(weight));
  Sum<C> sum, scale_grad;
  // This is the smallest number of Log1pSums that can hold the factors of a block. Each logarithm at the end costs as much as a few
  // elements.
  constexpr int kLogs = sizeof(C) == 8 ? 1 : kBlock / W <= 64 ? 1 : kBlock / W <= 128 ? 2 : 4;
  static_assert(sizeof(C) == 8 || kBlock / W / kLogs + 4 < math::Log1pSum<V>::most);
  math::Log1pSum<V> logs[kLogs];
  V lowest(0);

  const auto step = [&](int64_t i, auto lanes, int slot, math::Log1pSum<V>& logs) FASTVAE_INLINE {
    V p[L::params], d[L::params];
    for (int k = 0; k < L::params; ++k) p[k] = load_lanes(param[k] + i, lanes);
    const V t = load_lanes(target + i, lanes);
    V value;
    if constexpr (kQuick) {
      value = L::quick(p, t, constant, d, lowest);
    } else if constexpr (L::has_scale_grad) {
      V own_scale_grad;
      value = L::element(p, t, constant, d, logs, own_scale_grad);
      scale_grad.add(slot, own_scale_grad);
    } else {
      value = L::element(p, t, constant, d, logs);
    }
    if (kWhole<L> && values) store_lanes(value * w, values + i, lanes);
    if constexpr (kGrads) {
      for (int k = 0; k < L::params; ++k)
        if (grad[k]) store_lanes(d[k] * w, grad[k] + i, lanes);
    }
    return value;
  };

  constexpr auto whole = whole_vector<V>;
  constexpr int64_t kAhead = 2048 / sizeof(C);
  int64_t i = 0;
  for (; !kWhole<L> && i + 4 * W <= n; i += 4 * W) {
    // The arithmetic of a step fills the processor's window. Without the prefetch it would wait for memory after the arithmetic and
    // not during it.
    for (int k = 0; k < L::params; ++k) {
      prefetch(param[k] + i + kAhead, 4 * W * sizeof(C));
      if (kGrads && grad[k]) prefetch(grad[k] + i + kAhead, 4 * W * sizeof(C));
    }
    prefetch(target + i + kAhead, 4 * W * sizeof(C));
    V value[4];
    for (int k = 0; k < 4; ++k) value[k] = step(i + k * W, whole, k, logs[k % kLogs]);
    sum.add(0, (value[0] + value[1]) + (value[2] + value[3]));
  }
  for (; i + W <= n; i += W) sum.add(0, step(i, whole, 0, logs[0]));
  if (i < n) {
    math::Log1pSum<V> rest;
    const V value = step(i, n - i, 0, rest);
    sum.add_lanes(L::has_log1p ? value + rest.value() : value, n - i);
  }
  if constexpr (L::has_log1p) {
    for (int k = 0; k < kLogs; ++k) sum.add(k, logs[k].value());
  }
  double total = sum.total();
  if constexpr (kQuick) {
    if (P::any_less(lowest, V(L::template quick_from<V>))) total = NAN;
  }
  if constexpr (math::has_ends<L, V>) {
    if (std::isnan(total)) total = at_ends<L, C>(param, target, constant, n);
  }
  return {total, L::has_scale_grad ? scale_grad.total() : 0};
}

// The same where every element has a weight, by which values, derivatives and grads are multiplied. As there are so many likelihoods, this
// is compiled only once for each: whether grads are stored is decided at run time. With `at_ends`, elements with infinite params have the
// values that L::at_ends gives.
template <class L, class C>
BlockSums weighted_block(const C* const (&param)[kMaxParams], const C* target, const C* weights, C* const (&grad)[kMaxParams], C* values,
                         const double* constants, double weight, int64_t n, bool at_ends = false) {
  using V = Vec<C>;
  using P = math::Primitives<V>;
  constexpr int64_t W = V::size();
  V constant[L::constants + 1];
  for (int i = 0; i < L::constants; ++i) constant[i] = V(static_cast<C>(constants[i]));
  if constexpr (math::has_scale<L>) constant[0] = V(math::bounded_root(static_cast<C>(constants[0])));
  const V w(static_cast<C>(weight));
  Sum<C> sum, scale_grad, weight_sum;
  // The logarithms of elements with the weight 1 can be added up before they are computed. Others need one for each vector.
  math::Log1pSum<V> masked[4];
  bool is_mask = L::has_log1p;
  for (int64_t i = 0; is_mask && i < n; i += W) {
    const V own = load_lanes(weights + i, std::min(W, n - i));
    is_mask = !P::any_less(V(0), P::abs(own * own - own));
  }
  const auto step = [&](int64_t i, int64_t lanes, int slot) FASTVAE_INLINE {
    V p[L::params], d[L::params];
    for (int k = 0; k < L::params; ++k) p[k] = load_lanes(param[k] + i, lanes);
    const V t = load_lanes(target + i, lanes), own = load_lanes(weights + i, lanes);
    math::Log1pSum<V> logs;
    V value;
    if constexpr (L::has_scale_grad) {
      V own_scale_grad;
      value = L::element(p, t, constant, d, logs, own_scale_grad);
      scale_grad.add(slot, weighted<C>(own_scale_grad, own));
    } else {
      value = L::element(p, t, constant, d, logs);
    }
    if constexpr (math::has_ends<L, V>) {
      if (at_ends) value = L::at_ends(p, t, value);
    }
    if constexpr (L::has_log1p) {
      if (is_mask) {
        const V e = weighted<C>(logs.excess, own);
        masked[slot].add(e, V(1) + e);
      } else {
        value = value + P::log1p_parts(logs.excess).value;  // logs.value() takes several times as many instructions
      }
    }
    value = weighted<C>(value, own);
    if (kWhole<L> && values) store_lanes(value * w, values + i, lanes);
    for (int k = 0; k < L::params; ++k)
      if (grad[k]) store_lanes(weighted<C>(d[k], own) * w, grad[k] + i, lanes);
    // Lanes beyond the end have the weight 0.
    sum.add(slot, value);
    weight_sum.add(slot, own);
  };
  constexpr int64_t kAhead = 2048 / sizeof(C);
  for (int64_t i = 0; i < n; i += W) {
    for (int k = 0; k < L::params; ++k) {
      prefetch(param[k] + i + kAhead, W * sizeof(C));
      if (grad[k]) prefetch(grad[k] + i + kAhead, W * sizeof(C));
    }
    prefetch(target + i + kAhead, W * sizeof(C));
    step(i, std::min(W, n - i), i / W % 4);
  }
  for (int k = 0; L::has_log1p && k < 4; ++k) sum.add(k, masked[k].value());
  const double total = sum.total();
  if constexpr (math::has_ends<L, V>) {
    if (!at_ends && std::isnan(total)) return weighted_block<L, C>(param, target, weights, grad, values, constants, weight, n, true);
  }
  return {total, L::has_scale_grad ? scale_grad.total() : 0, weight_sum.total()};
}

template <class L, class C, bool kGrads>
BlockSums block(const C* const (&param)[kMaxParams], const C* target, C* const (&grad)[kMaxParams], C* values,
                const double* constants, double weight, int64_t n) {
  if constexpr (math::has_quick<L, Vec<C>>) {
    const BlockSums sums = block_as<L, C, kGrads, true>(param, target, grad, values, constants, weight, n);
    if (!std::isnan(sums.nll)) return sums;
  }
  return block_as<L, C, kGrads, false>(param, target, grad, values, constants, weight, n);
}

template <class L, class C>
void run(const NllArgs& args) {
  const int64_t blocks = (args.size + kBlock - 1) / kBlock, tasks = args.rows * blocks;
  bool wanted = false;
  for (int k = 0; k < L::params; ++k) wanted |= args.grads[k].data != nullptr;
  std::vector<double> partial(blocks > 1 ? tasks : 0);
  double* sums = blocks > 1 ? partial.data() : args.row_nll;
  const bool has_scale_grad = L::has_scale_grad && args.row_scale_grad;
  std::vector<double> partial_scale_grad(has_scale_grad && blocks > 1 ? tasks : 0);
  double* scale_grads = blocks > 1 ? partial_scale_grad.data() : args.row_scale_grad;
  std::vector<double> partial_weights(args.row_weights && blocks > 1 ? tasks : 0);
  double* weight_sums = blocks > 1 ? partial_weights.data() : args.row_weights;

  at::parallel_for(0, tasks, grain(std::min(args.size, kBlock)), [&](int64_t first, int64_t last) {
    Buffer<C> param_buffer[L::params], target_buffer, weight_buffer, grad_buffer[L::params], value_buffer;
    for (int64_t task = first; task < last; ++task) {
      const int64_t row = task / blocks, begin = task % blocks * kBlock, n = std::min(kBlock, args.size - begin);
      const C* param[kMaxParams] = {};
      C* grad[kMaxParams] = {};
      for (int k = 0; k < L::params; ++k) {
        param[k] = load(args.params[k], row, begin, n, args.size, param_buffer[k]);
        grad[k] = destination(args.grads[k], row, begin, args.size, grad_buffer[k]);
      }
      const C* target = load(args.target, target_row(args, row), begin, n, args.size, target_buffer);
      C* values = kWhole<L> ? destination(args.values, row, begin, args.size, value_buffer) : nullptr;
      const double weight = args.weight[row * args.weight_stride];
      BlockSums of_block;
      if (const C* weights = load(args.weights, target_row(args, row), begin, n, weight_buffer))
        of_block = weighted_block<L, C>(param, target, weights, grad, values, args.constants, weight, n);
      else if (wanted || kWhole<L>) of_block = block<L, C, true>(param, target, grad, values, args.constants, weight, n);
      else of_block = block<L, C, kWhole<L>>(param, target, grad, values, args.constants, weight, n);
      sums[task] = of_block.nll;
      if (args.row_weights) weight_sums[task] = of_block.weights;
      if (has_scale_grad) scale_grads[task] = of_block.scale_grad;
      for (int k = 0; k < L::params; ++k) store(args.grads[k], row, begin, n, args.size, grad_buffer[k]);
      if (kWhole<L>) store(args.values, row, begin, n, args.size, value_buffer);
    }
  });

  if (blocks == 1) return;
  const auto add_up = [&](const double* of_blocks, double* of_rows) {
    for (int64_t row = 0; row < args.rows; ++row) {
      double sum = 0;
      for (int64_t b = 0; b < blocks; ++b) sum += of_blocks[row * blocks + b];
      of_rows[row] = sum;
    }
  };
  add_up(sums, args.row_nll);
  if (has_scale_grad) add_up(scale_grads, args.row_scale_grad);
  if (args.row_weights) add_up(weight_sums, args.row_weights);
}

template <class L, class C>
void run_by_scale(const NllArgs& args) {
  if constexpr (math::has_scale<L> && !L::has_scale_grad) {
    if (std::isinf(static_cast<C>(args.constants[1]))) return run<math::ByRoot<L>, C>(args);
  }
  run<L, C>(args);
}

template <class L>
void run(const NllArgs& args) {
  args.in_double ? run_by_scale<L, double>(args) : run_by_scale<L, float>(args);
}

template <class C>
void scale(const ScaleArgs& args) {
  const int64_t blocks = (args.size + kBlock - 1) / kBlock;
  at::parallel_for(0, args.rows * blocks, grain(std::min(args.size, kBlock)), [&](int64_t first, int64_t last) {
    Buffer<C> in_buffer, out_buffer;
    for (int64_t task = first; task < last; ++task) {
      const int64_t row = task / blocks, begin = task % blocks * kBlock, n = std::min(kBlock, args.size - begin);
      const C* in = load(args.in, row, begin, n, args.size, in_buffer);
      C* out = destination(args.out, row, begin, args.size, out_buffer);
      const C factor = static_cast<C>(args.factor[row * args.factor_stride]);
      for (int64_t i = 0; i < n; ++i) out[i] = in[i] * factor;
      store(args.out, row, begin, n, args.size, out_buffer);
    }
  });
}

// As in counts.cpp, rows are split into chunks that depend only on their number, and the sums of the chunks are added in order.
template <class C>
void scale_each(const ScaleElementsArgs& args) {
  bool summed = false;
  for (int k = 0; k < args.count; ++k) summed |= args.sums[k] != nullptr;
  const int64_t rows = args.rows, size = args.size, step = summed ? std::max<int64_t>(8, (rows + 31) / 32) : 1;
  const int64_t chunks = (rows + step - 1) / step, blocks = (size + kBlock - 1) / kBlock;
  std::vector<C> partial[kMaxParams];
  for (int k = 0; k < args.count; ++k) partial[k].resize(args.sums[k] ? chunks * size : 0);

  at::parallel_for(0, chunks * blocks, grain(step * std::min(size, kBlock)), [&](int64_t first, int64_t last) {
    Buffer<C> out_buffer;
    for (int64_t task = first; task < last; ++task) {
      const int64_t chunk = task / blocks, begin = task % blocks * kBlock, n = std::min(kBlock, size - begin);
      for (int64_t row = chunk * step; row < std::min(rows, (chunk + 1) * step); ++row) {
        const C* factors = static_cast<const C*>(args.factor) + row * args.factor_stride + (args.factor_per_row ? 0 : begin);
        const C factor = factors[0];
        for (int k = 0; k < args.count; ++k) {
          const C* in = static_cast<const C*>(args.in[k]) + row * size + begin;
          C* out = args.sums[k] ? partial[k].data() + chunk * size + begin : destination(args.out[k], row, begin, size, out_buffer);
          if (args.sums[k]) {
            if (args.factor_per_row)
              for (int64_t i = 0; i < n; ++i) out[i] += factor * in[i];
            else
              for (int64_t i = 0; i < n; ++i) out[i] += factors[i] * in[i];
          } else if (!args.factor_per_row) {
            for (int64_t i = 0; i < n; ++i) out[i] = factors[i] * in[i];
          } else if (factor != 1 || in != out) {
            for (int64_t i = 0; i < n; ++i) out[i] = factor * in[i];
          }
          store(args.out[k], row, begin, n, size, out_buffer);
        }
      }
    }
  });

  for (int k = 0; k < args.count; ++k) {
    if (!args.sums[k]) continue;
    at::parallel_for(0, size, kGrain, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        double sum = 0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += partial[k][chunk * size + i];
        args.sums[k][i] = sum;
      }
    });
  }
}

}  // namespace

void nll(const NllArgs& args) {
  switch (args.element) {
#define FASTVAE_ELEMENT(name, Struct) \
  case Element::name: return run<math::Struct>(args);
#define FASTVAE_CUDA_ELEMENT(name, Struct) \
  case Element::name: return;
#include "../likelihoods.def"
    case Element::none: return;  // these variants have a loop of their own
  }
}

void scale_rows(const ScaleArgs& args) {
  args.in.type == DType::f64 ? scale<double>(args) : scale<float>(args);
}

void scale_elements(const ScaleElementsArgs& args) { args.in_double ? scale_each<double>(args) : scale_each<float>(args); }

}  // namespace fastvae::cpu::FASTVAE_ISA
