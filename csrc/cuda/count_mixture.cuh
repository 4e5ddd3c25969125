// Mixtures of two negative binomials (math/count_mixture.h). One launch computes the nll of each row, the loss and, where wanted, the
// gradients. The work is that of counts.cuh for means: segments of rows, and then what needs sums over them.
//
// All elements are first computed as zeros, in the compute type. Then follow the others: small whole counts in the compute type, and in
// fp64 the rest, and those zeros whose probabilities would underflow (math::is_near).
#pragma once
#include "counts.cuh"
//
#include "../math/count_mixture.h"

namespace fastvae::cuda {

template <class C>
struct MixtureTerm {
  C value, d_mean, d_mean2, d_theta, d_pi;
};

template <class C>
FASTVAE_DEVICE MixtureTerm<C> mixture_term(const math::CountTerm<C>& first, const math::CountTerm<C>& second,
                                           const math::MixedTerm<C>& both) {
  const C d_theta = math::Primitives<C>::fma(both.share1, first.d_theta, both.share2 * second.d_theta);
  return {both.value, both.share1 * first.d_mu, both.share2 * second.d_mu, d_theta, both.d_pi};
}

// An element as it is read; `eps` is to be added to its means.
template <class C>
struct MixtureElement {
  C t, mean, mean2, theta, pi;
};

// Computes a whole count below 8 in fp32, unless the dispersion or a mean is so extreme that the probabilities would not be accurate.
// Returns whether it has.
FASTVAE_DEVICE bool small_count_of_mixture(const MixtureElement<float>& in, double eps, MixtureTerm<float>& out) {
  constexpr float kLeast = 0x1p-6f, kMost = 0x1p6f;  // between them, no term of the nll is so large that its rounding would matter
  math::CountTerm<float> first{}, second{};
  const float mean = in.mean + static_cast<float>(eps), mean2 = in.mean2 + static_cast<float>(eps);
  if (!(mean > kLeast && mean < kMost && mean2 > kLeast && mean2 < kMost)) return false;
  if (!small_count<false>({in.t, mean, in.theta, 0.0f}, 0.0, first)) return false;
  if (!small_count<false>({in.t, mean2, in.theta, 0.0f}, 0.0, second)) return false;
  if (math::is_near(first.value, second.value, in.pi) == 0) return false;
  out = mixture_term(first, second, math::mixed_near(first.value, second.value, in.pi));
  return true;
}

FASTVAE_DEVICE double within_bounds(double theta) {
  using B = math::Bounds<double>;
  return math::Primitives<double>::clamp(theta, B::lowest, B::highest);
}

// Any count above zero, in fp64. The components share the instructions, and each converts what it needs: to keep it for the other one
// would take registers.
template <class C>
FASTVAE_DEVICE MixtureTerm<double> any_count_of_mixture(const MixtureElement<C>& in, double eps) {
  math::CountTerm<double> first{}, second{};
#pragma unroll 1
  for (int component = 0; component < 2; ++component) {
    const double t = computed_here(static_cast<double>(in.t)), theta = computed_here(static_cast<double>(in.theta));
    const auto term = any_count<false>({t, static_cast<double>(component ? in.mean2 : in.mean), within_bounds(theta), 0.0}, eps);
    if (component) second = term;
    else first = term;
  }
  const double pi = in.pi;
  auto out = mixture_term(first, second, math::mixed(first.value, second.value, pi));
  if (in.mean + eps == 0) out.d_mean = math::slope_at_mean_0(out.value, 1 / (1 + ::exp(-pi)), in.t);
  if (in.mean2 + eps == 0) out.d_mean2 = math::slope_at_mean_0(out.value, 1 / (1 + ::exp(pi)), in.t);
  out.value += math::below(in.theta, false);
  return out;
}

// Any count of zero, in fp64.
template <class C>
FASTVAE_DEVICE MixtureTerm<double> any_zero_of_mixture(const MixtureElement<C>& in, double eps) {
  const double theta = within_bounds(in.theta), inverse = 1 / theta, pi = in.pi;
  const auto first = math::negative_binomial_zero(in.mean + eps, theta, inverse);
  const auto second = math::negative_binomial_zero(in.mean2 + eps, theta, inverse);
  math::MixedTerm<double> both;
  if (math::is_near(first.value, second.value, pi) != 0) both = math::mixed_near(first.value, second.value, pi);
  else both = math::mixed(first.value, second.value, pi);
  return mixture_term(first, second, both);
}

// Computes a segment of a row, as the threads of one warp.
template <class T, bool kWeighted>
FASTVAE_DEVICE void mixture_segment(const CountArgs& args, const CountPlan& plan, const CountScratch<Compute<T>>& scratch,
                                    const CountShared<Compute<T>>& shared, int64_t row, int64_t segment) {
  using C = Compute<T>;
  using P = math::Primitives<C>;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t begin = segment * kSegment, source = cpu::target_row(args, row);
  const int count = static_cast<int>(begin + kSegment < args.size ? kSegment : args.size - begin);
  const bool sparse = args.starts, wants_sums = args.shared_gradient.data;
  uint8_t* list = shared.list + warp * kSegment;
  uint32_t* bits = shared.bits + warp * (kSegment / 32);
  Quad<C>* sums = shared.sums + warp * (kSegment / kQuad);
  C weight = weight_of_row<C>(args, row);
  const C eps = static_cast<C>(args.constants[0]);

  // Positions are computed where they are needed, because all of them would take more registers than there are.
  const auto param = [&](int i, int g) {
    return static_cast<const T*>(args.params[i].data) + (computed_here(row) * args.params[i].row_stride + (begin + g));
  };
  const auto cell = [&](int g) { return computed_here(row) * args.size + (begin + g); };  // in the results
  const auto count_at = [&](int g) { return computed_here(source) * args.target.row_stride + (begin + g); };
  const char* target = static_cast<const char*>(args.target.data);
  Stored stored;
  if (sparse) {
    stored = Stored(args, source, begin, count, bits);
    if (!stored.valid) weight = C(NAN);
  }

  // An element of weight 0 is left out, whatever it contains.
  const auto weight_at = [&](int g) { return kWeighted ? weight_of<C>(args.weights, source, begin + g) : C(1); };
  const auto weighted = [](MixtureTerm<C> term, C own) {
    if (own == C(0)) return MixtureTerm<C>{};
    return MixtureTerm<C>{term.value * own, term.d_mean * own, term.d_mean2 * own, term.d_theta * own, term.d_pi * own};
  };

  C sum(0);
  // Bit kQuad u + j of these belongs to element j of this lane's quad u.
  uint32_t others = 0;  // whether the count is not zero
  uint32_t far = 0;     // whether it is a zero that the compute type cannot compute
#pragma unroll 1
  for (int u = 0; u < kQuads; ++u) {
    const int quad = u * kWarp + lane, g = kQuad * quad;
    const int left = count - g;
    const Some some{plan.wide, left < 0 ? 0 : left < kQuad ? left : kQuad};
    // All loads come before the first use.
    C mean[kQuad], mean2[kQuad], pi[kQuad], t[kQuad];
    Quad<C> theta, inverse;
    load_quad(param(0, g), some, C(0), mean);
    load_quad(param(kSecondMean, g), some, C(0), mean2);
    load_quad(param(kMixtureLogits, g), some, C(0), pi);
    if (args.shared_dispersion) {
      theta = shared.theta[quad];
      inverse = shared.inverse[quad];
    } else {
      load_quad(param(1, g), some, C(1), theta.value);
    }
    uint32_t zeros = (1u << some.n) - 1;  // bit j is set if element j has a count of zero
    C own[kQuad];
    if constexpr (kWeighted) {
#pragma unroll
      for (int j = 0; j < kQuad; ++j) {
        own[j] = j < some.n ? weight_at(g + j) : C(0);
        if (own[j] == C(0)) zeros &= ~(1u << j);
      }
    }
    if (sparse) {
      zeros &= ~(bits[g / 32] >> g % 32);
    } else {
      with_count_type(args.target.type, [&](auto* as) {
        load_quad(reinterpret_cast<decltype(as)>(target) + count_at(g), some, C(0), t);
      });
      uint32_t is_other = 0;
#pragma unroll
      for (int j = 0; j < kQuad; ++j) is_other |= t[j] == C(0) ? 0 : 1u << j;
      if constexpr (kWeighted) is_other &= zeros;
      zeros &= ~is_other;
      others |= is_other << kQuad * u;
    }
    if (!args.shared_dispersion) {
#pragma unroll
      for (int j = 0; j < kQuad; ++j) dispersion_of_zeros<false, true>(theta.value[j], theta.value[j], inverse.value[j]);
    }
    C value[kQuad], d_mean[kQuad], d_mean2[kQuad], d_theta[kQuad], d_pi[kQuad];
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      const auto first = math::negative_binomial_zero(mean[j] + eps, theta.value[j], inverse.value[j]);
      const auto second = math::negative_binomial_zero(mean2[j] + eps, theta.value[j], inverse.value[j]);
      auto term = mixture_term(first, second, math::mixed_near(first.value, second.value, pi[j]));
      if (zeros >> j & 1 && math::is_near(first.value, second.value, pi[j]) == 0) {
        zeros &= ~(1u << j);
        far |= 1u << (kQuad * u + j);
      }
      if constexpr (kWeighted) term = weighted(term, own[j]);
      // The other elements add nothing to any sum.
      value[j] = zeros >> j & 1 ? term.value : C(0);
      d_theta[j] = zeros >> j & 1 ? term.d_theta : C(0);
      d_mean[j] = term.d_mean, d_mean2[j] = term.d_mean2, d_pi[j] = term.d_pi;
      sum += value[j];
    }
    const auto put = [&](const Result& to, C (&x)[kQuad]) {
      if (!to.data) return;
#pragma unroll
      for (int j = 0; j < kQuad; ++j) x[j] *= weight;
      store_quad<To<T>>(to, cell(g), some, x);
    };
    if (args.values.data) {
#pragma unroll
      for (int j = 0; j < kQuad; ++j) value[j] *= weight;
      store_quad<To<C>>(args.values, cell(g), some, value);
    }
    put(args.grads[0], d_mean);
    put(args.grads[kSecondMean], d_mean2);
    put(args.grads[kMixtureLogits], d_pi);
    if (wants_sums) {
      Quad<C> so_far = sums[quad];
#pragma unroll
      for (int j = 0; j < kQuad; ++j) so_far.value[j] = P::fma(d_theta[j], weight, so_far.value[j]);
      sums[quad] = so_far;
    } else {
      put(args.grads[1], d_theta);
    }
  }

  const auto read = [&](int g, C t) {
    MixtureElement<C> in;
    in.t = t;
    in.mean = static_cast<C>(load_one(param(0, g)));
    in.mean2 = static_cast<C>(load_one(param(kSecondMean, g)));
    in.theta = args.shared_dispersion ? load_shared<T>(args.params[1], begin + g) : static_cast<C>(load_one(param(1, g)));
    in.pi = static_cast<C>(load_one(param(kMixtureLogits, g)));
    return in;
  };
  const auto write = [&](int g, MixtureTerm<C> term) {
    if constexpr (kWeighted) term = weighted(term, weight_at(g));
    sum += term.value;
    if (args.values.data) store_one<To<C>>(args.values, cell(g), term.value * weight);
    if (args.grads[0].data) store_one<To<T>>(args.grads[0], cell(g), term.d_mean * weight);
    if (args.grads[kSecondMean].data) store_one<To<T>>(args.grads[kSecondMean], cell(g), term.d_mean2 * weight);
    if (args.grads[kMixtureLogits].data) store_one<To<T>>(args.grads[kMixtureLogits], cell(g), term.d_pi * weight);
    if (wants_sums) flat(sums)[g] += term.d_theta * weight;
    else if (args.grads[1].data) store_one<To<T>>(args.grads[1], cell(g), term.d_theta * weight);
  };
  const auto write_double = [&](int g, const MixtureTerm<double>& term) {
    write(g, {static_cast<C>(term.value), static_cast<C>(term.d_mean), static_cast<C>(term.d_mean2), static_cast<C>(term.d_theta),
              static_cast<C>(term.d_pi)});
  };
  // Entry i of the list, and its count.
  const auto feature = [&](int i, C& t) {
    if (!sparse) {
      t = load_count<C>(target, args.target.type, count_at(list[i]));
      return int(list[i]);
    }
    const int64_t at = stored.first + i;
    t = load_count<C>(target, args.target.type, at);
    return static_cast<int>(args.columns[at] - begin);
  };

  int listed = static_cast<int>(stored.last - stored.first);
  if (!sparse) listed = __ballot_sync(0xffffffff, others != 0) ? list_others(others, list) : 0;
  __syncwarp();  // also orders the stores above before those below, by other lanes
  int rest = listed;
  if constexpr (sizeof(C) == 4) {
    rest = 0;  // entries that are left for fp64 move to the front of the list
#pragma unroll 1
    for (int base = 0; base < listed; base += kWarp) {
      const int i = base + lane;
      bool is_left = false;
      int entry = 0;
      if (i < listed) {
        C t;
        const int g = feature(i, t);
        entry = sparse ? i : g;
        if (t != C(0) && weight_at(g) != C(0)) {
          MixtureTerm<float> term;
          is_left = !small_count_of_mixture(read(g, t), args.constants[0], term);
          if (!is_left) write(g, term);
        }
      }
      const uint32_t all = __ballot_sync(0xffffffff, is_left);
      __syncwarp();
      if (is_left) list[rest + __popc(all & ((1u << lane) - 1))] = static_cast<uint8_t>(entry);
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
    write_double(g, any_count_of_mixture(read(g, t), args.constants[0]));
  }
  if (__ballot_sync(0xffffffff, far != 0)) {
    const int zeros = list_others(far, list);
    __syncwarp();
#pragma unroll 1
    for (int i = lane; i < zeros; i += kWarp) write_double(list[i], any_zero_of_mixture(read(list[i], C(0)), args.constants[0]));
  }

  if (!stored.valid) sum = C(NAN);
  sum = warp_sum(sum);
  if (lane == 0) scratch.totals[row * plan.segments + segment] = static_cast<double>(sum);
}

template <class T, bool kWeighted>
__global__ void __launch_bounds__(kThreads, count_resident<T>())
    count_mixture_kernel(const __grid_constant__ CountArgs args, const __grid_constant__ CountPlan plan) {
  using C = Compute<T>;
  FASTVAE_SHARED(Quad<C>, theta, kSegment / kQuad);
  FASTVAE_SHARED(Quad<C>, inverse, kSegment / kQuad);
  FASTVAE_SHARED(Quad<C>, sums, kWarps * kSegment / kQuad);
  FASTVAE_SHARED(uint8_t, list, kWarps * kSegment);
  FASTVAE_SHARED(uint32_t, bits, kWarps * kSegment / 32);
  FASTVAE_SHARED(double, of_warps, kWarps);
  FASTVAE_SHARED(uint32_t, number, 2);
  const CountShared<C> shared{theta, inverse, sums, list, bits};
  uint32_t *taken = args.workspace.counter, *done = args.workspace.counter + 1;

  while (true) {
    if (threadIdx.x == 0) number[0] = take_number(taken, plan.items + gridDim.x - 1);
    __syncthreads();
    const uint32_t item = number[0];
    if (item >= plan.items) break;
    const CountScratch<C> scratch(args, plan);
    if (item < plan.second) {
      const int64_t group = item / plan.segments, segment = item - group * plan.segments, begin = segment * kSegment;
      if (args.shared_dispersion) {
#pragma unroll 1
        for (int i = threadIdx.x; i < kSegment; i += kThreads) {
          const C given = begin + i < args.size ? load_shared<T>(args.params[1], begin + i) : C(1);
          dispersion_of_zeros<false, true>(given, flat(theta)[i], flat(inverse)[i]);
        }
#pragma unroll 1
        for (int i = threadIdx.x; i < kWarps * kSegment / kQuad; i += kThreads) sums[i] = Quad<C>{};
      }
      __syncthreads();
      const int64_t first = group * plan.rows_each, last = first + plan.rows_each < args.rows ? first + plan.rows_each : args.rows;
#pragma unroll 1
      for (int64_t row = first + threadIdx.x / kWarp; row < last; row += kWarps) {
        mixture_segment<T, kWeighted>(args, plan, scratch, shared, row, segment);
        __syncwarp();
      }
      if (args.shared_gradient.data) {
        __syncthreads();
#pragma unroll 1
        for (int i = threadIdx.x; i < kSegment && begin + i < args.size; i += kThreads) {
          C sum(0);
          for (int w = 0; w < kWarps; ++w) sum += flat(sums)[w * kSegment + i];
          scratch.features[group * args.size + begin + i] = sum;
        }
      }
    } else {
      const uint32_t own = item - plan.second;
      wait_for(done, plan.second);
      if (own < plan.rows) {
        const double loss = finish_rows<C, false>(args, plan, scratch, own, of_warps);
        if (threadIdx.x == 0) scratch.losses[own] = loss;
      } else {
        finish_features(args, plan, scratch, own - plan.rows);
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

}  // namespace fastvae::cuda
