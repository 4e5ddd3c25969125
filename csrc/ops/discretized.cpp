// The checks of the variants of Family::discretized, the same on every device.
#include "discretized.h"

#include <cmath>

namespace fastvae {

LogisticConstants logistic_constants(const LikelihoodVariant& variant, at::ArrayRef<double> constants) {
  const bool mixture = variant.constants == 4;
  const double components = mixture ? constants[0] : 0, bits = constants[mixture];
  TORCH_CHECK_VALUE(!mixture || (components >= 1 && components == std::floor(components)),
                    "fastvae::nll: the components of ", std::string(variant.name), " must be a whole number from 1 on, got ", components);
  TORCH_CHECK_VALUE(bits >= 1 && bits <= 8 && bits == std::floor(bits), "fastvae::nll: the bits of ", std::string(variant.name),
                    " must be a whole number from 1 to 8, got ", bits);
  // Beyond these, a scale, or data in units of it, would exceed the range of fp32.
  const double floor = constants[mixture + 1], small = constants[mixture + 2];
  TORCH_CHECK_VALUE(floor >= -60 && floor <= 60, "fastvae::nll: the least log-scale must be between -60 and 60, got ", floor);
  TORCH_CHECK_VALUE(small >= 0 && small < 1, "fastvae::nll: the small mass must be at least 0 and less than 1, got ", small);
  return {static_cast<int64_t>(components), (int64_t(1) << static_cast<int64_t>(bits)) - 1, floor, small};
}

std::array<double, cpu::kMaxConstants> bins_of(const LogisticConstants& constants) {
  const double levels = static_cast<double>(constants.levels);
  return {levels, 1 / levels, std::log(2 / levels), constants.log_scale_floor, constants.min_mass};
}

void check_discretized(const LikelihoodVariant& variant, const Tensor& params, const Tensor& target, at::ArrayRef<double> constants) {
  const auto found = logistic_constants(variant, constants);
  TORCH_CHECK_TYPE(c10::isFloatingType(params.scalar_type()), "fastvae::nll: `params` must be floating point, got ",
                   params.scalar_type());
  TORCH_CHECK_TYPE(target.scalar_type() == at::kByte, "fastvae::nll: the `target` of ", std::string(variant.name),
                   " must be uint8, got ", target.scalar_type());
  TORCH_CHECK_VALUE(params.dim() >= 2 && target.dim() == params.dim(), "fastvae::nll: `params` (B, planes, ...) and `target` "
                    "(B, C, ...) must have one rank, got ", params.sizes(), " and ", target.sizes());
  const int64_t channels = target.size(1), components = found.components;
  TORCH_CHECK_VALUE(components == 0 || channels == 1 || channels == 3, "fastvae::nll: the `target` of ", std::string(variant.name),
                    " must have 1 or 3 channels, got ", channels);
  auto expected = target.sizes().vec();
  if (serves_rows(expected[0], params.size(0))) expected[0] = params.size(0);
  expected[1] = components == 0 ? 2 * channels : components * (channels == 3 ? 10 : 3);
  TORCH_CHECK_VALUE(params.sizes() == at::IntArrayRef(expected), "fastvae::nll: `params` must have the shape ",
                    at::IntArrayRef(expected), ", got ", params.sizes());
}

}  // namespace fastvae
