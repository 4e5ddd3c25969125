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
  switch (type) {
    case DType::f32: return f(static_cast<const float*>(nullptr));
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

// The dispersion for counts of zero, and its inverse.
template <bool kRaw, class C>
FASTVAE_DEVICE void dispersion_of_zeros(C given, C& theta, C& inverse) {
  using P = math::Primitives<C>;
  using B = math::Bounds<C>;
  if constexpr (kRaw) {
    const C bounded = P::clamp(given, B::lowest_log, B::highest_log);
    theta = P::exp_bounded(bounded);
    inverse = P::exp_bounded(-bounded);
  } else {
    theta = P::clamp(given, B::lowest, B::highest);
    inverse = P::divide(C(1), theta);
  }
}

// A count of zero with additional zeros, whose value is log(1 + r): the caller takes a single logarithm for several elements. In the
// few cases where r might overflow a product of these, `far` holds the value, and r is 0.
struct InflatedZeros {
  float r, far, d_z, d_pi;
};

// 1 - exp(-z) with its relative accuracy, given exp(-z), for z >= 0. The fit has a relative error of 2e-8.
FASTVAE_DEVICE float lost_by_decay(float z, float decay) {
  constexpr float fit[] = {0.00721385516f, -0.0413337015f, 0.166625708f, -0.499998242f, 1.0f};
  return z < 0.35f ? z * math::polynomial(z, fit) : 1.0f - decay;
}

// See math::with_additional_zeros. z are the values without additional zeros.
FASTVAE_DEVICE void with_additional_zeros(const float (&z)[kQuad], const float (&pi)[kQuad], InflatedZeros (&out)[kQuad]) {
  using P = math::Primitives<float>;
  constexpr float kFar = 0x1p-15f;  // the product of eight 1 + r, with r of at most 1 / kFar, is finite
  float denominators[kQuad], least = INFINITY;
#pragma unroll
  for (int j = 0; j < kQuad; ++j) {
    const float odds = P::exp_bounded(P::at_most(pi[j], 80.0f)), decay = P::exp_bounded(-z[j]);
    const float denominator = odds + decay, q = math::reciprocal_approximately(denominator);
    const float r = lost_by_decay(z[j], decay) * q;
    out[j] = {r, 0.0f, decay * q, -r * (odds * math::reciprocal_approximately(1.0f + odds))};
    denominators[j] = denominator;
    least = fminf(least, denominator);
  }
  if (least < kFar) {
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      if (!(denominators[j] < kFar)) continue;
      const auto term = math::with_additional_zeros(math::CountTerm<float>{z[j], 1.0f, 1.0f, 0.0f}, pi[j]);
      out[j] = {0.0f, term.value, term.d_mu, term.d_pi};
    }
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
