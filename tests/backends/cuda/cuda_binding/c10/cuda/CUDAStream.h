#pragma once
#include <cuda_runtime_api.h>

// Of the runtime, what csrc/ops uses beyond csrc/cuda.
constexpr auto cudaErrorNoKernelImageForDevice = static_cast<cudaError_t>(209);
constexpr auto cudaDevAttrComputeCapabilityMajor = static_cast<cudaDeviceAttr>(75);
constexpr auto cudaDevAttrComputeCapabilityMinor = static_cast<cudaDeviceAttr>(76);
enum cudaStreamCaptureMode { cudaStreamCaptureModeRelaxed };
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

#define C10_COMPILE_TIME_MAX_GPUS 1

namespace c10::cuda {

struct CUDAStream {
  operator cudaStream_t() const { return nullptr; }
};
inline CUDAStream getCurrentCUDAStream() { return {}; }
inline int current_device() { return 0; }

}  // namespace c10::cuda
