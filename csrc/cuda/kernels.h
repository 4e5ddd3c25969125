// The interface between csrc/ops and the CUDA kernels. Arguments are plain structs without torch types, and results are written through
// pointers. Each function makes one launch on `stream` of the current device, and neither allocates memory nor synchronises. All
// pointers are to device memory; values that are held in tensors are read by the kernels, never by the host.
#pragma once
#include <cuda_runtime_api.h>

#include "../cpu/kernels.h"

namespace fastvae::cuda {

using cpu::DType;
using cpu::Element;
using cpu::Operand;
using cpu::Result;
using cpu::Weights;
using cpu::kMaxConstants;

constexpr int kMaxParams = 4;  // of one likelihood, a mixture of negative binomials

// One fp32 or fp64 number per row, `stride` elements apart (0 if all rows share one), or a single number of any floating-point type. Null
// data means that none is given.
struct Numbers {
  const void* data = nullptr;
  DType type = DType::f32;
  int64_t stride = 0;
};

// The same as an output, where the numbers are contiguous. Null data means that it is not requested.
struct Output {
  void* data = nullptr;
  DType type = DType::f32;
};

// Where blocks leave partial results for other blocks. `scratch` has as many bytes as the function's ..._scratch returns for the same
// arguments; it is aligned to 16 bytes and its contents do not matter. `counter` points to kCounters adjacent counters, which must be
// zero before the launch and are zero again afterwards; launches that may run at the same time must not share them. Both may be null if
// ..._scratch returns 0.
constexpr int kCounters = 2;
struct Workspace {
  void* scratch = nullptr;
  uint32_t* counter = nullptr;
};

// Results per row are fp64 if the params are, and fp32 otherwise.
//   nll[r]         = sum of the row's elements + size * normaliser
//   loss           = nll[r] + beta kl[r] for each row, or, if `reduced`, weight times their sum
//   grads[i]      = d element / d params[i], times `weight`; if grad_loss or grad_nll is given, times
//                    weight * grad_loss[r] + grad_nll[r] instead, where one that is not given counts as 0
//   scalar_rows[r] = d nll[r] / d scalar
// A packed head has two views with the same runs for its params, and two for its grads. Each row of the target is a single run. The
// `weights` multiply the value and the derivatives of each element, including the normaliser.
struct NllArgs {
  Element element = Element::bernoulli;
  int64_t rows = 0, size = 0;
  Operand params[kMaxParams];
  Operand target;
  int64_t target_rows = 0;  // see cpu::target_row
  Weights weights;          // of elements, pixels or positions
  double constants[kMaxConstants] = {};  // as computed by csrc/ops/likelihood_table.h; for a scale of 1 if `scalar` is given
  double normaliser = 0;                 // per element
  Numbers scalar;                        // a learned log-scale (for the Gaussian, log-variance) for all elements
  Result grads[kMaxParams];
  double weight = 1;
  Numbers grad_loss, grad_nll;
  Numbers kl, beta;
  bool reduced = false;
  Output loss;  // null data if only the grads are requested
  Output nll, scalar_rows;
  // The value of each element times `weight`, dense and in the type of the rows; null data if not requested. Only for counts by their
  // mean (poisson_rate, not in half precision, and CountArgs).
  Result values;
  Workspace workspace;
};

// Mixtures of discretised logistics with 1 or 3 channels. The rows of params[0], grads[0] and the target (u8) are dense and consist of
// planes, which are stored one after another or, if `alternate`, interleaved at every pixel (channels_last). size = channels * pixels;
// the constants are those of math::DiscretizedLogistic.
struct MixtureArgs : NllArgs {
  int64_t pixels = 0, channels = 0, components = 0;
  bool alternate = false;
};

// The rows of params[0] and grads[0] are dense logits (positions, classes), and those of the target are class numbers (i64). A position
// whose target is `ignored` adds nothing; one whose target is not a class gives NaN. size = positions.
struct CategoricalArgs : NllArgs {
  int64_t positions = 0, classes = 0, ignored = 0;
};

// Negative binomial counts, as math/counts.h describes them: params are the mean (to which constants[0] is added), the dispersion and, if
// the likelihood is zero-inflated, the logits of zero inflation; null data if it is not. If `raw`, they are logits, from which the mean is
// library[row] * softmax(logits), and the logarithm of the dispersion. size = the number of features.
//
// The multinomial has logits only, in params[0], and is neither. A mixture of negative binomials has in params the mean, the dispersion, the
// logits of the mixture (params[kMixtureLogits]) and the mean of the second component (params[kSecondMean]).
//
// A dispersion with the row_stride 0 and `shared_dispersion` is shared by all rows, and has a type of its own. Its gradient is a sum over
// rows, `shared_gradient` of shape (size,), and grads[1] has null data. grads are dense; they have the type of params[0], or that of the rows.
constexpr int kMixtureLogits = 2, kSecondMean = 3;

struct CountArgs : NllArgs {
  bool raw = false, shared_dispersion = false;
  Numbers library;  // of any floating-point type
  Output shared_gradient, library_gradient;  // of any floating-point type
  // If raw, the derivatives by the logarithms of the means, dense and in the type of the rows, which are needed for grads[0]. They may be
  // the same memory.
  Result log_mean_grads;
  // Of a sparse target, row r has the values from starts[r] to starts[r + 1] in ascending columns, and target is a single row of
  // `stored` values. A row whose positions are out of range or out of order has an nll of NaN.
  const int64_t *starts = nullptr, *columns = nullptr;
  int64_t stored = 0;
};

// results[i] = gradients[i] times (weight * grad_loss[r] + grad_nll[r]) / weight. Nothing is written if both are the same memory and the
// factor is 1. All are dense tensors of shape (rows, size) and of one type.
//   scalar_gradient = sum of (weight * grad_loss[r] + grad_nll[r]) scalar_rows[r]
//   kl_gradient[r]  = weight * grad_loss[r] * beta
//   beta_gradient   = sum of weight * grad_loss[r] kl[r]
//
// `small[i]` is scaled in the same way. It has any floating-point type, and one number for each row, or as many as it likes if all rows
// have the same factor.
struct SmallGradient {
  Output gradient, result;
  int64_t count = 0;
};

struct NllBackwardArgs {
  int64_t rows = 0, size = 0;
  Operand gradients[kMaxParams];  // null data after the last
  Result results[kMaxParams];
  double weight = 1;  // as in NllArgs
  Numbers grad_loss, grad_nll;
  Numbers scalar_rows, kl, beta;
  Output scalar_gradient, kl_gradient, beta_gradient;
  SmallGradient small[2];  // null data after the last
  Workspace workspace;
};

// The seed and the offset for math/philox.h. If `tensor` is not null, it holds (seed, offset) as int64. Otherwise they are `*seed_pointer`
// and `*offset_pointer + offset_intragraph` if `captured`, and `seed` and `offset` if not, as in at::PhiloxCudaState. Draw k uses
// offset + 4 k, so the generator must be asked for 4 * draws.
struct NoiseSource {
  const int64_t* tensor = nullptr;
  uint64_t seed = 0, offset = 0;
  const int64_t *seed_pointer = nullptr, *offset_pointer = nullptr;
  uint64_t offset_intragraph = 0;
  bool captured = false;
  int64_t row_offset = 0;
};

// A diagonal Gaussian posterior with `draws` samples, and its prior, which is N(0, I) if prior_mu has null data. The scales of both are
// in the given form. All operands have the same type, and every row is a single run.
struct Latents {
  ScaleForm form;
  int64_t rows = 0, size = 0, draws = 0;
  Operand mu, logvar, prior_mu, prior_logvar;
  Operand eps;  // null data if it is to be drawn from `noise`
  int64_t eps_draw_stride = 0;
  NoiseSource noise;
};

// The KL is fp64 if mu is, and fp32 otherwise.
struct SampleArgs : Latents {
  Result z;  // null data if draws == 0
  int64_t z_draw_stride = 0;
  Output row_kl;
  Result element_kl;             // (rows, size); null data if not requested
  int64_t* used_seed = nullptr;  // output, or null: the (seed, offset) that the backward passes as `tensor`
  Workspace workspace;
};

struct SampleGradArgs : Latents {
  Operand grad_z;  // null data stands for zero
  int64_t grad_z_draw_stride = 0;
  Numbers grad_kl;          // per row; null data stands for zero
  Operand element_grad_kl;  // per element; an alternative to grad_kl
  double posterior_weight = 1, prior_weight = 1;  // factors of the KL's gradients
  Result grad_mu, grad_logvar, grad_prior_mu, grad_prior_logvar, grad_eps;  // null data if not requested
  int64_t grad_eps_draw_stride = 0;
};

// z of `draws` samples, and log q(z | x) and log p(z) of every draw and row, (draws, rows), fp64 if mu is and fp32 otherwise.
struct LogProbArgs : Latents {
  Result z;
  int64_t z_draw_stride = 0;
  Output log_q, log_p;
  int64_t* used_seed = nullptr;  // as in SampleArgs
};

// With `stl`, log q has no gradient but the one through z. Null gradients stand for zero.
struct LogProbGradArgs : Latents {
  bool stl = false;
  Operand grad_z;
  int64_t grad_z_draw_stride = 0;
  Numbers grad_log_q, grad_log_p;                                // (draws, rows)
  Result grad_mu, grad_logvar, grad_prior_mu, grad_prior_logvar;  // null data if not requested
};

// Mixtures of diagonal Gaussians (math/mixture.h): z is (points, dims), mu and logvar are (components, dims), all three of one type. The
// log-weights are one row that all points share (row_stride 0), or a row for each point, of any floating-point type; null data stands
// for equal weights. Results and their gradients are dense and fp64 if z is, and fp32 otherwise.
struct GaussianMixtureArgs {
  int64_t points = 0, components = 0, dims = 0;
  Operand z, mu, logvar, log_weight;
  Workspace workspace;
};

struct GaussianMixtureValueArgs : GaussianMixtureArgs {
  Output joint, per_dimension;  // (points,) and (points, dims); null data if not requested
};

// If `of_rows`, the gradient of the log-weights is (points, components), and otherwise (components,). Null data stands for a gradient of
// zero, or for one that is not requested. The values are read only where their gradient is given.
struct GaussianMixtureGradArgs : GaussianMixtureArgs {
  const void *joint = nullptr, *per_dimension = nullptr;  // the values
  Numbers grad_joint;
  const void* grad_per_dimension = nullptr;
  bool of_rows = false;
  Output grad_z, grad_mu, grad_logvar, grad_log_weight;  // of any floating-point type
};

int64_t nll_scratch(const NllArgs&);
int64_t mixture_scratch(const MixtureArgs&);
int64_t categorical_scratch(const CategoricalArgs&);
int64_t count_scratch(const CountArgs&);
int64_t count_mixture_scratch(const CountArgs&);
int64_t multinomial_scratch(const CountArgs&);
int64_t nll_backward_scratch(const NllBackwardArgs&);
int64_t sample_scratch(const SampleArgs&);
int64_t gaussian_mixture_scratch(const GaussianMixtureValueArgs&);
int64_t gaussian_mixture_grad_scratch(const GaussianMixtureGradArgs&);

cudaError_t nll(const NllArgs&, cudaStream_t stream);
cudaError_t mixture(const MixtureArgs&, cudaStream_t stream);
cudaError_t categorical(const CategoricalArgs&, cudaStream_t stream);
cudaError_t count_nll(const CountArgs&, cudaStream_t stream);
cudaError_t count_mixture(const CountArgs&, cudaStream_t stream);
cudaError_t multinomial(const CountArgs&, cudaStream_t stream);
cudaError_t nll_backward(const NllBackwardArgs&, cudaStream_t stream);
cudaError_t sample(const SampleArgs&, cudaStream_t stream);
cudaError_t sample_grad(const SampleGradArgs&, cudaStream_t stream);
cudaError_t log_probs(const LogProbArgs&, cudaStream_t stream);
cudaError_t log_probs_grad(const LogProbGradArgs&, cudaStream_t stream);
cudaError_t gaussian_mixture(const GaussianMixtureValueArgs&, cudaStream_t stream);
cudaError_t gaussian_mixture_grad(const GaussianMixtureGradArgs&, cudaStream_t stream);

}  // namespace fastvae::cuda
