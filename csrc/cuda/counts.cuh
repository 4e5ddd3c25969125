// Negative binomial counts. One launch computes the nll of each row, the loss and, where wanted, the gradients, and reads each input from
// memory once (the softmax and its gradient read the logits again from the cache).
//
// Sums over a row, and over all rows, are needed before other blocks can go on. So the work is a list of items in three phases, which
// blocks take in order with a counter:
//   1. if raw, a row: the sum of its softmax
//   2. a group of rows in a segment of kSegment features: nll and derivatives of every element
//   3. what needs sums over rows or over segments: the nll of rows and the loss, the gradient of a shared dispersion, and the logits'
// A block whose item is of a later phase waits until all items of the phases before it are done. They have all been taken, by blocks that
// are running, so it needs no block to start and cannot wait for ever.
//
// In phase 2, a warp computes a segment of one row. Most counts are zeros, and it first computes all elements as zeros, in the compute
// type. It lists the others, which then occupy its lanes one after the other: small whole counts are computed in the compute type, and
// the rest, whose terms cancel, in fp64.
#pragma once
#include "count_segments.cuh"
#include "rows.cuh"
#include "softmax.cuh"

namespace fastvae::cuda {

constexpr int kLong = 4;  // segments of an item of phase 3

template <class T>
constexpr int count_resident() {
  return sizeof(T) == 8 ? 1 : 2;
}

// What phase 1 finds about a row: the largest logit, the sum of exp(logit - top), and what turns logits into means and their logarithms.
template <class C>
struct alignas(16) RowSoftmax {
  double log_offset;  // log library - top - log sum
  C top, sum, scale;  // scale: library / sum, or its binary logarithm in fp32
};

struct CountPlan {
  int64_t groups, segments;  // of phase 2
  int rows_each;             // of a group
  int64_t parts;                        // of a row, for the logits in phase 3
  uint32_t first, second, items;        // items before the second and the third phase, and all
  uint32_t rows, features;              // items of phase 3 that finish rows and the shared dispersion's gradient; the others are for logits
  int64_t of_rows, of_softmax, of_features, bytes;  // offsets in the scratch
  int blocks;
  bool wide;
  bool whole;    // whether `wide` and all gradients, but no values of elements, are wanted: the segments of a training step
  bool uniform;  // whether all rows have the weight args.weight; then it multiplies the sums over rows, not every element
};

// ---------------------------------------------------------------------------------------------------------------------------------
// The phases
// ---------------------------------------------------------------------------------------------------------------------------------

// The sum of `a` to the lanes of the first half of a warp, and that of `b` to those of the second.
template <class C>
FASTVAE_DEVICE C warp_sum_of_two(C a, C b) {
  const bool second = threadIdx.x & kWarp / 2;
  const C other = __shfl_xor_sync(0xffffffff, second ? a : b, kWarp / 2);
  return group_sum((second ? b : a) + other, kWarp / 2, static_cast<C*>(nullptr));
}

// What the blocks leave each other.
template <class C>
struct CountScratch {
  // Of each row and segment: the nll; if raw, then of all again the derivatives by log means; those at an empty library; and with weights,
  // whether there is one that is not 0.
  double* totals;
  double* losses;  // of each item that finishes rows
  RowSoftmax<C>* softmax;
  C* features;  // of each group and feature: the derivative by the shared dispersion

  FASTVAE_DEVICE CountScratch(const CountArgs& args, const CountPlan& plan) {
    char* bytes = computed_here(static_cast<char*>(args.workspace.scratch));
    totals = reinterpret_cast<double*>(bytes);
    losses = reinterpret_cast<double*>(bytes + plan.of_rows);
    softmax = reinterpret_cast<RowSoftmax<C>*>(bytes + plan.of_softmax);
    features = reinterpret_cast<C*>(bytes + plan.of_features);
  }
};

// Phase 1.
template <class T, class C>
FASTVAE_DEVICE void softmax_of_row(const CountArgs& args, const CountPlan& plan, int64_t row, RowSoftmax<C>* out, C* scratch) {
  using P = math::Primitives<C>;
  constexpr int kUnroll = sizeof(T) == 8 ? 2 : 4;
  const T* logits = computed_here(static_cast<const T*>(args.params[0].data)) + row * args.params[0].row_stride;
  Scaled<C> mine;
  for (int64_t i = int64_t(threadIdx.x) * kQuad; i < args.size; i += int64_t(kThreads) * kQuad * kUnroll) {
    C x[kUnroll][kQuad], top = mine.top;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t at = i + int64_t(u) * kThreads * kQuad, left = args.size - at;
      load_quad(logits + at, Some{plan.wide, static_cast<int>(left < 0 ? 0 : left < kQuad ? left : kQuad)}, C(-INFINITY), x[u]);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
#pragma unroll
      for (int j = 0; j < kQuad; ++j) top = top < x[u][j] ? x[u][j] : top;
    C more(0);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
#pragma unroll
      for (int j = 0; j < kQuad; ++j) more += P::exp_bounded(x[u][j] - top);
    mine.sum = P::fma(mine.sum, P::exp(mine.top - top), more);
    mine.top = top;
  }
  mine = group_total(mine, kThreads, scratch);
  if (threadIdx.x != 0) return;
  const double library = number_of_any(args.library, row), sum = mine.sum, scale = library / sum;
  constexpr double most = math::largest<C>();
  C bounded = static_cast<C>(scale < most ? scale : scale == scale ? most : scale);
  if constexpr (sizeof(C) == 4) bounded = log2f(bounded);
  *out = {::log(library) - static_cast<double>(mine.top) - ::log(sum), mine.top, mine.sum, bounded};
}

// The shared memory of phase 2.
template <class C>
struct CountShared {
  Quad<C>*theta, *inverse;  // see dispersion_of_zeros; of each feature of the segment, if all rows share the dispersion
  Quad<C>* sums;            // of each warp and feature: the derivative by the shared dispersion
  uint8_t* list;            // of each warp: the features of the segment whose count is not zero
  uint32_t* bits;           // the same as bits, for a sparse target
};

// Where a lane writes its quads of a whole segment. In a training step, all gradients have the type of the params.
template <class T, class C, bool kRaw>
struct WholeResults {
  std::conditional_t<kRaw, C, T>* d_mean = nullptr;
  T *d_theta = nullptr, *d_pi = nullptr;

  FASTVAE_DEVICE WholeResults() {}
  FASTVAE_DEVICE WholeResults(const CountArgs& args, int64_t at) {
    d_mean = computed_here(static_cast<std::conditional_t<kRaw, C, T>*>((kRaw ? args.log_mean_grads : args.grads[0]).data) + at);
    if (!args.shared_dispersion) d_theta = computed_here(static_cast<T*>(args.grads[1].data) + at);
    if (args.params[2].data) d_pi = computed_here(static_cast<T*>(args.grads[2].data) + at);
  }
};
template <class S, class C>
FASTVAE_DEVICE void store_whole(S* p, const C (&x)[kQuad]) {
  Pack<S, kQuad> pack;
  pack.fill(x);
  pack.store(p);
}

// Computes a segment of a row, as the threads of one warp. `some_small` says that a dispersion which all rows share is very small.
template <class T, bool kRaw, bool kInflated, bool kWeighted>
FASTVAE_DEVICE void segment_of_row(const CountArgs& args, const CountPlan& plan, const CountScratch<Compute<T>>& scratch,
                                   const CountShared<Compute<T>>& shared, int64_t row, uint32_t segment, bool some_small) {
  using C = Compute<T>;
  using P = math::Primitives<C>;
  using Grad = To<T, kRaw>;  // only the mean form has values and derivatives per element, in the compute type
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t begin = int64_t(segment) * kSegment, source = cpu::target_row(args, row);
  const int count = static_cast<int>(begin + kSegment < args.size ? kSegment : args.size - begin);
  const bool sparse = args.starts, wants_sums = args.shared_gradient.data;
  uint8_t* list = shared.list + warp * kSegment;
  uint32_t* bits = shared.bits + warp * (kSegment / 32);
  Quad<C>* sums = shared.sums + warp * (kSegment / kQuad);
  C weight = weight_of_row<C>(args, row);

  const T* mean = static_cast<const T*>(args.params[0].data) + row * args.params[0].row_stride + begin;
  const T* dispersion = static_cast<const T*>(args.params[1].data) + row * args.params[1].row_stride + begin;
  const T* zero_logits = static_cast<const T*>(args.params[2].data) + row * args.params[2].row_stride + begin;
  const char* target = static_cast<const char*>(args.target.data);
  if (!sparse) target += (source * args.target.row_stride + begin) * cpu::item_size(args.target.type);
  const int64_t cell = row * args.size + begin;  // in the results

  const auto quad_at = [&](int quad) {
    const int left = count - kQuad * quad;
    return Some{plan.wide, left < 0 ? 0 : left < kQuad ? left : kQuad};
  };
  Stored stored_values;
  C grad(0);
  ZeroSums<C> of_zeros;
  if (sparse) {
    stored_values = Stored(args, source, begin, count, bits);
    if (!stored_values.valid) weight = grad = of_zeros.nll = C(NAN);
  }

  C top(0), scale(0);
  double offset = args.constants[0];
  if constexpr (kRaw) {
    const RowSoftmax<C>* of_row = scratch.softmax + row;
    top = load_written(&of_row->top);
    scale = load_written(&of_row->scale);
    offset = load_written(&of_row->log_offset);
  }

  // The factor of what is summed over rows, which is NaN if the positions are invalid.
  const auto sums_weight = [&] { return plan.uniform && weight == weight ? C(1) : weight; };

  // An element of weight 0 is left out, whatever it contains.
  const auto weight_at = [&](int g) { return kWeighted ? weight_of<C>(args.weights, source, begin + g) : C(1); };
  const auto weighted = [](C x, C own) { return !kWeighted ? x : own == C(0) ? C(0) : x * own; };
  bool any_weight = false;

  uint32_t others = 0;  // bit 4 u + j is set if element j of this lane's quad u has a count that is not zero

  // The segments of a training step, without weights in fp32 or less, take a way that has no tests for single elements. There the largest
  // logit is not subtracted from each logit: if it is small, this costs no digits.
  bool whole = !kWeighted && sizeof(C) == 4 && plan.whole && plan.uniform && count == kSegment && stored_values.valid;
  C shift(0);  // what is to be subtracted
  if constexpr (!kRaw) {
    scale = static_cast<C>(offset);
  } else if constexpr (sizeof(C) == 4) {
    if (fabsf(top) < 16.0f) {
      // Then mu / theta is at most 2^60 / theta, or 2^20 / theta if each element has a dispersion; see kMostExponent. If the library is
      // so small a part of the sum that mu / theta could underflow, the other way computes mu as well.
      whole = whole && scale < (args.shared_dispersion ? 60.0f : 20.0f) && scale > -16.0f && !some_small;
      scale = fmaf(top, -1.44269504f, scale);
    } else {
      whole = false;
      shift = top;
    }
  }
  // With a dispersion of each element, the segments of a training step bound the binary logarithm of library / (sum theta) by this, so
  // that mu / theta is at most kMostRatio for logits below 16. The bound takes effect only for theta < 2^-59 and a mean below 2^20. There
  // the nll of a count of zero has vanished, and so have its derivatives.
  [[maybe_unused]] constexpr float kMostExponent = 102;
  const RowWeight<C> of_row(weight);

  struct Inputs {
    C x[kQuad], pi[kQuad], t[kQuad], theta[kQuad];
  };
  constexpr int kStep = kQuad * kWarp;
  // Bit j is set if element j of quad u has a count that is not zero.
  const auto others_of = [&](int lane, int u, const Inputs& in) {
    if (sparse) {
      const int g = kQuad * (u * kWarp + static_cast<int>(computed_here(uint32_t(lane))));
      return bits[g / 32] >> g % 32 & 15;
    }
    uint32_t is_other = 0;
#pragma unroll
    for (int j = 0; j < kQuad; ++j) is_other |= in.t[j] == C(0) ? 0 : 1u << j;
    return is_other;
  };
  const auto load = [&](const T* lead, const T* logits, const Some& some, Inputs& in) {
    load_quad(lead, some, C(0), in.x);
    if constexpr (kInflated) load_quad(logits, some, C(0), in.pi);
  };
  // Computes quad u as zeros; see others_of for `is_other`. `lane` is a parameter so that the segments of a training step compute no
  // address of the loop below. They have `results` of their own, and know at compile time whether each element has its own dispersion.
  const auto compute = [&](auto is_whole, auto has_own_dispersion, int lane, int u, const Inputs& in, uint32_t is_other,
                           const WholeResults<T, C, kRaw>& results) {
    constexpr bool kWhole = decltype(is_whole)::value, kOwn = decltype(has_own_dispersion)::value;
    const bool shares_dispersion = kWhole ? !kOwn : args.shared_dispersion;
    const int quad = u * kWarp + lane;
    const int64_t at = cell + kQuad * lane + u * kStep;
    const Some some = kWhole ? Some{true, kQuad} : quad_at(quad);
    uint32_t zeros = kWhole ? 15 : (1u << some.n) - 1;  // bit j is set if element j has a count of zero
    [[maybe_unused]] C own[kQuad];
    if constexpr (kWeighted) {
#pragma unroll
      for (int j = 0; j < kQuad; ++j) {
        own[j] = j < some.n ? weight_at(kQuad * quad + j) : C(0);
        if (own[j] == C(0)) zeros &= ~(1u << j);
      }
      any_weight |= zeros != 0;
    }
    if constexpr (kWeighted) is_other &= zeros;
    zeros &= ~is_other;
    if constexpr (!kWhole) others |= is_other << kQuad * u;
    Quad<C> theta, inverse;
    C ratio[kQuad];  // mu / theta
    const auto ratios = [&](bool bounded) {
#pragma unroll
      for (int j = 0; j < kQuad; ++j) {
        if constexpr (!kRaw) ratio[j] = (in.x[j] + scale) * inverse.value[j];
        else if constexpr (sizeof(C) == 8) ratio[j] = P::exp(in.x[j] - top) * scale * inverse.value[j];
        else ratio[j] = math::exp2_approximately(fmaf(kWhole ? in.x[j] : in.x[j] - shift, 1.44269504f, scale + inverse.value[j]));
        // With a mean of 0, the other elements add nothing to any sum.
        ratio[j] = zeros >> j & 1 ? ratio[j] : C(0);
        if (bounded) ratio[j] = kRaw ? P::at_most(ratio[j], kMostRatio<C>) : P::clamp(ratio[j], C(0), kMostRatio<C>);
      }
    };
    if (shares_dispersion) {
      theta = shared.theta[quad];
      inverse = shared.inverse[quad];
      ratios(!kWhole || !kRaw);
    } else if constexpr (kWhole && kRaw) {
      // This bound replaces the lower one on the dispersion and the upper one on the ratio.
#pragma unroll
      for (int j = 0; j < kQuad; ++j) {
        const float binary = 1.44269504f * P::at_most(in.theta[j], math::Bounds<C>::highest_log);
        theta.value[j] = math::exp2_approximately(binary);
        ratio[j] = math::exp2_approximately(fmaf(in.x[j], 1.44269504f, P::at_most(scale - binary, kMostExponent)));
        ratio[j] = zeros >> j & 1 ? ratio[j] : C(0);
      }
    } else {
#pragma unroll
      for (int j = 0; j < kQuad; ++j) dispersion_of_zeros<kRaw>(in.theta[j], theta.value[j], inverse.value[j]);
      ratios(true);
    }
    // The value of each element is needed only if it has a weight or is a result.
    const bool each = kWeighted || (!kWhole && !kRaw && args.values.data);
    ZeroQuad<C> out;
    constexpr C unit = ZeroQuad<C>::template unit<kInflated>;
    zeros_of_quad<kRaw, kInflated>(ratio, theta.value, in.pi, of_row, each, of_zeros, out);
    if constexpr (kRaw && !kWhole && sizeof(C) == 4) {
      // Where mu / theta has underflowed, mu need not have.
#pragma unroll
      for (int j = 0; j < kQuad; ++j) {
        if (!(zeros >> j & 1) || ratio[j] >= 0x1p-100f) continue;
        const C mu = math::exp2_approximately(fmaf(in.x[j] - shift, 1.44269504f, scale));
        out.d_mean[j] = kInflated ? mu * P::divide(out.share[j], theta.value[j]) : mu;
      }
    }
    if constexpr (kWeighted) {
#pragma unroll
      for (int j = 0; j < kQuad; ++j) {
        out.value[j] = weighted(out.value[j], own[j]);
        out.d_mean[j] = weighted(out.d_mean[j], own[j]);
        out.d_theta[j] = weighted(out.d_theta[j], own[j]);
        out.share[j] = own[j] == C(0) ? C(0) : out.share[j];
        out.d_pi[j] = weighted(out.d_pi[j], own[j]);
      }
    }
    if (each) {
#pragma unroll
      for (int j = 0; j < kQuad; ++j) of_zeros.nll += out.value[j];
    }
    if constexpr (kRaw) {
#pragma unroll
      for (int j = 0; j < kQuad; ++j) grad += out.d_mean[j];
      if (kWhole) store_whole(results.d_mean + u * kStep, out.d_mean);
      else if (args.log_mean_grads.data) store_quad<To<C>>(args.log_mean_grads, at, some, out.d_mean);
    } else {
      if (!kWhole && args.values.data) {
#pragma unroll
        for (int j = 0; j < kQuad; ++j) out.value[j] *= weight;
        store_quad<To<C>>(args.values, at, some, out.value);
      }
      if (kWhole) store_whole(results.d_mean + u * kStep, out.d_mean);
      else if (args.grads[0].data) store_quad<Grad>(args.grads[0], at, some, out.d_mean);
    }
    if (kWhole ? !kOwn : wants_sums) {
      Quad<C> so_far = sums[quad];
#pragma unroll
      for (int j = 0; j < kQuad; ++j) {
        const C share = out.share[j] * (kWhole ? unit : sums_weight() * unit);
        so_far.value[j] = P::fma(out.d_theta[j], share, so_far.value[j]);
      }
      sums[quad] = so_far;
    } else if (kWhole || args.grads[1].data) {
#pragma unroll
      for (int j = 0; j < kQuad; ++j) out.d_theta[j] *= out.share[j] * (weight * unit);
      if (kWhole) store_whole(results.d_theta + u * kStep, out.d_theta);
      else store_quad<Grad>(args.grads[1], at, some, out.d_theta);
    }
    if constexpr (kInflated) {
      if (kWhole) store_whole(results.d_pi + u * kStep, out.d_pi);
      else if (args.grads[2].data) store_quad<Grad>(args.grads[2], at, some, out.d_pi);
    }
  };
  if (whole) {
    if constexpr (!kWeighted && sizeof(C) == 4) {
      // All loads come before the first use.
      const Some all{true, kQuad};
      const T *lead = computed_here(mean + kQuad * lane), *logits = kInflated ? computed_here(zero_logits + kQuad * lane) : lead;
      Inputs in[kQuads];
#pragma unroll
      for (int u = 0; u < kQuads; ++u) load(lead + u * kStep, logits + u * kStep, all, in[u]);
      if (!args.shared_dispersion) {
        const T* own = computed_here(dispersion + kQuad * lane);
#pragma unroll
        for (int u = 0; u < kQuads; ++u) load_quad(own + u * kStep, all, C(1), in[u].theta);
      }
      if (!sparse) {
        with_count_type(args.target.type, [&](auto* as) {
          const auto* counts = computed_here(reinterpret_cast<decltype(as)>(target) + kQuad * lane);
#pragma unroll
          for (int u = 0; u < kQuads; ++u) load_quad(counts + u * kStep, all, C(0), in[u].t);
        });
      }
#pragma unroll
      for (int u = 0; u < kQuads; ++u) others |= others_of(lane, u, in[u]) << kQuad * u;
      const WholeResults<T, C, kRaw> results(args, cell + kQuad * lane);
      if (args.shared_dispersion) {
#pragma unroll
        for (int u = 0; u < kQuads; ++u) compute(std::true_type(), std::false_type(), lane, u, in[u], others >> kQuad * u, results);
      } else {
#pragma unroll
        for (int u = 0; u < kQuads; ++u) compute(std::true_type(), std::true_type(), lane, u, in[u], others >> kQuad * u, results);
      }
    }
  } else {
    const int here = static_cast<int>(computed_here(uint32_t(lane)));
#pragma unroll 1
    for (int u = 0; u < kQuads; ++u) {
      const int g = kQuad * (u * kWarp + here);
      const Some some = quad_at(u * kWarp + here);
      Inputs in;
      load(mean + g, zero_logits + g, some, in);
      if (!args.shared_dispersion) load_quad(dispersion + g, some, C(1), in.theta);
      if (!sparse)
        with_count_type(args.target.type, [&](auto* as) { load_quad(reinterpret_cast<decltype(as)>(target) + g, some, C(0), in.t); });
      compute(std::false_type(), std::false_type(), here, u, in, others_of(here, u, in), {});
    }
  }
  C sum = of_zeros.nll;
  if constexpr (kInflated && !kWeighted) sum += P::log1p_parts(of_zeros.odds).value;

  // List the others.
  int listed = static_cast<int>(stored_values.last - stored_values.first);
  if (!sparse) listed = list_others(others, list);
  __syncwarp();  // also orders the stores above before those below, by other lanes

  const auto read = [&](int g, C t) {
    Positive<C> in;
    in.t = t;
    in.lead = static_cast<C>(load_one(mean + g));
    if (args.shared_dispersion) in.dispersion = load_shared<T>(args.params[1], begin + g);
    else in.dispersion = static_cast<C>(load_one(dispersion + g));
    in.pi = kInflated ? static_cast<C>(load_one(zero_logits + g)) : C(0);
    return in;
  };
  const auto write = [&](int g, C value, C d_mean, C d_theta, C d_pi) {
    if constexpr (kWeighted) {
      const C own = weight_at(g);
      value = weighted(value, own), d_mean = weighted(d_mean, own), d_theta = weighted(d_theta, own), d_pi = weighted(d_pi, own);
    }
    sum += value;
    if constexpr (kRaw) {
      grad += d_mean;
      if (args.log_mean_grads.data) store_one<To<C>>(args.log_mean_grads, cell + g, d_mean);
    } else {
      if (args.values.data) store_one<To<C>>(args.values, cell + g, value * weight);
      if (args.grads[0].data) store_one<Grad>(args.grads[0], cell + g, d_mean * weight);
    }
    if (wants_sums) flat(sums)[g] += d_theta * sums_weight();
    else if (args.grads[1].data) store_one<Grad>(args.grads[1], cell + g, d_theta * weight);
    if (kInflated && args.grads[2].data) store_one<Grad>(args.grads[2], cell + g, d_pi * weight);
  };
  // Entry i of the list, and its count.
  const auto feature = [&](int i, C& t) {
    if (!sparse) {
      t = load_count<C>(target, args.target.type, list[i]);
      return int(list[i]);
    }
    const int64_t at = stored_values.first + i;
    t = load_count<C>(target, args.target.type, at);
    return static_cast<int>(args.columns[at] - begin);
  };

  int rest = listed;
  if constexpr (sizeof(C) == 4) {
    rest = 0;  // entries that are left for fp64 move to the front of the list
#pragma unroll 1
    for (int base = 0; base < listed; base += kWarp) {
      const int i = base + lane;
      bool left = false;
      int entry = 0;
      if (i < listed) {
        C t;
        const int g = feature(i, t);
        entry = sparse ? i : g;
        if (t != C(0) && weight_at(g) != C(0)) {
          const auto in = read(g, t);
          math::CountTerm<float> term;
          left = !small_count<kRaw>(in, offset, term);
          if (!left) {
            if constexpr (kInflated) math::without_additional_zero(term, in.pi);
            write(g, term.value, term.d_mu, term.d_theta, term.d_pi);
          }
        }
      }
      const uint32_t all = __ballot_sync(0xffffffff, left);
      __syncwarp();
      if (left) list[rest + __popc(all & ((1u << lane) - 1))] = static_cast<uint8_t>(entry);
      rest += __popc(all);
      __syncwarp();
    }
  }
#pragma unroll 1
  for (int i = lane; i < rest; i += kWarp) {
    C t;
    int g;
    if (sparse) g = feature(sizeof(C) == 4 ? list[i] : i, t);
    else g = feature(i, t);
    if (t == C(0) || weight_at(g) == C(0)) continue;
    const auto in = read(g, t);
    auto term = any_count<kRaw>(Positive<double>{in.t, in.lead, in.dispersion, in.pi}, offset);
    if constexpr (kInflated) math::without_additional_zero(term, static_cast<double>(in.pi));
    write(g, static_cast<C>(term.value), static_cast<C>(term.d_mu), static_cast<C>(term.d_theta), static_cast<C>(term.d_pi));
  }

  const int64_t at = row * plan.segments + segment, cells = args.rows * plan.segments;
  if constexpr (kRaw) {
    sum = warp_sum_of_two(sum, grad);
    if (lane % (kWarp / 2) == 0) scratch.totals[lane ? cells + at : at] = static_cast<double>(sum);
    if (args.library_gradient.data && number_of_any(args.library, row) == 0) {
      // With a library of 0, all means are 0. As it grows, each mean grows by its feature's share of it, and the nll of a count of zero by
      // the same amount, unless it is an additional zero.
      C shares(0);
#pragma unroll 1
      for (int g = lane; g < count; g += kWarp) {
        C share = P::exp_bounded(static_cast<C>(load_one(mean + g)) - top);
        if constexpr (kInflated) share /= C(1) + P::exp(static_cast<C>(load_one(zero_logits + g)));
        shares += weighted(share, weight_at(g));
      }
      shares = warp_sum(shares);
      if (lane == 0) scratch.totals[2 * cells + at] = static_cast<double>(shares);
    }
    if constexpr (kWeighted) {
      any_weight = __ballot_sync(0xffffffff, any_weight);
      if (lane == 0) scratch.totals[3 * cells + at] = any_weight;
    }
  } else {
    sum = warp_sum(sum);
    if (lane == 0) scratch.totals[at] = static_cast<double>(sum);
  }
}

// Sums what the segments of a row have left, as the threads of one warp, and returns the sum to all of them.
FASTVAE_DEVICE double total_of_row(const double* totals, int64_t row, int64_t segments) {
  double sum = 0;
#pragma unroll 4
  for (int i = static_cast<int>(computed_here(threadIdx.x) % kWarp); i < static_cast<int>(segments); i += kWarp) sum += load_written(totals + row * segments + i);
  return warp_sum(sum);
}

// Whether an element of a row has a weight that is not 0. Otherwise the row has no nll and no gradient, whatever its logits and its library
// are. All threads of a warp call it.
template <class C, bool kWeighted>
FASTVAE_DEVICE bool has_weight(const CountArgs& args, const CountPlan& plan, const CountScratch<C>& scratch, int64_t row) {
  if (!kWeighted || !args.raw) return true;
  return total_of_row(scratch.totals + 3 * args.rows * plan.segments, row, plan.segments) != 0;
}

// Phase 3, for kWarps rows. Returns their part of the loss to the first thread.
template <class C, bool kWeighted>
FASTVAE_DEVICE double finish_rows(const CountArgs& args, const CountPlan& plan, const CountScratch<C>& scratch, int64_t item, double* of_warps) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t row = item * kWarps + warp, cells = args.rows * plan.segments;
  double loss = 0;
  if (row < args.rows) {
    double nll = total_of_row(scratch.totals, row, plan.segments);
    const bool counts = has_weight<C, kWeighted>(args, plan, scratch, row);
    const double library = args.raw && counts ? number_of_any(args.library, row) : 1;
    const auto is_infinite = [](double x) { return fabs(x) > math::largest<double>(); };
    if (is_infinite(library)) nll += fabs(library);
    if (args.loss.data && lane == 0) loss = put_row(args, row, nll, beta_of(args) * kl_of(args, row));
    if (args.library_gradient.data) {
      // If a row with a library of 0 has a count above zero, its nll and the derivative are infinite.
      const bool empty = library == 0 && !is_infinite(nll);
      double sum = total_of_row(scratch.totals + (empty ? 2 : 1) * cells, row, plan.segments);
      sum /= empty ? static_cast<double>(load_written(&scratch.softmax[row].sum)) : library;
      if (lane == 0) put_any(args.library_gradient, row, counts ? static_cast<double>(weight_of_row<C>(args, row)) * sum : 0);
    }
  }
  if (lane == 0) of_warps[warp] = loss;
  __syncthreads();
  for (int i = 1; threadIdx.x == 0 && i < kWarps; ++i) loss += of_warps[i];
  return loss;
}

// Phase 3, for kThreads features.
template <class C>
FASTVAE_DEVICE void finish_features(const CountArgs& args, const CountPlan& plan, const CountScratch<C>& scratch, int64_t item) {
  const int64_t feature = item * kThreads + threadIdx.x;
  if (feature >= args.size) return;
  double sum = 0;
#pragma unroll 8
  for (int64_t i = 0; i < plan.groups; ++i) sum += static_cast<double>(load_written(scratch.features + i * args.size + feature));
  put_any(args.shared_gradient, feature, sum);
}

// Phase 3, for kLong segments of kWarps rows: the derivative by a logit is the derivative by the logarithm of its mean, less its share
// of the sum of these over all features.
template <class T, bool kWeighted, class C>
FASTVAE_DEVICE void through_softmax(const CountArgs& args, const CountPlan& plan, const CountScratch<C>& scratch, int64_t item) {
  using P = math::Primitives<C>;
  const int lane = threadIdx.x % kWarp;
  const int64_t group = item / plan.parts, begin = (item - group * plan.parts) * (kLong * kSegment);
  const int64_t row = group * kWarps + threadIdx.x / kWarp;
  if (row >= args.rows) return;
  const RowSoftmax<C>* of_row = scratch.softmax + row;
  const C top = load_written(&of_row->top), weight = weight_of_row<C>(args, row);
  const double total = total_of_row(scratch.totals + args.rows * plan.segments, row, plan.segments);
  const C factor = static_cast<C>(total / static_cast<double>(load_written(&of_row->sum)));
  const bool counts = has_weight<C, kWeighted>(args, plan, scratch, row);
  const T* logits = computed_here(static_cast<const T*>(args.params[0].data)) + row * args.params[0].row_stride;
  const C* in = static_cast<const C*>(args.log_mean_grads.data) + row * args.size;
#pragma unroll 1
  for (int64_t base = begin; base < begin + kLong * kSegment && base < args.size; base += kSegment) {
    C x[kQuads][kQuad], d[kQuads][kQuad];
    Some some[kQuads];
#pragma unroll
    for (int u = 0; u < kQuads; ++u) {
      const int64_t i = base + kQuad * (u * kWarp + lane), left = args.size - i;
      some[u] = {plan.wide, static_cast<int>(left < 0 ? 0 : left < kQuad ? left : kQuad)};
      load_quad(logits + i, some[u], C(0), x[u]);
#pragma unroll
      for (int j = 0; j < kQuad; ++j) d[u][j] = C(0);
      if (some[u].wide && some[u].n) {
        Pack<C, kQuad> pack;
        pack.load_written(in + i);
#pragma unroll
        for (int j = 0; j < kQuad; ++j) d[u][j] = pack.value[j];
      } else {
#pragma unroll
        for (int j = 0; j < kQuad; ++j)
          if (j < some[u].n) d[u][j] = load_written(in + i + j);
      }
    }
#pragma unroll
    for (int u = 0; u < kQuads; ++u) {
#pragma unroll
      for (int j = 0; j < kQuad; ++j) d[u][j] = counts ? P::fma(-P::exp_bounded(x[u][j] - top), factor, d[u][j]) * weight : C(0);
      store_quad<To<T, true>>(args.grads[0], row * args.size + base + kQuad * (u * kWarp + lane), some[u], d[u]);
    }
  }
}

template <class T, bool kRaw, bool kInflated, bool kWeighted>
__global__ void __launch_bounds__(kThreads, count_resident<T>())
    count_kernel(const __grid_constant__ CountArgs args, const __grid_constant__ CountPlan plan) {
  using C = Compute<T>;
  FASTVAE_SHARED(Quad<C>, theta, kSegment / kQuad);
  FASTVAE_SHARED(Quad<C>, inverse, kSegment / kQuad);
  FASTVAE_SHARED(Quad<C>, sums, kWarps * kSegment / kQuad);
  FASTVAE_SHARED(uint8_t, list, kWarps * kSegment);
  FASTVAE_SHARED(uint32_t, bits, kWarps * kSegment / 32);
  FASTVAE_SHARED(double, of_warps, kWarps);
  FASTVAE_SHARED(C, softmax_scratch, 2 * kWarps);
  FASTVAE_SHARED(uint32_t, number, 2);
  FASTVAE_SHARED(uint32_t, some_small, 1);
  const CountShared<C> shared{theta, inverse, sums, list, bits};
  uint32_t *taken = args.workspace.counter, *done = args.workspace.counter + 1;

  while (true) {
    if (threadIdx.x == 0) number[0] = take_number(taken, plan.items + gridDim.x - 1), some_small[0] = 0;
    __syncthreads();
    const uint32_t item = number[0];
    if (item >= plan.items) break;
    const CountScratch<C> scratch(args, plan);
    if (item < plan.first) {
      if constexpr (kRaw) softmax_of_row<T>(args, plan, item, scratch.softmax + item, softmax_scratch);
    } else if (item < plan.second) {
      const uint32_t segments = static_cast<uint32_t>(plan.segments), group = (item - plan.first) / segments;
      const uint32_t segment = item - plan.first - group * segments;
      const int64_t begin = int64_t(segment) * kSegment;
      if (args.shared_dispersion) {
#pragma unroll 1
        for (int i = threadIdx.x; i < kSegment; i += kThreads) {
          const C given = begin + i < args.size ? load_shared<T>(args.params[1], begin + i) : C(1);
          dispersion_of_zeros<kRaw>(given, flat(theta)[i], flat(inverse)[i]);
          if (kRaw && !(flat(theta)[i] > 0x1p-60)) atomicOr(some_small, 1u);
        }
#pragma unroll 1
        for (int i = threadIdx.x; i < kWarps * kSegment / kQuad; i += kThreads) sums[i] = Quad<C>{};
      }
      if (kRaw) wait_for(done, plan.first);
      else __syncthreads();
      const int64_t first = int64_t(group) * plan.rows_each;
#pragma unroll 1
      for (int i = threadIdx.x / kWarp; i < plan.rows_each && first + i < args.rows; i += kWarps) {
        segment_of_row<T, kRaw, kInflated, kWeighted>(args, plan, scratch, shared, first + i, segment, some_small[0]);
        __syncwarp();
      }
      if (args.shared_gradient.data) {
        __syncthreads();
#pragma unroll 1
        for (int i = threadIdx.x; i < kSegment && begin + i < args.size; i += kThreads) {
          C sum(0);
          for (int w = 0; w < kWarps; ++w) sum += flat(sums)[w * kSegment + i];
          scratch.features[group * args.size + begin + i] = plan.uniform ? sum * static_cast<C>(args.weight) : sum;
        }
      }
    } else {
      const uint32_t own = item - plan.second;
      wait_for(done, plan.second);
      if (own < plan.rows) {
        const double loss = finish_rows<C, kWeighted>(args, plan, scratch, own, of_warps);
        if (threadIdx.x == 0) scratch.losses[own] = loss;
      } else if (own < plan.rows + plan.features) {
        finish_features(args, plan, scratch, own - plan.rows);
      } else if constexpr (kRaw) {
        through_softmax<T, kWeighted>(args, plan, scratch, own - plan.rows - plan.features);
      }
    }
    __syncthreads();
    if (threadIdx.x == 0) number[1] = take_number(done, plan.items - 1);
    __syncthreads();
    if (number[1] == plan.items - 1 && args.loss.data && args.reduced) {
      const double loss = sum_written(scratch.losses, static_cast<int>(plan.rows), of_warps);
      if (threadIdx.x == 0) put(args.loss, 0, args.weight * loss);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------------------

inline CountPlan count_plan(const CountArgs& args) {
  const int64_t rows = args.rows, size = args.size, item = cpu::item_size(args.params[0].type), in_compute = item == 8 ? 8 : 4;
  const int64_t slots = fastvae::cuda::slots(item == 8 ? count_resident<double>() : count_resident<float>());
  const auto up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  CountPlan plan{};
  plan.segments = up(size, kSegment);
  plan.parts = up(plan.segments, kLong);
  // A group has more than one row for each warp only if there are so many that the device stays busy.
  const int64_t each = std::min<int64_t>(64, up(rows, kWarps) * plan.segments / (16 * slots));
  plan.rows_each = kWarps * static_cast<int>(std::max<int64_t>(1, each));
  plan.groups = up(rows, plan.rows_each);
  const int64_t first = args.raw && plan.segments ? rows : 0, second = first + plan.groups * plan.segments;
  const int64_t finished = args.loss.data || args.library_gradient.data ? std::max<int64_t>(1, up(rows, kWarps)) : 0;
  const int64_t features = args.shared_gradient.data ? up(size, kThreads) : 0;
  const int64_t logits = args.raw && args.grads[0].data ? up(rows, kWarps) * plan.parts : 0;
  plan.first = static_cast<uint32_t>(first);
  plan.second = static_cast<uint32_t>(second);
  plan.rows = static_cast<uint32_t>(finished);
  plan.features = static_cast<uint32_t>(features);
  plan.items = static_cast<uint32_t>(second + finished + features + logits);
  plan.blocks = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(plan.items, slots)));
  plan.wide = allows(args.params[0], size, kQuad) && allows(args.grads[0], size, kQuad) && allows(args.params[2], size, kQuad) &&
              allows(args.grads[1], size, kQuad) && allows(args.grads[2], size, kQuad) && allows(args.values, size, kQuad) &&
              allows(args.log_mean_grads, size, kQuad) && (args.shared_dispersion || allows(args.params[1], size, kQuad)) &&
              (args.starts || allows(args.target, size, kQuad));
  plan.uniform = !args.grad_loss.data && !args.grad_nll.data;
  plan.whole = plan.wide && (args.raw ? args.log_mean_grads : args.grads[0]).data && !args.values.data &&
               (args.shared_dispersion ? args.shared_gradient.data : args.grads[1].data) && (!args.params[2].data || args.grads[2].data);
  for (const Result& grad : args.grads) plan.whole = plan.whole && (!grad.data || grad.type == args.params[0].type);
  const auto room = [&](int64_t bytes) {
    const int64_t at = plan.bytes;
    plan.bytes += up(bytes, 16) * 16;
    return at;
  };
  room((args.raw && args.weights.data ? 4 : args.library_gradient.data ? 3 : args.raw ? 2 : 1) * rows * plan.segments * int64_t(sizeof(double)));
  plan.of_rows = room(finished * int64_t(sizeof(double)));
  plan.of_softmax = room(first * int64_t(in_compute == 8 ? sizeof(RowSoftmax<double>) : sizeof(RowSoftmax<float>)));
  plan.of_features = room(features ? plan.groups * size * in_compute : 0);
  plan.bytes = std::max<int64_t>(plan.bytes, 16);  // the counters are needed in any case
  return plan;
}

template <class T, bool kWeighted>
cudaError_t launch_counts(const CountArgs& args, cudaStream_t stream) {
  const CountPlan plan = count_plan(args);
  const bool inflated = args.params[2].data;
  if (args.raw && inflated) return FASTVAE_LAUNCH((count_kernel<T, true, true, kWeighted>), plan.blocks, stream, args, plan);
  if (args.raw) return FASTVAE_LAUNCH((count_kernel<T, true, false, kWeighted>), plan.blocks, stream, args, plan);
  if (inflated) return FASTVAE_LAUNCH((count_kernel<T, false, true, kWeighted>), plan.blocks, stream, args, plan);
  return FASTVAE_LAUNCH((count_kernel<T, false, false, kWeighted>), plan.blocks, stream, args, plan);
}

extern template cudaError_t launch_counts<float, false>(const CountArgs&, cudaStream_t);
extern template cudaError_t launch_counts<float, true>(const CountArgs&, cudaStream_t);
extern template cudaError_t launch_counts<double, false>(const CountArgs&, cudaStream_t);
extern template cudaError_t launch_counts<double, true>(const CountArgs&, cudaStream_t);
extern template cudaError_t launch_counts<Half, false>(const CountArgs&, cudaStream_t);
extern template cudaError_t launch_counts<Half, true>(const CountArgs&, cudaStream_t);
extern template cudaError_t launch_counts<BFloat16, false>(const CountArgs&, cudaStream_t);
extern template cudaError_t launch_counts<BFloat16, true>(const CountArgs&, cudaStream_t);

}  // namespace fastvae::cuda
