// Every kernel in one program, for the sanitizers: memory of exactly the required size, and all paths: wide and single accesses, one or
// several blocks per row, a last block that adds up. Results are checked only roughly; tests/backends/cuda/test_cuda_kernels.py checks
// them.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <utility>
#include <vector>

#include <cuda_bf16.h>

#include "kernels.h"

using namespace fastvae::cuda;
using fastvae::ScaleForm;

namespace {

int failures = 0;

void check(bool right, const char* what, int64_t rows, int64_t size) {
  if (right) return;
  ++failures;
  std::printf("%s is wrong for (%lld, %lld)\n", what, static_cast<long long>(rows), static_cast<long long>(size));
}

bool near(double a, double b, double tolerance) { return std::abs(a - b) <= tolerance * (1 + std::abs(b)); }

// A tensor whose memory ends at its last element. It begins `shift` elements in, so that it is not aligned.
struct Buffer {
  DType type;
  int64_t count, shift;
  std::vector<char> bytes;

  Buffer(DType type, int64_t count, int64_t shift = 0)
      : type(type), count(count), shift(shift), bytes((count + shift) * fastvae::cpu::item_size(type)) {}
  void* data() { return bytes.data() + shift * fastvae::cpu::item_size(type); }
  double get(int64_t i) {
    if (type == DType::f32) return static_cast<float*>(data())[i];
    if (type == DType::bf16) return __bfloat162float(static_cast<__nv_bfloat16*>(data())[i]);
    return static_cast<uint8_t*>(data())[i] / 255.0;
  }
  Buffer& fill(std::mt19937& random) {
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < count; ++i) {
      if (type == DType::f32) static_cast<float*>(data())[i] = normal(random);
      else if (type == DType::bf16) static_cast<__nv_bfloat16*>(data())[i] = __float2bfloat16_rn(normal(random));
      else static_cast<uint8_t*>(data())[i] = static_cast<uint8_t>(random());
    }
    return *this;
  }
  void make_positive() {
    for (int64_t i = 0; i < count; ++i) {
      const float x = std::exp(static_cast<float>(get(i)));
      if (type == DType::f32) static_cast<float*>(data())[i] = x;
      else static_cast<__nv_bfloat16*>(data())[i] = __float2bfloat16_rn(x);
    }
  }
  template <class View>
  View view(int64_t size) {
    return {data(), type, size, size, 0};
  }
  Output output() { return {data(), type}; }
  Numbers numbers(int64_t stride = 1) { return {data(), type, stride}; }
};

// Weights of rows of `size` elements, in memory that ends at the last of them.
Weights weights_of(Buffer& weight, int64_t size) {
  for (int64_t i = 0; i < weight.count; ++i) static_cast<float*>(weight.data())[i] = static_cast<float>(i % 3);
  return {weight.data(), DType::f32, size, 1, {size}, {1}, {Weights::inverse_of(size)}};
}

struct Scratch {
  std::vector<double> memory;
  uint32_t counters[kCounters] = {};

  Workspace of(int64_t bytes) {
    memory.resize(bytes / 8);
    return {bytes ? memory.data() : nullptr, counters};
  }
  ~Scratch() { check(counters[0] == 0 && counters[1] == 0, "the counters", 0, 0); }
};

void reconstruction(std::mt19937& random, DType type, DType target_type, int64_t rows, int64_t size, int64_t shift) {
  Scratch scratch;
  Buffer logits(type, rows * size, shift), target(target_type, rows * size), grad(type, rows * size, shift), kl(DType::f32, rows);
  Buffer nll(DType::f32, rows), loss(DType::f32, 1), one(DType::f32, 1), kl_gradient(DType::f32, rows), beta_gradient(DType::f32, 1);
  logits.fill(random), target.fill(random), kl.fill(random), one.fill(random);
  NllArgs args;
  args.rows = rows, args.size = size;
  args.params[0] = logits.view<Operand>(size), args.grads[0] = grad.view<Result>(size), args.target = target.view<Operand>(size);
  args.weight = 1.0 / static_cast<double>(rows), args.reduced = true;
  args.nll = nll.output(), args.loss = loss.output(), args.kl = kl.numbers();
  args.workspace = scratch.of(nll_scratch(args));
  check(fastvae::cuda::nll(args, nullptr) == cudaSuccess, "nll", rows, size);

  double total = 0;
  for (int64_t r = 0; r < rows; ++r) {
    double sum = 0;
    for (int64_t i = r * size; i < (r + 1) * size; ++i)
      sum += std::log1p(std::exp(-std::abs(logits.get(i)))) + std::max(logits.get(i), 0.0) - logits.get(i) * target.get(i);
    check(near(nll.get(r), sum, 1e-4), "a row's nll", rows, size);
    total += sum + kl.get(r);
  }
  check(near(loss.get(0), total / static_cast<double>(rows), 1e-4), "the loss", rows, size);

  Buffer weight(DType::f32, rows * size);
  NllArgs weighted = args;
  weighted.weights = weights_of(weight, size);
  weighted.workspace = scratch.of(nll_scratch(weighted));
  check(fastvae::cuda::nll(weighted, nullptr) == cudaSuccess, "nll with weights", rows, size);
  for (int64_t r = 0; r < rows; ++r) {
    double sum = 0;
    for (int64_t i = r * size; i < (r + 1) * size; ++i)
      sum += i % 3 * (std::log1p(std::exp(-std::abs(logits.get(i)))) + std::max(logits.get(i), 0.0) - logits.get(i) * target.get(i));
    check(near(nll.get(r), sum, 1e-4), "a row's nll with weights", rows, size);
  }

  for (const bool by_row : {false, true}) {
    NllBackwardArgs back;
    back.rows = rows, back.size = size, back.weight = args.weight;
    back.gradients[0] = grad.view<Operand>(size), back.results[0] = grad.view<Result>(size);
    back.grad_loss = one.numbers(0);
    if (by_row) back.grad_nll = kl.numbers();
    back.kl = back.scalar_rows = kl.numbers();
    back.kl_gradient = kl_gradient.output(), back.beta_gradient = beta_gradient.output();
    back.workspace = scratch.of(nll_backward_scratch(back));
    check(nll_backward(back, nullptr) == cudaSuccess, "nll_backward", rows, size);
    double sum = 0;
    for (int64_t r = 0; r < rows; ++r) sum += one.get(0) * args.weight * kl.get(r);
    check(near(beta_gradient.get(0), sum, 1e-4), "beta's gradient", rows, size);
  }
}

// -log of the mass of a level by the plain formula; scales are wide enough for the difference to be accurate.
double log_mass(int level, double mean, double log_scale) {
  const double inverse = std::exp(-std::max(log_scale, -0.5));
  const auto below = [&](int edge) { return 1 / (1 + std::exp((mean - (2 * edge - 256) / 255.0) * inverse)); };
  return std::log((level == 255 ? 1 : below(level + 1)) - (level == 0 ? 0 : below(level)));
}

void levels(std::mt19937& random, DType type, int64_t components, int64_t channels, int64_t rows, int64_t pixels, int64_t shift,
            bool in_turns) {
  const int64_t blocks = channels == 3 ? 3 : 2, K = components, planes = K ? K * (1 + blocks * channels) : 2 * channels;
  const int64_t size = planes * pixels;
  Scratch scratch;
  Buffer params(type, rows * size, shift), grads(type, rows * size, shift), target(DType::u8, rows * channels * pixels);
  Buffer nll(DType::f32, rows), loss(DType::f32, 1), factors(DType::f32, rows);
  params.fill(random), target.fill(random), factors.fill(random);
  MixtureArgs args;
  args.element = Element::discretized_logistic;
  args.rows = rows, args.size = channels * pixels, args.pixels = pixels, args.channels = channels, args.components = K;
  args.alternate = in_turns;
  const double constants[] = {255, 1 / 255.0, std::log(2 / 255.0), -0.5, 0};
  std::copy(constants, constants + 5, args.constants);
  args.params[0] = params.view<Operand>(size), args.grads[0] = grads.view<Result>(size);
  args.target = target.view<Operand>(channels * pixels);
  args.target.type = DType::byte;
  if (!K) {
    const auto half = [&](auto whole, int64_t which) {
      whole = fastvae::cpu::shifted(whole, which * (in_turns ? channels : channels * pixels));
      whole.run = in_turns ? channels : channels * pixels, whole.run_stride = in_turns ? 2 * channels : 0;
      return whole;
    };
    args.params[1] = half(args.params[0], 1), args.params[0] = half(args.params[0], 0);
    args.grads[1] = half(args.grads[0], 1), args.grads[0] = half(args.grads[0], 0);
  }
  args.nll = nll.output(), args.loss = loss.output(), args.reduced = true;
  args.workspace = scratch.of(K ? mixture_scratch(args) : nll_scratch(args));
  check((K ? mixture(args, nullptr) : fastvae::cuda::nll(args, nullptr)) == cudaSuccess, "logistics", rows, pixels);
  double all = 0;
  for (int64_t row = 0; row < rows; ++row) {
    double sum = 0;
    for (int64_t i = 0; i < pixels; ++i) {
      const auto param = [&](int64_t plane) { return params.get(row * size + (in_turns ? i * planes + plane : plane * pixels + i)); };
      const auto level = [&](int64_t c) {
        return static_cast<int>(std::lround(255 * target.get(row * channels * pixels + (in_turns ? i * channels + c : c * pixels + i))));
      };
      double mixed = 0, weights = 0;
      for (int64_t k = 0; k < std::max<int64_t>(K, 1); ++k) {
        double one = K ? param(k) : 0;
        weights += std::exp(one);
        for (int64_t c = 0; c < channels; ++c) {
          const auto of = [&](int64_t c, int64_t block) {
            return K ? param(K * (1 + blocks * c + block) + k) : param(block * channels + c);
          };
          double mean = of(c, 0);
          for (int64_t j = 0; j < (K && channels == 3 ? c : 0); ++j) mean += std::tanh(of(c + j - 1, 2)) * (2 * level(j) - 255) / 255;
          one += log_mass(level(c), mean, of(c, 1));
        }
        mixed += std::exp(one);
      }
      sum += std::log(weights / mixed);
    }
    check(near(nll.get(row), sum, 1e-4), "a row of levels", rows, pixels);
    all += sum;
  }
  check(near(loss.get(0), all, 1e-4), "the loss of levels", rows, pixels);
  args.loss = args.nll = {};
  args.grad_nll = factors.numbers();
  check((K ? mixture(args, nullptr) : fastvae::cuda::nll(args, nullptr)) == cudaSuccess, "logistics", rows, pixels);
  const int64_t weighted = K ? pixels : channels * pixels;
  Buffer weight(DType::f32, rows * weighted);
  args.weights = weights_of(weight, weighted);
  check((K ? mixture(args, nullptr) : fastvae::cuda::nll(args, nullptr)) == cudaSuccess, "logistics with weights", rows, pixels);
}

void words(std::mt19937& random, DType type, int64_t rows, int64_t positions, int64_t classes, int64_t shift) {
  Scratch scratch;
  const int64_t size = positions * classes;
  Buffer logits(type, rows * size, shift), grads(type, rows * size, shift), nll(DType::f32, rows), loss(DType::f32, 1);
  Buffer factors(DType::f32, rows);
  logits.fill(random), factors.fill(random);
  std::vector<int64_t> target(rows * positions);
  for (auto& number : target) number = static_cast<int64_t>(random() % (classes + 1)) - 1;  // -1 is ignored
  CategoricalArgs args;
  args.rows = rows, args.size = args.positions = positions, args.classes = classes, args.ignored = -1;
  args.params[0] = logits.view<Operand>(size), args.grads[0] = grads.view<Result>(size);
  args.target = {target.data(), DType::i64, positions, positions, 0};
  args.nll = nll.output(), args.loss = loss.output(), args.reduced = true;
  args.workspace = scratch.of(categorical_scratch(args));
  check(categorical(args, nullptr) == cudaSuccess, "categorical", rows, size);
  double all = 0;
  for (int64_t row = 0; row < rows; ++row) {
    double sum = 0;
    for (int64_t t = row * positions; t < (row + 1) * positions; ++t) {
      double total = 0;
      for (int64_t v = 0; v < classes; ++v) total += std::exp(logits.get(t * classes + v));
      if (target[t] >= 0) sum += std::log(total) - logits.get(t * classes + target[t]);
    }
    check(near(nll.get(row), sum, 1e-4), "a row of words", rows, size);
    all += sum;
  }
  check(near(loss.get(0), all, 1e-4), "the loss of words", rows, size);
  args.loss = args.nll = {};
  args.grad_nll = factors.numbers();
  check(categorical(args, nullptr) == cudaSuccess, "categorical", rows, size);
  Buffer weight(DType::f32, rows * positions);
  args.weights = weights_of(weight, positions);
  check(categorical(args, nullptr) == cudaSuccess, "categorical with weights", rows, size);
}

// Counts of which most are 0, as float32 whose memory ends at the last of them.
struct Counts {
  int64_t features;
  std::vector<float> dense, values;
  std::vector<int64_t> starts{0}, columns;

  Counts(std::mt19937& random, int64_t rows, int64_t features) : features(features), dense(rows * features) {
    for (int64_t i = 0; i < rows * features; ++i) {
      if (random() % 4 == 0) dense[i] = static_cast<float>(random() % 12);
      if (dense[i] != 0) values.push_back(dense[i]), columns.push_back(i % features);
      if (i % features == features - 1) starts.push_back(static_cast<int64_t>(values.size()));
    }
    values.shrink_to_fit(), starts.shrink_to_fit(), columns.shrink_to_fit();
  }
  void pass_to(CountArgs& args, bool sparse) {
    args.target = {dense.data(), DType::f32, features, features, 0};
    if (!sparse) return;
    args.target = {values.data(), DType::f32, 1, 1, 0};
    args.starts = starts.data(), args.columns = columns.data(), args.stored = static_cast<int64_t>(values.size());
  }
};

// Zero-inflated counts by their logits, with every gradient, and a target that is dense or sparse.
void counts(std::mt19937& random, DType type, int64_t rows, int64_t features, int64_t shift, bool shared, bool sparse) {
  Scratch scratch;
  const int64_t cells = rows * features;
  Buffer logits(type, cells, shift), dispersion(type, shared ? features : cells, shift), zeros(type, cells, shift), library(DType::f32, rows);
  Buffer d_logits(type, cells, shift), d_dispersion(type, shared ? features : cells), d_zeros(type, cells), d_library(DType::f32, rows);
  Buffer nll(DType::f32, rows), loss(DType::f32, 1), log_grads(DType::f32, cells), factors(DType::f32, rows);
  logits.fill(random), dispersion.fill(random), zeros.fill(random), factors.fill(random);
  for (int64_t r = 0; r < rows; ++r) static_cast<float*>(library.data())[r] = static_cast<float>(features);
  Counts target(random, rows, features);
  CountArgs args;
  args.rows = rows, args.size = features, args.raw = true, args.shared_dispersion = shared;
  args.params[0] = logits.view<Operand>(features), args.params[1] = dispersion.view<Operand>(features);
  args.params[2] = zeros.view<Operand>(features), args.library = library.numbers();
  args.grads[0] = d_logits.view<Result>(features), args.grads[2] = d_zeros.view<Result>(features);
  if (shared) args.params[1].row_stride = 0, args.shared_gradient = d_dispersion.output();
  else args.grads[1] = d_dispersion.view<Result>(features);
  args.library_gradient = d_library.output();
  args.log_mean_grads = type == DType::f32 ? args.grads[0] : log_grads.view<Result>(features);
  target.pass_to(args, sparse);
  args.nll = nll.output(), args.loss = loss.output(), args.reduced = true;
  args.workspace = scratch.of(count_scratch(args));
  check(count_nll(args, nullptr) == cudaSuccess, "count_nll", rows, features);
  double all = 0;
  for (int64_t r = 0; r < rows; ++r) {
    double sum = 0, normaliser = 0;
    for (int64_t g = 0; g < features; ++g) normaliser += std::exp(logits.get(r * features + g));
    for (int64_t g = 0; g < features; ++g) {
      const int64_t i = r * features + g;
      const double mu = static_cast<double>(features) * std::exp(logits.get(i)) / normaliser, t = target.dense[i];
      const double theta = std::exp(dispersion.get(shared ? g : i)), p = 1 / (1 + std::exp(-zeros.get(i)));
      const double log_p = std::lgamma(t + theta) - std::lgamma(theta) - std::lgamma(t + 1) - theta * std::log1p(mu / theta) +
                           t * std::log(mu / (theta + mu));
      sum -= std::log((t == 0 ? p : 0) + (1 - p) * std::exp(log_p));
    }
    check(near(nll.get(r), sum, 1e-4), "a row of counts", rows, features);
    all += sum;
  }
  check(near(loss.get(0), all, 1e-4), "the loss of counts", rows, features);
  args.loss = args.nll = {};
  args.grad_nll = factors.numbers();
  args.workspace = scratch.of(count_scratch(args));
  check(count_nll(args, nullptr) == cudaSuccess, "count_nll", rows, features);
  Buffer weight(DType::f32, cells);
  args.weights = weights_of(weight, features);
  args.workspace = scratch.of(count_scratch(args));
  check(count_nll(args, nullptr) == cudaSuccess, "count_nll with weights", rows, features);
}

// A multinomial, with a target that is dense or sparse.
void items(std::mt19937& random, DType type, int64_t rows, int64_t features, int64_t shift, bool sparse) {
  Scratch scratch;
  const int64_t cells = rows * features;
  Buffer logits(type, cells, shift), grads(type, cells, shift), nll(DType::f32, rows), loss(DType::f32, 1), factors(DType::f32, rows);
  logits.fill(random), factors.fill(random);
  Counts target(random, rows, features);
  CountArgs args;
  args.rows = rows, args.size = features, args.raw = true;
  args.params[0] = logits.view<Operand>(features), args.grads[0] = grads.view<Result>(features);
  target.pass_to(args, sparse);
  args.nll = nll.output(), args.loss = loss.output(), args.reduced = true;
  args.workspace = scratch.of(multinomial_scratch(args));
  check(multinomial(args, nullptr) == cudaSuccess, "multinomial", rows, features);
  double all = 0;
  for (int64_t r = 0; r < rows; ++r) {
    double sum = 0, normaliser = 0, n = 0;
    for (int64_t g = 0; g < features; ++g) normaliser += std::exp(logits.get(r * features + g));
    for (int64_t g = 0; g < features; ++g) {
      const double t = target.dense[r * features + g];
      sum += std::lgamma(t + 1) - t * (logits.get(r * features + g) - std::log(normaliser));
      n += t;
    }
    sum -= std::lgamma(n + 1);
    check(near(nll.get(r), sum, 1e-4), "a row of items", rows, features);
    all += sum;
  }
  check(near(loss.get(0), all, 1e-4), "the loss of items", rows, features);
  args.loss = args.nll = {};
  args.grad_nll = factors.numbers();
  args.workspace = scratch.of(multinomial_scratch(args));
  check(multinomial(args, nullptr) == cudaSuccess, "multinomial", rows, features);
  Buffer weight(DType::f32, cells);
  args.weights = weights_of(weight, features);
  check(multinomial(args, nullptr) == cudaSuccess, "multinomial with weights", rows, features);
}

// A mixture of negative binomials with every gradient, and a target that is dense or sparse.
void proteins(std::mt19937& random, DType type, int64_t rows, int64_t features, int64_t shift, bool shared, bool sparse) {
  Scratch scratch;
  const int64_t cells = rows * features, dispersions = shared ? features : cells;
  Buffer mean(type, cells, shift), mean2(type, cells, shift), dispersion(type, dispersions, shift), mixing(type, cells, shift);
  Buffer d_mean(type, cells, shift), d_mean2(type, cells, shift), d_dispersion(type, dispersions), d_mixing(type, cells);
  Buffer nll(DType::f32, rows), loss(DType::f32, 1), factors(DType::f32, rows);
  for (auto* positive : {&mean, &mean2, &dispersion}) positive->fill(random).make_positive();
  mixing.fill(random), factors.fill(random);
  Counts target(random, rows, features);
  CountArgs args;
  args.rows = rows, args.size = features, args.shared_dispersion = shared;
  args.params[0] = mean.view<Operand>(features), args.params[1] = dispersion.view<Operand>(features);
  args.params[kSecondMean] = mean2.view<Operand>(features), args.params[kMixtureLogits] = mixing.view<Operand>(features);
  args.grads[0] = d_mean.view<Result>(features), args.grads[kSecondMean] = d_mean2.view<Result>(features);
  args.grads[kMixtureLogits] = d_mixing.view<Result>(features);
  if (shared) args.params[1].row_stride = 0, args.shared_gradient = d_dispersion.output();
  else args.grads[1] = d_dispersion.view<Result>(features);
  target.pass_to(args, sparse);
  args.nll = nll.output(), args.loss = loss.output(), args.reduced = true;
  args.workspace = scratch.of(count_mixture_scratch(args));
  check(count_mixture(args, nullptr) == cudaSuccess, "count_mixture", rows, features);
  double all = 0;
  for (int64_t r = 0; r < rows; ++r) {
    double sum = 0;
    for (int64_t g = 0; g < features; ++g) {
      const int64_t i = r * features + g;
      const double t = target.dense[i], theta = dispersion.get(shared ? g : i), p = 1 / (1 + std::exp(-mixing.get(i)));
      const auto mass = [&](double mu) {
        return std::exp(std::lgamma(t + theta) - std::lgamma(theta) - std::lgamma(t + 1) - theta * std::log1p(mu / theta) +
                        t * std::log(mu / (theta + mu)));
      };
      sum -= std::log(p * mass(mean.get(i)) + (1 - p) * mass(mean2.get(i)));
    }
    check(near(nll.get(r), sum, 1e-4), "a row of proteins", rows, features);
    all += sum;
  }
  check(near(loss.get(0), all, 1e-4), "the loss of proteins", rows, features);
  args.loss = args.nll = {};
  args.grad_nll = factors.numbers();
  args.workspace = scratch.of(count_mixture_scratch(args));
  check(count_mixture(args, nullptr) == cudaSuccess, "count_mixture", rows, features);
  Buffer weight(DType::f32, cells);
  args.weights = weights_of(weight, features);
  check(count_mixture(args, nullptr) == cudaSuccess, "count_mixture with weights", rows, features);
}

// Mixtures of Gaussians, jointly and in each dimension, with weights of components or of points and components, and every gradient.
void gaussians(std::mt19937& random, DType type, int64_t points, int64_t components, int64_t dims, int64_t shift, bool of_rows) {
  Scratch scratch;
  const int64_t weights = of_rows ? points * components : components;
  Buffer z(type, points * dims, shift), mu(type, components * dims, shift), logvar(type, components * dims, shift);
  Buffer log_weight(type, weights, shift), joint(DType::f32, points), each(DType::f32, points * dims);
  z.fill(random), mu.fill(random), logvar.fill(random), log_weight.fill(random);
  GaussianMixtureValueArgs args;
  args.points = points, args.components = components, args.dims = dims;
  args.z = z.view<Operand>(dims), args.mu = mu.view<Operand>(dims), args.logvar = logvar.view<Operand>(dims);
  args.log_weight = log_weight.view<Operand>(components);
  if (!of_rows) args.log_weight.row_stride = 0;
  args.joint = joint.output(), args.per_dimension = each.output();
  args.workspace = scratch.of(gaussian_mixture_scratch(args));
  check(gaussian_mixture(args, nullptr) == cudaSuccess, "a mixture", points, components);
  for (int64_t b = 0; b < points; ++b) {
    double sum = 0;
    std::vector<double> sums(dims);
    for (int64_t m = 0; m < components; ++m) {
      double all = log_weight.get(of_rows ? b * components + m : m);
      for (int64_t d = 0; d < dims; ++d) {
        const double v = logvar.get(m * dims + d), distance = z.get(b * dims + d) - mu.get(m * dims + d);
        const double one = -0.5 * (distance * distance * std::exp(-v) + v + std::log(2 * M_PI));
        all += one;
        sums[d] += std::exp(one + log_weight.get(of_rows ? b * components + m : m));
      }
      sum += std::exp(all);
    }
    check(near(joint.get(b), std::log(sum), 1e-4), "a point", b, components);
    for (int64_t d = 0; d < dims; ++d) check(near(each.get(b * dims + d), std::log(sums[d]), 1e-4), "a dimension", b, d);
  }

  Buffer d_z(type, points * dims), d_mu(type, components * dims), d_logvar(type, components * dims), d_weight(type, weights);
  GaussianMixtureGradArgs grad;
  static_cast<GaussianMixtureArgs&>(grad) = args;
  grad.of_rows = of_rows;
  grad.grad_z = d_z.output(), grad.grad_mu = d_mu.output(), grad.grad_logvar = d_logvar.output(), grad.grad_log_weight = d_weight.output();
  for (const bool with_each : {false, true}) {
    grad.joint = joint.data(), grad.grad_joint = joint.numbers();
    if (with_each) grad.per_dimension = grad.grad_per_dimension = each.data();
    grad.workspace = scratch.of(gaussian_mixture_grad_scratch(grad));
    check(gaussian_mixture_grad(grad, nullptr) == cudaSuccess, "the gradients of a mixture", points, components);
  }
}

void posterior(std::mt19937& random, DType type, int64_t rows, int64_t size, int64_t draws, int64_t shift) {
  Scratch scratch;
  Buffer mu(type, rows * size, shift), logvar(type, rows * size), z(type, draws * rows * size), kl(DType::f32, rows);
  Buffer grad_mu(type, rows * size), grad_logvar(type, rows * size, shift);
  int64_t used[2];
  mu.fill(random), logvar.fill(random);
  SampleArgs args;
  args.rows = rows, args.size = size, args.draws = draws;
  args.mu = mu.view<Operand>(size), args.logvar = logvar.view<Operand>(size);
  args.noise.seed = 3;
  args.z = z.view<Result>(size), args.z_draw_stride = rows * size;
  args.row_kl = kl.output(), args.used_seed = used;
  args.workspace = scratch.of(sample_scratch(args));
  check(sample(args, nullptr) == cudaSuccess, "sample", rows, size);
  for (int64_t r = 0; r < rows; ++r) {
    double sum = 0;
    for (int64_t i = r * size; i < (r + 1) * size; ++i)
      sum += 0.5 * (mu.get(i) * mu.get(i) + std::expm1(logvar.get(i)) - logvar.get(i));
    check(near(kl.get(r), sum, 1e-4), "a row's kl", rows, size);
  }

  SampleGradArgs grad;
  static_cast<Latents&>(grad) = args;
  grad.noise.tensor = used;
  grad.grad_z = z.view<Operand>(size), grad.grad_z_draw_stride = rows * size;
  grad.grad_kl = kl.numbers();
  grad.grad_mu = grad_mu.view<Result>(size), grad.grad_logvar = grad_logvar.view<Result>(size);
  check(sample_grad(grad, nullptr) == cudaSuccess, "sample_grad", rows, size);
}

// Every form of the scale, and draws with their densities. The values are tested elsewhere.
void forms(std::mt19937& random, DType type, int64_t rows, int64_t size, int64_t draws, int64_t shift) {
  Scratch scratch;
  Buffer mu(type, rows * size, shift), v(type, rows * size), z(type, draws * rows * size), kl(DType::f32, rows);
  Buffer grads[] = {{type, rows * size}, {type, rows * size, shift}, {type, rows * size}, {type, rows * size}};
  Buffer log_q(DType::f32, draws * rows), log_p(DType::f32, draws * rows);
  mu.fill(random), v.fill(random);
  for (int kind = ScaleForm::logvar; kind <= ScaleForm::shifted_variance; ++kind) {
    ScaleForm form;
    form.kind = ScaleForm::Kind(kind);
    form.constants[0] = kind == ScaleForm::softplus ? 1e-4 : -1, form.constants[1] = 2, form.constants[2] = 0.5;
    form.soft = kind == ScaleForm::shifted_log_std ? 5 : 0;
    SampleArgs args;
    args.form = form;
    args.rows = rows, args.size = size, args.draws = draws;
    args.mu = args.prior_mu = mu.view<Operand>(size), args.logvar = args.prior_logvar = v.view<Operand>(size);
    args.noise.seed = 3;
    args.z = z.view<Result>(size), args.z_draw_stride = rows * size;
    args.row_kl = kl.output();
    args.workspace = scratch.of(sample_scratch(args));
    check(sample(args, nullptr) == cudaSuccess, "a form", rows, size);

    SampleGradArgs grad;
    static_cast<Latents&>(grad) = args;
    grad.grad_z = z.view<Operand>(size), grad.grad_z_draw_stride = rows * size;
    grad.grad_kl = kl.numbers();
    grad.grad_mu = grads[0].view<Result>(size), grad.grad_logvar = grads[1].view<Result>(size);
    grad.grad_prior_mu = grads[2].view<Result>(size), grad.grad_prior_logvar = grads[3].view<Result>(size);
    check(sample_grad(grad, nullptr) == cudaSuccess, "the gradient of a form", rows, size);

    LogProbArgs densities;
    static_cast<Latents&>(densities) = args;
    densities.z = args.z, densities.z_draw_stride = rows * size;
    densities.log_q = log_q.output(), densities.log_p = log_p.output();
    check(log_probs(densities, nullptr) == cudaSuccess, "log_probs", rows, size);
    LogProbGradArgs back;
    static_cast<Latents&>(back) = args;
    back.stl = kind % 2;
    back.grad_z = grad.grad_z, back.grad_z_draw_stride = rows * size;
    back.grad_log_q = log_q.numbers(), back.grad_log_p = log_p.numbers();
    back.grad_mu = grad.grad_mu, back.grad_logvar = grad.grad_logvar;
    back.grad_prior_mu = grad.grad_prior_mu, back.grad_prior_logvar = grad.grad_prior_logvar;
    check(log_probs_grad(back, nullptr) == cudaSuccess, "log_probs_grad", rows, size);
  }
}

}  // namespace

int main() {
  std::mt19937 random(1);
  // Single accesses with one block per row, and wide accesses with several.
  for (const auto& [processors, shift] : {std::pair{1, 1}, std::pair{2, 0}}) {
    shim::processors = processors;
    reconstruction(random, DType::f32, DType::f32, 3, 17, shift);
    reconstruction(random, DType::f32, DType::f32, 70, 4, shift);
    reconstruction(random, DType::f32, DType::u8, 2, 2064, shift);
    reconstruction(random, DType::bf16, DType::f32, 2, 4104, shift);
    reconstruction(random, DType::f32, DType::f32, 300, 5, shift);
    words(random, DType::f32, 3, 5, 17, shift);
    words(random, DType::bf16, 40, 2, 8, shift);
    words(random, DType::f32, 2, 3, 1004, shift);
    for (const bool sparse : {false, true}) {
      counts(random, DType::f32, 3, 17, shift, true, sparse);
      counts(random, DType::f32, 5, 520, shift, false, sparse);
      counts(random, DType::bf16, 6, 260, shift, true, sparse);
      proteins(random, DType::f32, 3, 17, shift, true, sparse);
      proteins(random, DType::f32, 5, 520, shift, false, sparse);
      proteins(random, DType::bf16, 6, 260, shift, true, sparse);
      items(random, DType::f32, 9, 20, shift, sparse);
      items(random, DType::f32, 1, 1300, shift, sparse);
      items(random, DType::bf16, 3, 2308, shift, sparse);
    }
    for (const bool in_turns : {false, true}) {
      for (const int64_t components : {0, 1, 3, 10})
        for (const int64_t channels : {1, 3}) {
          levels(random, DType::f32, components, channels, 3, 17, shift, in_turns);
          levels(random, DType::bf16, components, channels, 23, 2, shift, in_turns);
        }
      levels(random, DType::f32, 3, 3, 2, 100, shift, in_turns);
      levels(random, DType::f32, 0, 1, 2, 2064, shift, in_turns);
    }
    for (const bool of_rows : {false, true}) {
      gaussians(random, DType::f32, 5, 40, 3, shift, of_rows);
      gaussians(random, DType::f32, 18, 66, 37, shift, of_rows);
      gaussians(random, DType::bf16, 17, 3, 16, shift, of_rows);
    }
    posterior(random, DType::f32, 5, 20, 1, shift);
    forms(random, DType::f32, 3, 20, 2, shift);
    forms(random, DType::bf16, 70, 5, 1, shift);
    forms(random, DType::f32, 1, 1030, 2, shift);
    posterior(random, DType::f32, 3, 7, 3, shift);
    posterior(random, DType::bf16, 2, 1032, 1, shift);
  }
  if (!failures) std::puts("all right");
  return failures != 0;
}
