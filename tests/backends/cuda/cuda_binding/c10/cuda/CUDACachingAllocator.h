#pragma once
#include <c10/core/CPUAllocator.h>

#include <cstring>

namespace c10::cuda::CUDACachingAllocator {

struct Allocator {
  c10::DataPtr allocate(size_t bytes) {
    auto memory = c10::GetCPUAllocator()->allocate(bytes);
    std::memset(memory.get(), 0xA5, bytes);  // nobody may rely on zeros
    return memory;
  }
};
inline Allocator* get() {
  static Allocator one;
  return &one;
}

}  // namespace c10::cuda::CUDACachingAllocator
