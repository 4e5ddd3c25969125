// The table of likelihoods: a row names one, says which tensors it takes and which kernel does the work. To add one: its struct in
// csrc/math/likelihoods.h, its Element (cpu/kernels.h) and the line that calls it (nll() in cpu/likelihoods.cpp), its row and its
// normaliser here.
#pragma once
#include <c10/util/Exception.h>
#include <c10/util/string_view.h>

#include <cmath>
#include <string_view>

#include "../cpu/kernels.h"

namespace fastvae {

// Which file does the checks and the work of a row: nll_cpu.cpp, an element of `Element` at a time, or mixture_cpu.cpp.
enum class Family : int8_t { elementwise, logistic };

struct LikelihoodRow {
  std::string_view name;
  cpu::Element element;
  int tensors;       // length of `params`
  int constants;     // length of `constants`
  bool packed;       // one tensor (B, 2C, ...) holds the kernel's two params along dimension 1
  bool has_scalar;   // the last tensor is 0-dim, one value for all elements; it has a derivative for each row
  bool is_location;  // a density of (target - mean): the target's derivative is the mean's, negated. Others have none.
  Family family = Family::elementwise;
};

constexpr LikelihoodRow kLikelihoods[] = {
    {"bernoulli", cpu::Element::bernoulli, 1, 0, false, false, false},                        // logits
    {"gaussian", cpu::Element::gaussian, 1, 1, false, false, true},                           // mean; scale
    {"gaussian_learned", cpu::Element::gaussian, 2, 0, false, true, true},                    // mean, logvar (0-dim)
    {"gaussian_per_element", cpu::Element::gaussian_per_element, 2, 0, false, false, true},  // mean, logvar
    {"gaussian_head", cpu::Element::gaussian_per_element, 1, 0, true, false, true},          // mean and logvar, packed
    // mean and log-scale, packed; bits, floor of the log-scale, small mass
    {"discretized_logistic", cpu::Element{}, 1, 3, false, false, false, Family::logistic},
    // see Mixture in cpu/mixtures.cpp; components, and the same
    {"discretized_logistic_mixture", cpu::Element{}, 1, 4, false, false, false, Family::logistic},
};

inline const LikelihoodRow& likelihood_row(std::string_view name) {
  for (const auto& row : kLikelihoods)
    if (row.name == name) return row;
  TORCH_CHECK_VALUE(false, "fastvae: unknown likelihood '", std::string(name), "'");
}

constexpr double kHalfLog2Pi = 0.918938533204672741780329736406;

// What the kernel needs besides tensors, and the part of the nll that is the same for every element. `scalar`: the value of the
// 0-dim tensor, or the constant, of the rows that have one.
struct Normaliser {
  double constant;
  double per_element;
};

inline Normaliser normaliser(const LikelihoodRow& row, double scalar) {
  switch (row.element) {
    case cpu::Element::bernoulli: return {0, 0};
    case cpu::Element::gaussian_per_element: return {0, kHalfLog2Pi};
    case cpu::Element::gaussian: {
      const double logvar = row.has_scalar ? scalar : 2 * std::log(scalar);
      return {std::exp(-logvar), kHalfLog2Pi + 0.5 * logvar};
    }
  }
  return {0, 0};
}

// The derivative of a row by the 0-dim tensor, given what the kernel summed: for the Gaussian, of
// (size logvar + sum (t - m)^2 exp(-logvar)) / 2.
inline double scalar_slope(int64_t size, double nll_less_normaliser) { return 0.5 * static_cast<double>(size) - nll_less_normaliser; }

}  // namespace fastvae
