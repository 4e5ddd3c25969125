// What csrc/ops asks of the CPU: plain structs in, results through pointers. No torch types, no instruction sets.
#pragma once
#include <cstdint>

namespace fastvae::cpu {

// u8 is a pixel, read as x / 255; byte is a number, read as it is, as are the wider integers.
enum class DType : int8_t { f32, f64, f16, bf16, u8, boolean, byte, u16, i32, i64 };

constexpr int64_t item_size(DType type) {
  switch (type) {
    case DType::f64: case DType::i64: return 8;
    case DType::f32: case DType::i32: return 4;
    case DType::f16: case DType::bf16: case DType::u16: return 2;
    default: return 1;
  }
}

// A (rows, size) operand, strides counted in elements. Within a row its elements lie in runs of `run` consecutive ones that start
// `run_stride` apart; a dense row is a single run. (A packed head in channels_last layout has a run for each pixel.)
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

// The same view, `elements` further on.
template <class View>
inline __attribute__((always_inline)) View shifted(View view, int64_t elements) {
  if (view.data) view.data = const_cast<char*>(static_cast<const char*>(view.data)) + elements * item_size(view.type);
  return view;
}

// The target of a row. One of `target_rows` rows serves several draws, which lie one behind the other; 0: each row has its own.
template <class Args>
constexpr int64_t target_row(const Args& args, int64_t row) {
  return args.target_rows ? row % args.target_rows : row;
}

constexpr int kMaxParams = 3;
constexpr int kMaxConstants = 5;

enum class Element : int8_t {
  none = -1,  // the elements are not each for themselves
#define FASTVAE_ELEMENT(name, Struct) name,
#include "../likelihoods.def"
};

// row_nll[r] = sum over the row of Element's value; slopes[i] (where wanted) = its derivative times weight[r * weight_stride].
struct NllArgs {
  Element element;
  bool in_double;
  int64_t rows, size;
  Operand params[kMaxParams];
  Operand target;
  int64_t target_rows;  // see target_row
  double constants[kMaxConstants];
  Result slopes[kMaxParams];
  const double* weight;
  int64_t weight_stride;
  double* row_nll;
  double* row_pull;  // of an Element that has_pull: the sum of (params[0] - target) times its unweighted derivative; may be null
  Result values;     // the value of each element, weighted; no data: not wanted. Of those alone whose `element` is the whole of it
};

// Negative binomial counts of (rows, genes), see math/counts.h.
struct CountArgs {
  bool in_double;
  bool raw;       // mean holds logits and dispersion logarithms: the mean is library[row] * softmax(logits) over the row
  bool inflated;  // there are additional zeros, of logits `zero_logits`
  int64_t rows, genes;
  Operand mean, dispersion, zero_logits;  // a dispersion of one row serves all rows (row_stride 0)
  bool shared_dispersion;
  double eps;  // added to the mean
  const double* library;
  Operand target;  // read where there are no `starts`; else row r holds target_values of columns[i], i from starts[r] to starts[r + 1]
  int64_t target_rows;  // see target_row
  const int64_t *starts, *columns;
  Operand target_values;  // one row
  // Derivatives times weight[row * weight_stride]; what has no data is not wanted.
  Result d_mean, d_dispersion, d_zero_logits;  // d_dispersion: of each element, of a shared one too
  double* d_shared_dispersion;  // (genes,), summed over the rows
  double* d_library;            // (rows,)
  const double* weight;
  int64_t weight_stride;
  double* row_nll;
  Result values;  // of each element, weighted; no data: not wanted
};

// logits (rows, positions, classes), positions and classes dense; the views are those of the first position, and slopes are dense.
// A position whose target is `ignored` adds nothing.
struct CategoricalArgs {
  bool in_double;
  int64_t rows, positions, classes;
  Operand logits;
  int64_t row_stride;
  const int64_t* target;
  int64_t target_rows;  // see target_row
  int64_t target_row_stride;
  int64_t ignored;
  Result slopes;  // no data: not wanted
  const double* weight;
  int64_t weight_stride;
  double* row_nll;
};

// The discretised logistic (components == 0) and the mixtures of it, of 1 or 3 channels; params and slopes have a plane of `pixels`
// for each of what the kernel's struct lists (discretized.cpp). In memory planes lie one behind the other or, where `alternate`, take
// turns at every pixel (channels_last); the target's channels likewise.
struct LogisticArgs {
  bool in_double, alternate;
  int64_t rows, pixels, channels, components;
  double levels, log_scale_floor, min_mass;
  Operand params;
  Operand target;  // u8: levels
  int64_t target_rows;  // see target_row
  Result slopes;   // no data: not wanted
  const double* weight;
  int64_t weight_stride;
  double* row_nll;
};

// The noise of Philox4x32-10: see math/philox.h.
struct NoiseKey {
  uint64_t seed, offset, row_offset;
};

// A diagonal Gaussian posterior and its prior (no data: N(0, I)), `draws` samples of it, and the noise: `eps` or drawn from `key`.
struct Latents {
  bool in_double;
  int64_t rows, size, draws;
  Operand mu, logvar, prior_mu, prior_logvar, eps;
  int64_t eps_draw_stride;
  NoiseKey key;
};

struct SampleArgs : Latents {
  Result z;  // no data where draws == 0
  int64_t z_draw_stride;
  double* row_kl;     // may be null
  Result element_kl;  // may have no data
};

struct SampleGradArgs : Latents {
  Operand grad_z;  // no data: zero
  int64_t grad_z_draw_stride;
  Operand grad_kl;  // per element, or a single value per row (run == 1, run_stride == 0); no data: zero
  Result grad_mu, grad_logvar, grad_prior_mu, grad_prior_logvar, grad_eps;  // no data: not wanted
  int64_t grad_eps_draw_stride;
};

// out = in * factor[row * factor_stride]; out may be in.
struct ScaleArgs {
  int64_t rows, size;
  Operand in;
  Result out;
  const double* factor;
  int64_t factor_stride;
};

// out[k] = factor * in[k], element by element, where out[k] may be in[k]; or where there are sums[k], in their place, the sum over rows.
// What is read is of the type that is computed in, and `in` is dense.
struct ScaleElementsArgs {
  bool in_double;
  int64_t rows, size;
  const void* factor;
  int64_t factor_stride;  // of rows
  bool factor_per_row;    // a row has one, and not one for each element
  int count;
  const void* in[kMaxParams];
  Result out[kMaxParams];
  double* sums[kMaxParams];  // (size,)
};

#define FASTVAE_DECLARE_KERNELS(isa)              \
  namespace isa {                                 \
  void nll(const NllArgs&);                       \
  void count_nll(const CountArgs&);               \
  void categorical(const CategoricalArgs&);       \
  void discretized_logistic(const LogisticArgs&); \
  void sample(const SampleArgs&);                 \
  void sample_grad(const SampleGradArgs&);        \
  void scale_rows(const ScaleArgs&);              \
  void scale_elements(const ScaleElementsArgs&);  \
  }
FASTVAE_DECLARE_KERNELS(isa_default)
FASTVAE_DECLARE_KERNELS(isa_avx2)
FASTVAE_DECLARE_KERNELS(isa_avx512)
#undef FASTVAE_DECLARE_KERNELS

}  // namespace fastvae::cpu
