#include "buffer_pool.h"

#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/CPUAllocator.h>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>

#include "common.h"

namespace fastvae {
namespace {

constexpr int64_t kSmallest = 1 << 20;       // for smaller buffers, the allocator does not call the system
constexpr int64_t kLarge = 1 << 22;          // from this size on, a buffer contains a huge page at any offset
constexpr int64_t kKept = int64_t(1) << 29;  // the maximum size of the unused buffers, in bytes

struct Buffer {
  c10::DataPtr memory;
  int64_t bytes;
};

// Large buffers use huge pages if the system gives them on request: a kernel that writes several planes then looks up fewer addresses,
// and the first write to a new buffer raises fewer page faults.
void ask_for_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  if (bytes < kLarge) return;
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE)), begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + page - 1) / page * page, last = (begin + bytes) / page * page;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // the system may decline
#endif
}

class Pool {
 public:
  Buffer take(int64_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (auto it = unused_.rbegin(); it != unused_.rend(); ++it) {
        if (it->bytes < bytes || it->bytes / 2 > bytes) continue;
        Buffer found = std::move(*it);
        unused_.erase(std::next(it).base());
        kept_ -= found.bytes;
        return found;
      }
    }
    Buffer made{c10::GetCPUAllocator()->allocate(bytes), bytes};
    ask_for_huge_pages(made.memory.get(), bytes);
    return made;
  }

  void give(Buffer buffer) {
    if (buffer.bytes > kKept) return;
    std::deque<Buffer> evicted;  // freed after the lock is released
    const std::lock_guard<std::mutex> lock(mutex_);
    kept_ += buffer.bytes;
    unused_.push_back(std::move(buffer));
    while (kept_ > kKept) {
      kept_ -= unused_.front().bytes;
      evicted.push_back(std::move(unused_.front()));
      unused_.pop_front();
    }
  }

  int64_t clear() {
    std::deque<Buffer> freed;
    const std::lock_guard<std::mutex> lock(mutex_);
    freed.swap(unused_);
    return std::exchange(kept_, 0);
  }

 private:
  std::mutex mutex_;
  std::deque<Buffer> unused_;  // the most recent one is last
  int64_t kept_ = 0;
};

// Never destroyed, because tensors may outlive all static objects.
Pool& pool() {
  static Pool& instance = *new Pool;
  return instance;
}

}  // namespace

at::Tensor uninitialized(at::IntArrayRef sizes, const at::TensorOptions& options, at::MemoryFormat order) {
  const bool on_cpu = options.device().is_cpu();
  auto* allocator = on_cpu ? c10::GetCPUAllocator() : at::detail::getCUDAHooks().getCUDADeviceAllocator();
  const c10::DispatchKeySet keys(on_cpu ? c10::DispatchKey::CPU : c10::DispatchKey::CUDA);
  return at::detail::empty_generic(sizes, allocator, keys, c10::typeMetaToScalarType(options.dtype()), order);
}

at::Tensor pooled_empty(at::IntArrayRef sizes, const at::TensorOptions& options, at::MemoryFormat order) {
  const auto bytes = c10::multiply_integers(sizes) * static_cast<int64_t>(options.dtype().itemsize());
  if (bytes < kSmallest || !options.device().is_cpu()) return uninitialized(sizes, options, order);
  const auto buffer = std::make_shared<Buffer>(pool().take(bytes));
  const auto give_back = [buffer](void*) { pool().give(std::move(*buffer)); };
  return at::from_blob(buffer->memory.get(), sizes, strides_in(sizes, order), give_back, options);
}

int64_t empty_buffer_pool() { return pool().clear(); }

}  // namespace fastvae
