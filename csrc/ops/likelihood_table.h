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

namespace fastvae {

// What evaluates a row: the loop over elements, or one of its own (counts.h).
enum class Family : int8_t { elementwise, counts };

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
  return target == at::kBool;
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

// What the kernel needs besides tensors, and the part of the nll that is the same for every element. `constants`: those of the op;
// `scalar`: the value of the 0-dim tensor, of the rows that have one.
struct Normaliser {
  double per_element;
  double constants[cpu::kMaxConstants];
};

inline Normaliser normaliser(const LikelihoodRow& row, c10::ArrayRef<double> constants, double scalar) {
  switch (row.element) {
    case cpu::Element::bernoulli: case cpu::Element::continuous_bernoulli: case cpu::Element::poisson: return {0, {}};
    case cpu::Element::gaussian_per_element: return {kHalfLog2Pi, {}};
    case cpu::Element::gaussian: {
      const double logvar = row.has_scalar ? scalar : 2 * std::log(constants[0]);
      return {kHalfLog2Pi + 0.5 * logvar, {std::exp(-logvar)}};
    }
    case cpu::Element::laplace_per_element: return {kLog2, {}};
    case cpu::Element::laplace: {
      const double log_scale = row.has_scalar ? scalar : std::log(constants[0]);
      return {kLog2 + log_scale, {std::exp(-log_scale)}};
    }
    case cpu::Element::student_t_per_element: case cpu::Element::student_t: {
      const double df = constants[0];
      const double log_scale = row.has_scalar ? scalar : constants.size() > 1 ? std::log(constants[1]) : 0;
      return {log_beta_half(df) + 0.5 * std::log(df) + log_scale, {std::exp(-log_scale) / std::sqrt(df), df + 1}};
    }
  }
  return {0, {}};
}

// The derivative of a row by the 0-dim tensor, given what the kernel summed. Every summand is log(scale) plus a function of
// (t - m) / scale, so it is size less the pull, by a log-variance half of that. The pull of the Gaussian is twice the nll, that of the
// Laplace the nll.
inline double scalar_slope(const LikelihoodRow& row, int64_t size, double nll_less_normaliser, double pull) {
  switch (row.element) {
    case cpu::Element::gaussian: return 0.5 * static_cast<double>(size) - nll_less_normaliser;
    case cpu::Element::laplace: return static_cast<double>(size) - nll_less_normaliser;
    default: return static_cast<double>(size) - pull;
  }
}

}  // namespace fastvae
