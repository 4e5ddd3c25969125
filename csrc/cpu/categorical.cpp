// The categorical likelihood: computes the nll of each row of logits and, if requested, its gradient.
#include <ATen/Parallel.h>

#include <cmath>
#include <vector>

#include "softmax.h"

namespace fastvae::cpu::FASTVAE_ISA {
namespace {

// The nll of one position: log(exp(a_t) + sum of exp(a_i) over the other classes i) - a_t. The other classes are summed separately,
// so that a confident, correct prediction does not lose the digits of its nll and of its gradient, p - 1.
template <class C>
double position(const Operand& logits, const Result& grads, int64_t classes, int64_t target, double weight,
                Buffer<C>& in_buffer, Buffer<C>& out_buffer) {
  Scaled others;
  C own = 0;
  for (int64_t begin = 0; begin < classes; begin += kBlock) {
    const int64_t n = std::min(kBlock, classes - begin);
    const C* x = load(logits, 0, begin, n, classes, in_buffer);
    if (target >= begin && target < begin + n) {
      own = x[target - begin];
      if (x != in_buffer.data) std::copy(x, x + n, in_buffer.data);
      in_buffer.data[target - begin] = kNothing<C>;
      x = in_buffer.data;
    }
    others.add_logits(x, n);
  }
  const double a = static_cast<double>(own), top = std::max(others.max, a);
  const double own_part = std::exp(a - top), rest = others.sum == 0 ? 0 : others.sum * std::exp(others.max - top);
  const double total = own_part + rest;
  if (std::isnan(own) || !std::isfinite(top)) others.sum = NAN;
  const double nll = std::isnan(others.sum) ? NAN : a >= others.max ? std::log1p(rest) : (top - a) + std::log(total);
  if (!grads.data) return nll;

  const C factor = static_cast<C>(std::isnan(nll) ? NAN : weight / total);
  for (int64_t begin = 0; begin < classes; begin += kBlock) {
    const int64_t n = std::min(kBlock, classes - begin);
    const C* x = load(logits, 0, begin, n, classes, in_buffer);
    C* grad = destination(grads, 0, begin, classes, out_buffer);
    softmax(x, static_cast<C>(top), factor, grad, n);
    if (target >= begin && target < begin + n) grad[target - begin] = static_cast<C>(-weight * (rest / total));
    store(grads, 0, begin, n, classes, out_buffer);
  }
  return nll;
}

template <class C>
void run(const CategoricalArgs& args) {
  const int64_t positions = args.positions, classes = args.classes, tasks = args.rows * positions;
  std::vector<double> nll(tasks);
  at::parallel_for(0, tasks, grain(classes), [&](int64_t first, int64_t last) {
    Buffer<C> in_buffer, out_buffer;
    for (int64_t task = first; task < last; ++task) {
      const int64_t row = task / positions, t = task % positions;
      const Operand logits = shifted(args.logits, row * args.row_stride + t * classes);
      const Result grads = shifted(args.grads, task * classes);
      const int64_t target = args.target[target_row(args, row) * args.target_row_stride + t];
      C weight_of_position[Vec<C>::size()] = {1};  // GCC does not see that no more than the first is written
      if (args.weights.data) read(args.weights, target_row(args, row), t, 1, weight_of_position);
      const C own = weight_of_position[0];
      if (target != args.ignored && own != C(0)) {
        const double weight = args.weight[row * args.weight_stride] * own;
        nll[task] = own * position<C>(logits, grads, classes, target, weight, in_buffer, out_buffer);
      } else if (grads.data) {
        // Zero bytes represent the number 0 in every type.
        std::fill_n(static_cast<char*>(grads.data), classes * item_size(grads.type), char(0));
      }
    }
  });
  for (int64_t row = 0; row < args.rows; ++row) {
    double sum = 0;
    for (int64_t t = 0; t < positions; ++t) sum += nll[row * positions + t];
    args.row_nll[row] = sum;
  }
}

}  // namespace

void categorical(const CategoricalArgs& args) {
  args.in_double ? run<double>(args) : run<float>(args);
}

}  // namespace fastvae::cpu::FASTVAE_ISA
