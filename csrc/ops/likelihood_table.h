// The table of likelihoods. A variant names a likelihood, the tensors that it takes and the kernel that serves it. The variants are
// listed in likelihoods.def; this file has their types, their lookup and the normalisers.
#pragma once
#include <c10/core/ScalarType.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>
#include <c10/util/string_view.h>

#include <cmath>
#include <string_view>

#include "../cpu/kernels.h"
#include "../math/continuous.h"

namespace fastvae {

// The name of the files that check and evaluate the likelihood, among others. All likelihoods with independent elements share one
// loop.
enum class Family : int8_t { continuous, discretized, counts, categorical };

// The integer dtypes of a target, besides the params' dtype and fp32.
enum class Integers : int8_t {
  none,
  pixels,            // uint8, read as x / 255 (or, for a discretised likelihood, as the level)
  pixels_and_bools,  // the same and bool
  counts,            // uint8 and wider integers, not scaled
  classes,           // int64
};

struct LikelihoodVariant {
  std::string_view name;
  Family family;
  cpu::Element element;  // the arithmetic in the loop over elements
  int tensors;           // length of `params`
  int constants;         // length of `constants`
  bool packed;           // one tensor (B, 2C, ...) holds the kernel's two params along dimension 1
  bool has_scalar;       // the last tensor is 0-dim, one value for all elements, with a derivative per row
  bool is_location;      // a density of (target - mean), so the target's gradient is the negated mean's; others have none
  Integers integers;

  constexpr bool elementwise() const { return element != cpu::Element::none; }
};

constexpr LikelihoodVariant kLikelihoods[] = {
#define FASTVAE_VARIANT(name, family, element, tensors, constants, packed, has_scalar, is_location, integers) \
  {#name, Family::family, cpu::Element::element, tensors, constants, packed, has_scalar, is_location, Integers::integers},
#include "../likelihoods.def"
};

constexpr std::string_view name_of(cpu::Element element) {
  switch (element) {
#define FASTVAE_ELEMENT(name, Struct) \
  case cpu::Element::name: return #name;
#include "../likelihoods.def"
    case cpu::Element::none: break;
  }
  return "";
}

inline const LikelihoodVariant& likelihood_variant(std::string_view name) {
  for (const auto& variant : kLikelihoods)
    if (variant.name == name) return variant;
  TORCH_CHECK_VALUE(false, "fastvae: unknown likelihood '", std::string(name), "'");
}

// The bit of a param that all rows share. Its gradient is a sum over rows, so factors per row require computing it again.
template <class Params>
int64_t shared_bit(const LikelihoodVariant& variant, const Params& params) {
  return variant.family == Family::counts && !variant.elementwise() && variant.tensors > 1 && params[1].dim() == 1 ? 2 : 0;
}

inline c10::ArrayRef<at::ScalarType> types_of(Integers integers) {
  static constexpr at::ScalarType pixels[] = {at::kByte, at::kBool}, counts[] = {at::kByte, at::kUInt16, at::kInt, at::kLong};
  switch (integers) {
    case Integers::none: break;
    case Integers::pixels: return {pixels, 1};
    case Integers::pixels_and_bools: return pixels;
    case Integers::counts: return counts;
    case Integers::classes: return counts[3];
  }
  return {};
}

// Whether a target of one dtype is valid for params of another.
inline bool takes_target(const LikelihoodVariant& variant, at::ScalarType params, at::ScalarType target) {
  if (target == params || target == at::kFloat) return true;
  for (const auto type : types_of(variant.integers))
    if (type == target) return true;
  return false;
}

constexpr double kHalfLog2Pi = 0.918938533204672741780329736406;
constexpr double kLog2 = 0.693147180559945309417232121458;
constexpr double kPi = 3.14159265358979323846264338328;

// log B(df / 2, 1/2), the normaliser of Student's t with scale sqrt(df).
inline double log_beta_half(double df) {
  // For a large df, the two log-gammas of about df log(df) / 2 would cancel, so their difference is an asymptotic series.
  const double x = 0.5 * df, r = 1 / x;
  const double difference = df < 200 ? std::lgamma(x + 0.5) - std::lgamma(x)
                                     : 0.5 * std::log(x) - r * (1. / 8 - r * r * (1. / 192 - r * r / 640));
  return 0.5 * std::log(kPi) - difference;
}

// `constants` are those of the op; `scalar` is the value of the 0-dim tensor, for variants that have one.
using Normaliser = math::Normaliser<double>;

inline Normaliser normaliser(const LikelihoodVariant& variant, c10::ArrayRef<double> constants, double scalar) {
  const auto log_scale = [&](size_t i) { return variant.has_scalar ? scalar : i < constants.size() ? std::log(constants[i]) : 0; };
  switch (variant.element) {
    case cpu::Element::bernoulli: case cpu::Element::continuous_bernoulli: case cpu::Element::poisson: return {0, {}};
    case cpu::Element::poisson_rate: return {0, {constants[0]}};
    case cpu::Element::gamma: return {std::lgamma(constants[0]), {constants[0], constants[0] - 1}};
    case cpu::Element::gaussian_per_element: return {kHalfLog2Pi, {}};
    case cpu::Element::gaussian_bounded: {
      const double low = 0.5 * constants[0], high = 0.5 * constants[1];
      return {kHalfLog2Pi, {low + high, high - low, 1 / (high - low)}};
    }
    case cpu::Element::discretized_logistic: case cpu::Element::none: break;
    case cpu::Element::gaussian: return math::at_scale<math::Gaussian>({kHalfLog2Pi, {1, 1, 0}}, variant.has_scalar ? scalar : 2 * log_scale(0));
    case cpu::Element::laplace_per_element: return {kLog2, {}};
    case cpu::Element::laplace: return math::at_scale<math::Laplace>({kLog2, {1, 1, 0}}, log_scale(0));
    case cpu::Element::student_t_per_element: case cpu::Element::student_t: {
      const double df = constants[0];
      const double log_root = 0.5 * std::log(df);
      const Normaliser unit = {log_beta_half(df) + log_root, {std::exp(-0.5 * log_root), std::exp(-log_root), -log_root, df + 1}};
      return math::at_scale<math::StudentT>(unit, log_scale(1));
    }
  }
  return {0, {}};
}

// The derivative of a row of n elements, or of elements whose weights sum to n, with respect to the 0-dim tensor, from the kernel's sums.
inline double scalar_grad(const LikelihoodVariant& variant, double n, double nll_less_normaliser, double scale_grad) {
  switch (variant.element) {
    case cpu::Element::gaussian: return math::Gaussian::scalar_grad(n, nll_less_normaliser, scale_grad);
    case cpu::Element::laplace: return math::Laplace::scalar_grad(n, nll_less_normaliser, scale_grad);
    default: return math::StudentT::scalar_grad(n, nll_less_normaliser, scale_grad);
  }
}

}  // namespace fastvae
