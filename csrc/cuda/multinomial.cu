#include "multinomial.cuh"

namespace fastvae::cuda {
namespace {

template <class T>
cudaError_t launch(const CountArgs& args, cudaStream_t stream) {
  const MultinomialPlan plan = multinomial_plan(args);
  if (args.weights.data) return FASTVAE_LAUNCH((multinomial_kernel<T, true>), plan.blocks, stream, args, plan);
  return FASTVAE_LAUNCH((multinomial_kernel<T, false>), plan.blocks, stream, args, plan);
}

}  // namespace

int64_t multinomial_scratch(const CountArgs& args) { return multinomial_plan(args).bytes; }

cudaError_t multinomial(const CountArgs& args, cudaStream_t stream) {
  switch (args.params[0].type) {
    case DType::f32: return launch<float>(args, stream);
    case DType::f64: return launch<double>(args, stream);
    case DType::f16: return launch<Half>(args, stream);
    default: return launch<BFloat16>(args, stream);
  }
}

}  // namespace fastvae::cuda
