#include "buffer_pool.h"

#include <ATen/ops/empty.h>
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

constexpr int64_t kSmallest = 1 << 20;       // below, the allocator does not ask the system
constexpr int64_t kLarge = 1 << 22;          // from here on, a huge page fits in wherever it begins
constexpr int64_t kKept = int64_t(1) << 29;  // the most that unused buffers may hold, in bytes

struct Buffer {
  c10::DataPtr memory;
  int64_t bytes;
};

// Large buffers in huge pages, where the system gives them on request: a kernel that writes a plane here and a plane there looks up
// fewer addresses, and the first write to a new buffer raises fewer page faults.
void ask_for_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  if (bytes < kLarge) return;
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE)), begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + page - 1) / page * page, last = (begin + bytes) / page * page;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // it may decline
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
    std::deque<Buffer> evicted;  // freed after the lock is
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
  std::deque<Buffer> unused_;  // the most recent last
  int64_t kept_ = 0;
};

// Never destroyed: tensors may outlive every static object.
Pool& pool() {
  static Pool& instance = *new Pool;
  return instance;
}

}  // namespace

at::Tensor pooled_empty(at::IntArrayRef sizes, const at::TensorOptions& options, at::MemoryFormat order) {
  const auto bytes = c10::multiply_integers(sizes) * static_cast<int64_t>(options.dtype().itemsize());
  if (bytes < kSmallest || !options.device().is_cpu()) return at::empty(sizes, options, order);
  const auto buffer = std::make_shared<Buffer>(pool().take(bytes));
  const auto give_back = [buffer](void*) { pool().give(std::move(*buffer)); };
  return at::from_blob(buffer->memory.get(), sizes, strides_in(sizes, order), give_back, options);
}

int64_t empty_buffer_pool() { return pool().clear(); }

}  // namespace fastvae
