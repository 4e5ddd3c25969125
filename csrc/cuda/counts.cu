#include "counts.cuh"

namespace fastvae::cuda {
namespace {

template <class T>
cudaError_t launch(const CountArgs& args, cudaStream_t stream) {
  return args.weights.data ? launch_counts<T, true>(args, stream) : launch_counts<T, false>(args, stream);
}

}  // namespace

int64_t count_scratch(const CountArgs& args) { return count_plan(args).bytes; }

cudaError_t count_nll(const CountArgs& args, cudaStream_t stream) {
  switch (args.params[0].type) {
    case DType::f32: return launch<float>(args, stream);
    case DType::f64: return launch<double>(args, stream);
    case DType::f16: return launch<Half>(args, stream);
    default: return launch<BFloat16>(args, stream);
  }
}

}  // namespace fastvae::cuda
