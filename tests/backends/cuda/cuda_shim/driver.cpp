// The kernels of csrc/cuda as a library for tests/backends/cuda/test_cuda_kernels.py: the functions of kernels.h with C names.
#include "device.cuh"

using namespace fastvae::cuda;

extern "C" {
void set_processors(int count) { shim::processors = count; }
int launches() { return shim::launches; }
int64_t size_of(int what) {
  const int64_t sizes[] = {sizeof(NllArgs),    sizeof(MixtureArgs),    sizeof(CategoricalArgs), sizeof(NllBackwardArgs),
                           sizeof(SampleArgs), sizeof(SampleGradArgs), sizeof(Plan),            sizeof(CountArgs),
                           sizeof(GaussianMixtureValueArgs), sizeof(GaussianMixtureGradArgs)};
  return sizes[what];
}
void plan(int64_t rows, int64_t size, int unit, int unroll, int64_t slots, Plan* plan) {
  *plan = plan_for(rows, size, unit, unroll, slots);
}
int64_t place(int64_t i, int64_t run, int64_t run_stride) {
  Operand view;
  view.run = run;
  view.run_stride = run_stride;
  return Runs(view)(i);
}
int64_t run_nll_scratch(const NllArgs* args) { return nll_scratch(*args); }
int64_t run_mixture_scratch(const MixtureArgs* args) { return mixture_scratch(*args); }
int64_t run_categorical_scratch(const CategoricalArgs* args) { return categorical_scratch(*args); }
int64_t run_count_nll_scratch(const CountArgs* args) { return count_scratch(*args); }
int64_t run_count_mixture_scratch(const CountArgs* args) { return count_mixture_scratch(*args); }
int64_t run_multinomial_scratch(const CountArgs* args) { return multinomial_scratch(*args); }
int64_t run_nll_backward_scratch(const NllBackwardArgs* args) { return nll_backward_scratch(*args); }
int64_t run_sample_scratch(const SampleArgs* args) { return sample_scratch(*args); }
int64_t run_gaussian_mixture_scratch(const GaussianMixtureValueArgs* args) { return gaussian_mixture_scratch(*args); }
int64_t run_gaussian_mixture_grad_scratch(const GaussianMixtureGradArgs* args) { return gaussian_mixture_grad_scratch(*args); }
int run_gaussian_mixture(const GaussianMixtureValueArgs* args) { return gaussian_mixture(*args, nullptr); }
int run_gaussian_mixture_grad(const GaussianMixtureGradArgs* args) { return gaussian_mixture_grad(*args, nullptr); }
int run_nll(const NllArgs* args) { return nll(*args, nullptr); }
int run_mixture(const MixtureArgs* args) { return mixture(*args, nullptr); }
int run_categorical(const CategoricalArgs* args) { return categorical(*args, nullptr); }
int run_count_nll(const CountArgs* args) { return count_nll(*args, nullptr); }
int run_count_mixture(const CountArgs* args) { return count_mixture(*args, nullptr); }
int run_multinomial(const CountArgs* args) { return multinomial(*args, nullptr); }
int run_nll_backward(const NllBackwardArgs* args) { return nll_backward(*args, nullptr); }
int run_sample(const SampleArgs* args) { return sample(*args, nullptr); }
int run_sample_grad(const SampleGradArgs* args) { return sample_grad(*args, nullptr); }
}
