#include <c10/cuda/CUDAGraphsC10Utils.h>

#include <array>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "common_cuda.h"

namespace fastvae {
namespace {

constexpr size_t kSets = 1024;
constexpr size_t kSetBytes = cuda::kCounters * sizeof(uint32_t);
constexpr size_t kOwnSetBytes = 16;  // keeps the memory behind it aligned
static_assert(kSetBytes <= kOwnSetBytes);

// The counters of a device, in sets for one launch each. They are zero while they are not in use. A stream has its own set, because its launches run
// in order. A captured launch has its own too, because its graph may be replayed on any stream, concurrently with anything else; that
// set is returned when the graph is destroyed.
class Counters {
 public:
  // Null if none is available: the first call of the process is captured, or existing graphs hold all of them.
  uint32_t* take(cudaStream_t stream, bool capturing) {
    auto* counter = find(stream, capturing);
    if (counter && capturing) lend(counter, stream);
    return counter;
  }

 private:
  struct Loan {
    Counters* from;
    uint32_t* counter;
  };

  uint32_t* find(cudaStream_t stream, bool capturing) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!all_) {
      if (capturing) return nullptr;  // the memory and its zeroing would belong to the graph
      const c10::cuda::CUDAStreamCaptureModeGuard while_others_capture(cudaStreamCaptureModeRelaxed);
      auto zeros = c10::cuda::CUDACachingAllocator::get()->allocate(kSets * kSetBytes);
      C10_CUDA_CHECK(cudaMemsetAsync(zeros.get(), 0, kSets * kSetBytes, stream));
      // Once per process and device, because other streams will use them as well.
      C10_CUDA_CHECK(cudaStreamSynchronize(stream));
      all_ = std::move(zeros);
    }
    if (!capturing)
      for (const auto& [known, counter] : of_streams_)
        if (known == stream) return counter;
    if (capturing && !returned_.empty()) {
      auto* counter = returned_.back();
      returned_.pop_back();
      return counter;
    }
    if (next_ == kSets) return nullptr;
    auto* counter = static_cast<uint32_t*>(all_.get()) + cuda::kCounters * next_++;
    if (!capturing) of_streams_.emplace_back(stream, counter);
    return counter;
  }

  // Makes the graph under capture return the counter when nothing can replay the launch any more. If CUDA declines, the counter is
  // not returned.
  void lend(uint32_t* counter, cudaStream_t stream) {
    auto status = cudaStreamCaptureStatusNone;
    cudaGraph_t graph = nullptr;
    cudaUserObject_t object = nullptr;
    auto* loan = new Loan{this, counter};
    if (cudaStreamGetCaptureInfo(stream, &status, nullptr, &graph) != cudaSuccess || !graph ||
        cudaUserObjectCreate(&object, loan, give_back, 1, cudaUserObjectNoDestructorSync) != cudaSuccess ||
        cudaGraphRetainUserObject(graph, object, 1, cudaGraphUserObjectMove) != cudaSuccess)
      cudaGetLastError();  // otherwise torch would report the error in a later call
  }

  // May be called on a thread of the driver, and must not call CUDA.
  static void give_back(void* data) {
    const std::unique_ptr<Loan> loan(static_cast<Loan*>(data));
    const std::lock_guard<std::mutex> lock(loan->from->mutex_);
    loan->from->returned_.push_back(loan->counter);
  }

  std::mutex mutex_;
  c10::DataPtr all_;
  size_t next_ = 0;
  std::vector<uint32_t*> returned_;
  std::vector<std::pair<cudaStream_t, uint32_t*>> of_streams_;
};

Counters& counters_of_current_device() {
  // Never destroyed, because CUDA may have been shut down by then.
  static auto& all = *new std::array<Counters, C10_COMPILE_TIME_MAX_GPUS>;
  return all.at(c10::cuda::current_device());
}

}  // namespace

void not_built_for_this_gpu() {
  cudaGetLastError();  // otherwise torch would report the error in a later call
  int major = 0, minor = 0, device = c10::cuda::current_device();
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  TORCH_CHECK(major >= 8, "fastvae: the CUDA kernels need compute capability 8.0, and this GPU has ", major, ".", minor,
              "; Triton's serve it: fastvae.set_backend(\"triton\")");
  TORCH_CHECK(false, "fastvae: the CUDA kernels were not built for this GPU, of compute capability ", major, ".", minor,
              "; build them for it with TORCH_CUDA_ARCH_LIST=", major, ".", minor, ", or use fastvae.set_backend(\"triton\")");
}

Scratch::Scratch(int64_t bytes, cudaStream_t stream) {
  if (bytes == 0) return;
  const bool capturing = c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
  counter_ = counters_of_current_device().take(stream, capturing);
  memory_ = c10::cuda::CUDACachingAllocator::get()->allocate(bytes + (counter_ ? 0 : kOwnSetBytes));
  scratch_ = memory_.get();
  if (counter_) return;
  counter_ = static_cast<uint32_t*>(scratch_);
  scratch_ = static_cast<char*>(scratch_) + kOwnSetBytes;
  C10_CUDA_CHECK(cudaMemsetAsync(counter_, 0, kOwnSetBytes, stream));
}

}  // namespace fastvae
