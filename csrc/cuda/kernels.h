// What csrc/ops asks of CUDA: plain structs in, results through pointers. No torch types. One launch for each function, on `stream`
// of the current device; nothing is allocated and nobody waits. Every pointer is device memory, and what is a value in a tensor
// stays there: the kernels read it.
#pragma once
#include <cuda_runtime_api.h>

#include "../cpu/kernels.h"

namespace fastvae::cuda {

using cpu::DType;
using cpu::Element;
using cpu::Operand;
using cpu::Result;
using cpu::kMaxConstants;
using cpu::kMaxParams;

// A number for every row, fp32 or fp64, `stride` elements apart (0: one for all), or a single one of any floating type. No data: none
// is given.
struct Numbers {
  const void* data = nullptr;
  DType type = DType::f32;
  int64_t stride = 0;
};

// The same to write, one behind the other. No data: not wanted.
struct Output {
  void* data = nullptr;
  DType type = DType::f32;
};

// Where blocks leave what the last of them adds up. `scratch`: as many bytes as the function's ..._scratch says of the same
// arguments, aligned to 16, with any contents. `counter`: zero, and zero again afterwards; launches that may run at the same time must
// not share it. Both may be null where ..._scratch says 0.
struct Workspace {
  void* scratch = nullptr;
  uint32_t* counter = nullptr;
};

// Rows are fp32 where the params are not fp64, else fp64.
//   nll[r]         = sum of the row's elements + size * normaliser
//   loss           = nll[r] + beta kl[r] for each row, or, where `reduced`, weight times their sum
//   slopes[i]      = d element / d params[i], times `weight`; where grad_loss or grad_nll is given, times
//                    weight * grad_loss[r] + grad_nll[r] of those that are
//   scalar_rows[r] = d nll[r] / d scalar
// The params and slopes of a packed head are two views with the same runs. The target's rows are a single run.
struct NllArgs {
  Element element = Element::bernoulli;
  int64_t rows = 0, size = 0;
  Operand params[kMaxParams];
  Operand target;
  int64_t target_rows = 0;  // see cpu::target_row
  double constants[kMaxConstants] = {};  // these as csrc/ops/likelihood_table.h has them, at the scale 1 where `scalar` is given
  double normaliser = 0;                 // per element
  Numbers scalar;                        // a learned log-scale (the Gaussian's log-variance) for all elements
  Result slopes[kMaxParams];
  double weight = 1;
  Numbers grad_loss, grad_nll;
  Numbers kl, beta;
  bool reduced = false;
  Output loss;  // no data: the slopes alone are made
  Output nll, scalar_rows;
  Workspace workspace;
};

// Mixtures of discretised logistics, of 1 or 3 channels: params[0], slopes[0] and the target (u8) are dense rows, of planes that lie one
// behind the other or, where `alternate`, take turns at every pixel (channels_last). size = channels * pixels; the constants are those
// of math::DiscretizedLogistic.
struct MixtureArgs : NllArgs {
  int64_t pixels = 0, channels = 0, components = 0;
  bool alternate = false;
};

// params[0] and slopes[0] are dense rows of logits (positions, classes), target of class numbers (i64); a position whose number is
// `ignored` adds nothing, and one whose number is no class is not a number. size = positions.
struct CategoricalArgs : NllArgs {
  int64_t positions = 0, classes = 0, ignored = 0;
};

// results[i] = gradients[i] times (weight * grad_loss[r] + grad_nll[r]) / weight, untouched where they are the same memory and the
// factor is 1. Dense tensors of (rows, size), all of one type.
//   scalar_gradient = sum of (weight * grad_loss[r] + grad_nll[r]) scalar_rows[r]
//   kl_gradient[r]  = weight * grad_loss[r] * beta
//   beta_gradient   = sum of weight * grad_loss[r] kl[r]
struct NllBackwardArgs {
  int64_t rows = 0, size = 0;
  Operand gradients[kMaxParams];  // no data: there is none
  Result results[kMaxParams];
  double weight = 1;  // as in NllArgs
  Numbers grad_loss, grad_nll;
  Numbers scalar_rows, kl, beta;
  Output scalar_gradient, kl_gradient, beta_gradient;
  Workspace workspace;
};

// Where the noise of math/philox.h starts.
//   tensor   (seed, offset), int64, or null; then
//   captured the numbers are at seed_pointer and offset_pointer (plus offset_intragraph), else they are `seed` and `offset`
// That is at::PhiloxCudaState. Draw k uses offset + 4 k: ask the generator for 4 * draws.
struct NoiseSource {
  const int64_t* tensor = nullptr;
  uint64_t seed = 0, offset = 0;
  const int64_t *seed_pointer = nullptr, *offset_pointer = nullptr;
  uint64_t offset_intragraph = 0;
  bool captured = false;
  int64_t row_offset = 0;
};

// A diagonal Gaussian posterior and its prior (no data: N(0, I)), and `draws` samples of it. All of one type, every row a single run.
struct Latents {
  int64_t rows = 0, size = 0, draws = 0;
  Operand mu, logvar, prior_mu, prior_logvar;
  Operand eps;  // no data: drawn from `noise`
  int64_t eps_draw_stride = 0;
  NoiseSource noise;
};

// kl is fp32 where mu is not fp64, else fp64.
struct SampleArgs : Latents {
  Result z;  // no data where draws == 0
  int64_t z_draw_stride = 0;
  Output row_kl;
  Result element_kl;             // (rows, size); no data: not wanted
  int64_t* used_seed = nullptr;  // out, or null: the (seed, offset) that the backward is to give as `tensor`
  Workspace workspace;
};

struct SampleGradArgs : Latents {
  Operand grad_z;  // no data: zero
  int64_t grad_z_draw_stride = 0;
  Numbers grad_kl;          // per row; no data: zero
  Operand element_grad_kl;  // per element, instead
  Result grad_mu, grad_logvar, grad_prior_mu, grad_prior_logvar, grad_eps;  // no data: not wanted
  int64_t grad_eps_draw_stride = 0;
};

int64_t nll_scratch(const NllArgs&);
int64_t mixture_scratch(const MixtureArgs&);
int64_t categorical_scratch(const CategoricalArgs&);
int64_t nll_backward_scratch(const NllBackwardArgs&);
int64_t sample_scratch(const SampleArgs&);

cudaError_t nll(const NllArgs&, cudaStream_t stream);
cudaError_t mixture(const MixtureArgs&, cudaStream_t stream);
cudaError_t categorical(const CategoricalArgs&, cudaStream_t stream);
cudaError_t nll_backward(const NllBackwardArgs&, cudaStream_t stream);
cudaError_t sample(const SampleArgs&, cudaStream_t stream);
cudaError_t sample_grad(const SampleGradArgs&, cudaStream_t stream);

}  // namespace fastvae::cuda
