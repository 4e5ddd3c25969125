// The elements of negative binomial counts: how a thread reads and writes four at a time, and the arithmetic of counts of zero, of small
// counts and of any others.
#pragma once
#include <cmath>

#include "device.cuh"
//
#include "../math/counts.h"

namespace fastvae::cuda {

// ---------------------------------------------------------------------------------------------------------------------------------
// Four adjacent elements
// ---------------------------------------------------------------------------------------------------------------------------------

// Of four elements, the first n exist: all or none if they are read at once (`wide`).
struct Some {
  bool wide;
  int n;
};

template <class T>
FASTVAE_DEVICE auto load_one(const T* p) {
  Pack<T, 1> one;
  one.load(p);
  return widened(one.value[0]);
}

template <class T, class C>
FASTVAE_DEVICE void load_quad(const T* p, const Some& some, C otherwise, C (&x)[kQuad]) {
#pragma unroll
  for (int j = 0; j < kQuad; ++j) x[j] = otherwise;
  if (some.wide) {
    if (!some.n) return;
    Pack<T, kQuad> pack;
    pack.load(p);
#pragma unroll
    for (int j = 0; j < kQuad; ++j) x[j] = static_cast<C>(widened(pack.value[j]));
  } else {
#pragma unroll
    for (int j = 0; j < kQuad; ++j)
      if (j < some.n) x[j] = static_cast<C>(load_one(p + j));
  }
}

// A dispersion that all rows share, which may be in fp32 beside params in half precision.
template <class T>
FASTVAE_DEVICE Compute<T> load_shared(const Operand& dispersion, int64_t i) {
  if constexpr (sizeof(T) == 2) {
    if (dispersion.type == DType::f32) return load_one(static_cast<const float*>(dispersion.data) + i);
  }
  return load_one(static_cast<const T*>(dispersion.data) + i);
}

// Calls f with a null pointer to the type of a count.
template <class F>
FASTVAE_DEVICE auto with_count_type(DType type, const F& f) {
  if (type == DType::f32) return f(static_cast<const float*>(nullptr));
  switch (type) {
    case DType::f64: return f(static_cast<const double*>(nullptr));
    case DType::f16: return f(static_cast<const Half*>(nullptr));
    case DType::bf16: return f(static_cast<const BFloat16*>(nullptr));
    case DType::u16: return f(static_cast<const uint16_t*>(nullptr));
    case DType::i32: return f(static_cast<const int32_t*>(nullptr));
    case DType::i64: return f(static_cast<const int64_t*>(nullptr));
    default: return f(static_cast<const uint8_t*>(nullptr));
  }
}

template <class C>
FASTVAE_DEVICE C load_count(const char* data, DType type, int64_t i) {
  return with_count_type(type, [&](auto* as) { return static_cast<C>(load_one(reinterpret_cast<decltype(as)>(data) + i)); });
}

// A result of type T or, unless `kFixed`, of the compute type.
template <class T, bool kFixed = false>
struct To {};
template <class T, bool kFixed, class F>
FASTVAE_DEVICE void with_result_type(To<T, kFixed>, const Result& out, const F& f) {
  if constexpr (sizeof(T) == 2 && !kFixed) {
    if (out.type == DType::f32) return f(static_cast<float*>(out.data));
  }
  f(static_cast<T*>(out.data));
}

template <class Type, class C>
FASTVAE_DEVICE void store_quad(const Result& out, int64_t i, const Some& some, const C (&x)[kQuad]) {
  with_result_type(Type(), out, [&](auto* p) {
    using S = std::remove_pointer_t<decltype(p)>;
    if (some.wide) {
      if (!some.n) return;
      Pack<S, kQuad> pack;
      pack.fill(x);
      pack.store(p + i);
    } else {
#pragma unroll
      for (int j = 0; j < kQuad; ++j)
        if (j < some.n) p[i + j] = narrowed<S>(x[j]);
    }
  });
}

template <class Type, class C>
FASTVAE_DEVICE void store_one(const Result& out, int64_t i, C x) {
  with_result_type(Type(), out, [&](auto* p) { p[i] = narrowed<std::remove_pointer_t<decltype(p)>>(x); });
}

// ---------------------------------------------------------------------------------------------------------------------------------
// Elements
// ---------------------------------------------------------------------------------------------------------------------------------

// The dispersion for counts of zero, and its inverse or, by logits in fp32, the binary logarithm of its inverse.
// An approximate inverse has enough digits for terms that do not cancel.
template <bool kRaw, bool kExact = false, class C>
FASTVAE_DEVICE void dispersion_of_zeros(C given, C& theta, C& inverse) {
  using P = math::Primitives<C>;
  using B = math::Bounds<C>;
  if constexpr (kRaw) {
    const C bounded = P::clamp(given, B::lowest_log, B::highest_log);
    if constexpr (sizeof(C) == 4) {
      const float binary = 1.44269504f * bounded;
      theta = math::exp2_approximately(binary);
      inverse = -binary;
    } else {
      theta = P::exp_bounded(bounded);
      inverse = P::exp_bounded(-bounded);
    }
  } else {
    theta = P::clamp(given, B::lowest, B::highest);
    if constexpr (sizeof(C) == 4 && !kExact) inverse = math::reciprocal_approximately(theta);
    else inverse = P::divide(C(1), theta);
  }
}

// The largest mu / theta whose logarithm log1p_parts can still compute.
template <class C>
constexpr C kMostRatio = sizeof(C) == 8 ? C(1e307) : C(8e37f);

// What a lane has summed over counts of zero: their nll is nll + log(1 + odds), where 1 + odds is a product with a factor for each element
// with additional zeros, so that several elements share a logarithm.
template <class C>
struct ZeroSums {
  C nll = C(0), odds = C(0);
};

// Four counts of zero. d_theta is to be multiplied by `share`, by the weight of the row and by unit<kInflated>; the others are complete.
template <class C>
struct ZeroQuad {
  template <bool kInflated>
  static constexpr C unit = kInflated && sizeof(C) == 4 ? C(0.693147181) : C(1);

  C value[kQuad];  // only if each value is asked for
  C d_mean[kQuad], d_theta[kQuad], share[kQuad], d_pi[kQuad];
};

// The weight of a row and, in fp32 and in bounds, its inverse.
template <class C>
struct RowWeight {
  C weight, inverse = C(0);

  explicit FASTVAE_DEVICE RowWeight(C w) : weight(w) {
    if constexpr (sizeof(C) == 4) inverse = math::Primitives<C>::clamp(math::reciprocal_approximately(w), -3e38f, 3e38f);
  }
};

// Log1pParts for binary logarithms: `value` is log2(1 + x), and `excess` what is left of it after y / log 2, where y = x / (1 + x). The fit
// is that of log1p_parts.
struct BinaryLog1p {
  float y, inverse, excess, value;

  explicit FASTVAE_DEVICE BinaryLog1p(float x) {
    constexpr float fit[] = {0.563604116f, 0.0784708932f, 0.319230705f, 0.358145624f, 0.480972916f, 0.721347153f};
    const float one_plus_x = 1.0f + x;
    inverse = math::reciprocal_approximately(one_plus_x);
    y = x * inverse;
    const float near = y * y * math::polynomial(y, fit), far = fmaf(y, -1.44269504f, math::log2_approximately(one_plus_x));
    excess = x < 0.5f ? near : far;
    value = fmaf(y, 1.44269504f, excess);
  }
};

// Four counts of zero in fp32, given x = mu / theta, from 0 to kMostRatio (see math::negative_binomial_zero and
// math::with_additional_zeros). d_mean is the derivative by log mu if raw, and otherwise by mu, times the weight of the row. d_theta is
// that by log theta or theta. The values are added to `sums` or, if `each`, returned.
template <bool kRaw, bool kInflated>
FASTVAE_DEVICE void zeros_of_quad(const float (&x)[kQuad], const float (&theta)[kQuad], const float (&pi)[kQuad],
                                  const RowWeight<float>& of_row, bool each, ZeroSums<float>& sums, ZeroQuad<float>& out) {
  using P = math::Primitives<float>;
  if constexpr (!kInflated) {
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      const auto parts = P::log1p_parts(x[j]);
      float z;
      if constexpr (kRaw) {
        out.d_mean[j] = theta[j] * (x[j] * parts.inverse);
        out.d_theta[j] = theta[j] * parts.excess;
        z = P::fma(theta[j], parts.excess, out.d_mean[j]);
      } else {
        out.d_mean[j] = parts.inverse * of_row.weight;
        out.d_theta[j] = parts.excess;
        z = theta[j] * parts.value;
      }
      if (each) out.value[j] = z;
      else sums.nll = kRaw ? sums.nll + z : P::fma(theta[j], parts.value, sums.nll);
      out.share[j] = 1;
      out.d_pi[j] = 0;
    }
  } else {
    // With e = exp(pi) and the value z without additional zeros, the value is log(1 + r) with r = (1 - exp(-z)) / (e + exp(-z)).
    // z is in units of log 2, because the hardware's logarithms and powers are binary.
    constexpr float kFar = 0x1p100f, kLog2 = 0.693147181f;
    float z[kQuad], y[kQuad];
    const float before = sums.odds;
    float largest = 0;
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      const BinaryLog1p of_x(x[j]);
      y[j] = kRaw ? of_x.y : of_x.inverse;
      out.d_theta[j] = of_x.excess;
      z[j] = theta[j] * of_x.value;
      const float e = P::exp_bounded(P::at_most(pi[j], 80.0f)), decay = math::exp2_approximately(-z[j]);
      const float q = math::reciprocal_approximately(e + decay);
      // Near 0, 1 - exp(-z) is a minimax fit, with a relative error of 5e-7. The difference has no larger one from there on.
      constexpr float fit[] = {-0.00853330083f, 0.0552144684f, -0.240201339f, 0.693146825f};
      const float near = z[j] * math::polynomial(z[j], fit), far = 1.0f - decay, lost = z[j] < 0.43f ? near : far;
      const float r = lost * q;
      out.share[j] = decay * q;
      out.d_pi[j] = -r * (e * math::reciprocal_approximately(P::fma(e, of_row.inverse, of_row.inverse)));
      if (each) {
        out.value[j] = P::log1p(r);
        largest = r < largest ? largest : r;
      } else {
        sums.odds = P::fma(sums.odds, P::fma(lost, q, 1.0f), r);
      }
    }
    // If an r or the product of the factors may overflow, the logarithms are taken one by one.
    if (!((each ? largest : sums.odds) < kFar)) {
      sums.odds = before;
#pragma unroll
      for (int j = 0; j < kQuad; ++j) {
        const auto term = math::with_additional_zeros(math::CountTerm<float>{z[j] * kLog2, 1.0f, 1.0f, 0.0f}, pi[j]);
        if (each) out.value[j] = term.value;
        else sums.nll += term.value;
        out.share[j] = term.d_mu;
        out.d_pi[j] = term.d_pi * of_row.weight;
      }
    }
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      if constexpr (kRaw) out.share[j] *= theta[j];
      out.d_mean[j] = kRaw ? y[j] * out.share[j] : y[j] * (out.share[j] * of_row.weight);
    }
  }
}

// The same in fp64.
template <bool kRaw, bool kInflated>
FASTVAE_DEVICE void zeros_of_quad(const double (&x)[kQuad], const double (&theta)[kQuad], const double (&pi)[kQuad],
                                  const RowWeight<double>& of_row, bool each, ZeroSums<double>& sums, ZeroQuad<double>& out) {
#pragma unroll
  for (int j = 0; j < kQuad; ++j) {
    auto term = math::negative_binomial_zero(x[j], theta[j], 1.0);
    if constexpr (kInflated) term = math::with_additional_zeros(term, pi[j]);
    if (each) out.value[j] = term.value;
    else sums.nll += term.value;
    out.d_mean[j] = kRaw ? term.d_mu * (theta[j] * x[j]) : term.d_mu * of_row.weight;
    out.d_theta[j] = kRaw ? term.d_theta * theta[j] : term.d_theta;
    out.share[j] = 1;
    out.d_pi[j] = term.d_pi * of_row.weight;
  }
}

// A count above zero, as it is read. `lead` is the mean or the logit; what is to be added to it is called `offset` (see RowSoftmax).
template <class C>
struct Positive {
  C t, lead, dispersion, pi;
};

// Computes a whole count below 8 in fp32, unless its dispersion or mean is extreme; returns whether it has. d_mu is the derivative by mu
// or, if raw, by log mu, and d_theta that by theta or, if raw, log theta. With the products written as one,
//   value = theta log(1 + mu / theta) + log[(1 + mu / theta) prod (i + 1) (theta + mu) / (theta + i)] - t log mu,  i = 1, ..., t - 1
// The value is at least 1, and of the three terms no two are so much larger that their difference would lose digits of it.
template <bool kRaw>
FASTVAE_DEVICE bool small_count(const Positive<float>& in, double offset, math::CountTerm<float>& term) {
  constexpr float kLowest = kRaw ? -11.5f : 1e-5f, kHighest = kRaw ? 69.0f : 1e30f, kMost = kRaw ? 9.2f : 1e4f;
  bool fits = in.t < 8.0f && in.t >= 1.0f && truncf(in.t) == in.t && in.dispersion > kLowest && in.dispersion < kHighest;
  float mu = 0, log_mu = 0, theta = in.dispersion;
  if constexpr (kRaw) {
    log_mu = static_cast<float>(static_cast<double>(in.lead) + offset);  // fp64, because the error would be the same in the whole row
    fits = fits && log_mu < kMost;
  } else {
    mu = in.lead + static_cast<float>(offset);
    fits = fits && mu > 1e-37f && mu < kMost;
  }
  if (!fits) return false;
  if constexpr (kRaw) {
    mu = expf(log_mu);
    theta = expf(theta);
  } else {
    log_mu = logf(mu);
  }
  using P = math::Primitives<float>;
  const float x = mu / theta, inverse = 1.0f / (1.0f + x);
  const auto parts = math::log1p_parts_by_series(x, P::log1p(x), inverse);
  float product = 1.0f + x, shares = 0;  // shares is 1 / (theta + 1) + 2 / (theta + 2) + ...
#pragma unroll 1
  for (float i = 1; i < in.t; ++i) {
    product *= P::divide((i + 1.0f) * (theta + mu), theta + i);
    shares += P::divide(i, theta + i);
  }
  const float kept = fmaf(-in.t, x * inverse, shares);
  term = {fmaf(theta, parts.value, fmaf(-in.t, log_mu, logf(product))), (mu - in.t) * inverse,
          kRaw ? fmaf(parts.excess, theta, kept) : parts.excess + kept / theta, 0.0f};
  if constexpr (!kRaw) term.d_mu /= mu;
  return true;
}

// Any count above zero, in fp64.
template <bool kRaw>
FASTVAE_DEVICE math::CountTerm<double> any_count(const Positive<double>& in, double offset) {
  using P = math::Primitives<double>;
  using B = math::Bounds<double>;
  double mu = in.lead + offset, log_mu = mu, extra = math::below(in.dispersion, kRaw), theta = in.dispersion;
  if constexpr (kRaw) {
    const double unbounded = mu;
    log_mu = P::clamp(unbounded, -670, 670);
    extra += in.t * P::relu(log_mu - unbounded);  // below the clamp, the nll is -t log mu plus a constant
    mu = ::exp(log_mu);
    theta = ::exp(P::clamp(theta, B::lowest_log, B::highest_log));
  } else {
    log_mu = ::log(mu);
    theta = P::clamp(theta, B::lowest, B::highest);
  }
  const bool large = in.t >= math::kStirlingFrom, near_poisson = theta >= math::kStirlingFrom;
  const double log_factorial = large ? 0 : math::gamma_parts(in.t + 1).log_gamma;
  math::CountTerm<double> term;
  if (!large && in.t >= 1 && trunc(in.t) == in.t && theta >= math::kFewFrom) {
    term = math::negative_binomial_few<false>(in.t, mu, log_mu, theta, log_factorial);
  } else {
    const auto of_theta = math::dispersion_parts(theta);
    if (large)
      term = near_poisson ? math::negative_binomial_positive<true, true>(in.t, mu, log_mu, theta, of_theta, log_factorial)
                          : math::negative_binomial_positive<true, false>(in.t, mu, log_mu, theta, of_theta, log_factorial);
    else
      term = near_poisson ? math::negative_binomial_positive<false, true>(in.t, mu, log_mu, theta, of_theta, log_factorial)
                          : math::negative_binomial_positive<false, false>(in.t, mu, log_mu, theta, of_theta, log_factorial);
  }
  term.value += extra;
  if constexpr (kRaw) term.d_theta *= theta;
  else term.d_mu /= mu;
  return term;
}

}  // namespace fastvae::cuda
