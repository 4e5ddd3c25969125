#include "counts.cuh"

namespace fastvae::cuda {

int64_t count_scratch(const CountArgs& args) { return count_plan(args).bytes; }

cudaError_t count_nll(const CountArgs& args, cudaStream_t stream) {
  switch (args.params[0].type) {
    case DType::f32: return launch_counts<float>(args, stream);
    case DType::f64: return launch_counts<double>(args, stream);
    case DType::f16: return launch_counts<Half>(args, stream);
    default: return launch_counts<BFloat16>(args, stream);
  }
}

}  // namespace fastvae::cuda
