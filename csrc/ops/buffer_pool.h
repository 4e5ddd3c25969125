// Large CPU results come from a small pool of buffers. A fresh buffer costs a page fault for every 4 KiB, which for tens of megabytes
// takes several times as long as the kernel that fills it, and training steps request the same sizes again and again.
#pragma once
#include <ATen/core/Tensor.h>

namespace fastvae {

// A tensor that a kernel will overwrite completely, on the CPU or on the current GPU. at::empty would go through the dispatcher and,
// under torch.use_deterministic_algorithms, fill the tensor, which would be an additional launch for every result.
at::Tensor uninitialized(at::IntArrayRef sizes, const at::TensorOptions& options,
                         at::MemoryFormat order = at::MemoryFormat::Contiguous);

// The same, from the pool if it is large and on the CPU. Dtype and device are those of `like`.
at::Tensor pooled_empty(at::IntArrayRef sizes, const at::TensorOptions& options, at::MemoryFormat order = at::MemoryFormat::Contiguous);
inline at::Tensor pooled_empty(at::IntArrayRef sizes, const at::Tensor& like, at::MemoryFormat order = at::MemoryFormat::Contiguous) {
  return pooled_empty(sizes, like.options(), order);
}

// Releases the unused buffers and returns their size in bytes.
int64_t empty_buffer_pool();

}  // namespace fastvae
