// A mixture of two distributions of counts, as one element of a mixture of negative binomials (Gayoso et al. 2021): -log of
// p exp(-n1) + (1 - p) exp(-n2), where n1 and n2 are the nll of its components and p = 1 / (1 + exp(-pi)).
#pragma once
#include "counts.h"

namespace fastvae::math {
inline namespace FASTVAE_ISA {

template <class V>
struct MixedTerm {
  V value;
  V share1, share2;  // the probability of each component given the count, by which its derivatives are multiplied
  V d_pi;
};

// Whether `mixed_near` serves these values: no product of probabilities underflows. In fp32 the bounds are narrow, because an error of n1
// or n2 is one of the logarithm of the shares. It is false for a NaN.
template <class V>
FASTVAE_HD V is_near(V n1, V n2, V pi) {
  using P = Primitives<V>;
  constexpr bool wide = sizeof(typename P::Scalar) == 8;
  return P::keep_where(P::less(P::abs(pi), V(wide ? 300 : 30)), P::less(P::minimum(n1, n2), V(wide ? 300 : 16)));
}

// The mixture there. 1 - P of the probability P is a sum of positive terms, and -log P = log(1 + (1 - P) / P) keeps the digits of a small
// value.
template <class V>
FASTVAE_HD MixedTerm<V> mixed_near(V n1, V n2, V pi) {
  using P = Primitives<V>;
  const V e = P::exp_bounded(P::neg_abs(pi)), inverse = P::divide(V(1), V(1) + e), rest = e * inverse;
  const auto negative = P::less(pi, V(0));
  const V p1 = P::select(negative, rest, inverse), p2 = P::select(negative, inverse, rest);
  const auto first = P::exp_pair(P::neg(n1)), second = P::exp_pair(P::neg(n2));
  const V part1 = p1 * first.exp, part2 = p2 * second.exp, per = P::divide(V(1), part1 + part2);
  const V missing = P::neg(P::fma(p1, first.minus_1, p2 * second.minus_1));
  // exp(-n2) - exp(-n1): where both are small, they have more digits than their differences to 1.
  const V difference = P::select(P::less(V(0.5f), P::minimum(n1, n2)), second.exp - first.exp, second.minus_1 - first.minus_1);
  return {P::log1p_parts(missing * per).value, part1 * per, part2 * per, p1 * p2 * per * difference};
}

// The mixture anywhere; n1 and n2 may be infinite, and so may pi, which leaves one component. V must be in fp64.
template <class V>
FASTVAE_HD MixedTerm<V> mixed(V n1, V n2, V pi) {
  using P = Primitives<V>;
  const V most(largest<typename P::Scalar>());
  const V difference = P::select(P::less(most, P::minimum(n1, n2)), V(0), n2 - n1);  // inf - inf would be NaN
  const V odds = P::select(P::less(most, P::abs(pi)), pi, pi + difference);          // the logit of share1
  const V e = P::exp_bounded(P::neg_abs(pi)), inverse = V(1) / (V(1) + e);
  const V e_odds = P::exp_bounded(P::neg_abs(odds)), inverse_odds = V(1) / (V(1) + e_odds), rest_odds = e_odds * inverse_odds;
  const auto second = P::less(odds, V(0));
  MixedTerm<V> term;
  term.share1 = P::select(second, rest_odds, inverse_odds);
  term.share2 = P::select(second, inverse_odds, rest_odds);
  term.value = P::select(second, n2 + P::relu(pi), n1 + P::relu(P::neg(pi))) + P::log((V(1) + e) * inverse_odds);
  // p1 - share1 or share2 - p2, of which one subtracts the smaller probabilities.
  const auto negative = P::less(pi, V(0));
  term.d_pi = P::select(negative, e * inverse - term.share1, term.share2 - e * inverse);
  return term;
}

// The derivative by a mean of 0 beside a count t above 0, which its component, of probability p, makes impossible. As the mean goes to 0,
// the probability of 1 is the mean itself to first order. `value` is the nll of the mixture.
FASTVAE_HD double slope_at_mean_0(double value, double p, double t) {
  if (p == 0) return 0;
  if (value > largest<double>()) return -INFINITY;  // the other component makes it impossible, too
  return t == 1 ? -p * std::exp(value) : 0;
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae::math
