#include "count_mixture.cuh"

namespace fastvae::cuda {
namespace {

template <class T>
cudaError_t launch(const CountArgs& args, cudaStream_t stream) {
  CountPlan plan = count_plan(args);
  plan.wide = plan.wide && allows(args.params[kSecondMean], args.size, kQuad) && allows(args.grads[kSecondMean], args.size, kQuad);
  if (args.weights.data) return FASTVAE_LAUNCH((count_mixture_kernel<T, true>), plan.blocks, stream, args, plan);
  return FASTVAE_LAUNCH((count_mixture_kernel<T, false>), plan.blocks, stream, args, plan);
}

}  // namespace

int64_t count_mixture_scratch(const CountArgs& args) { return count_plan(args).bytes; }

cudaError_t count_mixture(const CountArgs& args, cudaStream_t stream) {
  switch (args.params[0].type) {
    case DType::f32: return launch<float>(args, stream);
    case DType::f64: return launch<double>(args, stream);
    case DType::f16: return launch<Half>(args, stream);
    default: return launch<BFloat16>(args, stream);
  }
}

}  // namespace fastvae::cuda
