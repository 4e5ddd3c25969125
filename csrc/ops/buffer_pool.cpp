#include "buffer_pool.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/CPUAllocator.h>

#include <deque>
#include <memory>
#include <mutex>

#include "common.h"

namespace fastvae {
namespace {

constexpr int64_t kSmallest = 1 << 20;       // below, the allocator does not ask the system
constexpr int64_t kKept = int64_t(1) << 29;  // the most that unused buffers may hold, in bytes

struct Buffer {
  c10::DataPtr memory;
  int64_t bytes;
};

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
    return {c10::GetCPUAllocator()->allocate(bytes), bytes};
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

at::Tensor pooled_empty(at::IntArrayRef sizes, const at::Tensor& like, at::MemoryFormat order) {
  const auto bytes = c10::multiply_integers(sizes) * static_cast<int64_t>(like.element_size());
  if (bytes < kSmallest || !like.is_cpu()) return at::empty(sizes, like.options(), order);
  const auto buffer = std::make_shared<Buffer>(pool().take(bytes));
  const auto give_back = [buffer](void*) { pool().give(std::move(*buffer)); };
  return at::from_blob(buffer->memory.get(), sizes, strides_in(sizes, order), give_back, like.options());
}

int64_t empty_buffer_pool() { return pool().clear(); }

}  // namespace fastvae
