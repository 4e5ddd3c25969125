// The likelihoods that are densities of real numbers, and the Bernoulli, which is computed in the same way. element.h describes what
// each struct has.
#pragma once
#include "element.h"

namespace fastvae::math {
inline namespace FASTVAE_ISA {

// -log Bernoulli(t; sigmoid(a)) = max(a, 0) - a t + log(1 + exp(-|a|)). For t strictly between 0 and 1 this is the cross-entropy.
struct Bernoulli {
  static constexpr int params = 1;
  static constexpr int constants = 0;
  static constexpr bool has_log1p = true;
  static constexpr bool has_scale_grad = false;

  template <class V>
  static FASTVAE_HD V element(const V (&param)[params], V t, const V*, V (&grad)[params], Log1pSum<V>& logs) {
    using P = Primitives<V>;
    const V a = param[0];
    const V e = P::exp_bounded(P::neg_abs(a)), one_plus_e = V(1) + e;
    grad[0] = P::divide(P::if_negative(a, e, V(1)), one_plus_e) - t;
    logs.add(e, one_plus_e);
    if constexpr (P::vectors) return P::fnma(a, t, P::relu(a));
    // This is max(a, 0) - a t as one product: a times the distance from t to the end of [0, 1] that the sign of a predicts. It is 0
    // where the prediction is right, even if a is infinite. Vectors use `at_ends` for that.
    const V miss = P::if_negative(a, P::neg(t), V(1) - t), value = a * miss;
    return P::select(P::less(V(0), P::abs(miss)), value, miss);
  }

  template <class V, class = std::enable_if_t<Primitives<V>::vectors>>
  static FASTVAE_HD V at_ends(const V (&param)[params], V t, V value) {
    using P = Primitives<V>;
    const V miss = P::if_negative(param[0], t, V(1) - t);
    const V of_infinite = P::select(P::less(V(0), miss), V(INFINITY), miss);
    return P::select(P::less(V(largest<typename P::Scalar>()), P::abs(param[0])), of_infinite, value);
  }
};

// -log Normal(t; m, s^2) without its normaliser: ((t - m) / s)^2 / 2. All elements share one variance.
//
// Here and below, the code multiplies by 1 / s twice, because the square of 1 / s is finite for only half as many s. Where 1 / s
// itself might overflow, each multiplication by it becomes two by its root, so that a difference of 0, where the data equal the mean,
// stays 0. Scales that small are rare, so code that computes several elements side by side takes this path only if one of them needs it.
struct Gaussian {
  static constexpr int params = 1;
  static constexpr int constants = 2;  // the root of 1 / s, 1 / s
  static constexpr bool has_log1p = false;
  static constexpr bool has_scale_grad = false;

  template <class V>
  static FASTVAE_HD V element(const V (&param)[params], V t, const V* constant, V (&grad)[params], Log1pSum<V>&) {
    if constexpr (!Primitives<V>::vectors) return by_root(param, t, constant, grad);
    const V scaled = (param[0] - t) * constant[1];
    grad[0] = scaled * constant[1];
    return V(0.5f) * scaled * scaled;
  }

  template <class V>
  static FASTVAE_HD V by_root(const V (&param)[params], V t, const V* constant, V (&grad)[params]) {
    const V root = constant[0], scaled = (param[0] - t) * root * root;
    grad[0] = scaled * root * root;
    return V(0.5f) * scaled * scaled;
  }

  static constexpr double scale_share = 0.5;  // the learned scalar is log s^2
  template <class C>
  static FASTVAE_HD C scalar_grad(C size, C nll, C) {
    return C(0.5) * size - nll;
  }
};

// -log Normal(t; m, exp(v)) without log(2 pi) / 2: (v + (t - m)^2 exp(-v)) / 2. Every element has its own log-variance.
struct GaussianPerElement {
  static constexpr int params = 2;  // mean, logvar
  static constexpr int constants = 0;
  static constexpr bool has_log1p = false;
  static constexpr bool has_scale_grad = false;

  template <class V>
  static FASTVAE_HD V element(const V (&param)[params], V t, const V*, V (&grad)[params], Log1pSum<V>&) {
    using P = Primitives<V>;
    const V root = inverse_root(V(0.5f) * param[1]), scaled = (param[0] - t) * root * root;
    const V half_square = V(0.5f) * scaled * scaled;
    grad[0] = scaled * root * root;
    grad[1] = V(0.5f) - half_square;
    return P::fma(V(0.5f), beside(param[1], half_square), half_square);
  }

  template <class V>
  static FASTVAE_HD V quick(const V (&param)[params], V t, const V*, V (&grad)[params], V& lowest) {
    using P = Primitives<V>;
    lowest = P::at_most(lowest, param[1]);
    return P::fma(V(0.5f), param[1], half_square(param[0] - t, param[1], grad));
  }
  template <class V>
  static constexpr auto quick_from = 2 * lowest_log<V>();

  // Half the squared distance in units of the scale. The inverse of the scale must be finite for this log-variance.
  template <class V>
  static FASTVAE_HD V half_square(V distance, V logvar, V (&grad)[params]) {
    const V inverse = Primitives<V>::exp_finite(V(-0.5f) * logvar), scaled = distance * inverse, half = V(0.5f) * scaled * scaled;
    grad[0] = scaled * inverse;
    grad[1] = V(0.5f) - half;
    return half;
  }
};

// The same likelihood with a log-variance that is clamped smoothly, to middle + half tanh((v - middle) / half).
struct GaussianBounded {
  static constexpr int params = 2;  // mean, logvar
  static constexpr int constants = 3;  // the middle between the bounds, half the distance between them, and the inverse of that half
  static constexpr bool has_log1p = false;
  static constexpr bool has_scale_grad = false;

  template <class V>
  static FASTVAE_HD V element(const V (&param)[params], V t, const V* constant, V (&grad)[params], Log1pSum<V>&) {
    using P = Primitives<V>;
    const Tanh<V> tanh((param[1] - constant[0]) * constant[2]);
    const V bounded = P::fma(constant[1], tanh.value, constant[0]);
    // Bounds are rarely so low that data equal to the mean would need the root of the inverse scale. A log-variance that low is raised
    // to the lowest one whose inverse scale is finite.
    const V with_inverse = P::at_least(bounded, V(2 * lowest_log<V>()));
    const V half_square = GaussianPerElement::half_square(param[0] - t, with_inverse, grad);
    grad[1] = grad[1] * tanh.grad;
    return P::fma(V(0.5f), bounded, half_square);
  }
};

// -log Laplace(t; m, s) without its normaliser: |t - m| / s. All elements share one scale.
struct Laplace {
  static constexpr int params = 1;
  static constexpr int constants = 2;  // the root of 1 / s, 1 / s
  static constexpr bool has_log1p = false;
  static constexpr bool has_scale_grad = false;

  template <class V>
  static FASTVAE_HD V element(const V (&param)[params], V t, const V* constant, V (&grad)[params], Log1pSum<V>&) {
    if constexpr (!Primitives<V>::vectors) return by_root(param, t, constant, grad);
    return weighted_distance(param[0] - t, constant[1], V(1), grad[0]);
  }

  template <class V>
  static FASTVAE_HD V by_root(const V (&param)[params], V t, const V* constant, V (&grad)[params]) {
    return weighted_distance(param[0] - t, constant[0], constant[0], grad[0]);
  }

  static constexpr double scale_share = 1;
  template <class C>
  static FASTVAE_HD C scalar_grad(C size, C nll, C) {
    return size - nll;
  }

  // |difference| times two numbers. Its gradient is 0 at the kink, and NaN where `difference` is NaN.
  template <class V>
  static FASTVAE_HD V weighted_distance(V difference, V first, V second, V& grad) {
    using P = Primitives<V>;
    const V weight = first * second;
    const V zero_or_nan = P::select(P::less(difference, V(0)), P::neg(weight), difference);
    grad = P::select(P::less(V(0), difference), weight, zero_or_nan);
    return P::abs(difference) * first * second;
  }
};

// -log Laplace(t; m, exp(s)) without log(2): s + |t - m| exp(-s). Every element has its own log-scale.
struct LaplacePerElement {
  static constexpr int params = 2;  // location, log-scale
  static constexpr int constants = 0;
  static constexpr bool has_log1p = false;
  static constexpr bool has_scale_grad = false;

  template <class V>
  static FASTVAE_HD V element(const V (&param)[params], V t, const V*, V (&grad)[params], Log1pSum<V>&) {
    const V root = inverse_root(param[1]), distance = Laplace::weighted_distance(param[0] - t, root, root, grad[0]);
    grad[1] = V(1) - distance;
    return beside(param[1], distance) + distance;
  }

  template <class V>
  static FASTVAE_HD V quick(const V (&param)[params], V t, const V*, V (&grad)[params], V& lowest) {
    using P = Primitives<V>;
    lowest = P::at_most(lowest, param[1]);
    const V distance = Laplace::weighted_distance(param[0] - t, P::exp_finite(P::neg(param[1])), V(1), grad[0]);
    grad[1] = V(1) - distance;
    return param[1] + distance;
  }
  template <class V>
  static constexpr auto quick_from = lowest_log<V>();
};

// -log CB(t; sigmoid(a)) = -log(a exp(a t) / (exp(a) - 1)): the Bernoulli, normalised on all of [0, 1]. Its mean is the derivative
// of log((exp(a) - 1) / a).
struct ContinuousBernoulli {
  static constexpr int params = 1;
  static constexpr int constants = 0;
  static constexpr bool has_log1p = false;
  static constexpr bool has_scale_grad = false;

  template <class V>
  static FASTVAE_HD V element(const V (&param)[params], V t, const V*, V (&grad)[params], Log1pSum<V>&) {
    using P = Primitives<V>;
    constexpr bool wide = sizeof(typename P::Scalar) == 8;
    const V a = param[0], x = P::abs(a), bounded = P::at_most(x, V(wide ? 1e300 : 1e37));
    // log((exp(a) - 1) / a) = max(a, 0) + log(c / x) with c = 1 - exp(-x), which loses all its digits near 0. There the logarithm is
    // computed as a/2 + a^2 h(a^2), and the mean as 1/2 + a g(a^2).
    const V e = P::exp_bounded(P::neg(x)), c = V(1) - e, q = V(1) / (bounded * c);
    const V rest = q * P::fma(P::neg(e), bounded, c);  // 1 / x - e / c
    const V far_mean = P::select(P::less(a, V(0)), rest, V(1) - rest);
    const V far = P::fma(P::neg(a), t, P::relu(a)) + P::log(c * c * q);

    const V square = a * a;
    V h, g;
    if constexpr (wide) {
      // The Taylor series, with coefficients B_2n / (2n (2n)!) and B_2n / (2n)!, are exact for x < 1/2.
      constexpr double value[] = {-2.1185501852016142e-14, 9.55895466477477e-13,    -4.403491782239578e-11, 2.08767569878681e-09,
                                  -1.033399470899471e-07,  5.5114638447971785e-06, -1. / 2880,             1. / 24};
      constexpr double derivative[] = {-3.3896801963225827e-13, 1.3382536530684679e-11, -5.284190138687493e-10, 2.08767569878681e-08,
                                       -8.267195767195768e-07,  3.306878306878307e-05,  -1. / 720,              1. / 12};
      h = polynomial(square, value);
      g = polynomial(square, derivative);
    } else {
      // These are Chebyshev fits for x < 2, with relative errors of 3e-8 and 5e-8.
      constexpr float value[] = {1.70277914e-09f, -1.02051338e-07f, 5.50965933e-06f, -0.000347221328f, 0.0416666679f};
      constexpr float derivative[] = {1.63568714e-08f, -8.11700431e-07f, 3.30478215e-05f, -0.00138887856f, 0.0833333358f};
      h = polynomial(square, value);
      g = polynomial(square, derivative);
    }
    const auto near = P::less(x, V(wide ? 0.5 : 2));
    grad[0] = P::select(near, P::fma(a, g, V(0.5f)), far_mean) - t;
    return P::select(near, P::fma(a, V(0.5f) - t, square * h), far);
  }

  // For an infinite a, all the mass lies at one end of [0, 1], where the density is infinite. The density is 0 elsewhere.
  template <class V>
  static FASTVAE_HD V at_ends(const V (&param)[params], V t, V value) {
    using P = Primitives<V>;
    const V miss = P::if_negative(param[0], t, V(1) - t);
    const V of_infinite = P::select(P::less(V(0), miss), V(INFINITY), miss - V(INFINITY));
    return P::select(P::less(V(largest<typename P::Scalar>()), P::abs(param[0])), of_infinite, value);
  }
};

// -log of Student's t with nu degrees of freedom, without its normaliser: (nu + 1) log(1 + y^2) / 2 with y = (m - t) / (scale sqrt(nu)).
struct StudentT {
  static constexpr int params = 1;
  static constexpr int constants = 4;  // the root of 1 / (scale sqrt(nu)), the number itself, its logarithm, and nu + 1
  static constexpr bool has_log1p = false;
  static constexpr bool has_scale_grad = true;

  template <class V>
  static FASTVAE_HD V element(const V (&param)[params], V t, const V* constant, V (&grad)[params], Log1pSum<V>&, V& scale_grad) {
    using P = Primitives<V>;
    const V distance = param[0] - t;
    const auto x = standardised(distance, constant[1], constant[3], P::any_less(V(-lowest_log<V>()), constant[2]),
                                [&]() FASTVAE_INLINE { return from_afar(distance, constant[0], constant[2], constant[3]); });
    grad[0] = x.grad;
    scale_grad = x.scale_grad;
    return x.value;
  }

  static constexpr double scale_share = 1;
  template <class C>
  static FASTVAE_HD C scalar_grad(C size, C, C scale_grad) {
    return size - scale_grad;
  }

  template <class V>
  struct Standardised {
    V value;
    V grad;        // the derivative by m
    V scale_grad;  // the derivative by log y, which lies in (0, nu + 1)
    decltype(Primitives<V>::less(V(0), V(0))) far;
  };

  // From this |y| on, 1 + y^2 is rounded to y^2, and y may overflow.
  template <class V>
  static constexpr typename Primitives<V>::Scalar far_from = sizeof(typename Primitives<V>::Scalar) == 8 ? 1e9 : 1e5;

  // Computes an element from its distance m - t. Where that is far, or the scale is `tiny`, it returns afar(); both are rare.
  template <class V, class F>
  static FASTVAE_HD Standardised<V> standardised(V distance, V inverse_scale, V nu_plus_1, bool tiny, const F& afar) {
    using P = Primitives<V>;
    if constexpr (!P::vectors) return afar();
    const V y = distance * inverse_scale;
    if (tiny || P::any_less(V(far_from<V>), P::abs(y))) return afar();
    const V square = y * y, sum = V(1) + square, inverse = V(1) / sum, weight = nu_plus_1 * inverse;
    return {nu_plus_1 * near_value(square, sum, inverse, P::log(sum)), weight * y * inverse_scale, weight * square, P::less(sum, V(0))};
  }

  // log(1 + y^2) / 2, corrected for the digits of y^2 that 1 + y^2 has lost.
  template <class V>
  static FASTVAE_HD V near_value(V square, V sum, V inverse, V logarithm) {
    return V(0.5f) * Primitives<V>::fma(square - (sum - V(1)), inverse, logarithm);
  }

  // Computes an element at any distance. Far out, log(1 + y^2) / 2 is the sum of the logarithms of the distance and of the inverse
  // scale, and its derivatives are 1 / distance and 1.
  template <class V>
  static FASTVAE_COLD Standardised<V> from_afar(V distance, V root, V log_inverse, V nu_plus_1) {
    using P = Primitives<V>;
    const V y = distance * root * root, size = P::abs(distance);
    const auto far = P::less(V(far_from<V>), P::abs(y));
    const V square = y * y, sum = V(1) + square;
    const V inverse = V(1) / P::select(far, distance, sum);
    const V logarithm = P::log(P::select(far, size, sum));
    const V far_value = P::select(P::less(size, V(INFINITY)), logarithm, size) + log_inverse;
    return {nu_plus_1 * P::select(far, far_value, near_value(square, sum, inverse, logarithm)),
            nu_plus_1 * P::select(far, inverse, y * inverse * root * root), nu_plus_1 * P::select(far, V(1), square * inverse), far};
  }
};

// Student's t where every element has its own log-scale, which is also a summand of the nll.
struct StudentTPerElement {
  static constexpr int params = 2;     // location, log-scale
  static constexpr int constants = 4;  // those of StudentT at a scale of 1
  static constexpr bool has_log1p = false;
  static constexpr bool has_scale_grad = false;

  template <class V>
  static FASTVAE_HD V element(const V (&param)[params], V t, const V* constant, V (&grad)[params], Log1pSum<V>&) {
    using P = Primitives<V>;
    const V distance = param[0] - t, nu_plus_1 = constant[3], lowest(lowest_log<V>());
    const V inverse_scale = P::vectors ? constant[1] * P::exp_finite(P::neg(P::at_least(param[1], lowest))) : V(0);
    const auto x = StudentT::standardised(distance, inverse_scale, nu_plus_1, P::any_less(param[1], lowest), [&]() FASTVAE_INLINE {
      return StudentT::from_afar(distance, constant[0] * inverse_root(param[1]), constant[2], nu_plus_1);
    });
    grad[0] = x.grad;
    grad[1] = V(1) - x.scale_grad;
    // Far out, x.value lacks the log-scale, which belongs in it with the factor -nu_plus_1. Adding that factor to the 1 of the
    // log-scale's own term makes one summand, so that the log-scale is never subtracted from itself.
    return P::fma(P::select(x.far, V(1) - nu_plus_1, V(1)), param[1], x.value);
  }
};

// -log Gamma(t; k, exp(s)) without log Gamma(k): k s - (k - 1) log t + t exp(-s), for t >= 0. Every element has its own log-scale.
struct Gamma {
  static constexpr int params = 1;     // log-scale
  static constexpr int constants = 2;  // k, k - 1
  static constexpr bool has_log1p = false;
  static constexpr bool has_scale_grad = false;

  template <class V>
  static FASTVAE_HD V element(const V (&param)[params], V t, const V* constant, V (&grad)[params], Log1pSum<V>&) {
    using P = Primitives<V>;
    const V root = inverse_root(param[0]), ratio = t * root * root;
    V log_t(0);
    if (P::any(P::less(V(0), P::abs(constant[1])))) {  // k is 1 for the exponential, which has no log t
      log_t = P::log(t);
      constexpr auto normal = sizeof(typename P::Scalar) == 8 ? 0x1p-1022 : 0x1p-126;  // P::log is accurate from here on
      const auto small = P::less(t, V(normal));
      if (P::any(small)) {
        const auto positive = P::less(V(0), t);
        const V log_small = P::log(V(0x1p64) * P::select(positive, t, V(1))) - V(44.3614195558364998);
        log_t = P::select(small, P::select(positive, log_small, V(-INFINITY)), log_t);
      }
    }
    grad[0] = constant[0] - ratio;
    // The infinite logarithm of a zero, or an infinite ratio, outweighs any log-scale. Vectors use `at_ends` for that.
    const V rest = P::fnma(constant[1], log_t, ratio);
    return P::fma(constant[0], P::vectors ? param[0] : beside(param[0], P::abs(rest)), rest);
  }

  template <class V, class = std::enable_if_t<Primitives<V>::vectors>>
  static FASTVAE_HD V at_ends(const V (&param)[params], V t, V value) {
    using P = Primitives<V>;
    return P::select(P::less(param[0], V(-largest<typename P::Scalar>())), P::select(P::less(V(0), t), V(INFINITY), value), value);
  }
};

}  // namespace FASTVAE_ISA
}  // namespace fastvae::math
