// One struct per likelihood: the negative log-likelihood of one element and its derivatives, in nats.
//
//   params      how many tensors of the data's shape it reads; `element` writes one derivative for each
//   constants   how many scalars it reads, the same for every element
//   has_log1p   whether it leaves a term log(1 + e) to `logs`, the caller adds logs.value() once for many elements
//   element     the part of the nll that differs between elements; what is the same for all of them, the normaliser, is
//               added once per row
#pragma once
#include <cmath>

#include "elementary.h"

namespace fastvae::math {
inline namespace FASTVAE_ISA {

// -log Bernoulli(t; sigmoid(a)) = max(a, 0) - a t + log(1 + exp(-|a|)); for t strictly between 0 and 1, the cross-entropy.
struct Bernoulli {
  static constexpr int params = 1;
  static constexpr int constants = 0;
  static constexpr bool has_log1p = true;

  template <class V>
  static FASTVAE_HD V element(const V (&param)[params], V t, const V*, V (&slope)[params], Log1pSum<V>& logs) {
    using P = Primitives<V>;
    const V a = param[0];
    const V e = P::exp_bounded(P::neg(P::abs(a))), one_plus_e = V(1) + e;
    slope[0] = P::divide(P::select(P::less(a, V(0)), e, V(1)), one_plus_e) - t;
    logs.add(e, one_plus_e);
    return P::fma(P::neg(a), t, P::relu(a));
  }
};

constexpr double kHalfLog2Pi = 0.918938533204672741780329736406;

// The scalar that an element reads, and what is the same for every element: of the Gaussian with one variance for all.
template <class C>
struct Normaliser {
  C constant, per_element;
};
template <class C>
FASTVAE_HD Normaliser<C> gaussian_normaliser(C logvar) {
  return {std::exp(-logvar), C(kHalfLog2Pi) + C(0.5) * logvar};
}

// The derivative of a row's nll by that logvar, of (size logvar + sum (t - m)^2 exp(-logvar)) / 2.
template <class C>
FASTVAE_HD C gaussian_scalar_slope(C size, C nll_less_normaliser) {
  return C(0.5) * size - nll_less_normaliser;
}

// -log Normal(t; m, 1 / precision) less its normaliser: (t - m)^2 precision / 2. One variance for all elements.
struct Gaussian {
  static constexpr int params = 1;
  static constexpr int constants = 1;  // precision
  static constexpr bool has_log1p = false;

  template <class V>
  static FASTVAE_HD V element(const V (&param)[params], V t, const V* constant, V (&slope)[params], Log1pSum<V>&) {
    const V difference = param[0] - t;
    slope[0] = difference * constant[0];
    return V(0.5f) * difference * slope[0];
  }
};

// -log Normal(t; m, exp(v)) less log(2 pi) / 2: (v + (t - m)^2 exp(-v)) / 2. A log-variance for every element.
struct GaussianPerElement {
  static constexpr int params = 2;  // mean, logvar
  static constexpr int constants = 0;
  static constexpr bool has_log1p = false;

  template <class V>
  static FASTVAE_HD V element(const V (&param)[params], V t, const V*, V (&slope)[params], Log1pSum<V>&) {
    using P = Primitives<V>;
    const V difference = param[0] - t;
    slope[0] = difference * P::exp(P::neg(param[1]));
    const V square = difference * slope[0];
    slope[1] = P::fma(V(-0.5f), square, V(0.5f));
    return V(0.5f) * (param[1] + square);
  }
};

}  // namespace FASTVAE_ISA
}  // namespace fastvae::math
