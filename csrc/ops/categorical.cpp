// The checks of the variant "categorical", the same on every device.
#include "categorical.h"

#include <cmath>

namespace fastvae {

void check_categorical(const Tensor& logits, const Tensor& target, at::ArrayRef<double> constants) {
  TORCH_CHECK_TYPE(c10::isFloatingType(logits.scalar_type()), "fastvae::nll: `params` must be floating point, got ",
                   logits.scalar_type());
  TORCH_CHECK_TYPE(target.scalar_type() == at::kLong, "fastvae::nll: the `target` of categorical must be int64, got ",
                   target.scalar_type());
  TORCH_CHECK_VALUE(logits.dim() >= 2 && logits.size(-1) >= 1, "fastvae::nll: the logits must be (B, ..., V), got ",
                    logits.sizes());
  TORCH_CHECK_VALUE(target.dim() == logits.dim() - 1 && serves_rows(target.size(0), logits.size(0)) &&
                    target.sizes().slice(1) == logits.sizes().slice(1, logits.dim() - 2), "fastvae::nll: `target` must have the shape ",
                    logits.sizes().slice(0, logits.dim() - 1), ", got ", target.sizes());
  TORCH_CHECK_VALUE(std::abs(constants[0]) < 0x1p53 && constants[0] == std::floor(constants[0]),
                    "fastvae::nll: the number that is ignored must be whole and within 2^53, got ", constants[0]);
}

}  // namespace fastvae
