// A likelihood whose elements are each for themselves is a struct (in the file of its family): the negative log-likelihood of one element
// and its derivatives, in nats.
//
//   params      how many tensors of the data's shape it reads; `element` writes one derivative for each
//   constants   how many scalars it reads, the same for every element
//   has_log1p   whether it leaves a term log(1 + e) to `logs`, the caller adds logs.value() once for many elements
//   has_pull    whether a learned scale needs a sum of its own, of what `element` then writes to `pull`: (first param - target) times the
//               derivative by it. Of other scale families that is a multiple of the nll
//   element     the part of the nll that differs between elements; what is the same for all of them, the normaliser, is
//               added once per row
//   at_ends     where there is one: the value in place of a NaN that `element` has given, which is one for infinite params too; the
//               slopes are right. So these cost nothing elsewhere
// Scale families, which have one log-scale s for all elements (the Gaussian has the log-variance in its place):
//   constants     the first are the root of the inverse scale and the logarithm of the inverse scale: see inverse_root
//   scale_share   what the nll of every element gains with s
//   scalar_slope  the derivative of a row by s, from what was summed of the row
#pragma once
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "elementary.h"

namespace fastvae::math {
inline namespace FASTVAE_ISA {

// What is the same for every element: the part of its nll, and the scalars that `element` reads.
template <class C>
struct Normaliser {
  C per_element;
  C constants[5];
};

template <class L, class V, class = void>
constexpr bool has_ends = false;
template <class L, class V>
constexpr bool has_ends<L, V, std::void_t<decltype(&L::template at_ends<V>)>> = true;

// The nll of a row of `size` elements, of their sum less the normaliser. Beside an infinite sum that of an infinitely small scale is nothing.
template <class C>
FASTVAE_HD double with_normaliser(double sum, int64_t size, C per_element) {
  return std::isinf(sum) || size == 0 ? sum : sum + static_cast<double>(size) * static_cast<double>(per_element);
}

// Constants in the type that is computed in. A root that overflows there is as good as the largest number.
template <class C>
FASTVAE_HD C constant_of(double x) {
  constexpr C most = largest<C>();
  const C y = static_cast<C>(x);
  return y > most ? most : y < -most ? -most : y;
}

// That of L with the scale 1, at another one.
template <class L, class C>
FASTVAE_HD Normaliser<C> at_scale(Normaliser<C> unit, C log_scale) {
  constexpr C most = largest<C>();
  log_scale *= C(L::scale_share);
  unit.per_element += log_scale;
  const C root = unit.constants[0] * std::exp(C(-0.5) * log_scale);
  unit.constants[0] = root > most ? most : root;
  unit.constants[1] -= log_scale;
  return unit;
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae::math
