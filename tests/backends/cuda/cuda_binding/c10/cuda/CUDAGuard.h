#pragma once
#include <c10/core/Device.h>

#include "CUDAStream.h"

namespace c10::cuda {

class CUDAGuard {
 public:
  explicit CUDAGuard(c10::Device device) : device_(device) {}
  c10::Device current_device() const { return device_; }

 private:
  c10::Device device_;
};

}  // namespace c10::cuda
