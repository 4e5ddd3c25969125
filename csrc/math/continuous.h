// Densities of numbers, and the Bernoulli, which is computed as they are: structs that element.h describes.
#pragma once
#include "element.h"

namespace fastvae::math {
inline namespace FASTVAE_ISA {

// -log Bernoulli(t; sigmoid(a)) = max(a, 0) - a t + log(1 + exp(-|a|)); for t strictly between 0 and 1, the cross-entropy.
struct Bernoulli {
  static constexpr int params = 1;
  static constexpr int constants = 0;
  static constexpr bool has_log1p = true;
  static constexpr bool has_pull = false;

  template <class V>
  static FASTVAE_HD V element(const V (&param)[params], V t, const V*, V (&slope)[params], Log1pSum<V>& logs) {
    using P = Primitives<V>;
    const V a = param[0];
    const V e = P::exp_bounded(P::neg_abs(a)), one_plus_e = V(1) + e;
    slope[0] = P::divide(P::if_negative(a, e, V(1)), one_plus_e) - t;
    logs.add(e, one_plus_e);
    return P::fnma(a, t, P::relu(a));
  }
};

// -log Normal(t; m, s^2) less its normaliser: ((t - m) / s)^2 / 2. One variance for all elements.
//
// Here and below, 1 / s goes in twice: its square is finite for half as many s.
struct Gaussian {
  static constexpr int params = 1;
  static constexpr int constants = 1;  // 1 / s
  static constexpr bool has_log1p = false;
  static constexpr bool has_pull = false;

  template <class V>
  static FASTVAE_HD V element(const V (&param)[params], V t, const V* constant, V (&slope)[params], Log1pSum<V>&) {
    const V scaled = (param[0] - t) * constant[0];
    slope[0] = scaled * constant[0];
    return V(0.5f) * scaled * scaled;
  }

  static constexpr double scale_share = 0.5;  // of log s^2
  template <class C>
  static FASTVAE_HD C scalar_slope(C size, C nll, C) {
    return C(0.5) * size - nll;
  }
};

// -log Normal(t; m, exp(v)) less log(2 pi) / 2: (v + (t - m)^2 exp(-v)) / 2. A log-variance for every element.
struct GaussianPerElement {
  static constexpr int params = 2;  // mean, logvar
  static constexpr int constants = 0;
  static constexpr bool has_log1p = false;
  static constexpr bool has_pull = false;

  template <class V>
  static FASTVAE_HD V element(const V (&param)[params], V t, const V*, V (&slope)[params], Log1pSum<V>&) {
    using P = Primitives<V>;
    const V inverse = P::exp(V(-0.5f) * param[1]), scaled = (param[0] - t) * inverse, square = scaled * scaled;
    slope[0] = scaled * inverse;
    slope[1] = P::fma(V(-0.5f), square, V(0.5f));
    return V(0.5f) * (param[1] + square);
  }
};

// The same of a log-variance that is clamped smoothly, to middle + half tanh((v - middle) / half).
struct GaussianBounded {
  static constexpr int params = 2;  // mean, logvar
  static constexpr int constants = 3;  // the middle between the bounds, half their distance, its inverse
  static constexpr bool has_log1p = false;
  static constexpr bool has_pull = false;

  template <class V>
  static FASTVAE_HD V element(const V (&param)[params], V t, const V* constant, V (&slope)[params], Log1pSum<V>& logs) {
    const Tanh<V> tanh((param[1] - constant[0]) * constant[2]);
    const V bounded[params] = {param[0], Primitives<V>::fma(constant[1], tanh.value, constant[0])};
    const V value = GaussianPerElement::element(bounded, t, constant, slope, logs);
    slope[1] = slope[1] * tanh.slope;
    return value;
  }
};

// -log Laplace(t; m, 1 / inverse_scale) less its normaliser: |t - m| inverse_scale. One scale for all elements.
struct Laplace {
  static constexpr int params = 1;
  static constexpr int constants = 1;  // inverse scale
  static constexpr bool has_log1p = false;
  static constexpr bool has_pull = false;

  template <class V>
  static FASTVAE_HD V element(const V (&param)[params], V t, const V* constant, V (&slope)[params], Log1pSum<V>&) {
    return weighted_distance(param[0] - t, constant[0], slope[0]);
  }

  static constexpr double scale_share = 1;
  template <class C>
  static FASTVAE_HD C scalar_slope(C size, C nll, C) {
    return size - nll;
  }

  // |difference| weight; its slope is 0 in the kink, and NaN where `difference` is.
  template <class V>
  static FASTVAE_HD V weighted_distance(V difference, V weight, V& slope) {
    using P = Primitives<V>;
    const V zero_or_nan = P::select(P::less(difference, V(0)), P::neg(weight), difference);
    slope = P::select(P::less(V(0), difference), weight, zero_or_nan);
    return P::abs(difference) * weight;
  }
};

// -log Laplace(t; m, exp(s)) less log(2): s + |t - m| exp(-s). A log-scale for every element.
struct LaplacePerElement {
  static constexpr int params = 2;  // location, log-scale
  static constexpr int constants = 0;
  static constexpr bool has_log1p = false;
  static constexpr bool has_pull = false;

  template <class V>
  static FASTVAE_HD V element(const V (&param)[params], V t, const V*, V (&slope)[params], Log1pSum<V>&) {
    using P = Primitives<V>;
    const V distance = Laplace::weighted_distance(param[0] - t, P::exp(P::neg(param[1])), slope[0]);
    slope[1] = V(1) - distance;
    return param[1] + distance;
  }
};

// -log CB(t; sigmoid(a)) = -log(a exp(a t) / (exp(a) - 1)): the Bernoulli that is normalised on all of [0, 1]. (Its mean is the
// derivative of log((exp(a) - 1) / a).)
struct ContinuousBernoulli {
  static constexpr int params = 1;
  static constexpr int constants = 0;
  static constexpr bool has_log1p = false;
  static constexpr bool has_pull = false;

  template <class V>
  static FASTVAE_HD V element(const V (&param)[params], V t, const V*, V (&slope)[params], Log1pSum<V>&) {
    using P = Primitives<V>;
    constexpr bool wide = sizeof(typename P::Scalar) == 8;
    const V a = param[0], x = P::abs(a);
    // log((exp(a) - 1) / a) = max(a, 0) + log(c / x), c = 1 - exp(-x), which leaves nothing near 0. There it is a/2 + a^2 h(a^2), and the
    // mean 1/2 + a g(a^2).
    const V e = P::exp_bounded(P::neg(x)), c = V(1) - e, q = V(1) / (x * c);
    const V rest = q * P::fma(P::neg(e), x, c);  // 1 / x - e / c
    const V far_mean = P::select(P::less(a, V(0)), rest, V(1) - rest);
    const V far = P::fma(P::neg(a), t, P::relu(a)) + P::log(c * c * q);

    const V square = a * a;
    V h, g;
    if constexpr (wide) {
      // Taylor series: B_2n / (2n (2n)!) and B_2n / (2n)!, exact for x < 1/2.
      constexpr double value[] = {-2.1185501852016142e-14, 9.55895466477477e-13,    -4.403491782239578e-11, 2.08767569878681e-09,
                                  -1.033399470899471e-07,  5.5114638447971785e-06, -1. / 2880,             1. / 24};
      constexpr double derivative[] = {-3.3896801963225827e-13, 1.3382536530684679e-11, -5.284190138687493e-10, 2.08767569878681e-08,
                                       -8.267195767195768e-07,  3.306878306878307e-05,  -1. / 720,              1. / 12};
      h = polynomial(square, value);
      g = polynomial(square, derivative);
    } else {
      // Chebyshev fits for x < 2, relative errors 3e-8 and 5e-8.
      constexpr float value[] = {1.70277914e-09f, -1.02051338e-07f, 5.50965933e-06f, -0.000347221328f, 0.0416666679f};
      constexpr float derivative[] = {1.63568714e-08f, -8.11700431e-07f, 3.30478215e-05f, -0.00138887856f, 0.0833333358f};
      h = polynomial(square, value);
      g = polynomial(square, derivative);
    }
    const auto near = P::less(x, V(wide ? 0.5 : 2));
    slope[0] = P::select(near, P::fma(a, g, V(0.5f)), far_mean) - t;
    return P::select(near, P::fma(a, V(0.5f) - t, square * h), far);
  }
};

// -log of Student's t with nu degrees of freedom less its normaliser: (nu + 1) log(1 + y^2) / 2, y = (m - t) / (scale sqrt(nu)).
struct StudentT {
  static constexpr int params = 1;
  static constexpr int constants = 2;  // 1 / (scale sqrt(nu)), nu + 1
  static constexpr bool has_log1p = false;
  static constexpr bool has_pull = true;

  template <class V>
  static FASTVAE_HD V element(const V (&param)[params], V t, const V* constant, V (&slope)[params], Log1pSum<V>&) {
    V unused;
    return standardised((param[0] - t) * constant[0], constant[0], constant[1], slope[0], unused);
  }

  static constexpr double scale_share = 1;
  template <class C>
  static FASTVAE_HD C scalar_slope(C size, C, C pull) {
    return size - pull;
  }

  // The value; `slope` is its derivative by m, `pull` that by y, times y: in (0, nu + 1).
  template <class V>
  static FASTVAE_HD V standardised(V y, V inverse_scale, V nu_plus_1, V& slope, V& pull) {
    using P = Primitives<V>;
    // Beyond `far` 1 + y^2 is y^2, which may be too large a number to be squared.
    const auto far = P::less(V(sizeof(typename P::Scalar) == 8 ? 1e9 : 1e5), P::abs(y));
    const V square = y * y, sum = V(1) + square;
    const V denominator = P::select(far, y, sum), ratio = P::select(far, V(1), y) / denominator;  // y / (1 + y^2)
    const V logarithm = P::log(P::select(far, P::abs(y), sum));
    // What 1 + y^2 lost of y^2.
    const V near = logarithm + (square - (sum - V(1))) / sum;
    slope = nu_plus_1 * inverse_scale * ratio;
    pull = nu_plus_1 * y * ratio;
    return nu_plus_1 * P::select(far, logarithm, V(0.5f) * near);
  }
};

// The same with a log-scale for every element, which is a summand.
struct StudentTPerElement {
  static constexpr int params = 2;  // location, log-scale
  static constexpr int constants = 2;  // 1 / sqrt(nu), nu + 1
  static constexpr bool has_log1p = false;
  static constexpr bool has_pull = false;

  template <class V>
  static FASTVAE_HD V element(const V (&param)[params], V t, const V* constant, V (&slope)[params], Log1pSum<V>&) {
    using P = Primitives<V>;
    const V inverse_scale = constant[0] * P::exp(P::neg(param[1]));
    V pull;
    const V value = StudentT::standardised((param[0] - t) * inverse_scale, inverse_scale, constant[1], slope[0], pull);
    slope[1] = V(1) - pull;
    return param[1] + value;
  }
};

// -log Gamma(t; k, exp(s)) less log Gamma(k): k s - (k - 1) log t + t exp(-s), of t >= 0. A log-scale for every element.
struct Gamma {
  static constexpr int params = 1;     // log-scale
  static constexpr int constants = 2;  // k, k - 1
  static constexpr bool has_log1p = false;
  static constexpr bool has_pull = false;

  template <class V>
  static FASTVAE_HD V element(const V (&param)[params], V t, const V* constant, V (&slope)[params], Log1pSum<V>&) {
    using P = Primitives<V>;
    // Not its square: the root is finite for twice as many s.
    const V root = P::exp(V(-0.5f) * param[0]);
    V ratio = t * root * root, log_t(0);
    const bool has_power = P::any(P::less(V(0), P::abs(constant[1])));  // the exponential has no log t
    if (has_power) log_t = P::log(t);
    constexpr auto normal = sizeof(typename P::Scalar) == 8 ? 0x1p-1022 : 0x1p-126;  // from here on P::log has its digits
    const auto small = P::less(t, V(normal));
    if (P::any(small)) {
      // Of 0 the ratio is 0, however large the root, and the logarithm is infinite.
      const auto positive = P::less(V(0), t);
      ratio = P::select(positive, ratio, t);
      const V log_small = P::log(V(0x1p64) * P::select(positive, t, V(1))) - V(44.3614195558364998);
      if (has_power) log_t = P::select(small, P::select(positive, log_small, V(-INFINITY)), log_t);
    }
    slope[0] = constant[0] - ratio;
    return P::fma(constant[0], param[0], P::fnma(constant[1], log_t, ratio));
  }
};

}  // namespace FASTVAE_ISA
}  // namespace fastvae::math
