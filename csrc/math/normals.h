// The Box-Muller transform in fp32, for any number of lanes at a time. It uses polynomials in place of the logarithm, sine and cosine of
// the standard library, which the version for fp64 in math/philox.h calls.
//
// The template argument N describes the lanes. It has the 32-bit types Floats, Words and Integers; as_floats and as_words, which
// reinterpret bits; to_floats and to_integers, which convert numbers (truncating fractions); and sqrt.
#pragma once
#include "philox.h"

namespace fastvae::math {
inline namespace FASTVAE_ISA {

template <class F, int K>
FASTVAE_HD F horner(F x, const float (&highest_first)[K]) {
  F sum = x * highest_first[0] + highest_first[1];
  for (int i = 2; i < K; ++i) sum = sum * x + highest_first[i];
  return sum;
}

template <class N>
FASTVAE_HD typename N::Floats open_unit_lanes(typename N::Words x) {
  // 1.m - (1 - 2^-24) = (2 m + 1) 2^-24, exactly.
  return N::as_floats((x >> 9) | 0x3f800000u) - 0.999999940395355224609375f;
}

// sqrt(-2 log u).
template <class N>
FASTVAE_HD typename N::Floats radius(typename N::Words x) {
  using Floats = typename N::Floats;
  using Words = typename N::Words;
  const Floats u = open_unit_lanes<N>(x);
  // u = 2^n m with m in [sqrt(1/2), sqrt(2)).
  const Words biased = N::as_words(u) - 0x3f3504f3u;
  const Floats n = N::to_floats((typename N::Integers)biased >> 23);
  const Floats f = N::as_floats((biased & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
  // A Chebyshev fit of log(1 + f) / f on that interval, with relative error 8e-9.
  constexpr float fit[] = {-0.0745118633f, 0.128066108f,  -0.132660314f, 0.141996503f,  -0.166083694f,
                           0.200009391f,   -0.250015795f, 0.333333462f,  -0.499999881f, 1.0f};
  const Floats log_m = f * horner(f, fit);
  return N::sqrt(-2.0f * (n * 0.693147180559945f + log_m));
}

// The cosine and sine of 2 pi u.
template <class N>
FASTVAE_HD void circle(typename N::Words x, typename N::Floats& cosine, typename N::Floats& sine) {
  using Floats = typename N::Floats;
  using Words = typename N::Words;
  const Floats turns = open_unit_lanes<N>(x) * 4.0f;
  const auto quadrant = N::to_integers(turns + 0.5f);
  const Floats f = turns - N::to_floats(quadrant);  // in [-1/2, 1/2], exact
  const Floats y = f * f;
  // Chebyshev fits in y of sin(f pi / 2) / f and cos(f pi / 2), with relative errors 3e-8 and 1e-8.
  constexpr float of_sine[] = {0.000158206298f, -0.00468126638f, 0.0796925798f, -0.645964086f, 1.57079637f};
  constexpr float of_cosine[] = {0.000903628068f, -0.0208600704f, 0.253669202f, -1.23370051f, 1.0f};
  const Words s = N::as_words(f * horner(y, of_sine)), c = N::as_words(horner(y, of_cosine));
  const Words q = (Words)quadrant;
  const Words exchanged = (s ^ c) & -(q & 1u);
  const Words signs = q << 30;  // bit 1 of the quadrant becomes the sign
  sine = N::as_floats(s ^ exchanged ^ (signs & 0x80000000u));
  cosine = N::as_floats(c ^ exchanged ^ ((signs + (q << 31)) & 0x80000000u));
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae::math
