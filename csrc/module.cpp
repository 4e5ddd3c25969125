// The Python module fastvae._C. Importing it registers the ops (csrc/ops/library.cpp); it offers only what backend.py reports.
#include <pybind11/pybind11.h>

#include "ops/buffer_pool.h"
#include "ops/cpu_kernels.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled kernels of fastvae, reached through torch.ops.fastvae.";
  m.def("cpu_capability", [] { return fastvae::cpu::kernels().capability; }, "The instruction set of the CPU kernels in use.");
  m.def("empty_buffer_pool", &fastvae::empty_buffer_pool, "Free the unused CPU buffers; returns how many bytes.");
}
