#include "cpu_kernels.h"

#include <ATen/Version.h>

namespace fastvae::cpu {

#define FASTVAE_KERNELS(name, isa) \
  Kernels{name,        isa::nll,         isa::count_nll, isa::count_mixture,  isa::multinomial, isa::categorical, isa::discretized_logistic,  \
          isa::sample, isa::sample_grad, isa::log_probs, isa::log_probs_grad, isa::mixture,     isa::mixture_grad,          \
          isa::sparse_product, isa::sparse_product_grad, isa::scale_rows,     isa::scale_elements}

static Kernels choose() {
  [[maybe_unused]] const std::string capability = at::get_cpu_capability();
#ifdef FASTVAE_HAVE_AVX512
  if (capability == "AVX512") return FASTVAE_KERNELS("avx512", isa_avx512);
#endif
#ifdef FASTVAE_HAVE_AVX2
  if (capability == "AVX512" || capability == "AVX2") return FASTVAE_KERNELS("avx2", isa_avx2);
#endif
  return FASTVAE_KERNELS("default", isa_default);
}

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

}  // namespace fastvae::cpu
