// The interface of the kernel of mixtures of negative binomials; see kernels.h.
#pragma once
#include "kernels.h"

namespace fastvae::cpu {

// `mean` is that of the first component, and the dispersion belongs to both. Neither raw nor inflated.
struct CountMixtureArgs : CountArgs {
  Operand mean2, mixture_logits;
  Result d_mean2, d_mixture_logits;  // not requested if their data are null
};

namespace isa_default { void count_mixture(const CountMixtureArgs&); }
namespace isa_avx2 { void count_mixture(const CountMixtureArgs&); }
namespace isa_avx512 { void count_mixture(const CountMixtureArgs&); }

}  // namespace fastvae::cpu
