// A likelihood with independent elements is a struct (in the file of its family) that computes the negative log-likelihood of one
// element and its derivatives, in nats. It has these members:
//
//   params          the number of tensors of the data's shape that it reads; `element` writes one derivative for each
//   constants       the number of scalars that it reads, which are the same for every element
//   has_log1p       whether it leaves a term log(1 + e) to `logs`; the caller adds logs.value() once for many elements
//   has_scale_grad  whether a learned scale needs a sum of its own, of what `element` then writes to `scale_grad`: (first param - target)
//                   times the derivative by the first param. In the other scale families this is a multiple of the nll
//   element         computes the part of the nll that differs between elements; the normaliser, which is the same for all of them, is
//                   added once per row
//   at_ends         optional: returns the value for an element whose value from `element` is NaN, as it also is for infinite params.
//                   The gradients from `element` are right for these. Elements without a NaN thus pay nothing for infinite params
//   quick           optional: a shorter `element` that is right for log-scales of at least quick_from. It keeps the lowest log-scale that
//                   it has seen in `lowest`; a caller that finds one below quick_from must start again with `element`
//
// A scale family has one log-scale s for all elements (the Gaussian has the log-variance instead). Its further members are:
//   constants       the first are the root of the inverse scale (see inverse_root), the inverse scale itself and its logarithm
//   by_root         replaces `element` where the inverse scale overflows (only in families without has_scale_grad)
//   scale_share     how much the normaliser of every element grows per unit of s
//   scalar_grad     computes the derivative of a row by s from the sums over the row
#pragma once
#include <cmath>
#include <type_traits>

#include "elementary.h"

namespace fastvae::math {
inline namespace FASTVAE_ISA {

// The part of the nll that is the same for every element, and the scalars that `element` reads.
template <class C>
struct Normaliser {
  C per_element;
  C constants[5];
};

template <class L, class V, class = void>
constexpr bool has_ends = false;
template <class L, class V>
constexpr bool has_ends<L, V, std::void_t<decltype(&L::template at_ends<V>)>> = true;

template <class L, class V, class = void>
constexpr bool has_quick = false;
template <class L, class V>
constexpr bool has_quick<L, V, std::void_t<decltype(L::template quick_from<V>)>> = true;

// Whether L is a scale family: it has one scale for all elements, which may be learned.
template <class L, class = void>
constexpr bool has_scale = false;
template <class L>
constexpr bool has_scale<L, std::void_t<decltype(L::scale_share)>> = true;

// A root that overflows in the compute type is replaced by the largest number of that type, which serves as well.
template <class C>
FASTVAE_HD C bounded_root(C root) {
  constexpr C most = largest<C>();
  return root > most ? most : root;
}

// Turns the normaliser of L at a scale of 1 into that at another scale. A log-scale of -infinity counts as the lowest finite number, so
// that adding it to an infinite sum does not give NaN.
template <class L, class C>
FASTVAE_HD Normaliser<C> at_scale(Normaliser<C> unit, C log_scale) {
  constexpr C most = largest<C>();
  log_scale = C(L::scale_share) * (log_scale < -most ? -most : log_scale);
  unit.per_element += log_scale;
  unit.constants[0] = bounded_root(unit.constants[0] * std::exp(C(-0.5) * log_scale));
  unit.constants[1] *= std::exp(-log_scale);
  unit.constants[2] -= log_scale;
  return unit;
}

// L with `by_root` as its `element`, for an inverse scale that overflows.
template <class L>
struct ByRoot : L {
  template <class V>
  static FASTVAE_HD V element(const V (&param)[L::params], V t, const V* constant, V (&grad)[L::params], Log1pSum<V>&) {
    return L::by_root(param, t, constant, grad);
  }
};

}  // namespace FASTVAE_ISA
}  // namespace fastvae::math
