// A likelihood whose elements are each for themselves is a struct (in the file of its family): the negative log-likelihood of one element
// and its derivatives, in nats.
//
//   params      how many tensors of the data's shape it reads; `element` writes one derivative for each
//   constants   how many scalars it reads, the same for every element
//   has_log1p   whether it leaves a term log(1 + e) to `logs`, the caller adds logs.value() once for many elements
//   has_pull    whether a learned scale needs the sum of (first param - target) times its derivative: of other scale families that is
//               a multiple of the nll
//   element     the part of the nll that differs between elements; what is the same for all of them, the normaliser, is
//               added once per row
// Scale families, which have one log-scale s for all elements (the Gaussian has the log-variance in its place):
//   scale_share   what the nll of every element gains with s
//   scalar_slope  the derivative of a row by s, from what was summed of the row
#pragma once
#include <cmath>

#include "elementary.h"

namespace fastvae::math {
inline namespace FASTVAE_ISA {

// What is the same for every element: the part of its nll, and the scalars that `element` reads.
template <class C>
struct Normaliser {
  C per_element;
  C constants[5];
};

// That of L with the scale 1, at another one.
template <class L, class C>
FASTVAE_HD Normaliser<C> at_scale(Normaliser<C> unit, C log_scale) {
  log_scale *= C(L::scale_share);
  unit.per_element += log_scale;
  unit.constants[0] *= std::exp(-log_scale);
  return unit;
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae::math
