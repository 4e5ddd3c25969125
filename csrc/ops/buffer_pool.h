// Large CPU results come from a small pool of buffers. A fresh one costs a page fault for every 4 KiB, which at tens of megabytes is
// several times the work of the kernel that fills it, and a training step asks for the same sizes again and again.
#pragma once
#include <ATen/core/Tensor.h>

namespace fastvae {

// An uninitialised tensor of those options, or `like`'s dtype and device: from the pool where it is large and on the CPU, else at::empty.
at::Tensor pooled_empty(at::IntArrayRef sizes, const at::TensorOptions& options, at::MemoryFormat order = at::MemoryFormat::Contiguous);
inline at::Tensor pooled_empty(at::IntArrayRef sizes, const at::Tensor& like, at::MemoryFormat order = at::MemoryFormat::Contiguous) {
  return pooled_empty(sizes, like.options(), order);
}

// Gives the unused buffers back to the system; returns how many bytes.
int64_t empty_buffer_pool();

}  // namespace fastvae
