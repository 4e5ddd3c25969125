// csrc/ops with its CUDA side, and the kernels that cuda_shim runs on the CPU in place of the CPU kernels. CPU tensors then take the path
// of CUDA tensors on a GPU. The folders ATen and c10 here replace torch's CUDA headers.
#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include "../../../../csrc/ops/buffer_pool.cpp"
#include "../../../../csrc/ops/categorical.cpp"
#include "../../../../csrc/ops/common.cpp"
#include "../../../../csrc/ops/counts.cpp"
#include "../../../../csrc/ops/discretized.cpp"
#include "../../../../csrc/ops/latents.cpp"
#include "../../../../csrc/ops/library.cpp"
#include "../../../../csrc/ops/mixture.cpp"
#include "../../../../csrc/ops/nll.cpp"
#include "../../../../csrc/ops/nll_elements.cpp"

#define CUDA CPU  // the dispatch key
#include "../../../../csrc/ops/common_cuda.cpp"
#include "../../../../csrc/ops/counts_cuda.cpp"
#include "../../../../csrc/ops/latents_cuda.cpp"
#include "../../../../csrc/ops/mixture_cuda.cpp"
#include "../../../../csrc/ops/nll_cuda.cpp"
#include "../../../../csrc/ops/nll_elements_cuda.cpp"
#undef CUDA

extern "C" void set_capturing(bool on) { c10::cuda::capturing = on; }
extern "C" void destroy_graph() { c10::cuda::destroy_graph(); }
extern "C" int64_t memsets() { return c10::cuda::memsets; }

// New memory holds NaN, because nobody may rely on its contents.
C10_DECLARE_bool(caffe2_cpu_allocator_do_junk_fill);
static const bool filled = FLAGS_caffe2_cpu_allocator_do_junk_fill = true;
