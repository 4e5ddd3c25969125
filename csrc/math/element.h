// A likelihood whose elements are each for themselves is a struct (in the file of its family): the negative log-likelihood of one element
// and its derivatives, in nats.
//
//   params      how many tensors of the data's shape it reads; `element` writes one derivative for each
//   constants   how many scalars it reads, the same for every element
//   has_log1p   whether it leaves a term log(1 + e) to `logs`, the caller adds logs.value() once for many elements
//   has_scale_grad    whether a learned scale needs a sum of its own, of what `element` then writes to `scale_grad`: (first param - target) times the
//               derivative by it. Of other scale families that is a multiple of the nll
//   element     the part of the nll that differs between elements; what is the same for all of them, the normaliser, is
//               added once per row
//   at_ends     where there is one: the value in place of a NaN that `element` has given, which is one for infinite params too; the
//               grads are right. So these cost nothing elsewhere
//   quick       where there is one: a shorter `element` for log-scales that are no less than quick_from; `lowest` will be the lowest of
//               all that were seen, and who sees a lower one must begin again
// Scale families, which have one log-scale s for all elements (the Gaussian has the log-variance in its place):
//   constants     the first are of the inverse scale the root (see inverse_root), itself and its logarithm
//   by_root       `element`, where the inverse scale is too large a number (of those that have no scale_grad)
//   scale_share   what the nll of every element gains with s
//   scalar_grad  the derivative of a row by s, from what was summed of the row
#pragma once
#include <cmath>
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

template <class L, class V, class = void>
constexpr bool has_quick = false;
template <class L, class V>
constexpr bool has_quick<L, V, std::void_t<decltype(L::template quick_from<V>)>> = true;

// Families with one scale for all elements, which may be learned.
template <class L, class = void>
constexpr bool has_scale = false;
template <class L>
constexpr bool has_scale<L, std::void_t<decltype(L::scale_share)>> = true;

// A root that overflows in the type that is computed in is as good as the largest number there.
template <class C>
FASTVAE_HD C bounded_root(C root) {
  constexpr C most = largest<C>();
  return root > most ? most : root;
}

// That of L with the scale 1, at another one. An infinite logarithm counts as the largest number, which is not lost beside an infinite sum.
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

// L where its inverse scale is too large a number.
template <class L>
struct ByRoot : L {
  template <class V>
  static FASTVAE_HD V element(const V (&param)[L::params], V t, const V* constant, V (&grad)[L::params], Log1pSum<V>&) {
    return L::by_root(param, t, constant, grad);
  }
};

}  // namespace FASTVAE_ISA
}  // namespace fastvae::math
