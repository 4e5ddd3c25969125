// The table of likelihoods: a row names one, says which tensors it takes and which kernel does the work. To add one: its struct in
// csrc/math/likelihoods.h, its Element (cpu/kernels.h) and the line that calls it (nll() in cpu/likelihoods.cpp), its row and its
// normaliser here.
#pragma once
#include <c10/core/ScalarType.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>
#include <c10/util/string_view.h>

#include <cmath>
#include <string_view>

#include "../cpu/kernels.h"
#include "../math/likelihoods.h"

namespace fastvae {

// What checks and evaluates a row: the loop over elements, or one of its own (counts.h, categorical.h, mixture.h).
enum class Family : int8_t { elementwise, counts, categorical, logistic };

struct LikelihoodRow {
  std::string_view name;
  cpu::Element element;
  int tensors;       // length of `params`
  int constants;     // length of `constants`
  bool packed;       // one tensor (B, 2C, ...) holds the kernel's two params along dimension 1
  bool has_scalar;   // the last tensor is 0-dim, one value for all elements; it has a derivative for each row
  bool is_location;  // a density of (target - mean): the target's derivative is the mean's, negated. Others have none.
  bool counts = false;  // the target counts something: all integers, uint8 too, are read as they are
  Family family = Family::elementwise;
};

constexpr LikelihoodRow kLikelihoods[] = {
    {"bernoulli", cpu::Element::bernoulli, 1, 0, false, false, false},                        // logits
    {"gaussian", cpu::Element::gaussian, 1, 1, false, false, true},                           // mean; scale
    {"gaussian_learned", cpu::Element::gaussian, 2, 0, false, true, true},                    // mean, logvar (0-dim)
    {"gaussian_per_element", cpu::Element::gaussian_per_element, 2, 0, false, false, true},  // mean, logvar
    {"gaussian_head", cpu::Element::gaussian_per_element, 1, 0, true, false, true},          // mean and logvar, packed
    {"gaussian_bounded_per_element", cpu::Element::gaussian_bounded, 2, 2, false, false, true},  // mean, logvar; lo, hi
    {"gaussian_bounded_head", cpu::Element::gaussian_bounded, 1, 2, true, false, true},       // mean and logvar, packed; lo, hi
    {"laplace", cpu::Element::laplace, 1, 1, false, false, true},                             // loc; scale
    {"laplace_learned", cpu::Element::laplace, 2, 0, false, true, true},                      // loc, log_scale (0-dim)
    {"laplace_per_element", cpu::Element::laplace_per_element, 2, 0, false, false, true},     // loc, log_scale
    {"laplace_head", cpu::Element::laplace_per_element, 1, 0, true, false, true},             // loc and log_scale, packed
    {"continuous_bernoulli", cpu::Element::continuous_bernoulli, 1, 0, false, false, false},  // logits
    {"poisson", cpu::Element::poisson, 1, 0, false, false, false, true},                      // log_rate
    {"student_t", cpu::Element::student_t, 1, 2, false, false, true},                         // loc; df, scale
    {"student_t_learned", cpu::Element::student_t, 2, 1, false, true, true},                  // loc, log_scale (0-dim); df
    {"student_t_per_element", cpu::Element::student_t_per_element, 2, 1, false, false, true}, // loc, log_scale; df
    {"student_t_head", cpu::Element::student_t_per_element, 1, 1, true, false, true},         // loc and log_scale, packed; df
    // mean, inverse dispersion; logits of additional zeros
    {"negative_binomial", {}, 2, 0, false, false, false, true, Family::counts},
    {"zero_inflated_negative_binomial", {}, 3, 0, false, false, false, true, Family::counts},
    // logits, log-dispersion; logits of additional zeros; library
    {"negative_binomial_logits", {}, 3, 0, false, false, false, true, Family::counts},
    {"zero_inflated_negative_binomial_logits", {}, 4, 0, false, false, false, true, Family::counts},
    {"categorical", {}, 1, 1, false, false, false, false, Family::categorical},               // logits; the ignored target
    // mean and log-scale, packed; bits, floor of the log-scale, small mass
    {"discretized_logistic", cpu::Element::discretized_logistic, 1, 3, true, false, false, true, Family::logistic},
    // see Mixture in cpu/mixtures.cpp; components, and the same
    {"discretized_logistic_mixture", {}, 1, 4, false, false, false, false, Family::logistic},
};

inline const LikelihoodRow& likelihood_row(std::string_view name) {
  for (const auto& row : kLikelihoods)
    if (row.name == name) return row;
  TORCH_CHECK_VALUE(false, "fastvae: unknown likelihood '", std::string(name), "'");
}

// The bit of a param that serves all rows, whose gradient is a sum over them: with a factor for each it must be made again.
template <class Params>
int64_t shared_bit(const LikelihoodRow& row, const Params& params) {
  return row.family == Family::counts && params[1].dim() == 1 ? 2 : 0;
}

// Whether a target of that type goes with params of another.
inline bool takes_target(const LikelihoodRow& row, at::ScalarType params, at::ScalarType target) {
  if (target == params || target == at::kFloat || target == at::kByte) return true;
  if (row.counts) return target == at::kUInt16 || target == at::kInt || target == at::kLong;
  return target == at::kBool && row.element == cpu::Element::bernoulli;
}

constexpr double kHalfLog2Pi = 0.918938533204672741780329736406;
constexpr double kLog2 = 0.693147180559945309417232121458;
constexpr double kPi = 3.14159265358979323846264338328;

// log B(df / 2, 1/2): the normaliser of Student's t is that of scale sqrt(df).
inline double log_beta_half(double df) {
  // Where df is large the two log-gammas, each about df log(df) / 2, cancel: their difference by its asymptotic series.
  const double x = 0.5 * df, r = 1 / x;
  const double difference = df < 200 ? std::lgamma(x + 0.5) - std::lgamma(x)
                                     : 0.5 * std::log(x) - r * (1. / 8 - r * r * (1. / 192 - r * r / 640));
  return 0.5 * std::log(kPi) - difference;
}

// `constants`: those of the op; `scalar`: the value of the 0-dim tensor, of the rows that have one.
using Normaliser = math::Normaliser<double>;

inline Normaliser normaliser(const LikelihoodRow& row, c10::ArrayRef<double> constants, double scalar) {
  const auto log_scale = [&](size_t i) { return row.has_scalar ? scalar : i < constants.size() ? std::log(constants[i]) : 0; };
  switch (row.element) {
    case cpu::Element::bernoulli: case cpu::Element::continuous_bernoulli: case cpu::Element::poisson: return {0, {}};
    case cpu::Element::gaussian_per_element: return {kHalfLog2Pi, {}};
    case cpu::Element::gaussian_bounded: {
      const double low = 0.5 * constants[0], high = 0.5 * constants[1];
      return {kHalfLog2Pi, {low + high, high - low, 1 / (high - low)}};
    }
    case cpu::Element::discretized_logistic: break;  // see logistic_constants
    case cpu::Element::gaussian: return math::at_scale<math::Gaussian>({kHalfLog2Pi, {1}}, row.has_scalar ? scalar : 2 * log_scale(0));
    case cpu::Element::laplace_per_element: return {kLog2, {}};
    case cpu::Element::laplace: return math::at_scale<math::Laplace>({kLog2, {1}}, log_scale(0));
    case cpu::Element::student_t_per_element: case cpu::Element::student_t: {
      const double df = constants[0];
      const Normaliser unit = {log_beta_half(df) + 0.5 * std::log(df), {1 / std::sqrt(df), df + 1}};
      return math::at_scale<math::StudentT>(unit, log_scale(1));
    }
  }
  return {0, {}};
}

// The derivative of a row by the 0-dim tensor, from what the kernel summed.
inline double scalar_slope(const LikelihoodRow& row, int64_t size, double nll_less_normaliser, double pull) {
  const double n = static_cast<double>(size);
  switch (row.element) {
    case cpu::Element::gaussian: return math::Gaussian::scalar_slope(n, nll_less_normaliser, pull);
    case cpu::Element::laplace: return math::Laplace::scalar_slope(n, nll_less_normaliser, pull);
    default: return math::StudentT::scalar_slope(n, nll_less_normaliser, pull);
  }
}

}  // namespace fastvae
