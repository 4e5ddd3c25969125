// Large CPU results come from a small pool of buffers. A fresh one costs a page fault for every 4 KiB, which at tens of megabytes is
// several times the work of the kernel that fills it, and a training step asks for the same sizes again and again.
#pragma once
#include <ATen/core/Tensor.h>

namespace fastvae {

// A tensor that a kernel will write whole, on the CPU or on the current GPU. torch.use_deterministic_algorithms fills what at::empty
// gives, which here would be a launch for every result; and at::empty goes through the dispatcher.
at::Tensor uninitialized(at::IntArrayRef sizes, const at::TensorOptions& options,
                         at::MemoryFormat order = at::MemoryFormat::Contiguous);

// The same from the pool where it is large and on the CPU; `like` stands for its dtype and device.
at::Tensor pooled_empty(at::IntArrayRef sizes, const at::TensorOptions& options, at::MemoryFormat order = at::MemoryFormat::Contiguous);
inline at::Tensor pooled_empty(at::IntArrayRef sizes, const at::Tensor& like, at::MemoryFormat order = at::MemoryFormat::Contiguous) {
  return pooled_empty(sizes, like.options(), order);
}

// Gives the unused buffers back to the system; returns how many bytes.
int64_t empty_buffer_pool();

}  // namespace fastvae
