// A CPU generator that returns seeds and offsets as one of CUDA does: as numbers or, during a capture, as pointers.
#pragma once
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/cuda/PhiloxCudaState.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>

namespace at {

inline int64_t captured_words[2];

struct CUDAGeneratorImpl : CPUGeneratorImpl {
  PhiloxCudaState philox_cuda_state(uint64_t) {
    const uint64_t seed = random64(), offset = random64() & 0xFFFFFFFC;
    if (!c10::cuda::capturing) return {seed, offset};
    captured_words[0] = static_cast<int64_t>(seed);
    captured_words[1] = static_cast<int64_t>(offset) - 4;
    return {&captured_words[0], &captured_words[1], 4};
  }
};

namespace cuda::detail {
inline const Generator& getDefaultCUDAGenerator() { return at::detail::getDefaultCPUGenerator(); }
}  // namespace cuda::detail

}  // namespace at
