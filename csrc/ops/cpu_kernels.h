// The kernels of csrc/cpu for this machine's instruction set.
#pragma once
#include "../cpu/count_mixture.h"

namespace fastvae::cpu {

struct Kernels {
  const char* capability;
  void (*nll)(const NllArgs&);
  void (*count_nll)(const CountArgs&);
  void (*count_mixture)(const CountMixtureArgs&);
  void (*multinomial)(const CountArgs&);
  void (*categorical)(const CategoricalArgs&);
  void (*discretized_logistic)(const LogisticArgs&);
  void (*sample)(const SampleArgs&);
  void (*sample_grad)(const SampleGradArgs&);
  void (*log_probs)(const LogProbArgs&);
  void (*log_probs_grad)(const LogProbGradArgs&);
  void (*mixture)(const MixtureValueArgs&);
  void (*mixture_grad)(const MixtureGradArgs&);
  void (*sparse_product)(const SparseProductArgs&);
  void (*sparse_product_grad)(const SparseProductGradArgs&);
  void (*scale_rows)(const ScaleArgs&);
  void (*scale_elements)(const ScaleElementsArgs&);
};

// Chosen once, following torch's own choice, so that ATEN_CPU_CAPABILITY=avx2 or =default applies to both.
const Kernels& kernels();

}  // namespace fastvae::cpu
