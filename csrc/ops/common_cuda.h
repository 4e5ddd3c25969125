// Shared by the CUDA sides of the ops.
#pragma once
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>

#include "../cuda/kernels.h"
#include "common.h"

namespace fastvae {

// Makes the device of an op's tensors current, and returns the stream for its launches.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& lead) : guard_(lead.device()), stream_(c10::cuda::getCurrentCUDAStream()) {}
  operator cudaStream_t() const { return stream_; }

  // Kernels read through pointers, so a tensor on another device would be an illegal access, reported by a later call.
  void expect(at::Device found, const char* name) const {
    TORCH_CHECK_VALUE(found == guard_.current_device(), "fastvae: `", name, "` must be on ", guard_.current_device(), ", got ", found);
  }
  void expect(const Tensor& t, const char* name) const { expect(t.device(), name); }
  void expect(const OptionalTensor& t, const char* name) const {
    if (t) expect(*t, name);
  }

 private:
  c10::cuda::CUDAGuard guard_;
  c10::cuda::CUDAStream stream_;
};

[[noreturn]] void not_built_for_this_gpu();

inline void check_launch(cudaError_t status) {
  if (status == cudaErrorNoKernelImageForDevice) not_built_for_this_gpu();
  C10_CUDA_CHECK(status);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// A single number of any floating-point type.
inline cuda::Numbers number(const Tensor& t, const char* name) {
  TORCH_CHECK_TYPE(c10::isFloatingType(t.scalar_type()), "fastvae: `", name, "` must be floating point, got ", t.scalar_type());
  return {t.const_data_ptr(), dtype_of(t), 0};
}

// One number for every row, or one for all rows.
inline cuda::Numbers numbers(const OptionalTensor& t, const char* name) {
  if (!t) return {};
  TORCH_CHECK_TYPE(t->scalar_type() == at::kFloat || t->scalar_type() == at::kDouble, "fastvae: `", name,
                   "` must be Float or Double, got ", t->scalar_type());
  return {t->const_data_ptr(), dtype_of(*t), t->dim() == 1 ? t->stride(0) : 0};
}

inline cuda::Output output(const Tensor& t) { return {t.mutable_data_ptr(), dtype_of(t)}; }

// Scratch memory for one launch, and the counter with which its blocks determine the last of them. Neither is needed if no block
// passes data to another. Keep it until the launch is on its stream.
class Scratch {
 public:
  Scratch(int64_t bytes, cudaStream_t stream);
  cuda::Workspace workspace() const { return {scratch_, counter_}; }

 private:
  c10::DataPtr memory_;
  void* scratch_ = nullptr;
  uint32_t* counter_ = nullptr;
};

// Launches a kernel whose blocks leave each other partial results.
template <class Arguments>
void launch(Arguments& args, int64_t (*scratch_of)(const Arguments&), cudaError_t (*kernel)(const Arguments&, cudaStream_t),
            const OnDevice& device) {
  const Scratch scratch(scratch_of(args), device);
  args.workspace = scratch.workspace();
  check_launch(kernel(args, device));
}

}  // namespace fastvae
