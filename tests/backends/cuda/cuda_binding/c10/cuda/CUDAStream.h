#pragma once
#include <cuda_runtime_api.h>

#include <utility>
#include <vector>

// The part of the runtime that csrc/ops uses in addition to csrc/cuda.
constexpr auto cudaErrorNoKernelImageForDevice = static_cast<cudaError_t>(209);
constexpr auto cudaDevAttrComputeCapabilityMajor = static_cast<cudaDeviceAttr>(75);
constexpr auto cudaDevAttrComputeCapabilityMinor = static_cast<cudaDeviceAttr>(76);
enum cudaStreamCaptureMode { cudaStreamCaptureModeRelaxed };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum { cudaUserObjectNoDestructorSync = 1, cudaGraphUserObjectMove = 1 };
using cudaUserObject_t = std::pair<void (*)(void*), void*>*;
using cudaGraph_t = std::vector<cudaUserObject_t>*;

namespace c10::cuda {

inline int64_t memsets = 0;
inline std::vector<cudaUserObject_t> graph;  // the graph under capture: the functions to call when it is destroyed

inline void destroy_graph() {
  for (auto* object : std::exchange(graph, {})) {
    object->first(object->second);
    delete object;
  }
}

}  // namespace c10::cuda

inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  ++c10::cuda::memsets;
  std::memset(p, value, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status, void*, cudaGraph_t* found) {
  *status = cudaStreamCaptureStatusActive;
  *found = &c10::cuda::graph;
  return cudaSuccess;
}
inline cudaError_t cudaUserObjectCreate(cudaUserObject_t* object, void* data, void (*destroy)(void*), int, int) {
  *object = new std::pair(destroy, data);
  return cudaSuccess;
}
inline cudaError_t cudaGraphRetainUserObject(cudaGraph_t owner, cudaUserObject_t object, int, int) {
  owner->push_back(object);
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
