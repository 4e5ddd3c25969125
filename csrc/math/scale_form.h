// How the numbers of an encoder give the scale of a posterior. It has no instruction set of its own, because every kernel takes it.
#pragma once
#include <cstdint>

namespace fastvae {

// With the encoder's number v and the scale sigma:
//   logvar    v = log sigma^2
//   clamped   log sigma^2 is v, clamped to constants[0] and constants[1], with no gradient outside
//   bounded   log sigma^2 is v, clamped smoothly to middle + half tanh((v - middle) / half): constants are middle, half, 1 / half
//   log_std   v = log sigma
//   shifted_log_std   sigma = exp(v) + eps: constants[0] is log eps
//   softplus  sigma = log(1 + exp(v)) + eps: constants[0] is eps
//   shifted_variance  sigma^2 = exp(v) + eps: constants[0] is log eps
// If `soft` is not 0, v and the mean first become soft tanh(v / soft), and soft tanh(mu / soft).
struct ScaleForm {
  enum Kind : int8_t { logvar, clamped, bounded, log_std, shifted_log_std, softplus, shifted_variance };

  Kind kind = logvar;
  double constants[3] = {};
  double soft = 0;

#if defined(__CUDACC__)
  __host__ __device__
#endif
  constexpr bool
  is_plain() const {
    return kind == logvar && soft == 0;
  }
};

}  // namespace fastvae
