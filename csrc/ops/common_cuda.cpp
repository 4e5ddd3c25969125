#include <c10/cuda/CUDAGraphsC10Utils.h>

#include <array>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "common_cuda.h"

namespace fastvae {
namespace {

constexpr size_t kCounters = 1024;
constexpr size_t kCounterBytes = 16;  // keeps what lies behind it aligned

// The counters of a device, each zero while it is not in use. A stream has one of its own, for what it runs comes in turn. A captured
// launch has one of its own too: its graph may be replayed on any stream, beside anything else. It comes back when the graph is gone.
class Counters {
 public:
  // Null where there is none to give: the first call ever is captured, or the graphs that are there hold so many.
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
      if (capturing) return nullptr;  // the memory would be the graph's, and the zeros too
      const c10::cuda::CUDAStreamCaptureModeGuard while_others_capture(cudaStreamCaptureModeRelaxed);
      auto zeros = c10::cuda::CUDACachingAllocator::get()->allocate(kCounters * sizeof(uint32_t));
      C10_CUDA_CHECK(cudaMemsetAsync(zeros.get(), 0, kCounters * sizeof(uint32_t), stream));
      // Once per process and device: other streams will use them as well.
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
    if (next_ == kCounters) return nullptr;
    auto* counter = static_cast<uint32_t*>(all_.get()) + next_++;
    if (!capturing) of_streams_.emplace_back(stream, counter);
    return counter;
  }

  // Leaves it to the graph that is being captured to give the counter back, once nothing can replay the launch. Where CUDA declines,
  // the counter stays lent.
  void lend(uint32_t* counter, cudaStream_t stream) {
    auto status = cudaStreamCaptureStatusNone;
    cudaGraph_t graph = nullptr;
    cudaUserObject_t object = nullptr;
    auto* loan = new Loan{this, counter};
    if (cudaStreamGetCaptureInfo(stream, &status, nullptr, &graph) != cudaSuccess || !graph ||
        cudaUserObjectCreate(&object, loan, give_back, 1, cudaUserObjectNoDestructorSync) != cudaSuccess ||
        cudaGraphRetainUserObject(graph, object, 1, cudaGraphUserObjectMove) != cudaSuccess)
      cudaGetLastError();  // or torch would report it of a later call
  }

  // May be called on a thread of the driver's, and may not call CUDA.
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
  // Never destroyed: CUDA may be gone by then.
  static auto& all = *new std::array<Counters, C10_COMPILE_TIME_MAX_GPUS>;
  return all.at(c10::cuda::current_device());
}

}  // namespace

void not_built_for_this_gpu() {
  cudaGetLastError();  // or torch would report it of a later call
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
  memory_ = c10::cuda::CUDACachingAllocator::get()->allocate(bytes + (counter_ ? 0 : kCounterBytes));
  scratch_ = memory_.get();
  if (counter_) return;
  counter_ = static_cast<uint32_t*>(scratch_);
  scratch_ = static_cast<char*>(scratch_) + kCounterBytes;
  C10_CUDA_CHECK(cudaMemsetAsync(counter_, 0, kCounterBytes, stream));
}

}  // namespace fastvae
