#pragma once
#include "CUDAStream.h"

namespace c10::cuda {

enum class CaptureStatus { None, Active };
inline bool capturing = false;  // set by the tests
inline CaptureStatus currentStreamCaptureStatusMayInitCtx() { return capturing ? CaptureStatus::Active : CaptureStatus::None; }

struct CUDAStreamCaptureModeGuard {
  explicit CUDAStreamCaptureModeGuard(cudaStreamCaptureMode) {}
};

}  // namespace c10::cuda
