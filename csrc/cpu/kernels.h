// The interface between csrc/ops and the CPU kernels. Arguments are plain structs, and results are written through pointers. Neither
// torch types nor instruction sets appear here.
#pragma once
#include <cstdint>

#include "../math/scale_form.h"

namespace fastvae::cpu {

// u8 is a pixel and is read as x / 255; byte and the wider integers are read as plain numbers.
enum class DType : int8_t { f32, f64, f16, bf16, u8, boolean, byte, u16, i32, i64 };

constexpr int64_t item_size(DType type) {
  switch (type) {
    case DType::f64: case DType::i64: return 8;
    case DType::f32: case DType::i32: return 4;
    case DType::f16: case DType::bf16: case DType::u16: return 2;
    default: return 1;
  }
}

// A (rows, size) operand, whose strides are counted in elements. Each row consists of runs of `run` consecutive elements that start
// `run_stride` apart; a dense row is a single run. (A packed head in channels_last layout has one run per pixel.)
struct Operand {
  const void* data = nullptr;
  DType type = DType::f32;
  int64_t row_stride = 0;
  int64_t run = 0;
  int64_t run_stride = 0;
};

struct Result {
  void* data = nullptr;
  DType type = DType::f32;
  int64_t row_stride = 0;
  int64_t run = 0;
  int64_t run_stride = 0;
};

// The same view, moved forward by `elements`.
template <class View>
inline __attribute__((always_inline)) View shifted(View view, int64_t elements) {
  if (view.data) view.data = const_cast<char*>(static_cast<const char*>(view.data)) + elements * item_size(view.type);
  return view;
}

// The target row that belongs to a row of the params. With several draws, which are stored one after another, the draws share
// `target_rows` rows; `target_rows` is 0 if every row has its own target.
template <class Args>
constexpr int64_t target_row(const Args& args, int64_t row) {
  return args.target_rows ? row % args.target_rows : row;
}

constexpr int kMaxLevels = 4;

// The weights of the elements of a (target rows, size) target, or of its positions or pixels. The dimensions of a row are nested loops:
// `levels` of them, the innermost first, with sizes[i] steps of strides[i] elements. A stride of 0 repeats a weight. Where the weight is 0,
// the element is left out, and whatever it contains reaches no result.
struct Weights {
  const void* data = nullptr;  // null if there are no weights
  DType type = DType::f32;     // not u8
  int64_t row_stride = 0;
  int levels = 0;
  int64_t sizes[kMaxLevels] = {}, strides[kMaxLevels] = {};
  uint64_t inverses[kMaxLevels] = {};  // see inverse_of

  // 2^63 / size, rounded up. i / size is then the high half of 2 * i * inverse while i * size is below 2^63, so that CUDA needs no division.
  static constexpr uint64_t inverse_of(int64_t size) { return ((uint64_t(1) << 63) - 1) / static_cast<uint64_t>(size) + 1; }
};

constexpr int kMaxParams = 3;
constexpr int kMaxConstants = 5;

enum class Element : int8_t {
  none = -1,  // the likelihood is not a sum of independent elements
#define FASTVAE_ELEMENT(name, Struct) name,
#include "../likelihoods.def"
};

// row_nll[r] is the sum of the element's values over the row. grads[i], if requested, is the derivative of each element times
// weight[r * weight_stride]. Here and below, `weights` multiply both.
struct NllArgs {
  Element element;
  bool in_double;
  int64_t rows, size;
  Operand params[kMaxParams];
  Operand target;
  int64_t target_rows;  // see target_row
  double constants[kMaxConstants];
  Result grads[kMaxParams];
  const double* weight;
  int64_t weight_stride;
  double* row_nll;
  // For an Element that has_scale_grad, the sum of (params[0] - target) times the derivative before weight[r]; may be null.
  double* row_scale_grad;
  Weights weights;
  double* row_weights;  // the sum of the weights of each row; null without weights
  // The weighted value of each element; null data if not requested. Supported only where `element` gives the complete value.
  Result values;
};

// Counts of shape (rows, genes); see math/counts.h. The multinomial reads the logits from `mean`, and has none of the other params.
struct CountArgs {
  bool in_double;
  bool raw;       // mean holds logits, dispersion holds logarithms, and the mean is library[row] * softmax(logits) over the row
  bool inflated;  // the distribution is zero-inflated, with logits `zero_logits`
  int64_t rows, genes;
  Operand mean, dispersion, zero_logits;  // a dispersion with one row is shared by all rows (row_stride 0)
  bool shared_dispersion;
  double eps;  // added to the mean
  const double* library;
  // The dense target. It is read only if `starts` is null; otherwise row r has target_values[i] in column columns[i], for i from
  // starts[r] to starts[r + 1].
  Operand target;
  int64_t target_rows;  // see target_row
  const int64_t *starts, *columns;
  Operand target_values;  // a single row
  Weights weights;
  // Derivatives times weight[row * weight_stride]; those with null data are not requested.
  Result d_mean, d_dispersion, d_zero_logits;  // d_dispersion is per element, even if the dispersion is shared
  double* d_shared_dispersion;  // (genes,), summed over the rows
  double* d_library;            // (rows,)
  const double* weight;
  int64_t weight_stride;
  double* row_nll;
  Result values;  // the weighted value of each element; null data if not requested
};

// The logits have shape (rows, positions, classes), where positions and classes are dense. The views describe the first position, and
// grads are dense. A position whose target is `ignored` adds nothing.
struct CategoricalArgs {
  bool in_double;
  int64_t rows, positions, classes;
  Operand logits;
  int64_t row_stride;
  const int64_t* target;
  int64_t target_rows;  // see target_row
  int64_t target_row_stride;
  int64_t ignored;
  Weights weights;  // of positions
  Result grads;  // null data if not requested
  const double* weight;
  int64_t weight_stride;
  double* row_nll;
};

// The discretised logistic (components == 0) and mixtures of it with 1 or 3 channels. params and grads consist of planes of `pixels`
// elements; the structs in discretized.cpp list the planes. In memory, the planes are stored one after another or, if `alternate`,
// interleaved at every pixel (channels_last). The same holds for the target's channels.
struct LogisticArgs {
  bool in_double, alternate;
  int64_t rows, pixels, channels, components;
  double levels, log_scale_floor, min_mass;
  Operand params;
  Operand target;  // u8: levels
  int64_t target_rows;  // see target_row
  Weights weights;  // of elements in the order of the target or, with components, of pixels
  Result grads;   // null data if not requested
  const double* weight;
  int64_t weight_stride;
  double* row_nll;
};

// Where the noise of Philox4x32-10 starts; see math/philox.h.
struct NoiseKey {
  uint64_t seed, offset, row_offset;
};

// A diagonal Gaussian posterior with `draws` samples, and its prior, which is N(0, I) if prior_mu has null data. The scales of both are
// in the given form. The noise is `eps` if that is given, and is otherwise drawn from `key`.
struct Latents {
  bool in_double;
  ScaleForm form;
  int64_t rows, size, draws;
  Operand mu, logvar, prior_mu, prior_logvar, eps;
  int64_t eps_draw_stride;
  NoiseKey key;
};

struct SampleArgs : Latents {
  Result z;  // null data if draws == 0
  int64_t z_draw_stride;
  double* row_kl;     // may be null
  Result element_kl;  // data may be null
};

struct SampleGradArgs : Latents {
  Operand grad_z;  // null data stands for zero
  int64_t grad_z_draw_stride;
  Operand grad_kl;  // one value per element, or per row (run == 1, run_stride == 0); null data stands for zero
  double posterior_weight, prior_weight;  // factors of the KL's gradients
  Result grad_mu, grad_logvar, grad_prior_mu, grad_prior_logvar, grad_eps;  // null data if not requested
  int64_t grad_eps_draw_stride;
};

// z of `draws` samples, and log q(z | x) and log p(z) of every draw and row, (draws, rows).
struct LogProbArgs : Latents {
  Result z;
  int64_t z_draw_stride;
  double *log_q, *log_p;
};

// With `stl`, log q has no gradient but the one through z. Null gradients stand for zero.
struct LogProbGradArgs : Latents {
  bool stl;
  Operand grad_z;
  int64_t grad_z_draw_stride;
  const double *grad_log_q, *grad_log_p;                            // (draws, rows)
  Result grad_mu, grad_logvar, grad_prior_mu, grad_prior_logvar;  // null data if not requested
};

// Points (points, dims) and the components (components, dims) of a mixture, all dense and of the type of the computation. The log-weights
// of a point start log_weight_stride after those of the point before, or are shared by all (0).
struct MixtureArgs {
  bool in_double;
  int64_t points, components, dims;
  const void *z, *mu, *logvar, *log_weight;
  int64_t log_weight_stride;
};

struct MixtureValueArgs : MixtureArgs {
  void* joint;          // (points,)
  void* per_dimension;  // (points, dims); one of the two may be null
};

struct MixtureGradArgs : MixtureArgs {
  const void *joint, *per_dimension;            // the values
  const void *grad_joint, *grad_per_dimension;  // one of the two may be null
  void *grad_z, *grad_mu, *grad_logvar;
  void* grad_log_weight;  // the size of log_weight; may be null
};

// A sparse matrix (rows, width) in CSR form, whose columns ascend in every row, and a dense one (width, outputs). All numbers have the type
// of the computation.
struct SparseArgs {
  bool in_double;
  int64_t rows, width, outputs;
  const int64_t *starts, *columns;
  const void* values;
};

struct SparseProductArgs : SparseArgs {
  const void *weight, *bias;  // (width, outputs), and (outputs,) or null
  void* out;                  // (rows, outputs)
};

struct SparseProductGradArgs : SparseArgs {
  const void* grad;   // (rows, outputs)
  void* grad_weight;  // (width, outputs)
};

// out = in * factor[row * factor_stride]; `out` may be the same memory as `in`.
struct ScaleArgs {
  int64_t rows, size;
  Operand in;
  Result out;
  const double* factor;
  int64_t factor_stride;
};

// out[k] = factor * in[k], element by element, where out[k] may be the same memory as in[k]. If sums[k] is given, the sum of the
// products over rows is written there instead. `in` is dense, and inputs have the type of the computation.
struct ScaleElementsArgs {
  bool in_double;
  int64_t rows, size;
  const void* factor;
  int64_t factor_stride;  // between rows
  bool factor_per_row;    // each row has a single factor, not one per element
  int count;
  const void* in[kMaxParams];
  Result out[kMaxParams];
  double* sums[kMaxParams];  // (size,)
};

#define FASTVAE_DECLARE_KERNELS(isa)              \
  namespace isa {                                 \
  void nll(const NllArgs&);                       \
  void count_nll(const CountArgs&);               \
  void multinomial(const CountArgs&);             \
  void categorical(const CategoricalArgs&);       \
  void discretized_logistic(const LogisticArgs&); \
  void sample(const SampleArgs&);                 \
  void sample_grad(const SampleGradArgs&);        \
  void log_probs(const LogProbArgs&);             \
  void log_probs_grad(const LogProbGradArgs&);    \
  void mixture(const MixtureValueArgs&);          \
  void mixture_grad(const MixtureGradArgs&);      \
  void sparse_product(const SparseProductArgs&);  \
  void sparse_product_grad(const SparseProductGradArgs&); \
  void scale_rows(const ScaleArgs&);              \
  void scale_elements(const ScaleElementsArgs&);  \
  }
FASTVAE_DECLARE_KERNELS(isa_default)
FASTVAE_DECLARE_KERNELS(isa_avx2)
FASTVAE_DECLARE_KERNELS(isa_avx512)
#undef FASTVAE_DECLARE_KERNELS

}  // namespace fastvae::cpu
