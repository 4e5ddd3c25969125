#pragma once
#include <c10/util/Exception.h>

#include "CUDAStream.h"

#define C10_CUDA_CHECK(status) TORCH_CHECK((status) == cudaSuccess)
#define C10_CUDA_KERNEL_LAUNCH_CHECK() C10_CUDA_CHECK(cudaGetLastError())
