// The product of a sparse matrix in CSR form with a dense one, and the gradient of the dense one.
//
// A value of the sparse matrix meets a whole row of the dense one, so both kernels read and write vectors of consecutive numbers. They go
// over the columns of the sparse matrix in blocks, whose rows of the dense matrix stay in the L2 cache while all rows of the sparse matrix
// use them: in memory, the dense matrix is read or written once.
#include <ATen/Parallel.h>

#include <cstring>
#include <vector>

#include "staging.h"

namespace fastvae::cpu::FASTVAE_ISA {
namespace {

constexpr int64_t kBlockBytes = 512 * 1024;  // of the dense matrix: half of a small L2 cache
constexpr int kVectors = 8;                  // the number of vectors of a dense row that stay in registers

template <class C>
int64_t block_columns(int64_t outputs) {
  return std::max<int64_t>(16, kBlockBytes / (outputs * int64_t(sizeof(C))));
}

// The positions of the values of `row` in columns below `end`, from `begin` on.
inline int64_t find_end(const SparseArgs& args, int64_t row, int64_t begin, int64_t end) {
  const int64_t stop = args.starts[row + 1];
  while (begin < stop && args.columns[begin] < end) ++begin;
  return begin;
}

// Calls f(n, o) for vectors [o, o + n * size) of a row of `outputs` numbers, with n = kVectors as long as there are so many, and then
// f(1, o) for the rest, the last of which may be incomplete.
template <class C, class F>
inline void for_vectors(int64_t outputs, const F& f) {
  constexpr int64_t many = kVectors * Vec<C>::size();
  int64_t o = 0;
  for (; o + many <= outputs; o += many) f(std::integral_constant<int, kVectors>(), o);
  for (; o < outputs; o += Vec<C>::size()) f(std::integral_constant<int, 1>(), o);
}

template <class C>
void product_as(const SparseProductArgs& args) {
  using V = Vec<C>;
  constexpr int64_t W = V::size();
  const int64_t outputs = args.outputs, width = block_columns<C>(outputs);
  const C* values = static_cast<const C*>(args.values);
  const C* weight = static_cast<const C*>(args.weight);
  const int64_t work = (args.starts[args.rows] / args.rows + 1) * outputs / 4;
  at::parallel_for(0, args.rows, grain(work), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      C* out = static_cast<C*>(args.out) + row * outputs;
      if (args.bias) std::memcpy(out, args.bias, outputs * sizeof(C));
      else std::memset(out, 0, outputs * sizeof(C));
    }
    std::vector<int64_t> next(args.starts + first, args.starts + last);
    for (int64_t begin = 0; begin < args.width; begin += width) {
      for (int64_t row = first; row < last; ++row) {
        const int64_t from = next[row - first], to = find_end(args, row, from, begin + width);
        if (from == to) continue;
        next[row - first] = to;
        C* out = static_cast<C*>(args.out) + row * outputs;
        for_vectors<C>(outputs, [&](auto count, int64_t o) {
          constexpr int n = decltype(count)::value;
          const int64_t lanes = n == 1 ? std::min(W, outputs - o) : W;
          V sum[n];
          for (int k = 0; k < n; ++k) sum[k] = load_lanes(out + o + k * W, lanes);
          for (int64_t i = from; i < to; ++i) {
            const V x(values[i]);
            const C* w = weight + args.columns[i] * outputs + o;
            for (int k = 0; k < n; ++k) sum[k] = math::Primitives<V>::fma(x, load_lanes(w + k * W, lanes), sum[k]);
          }
          for (int k = 0; k < n; ++k) store_lanes(sum[k], out + o + k * W, lanes);
        });
      }
    }
  });
}

template <class C>
void product_grad_as(const SparseProductGradArgs& args) {
  using V = Vec<C>;
  constexpr int64_t W = V::size();
  const int64_t outputs = args.outputs, width = block_columns<C>(outputs), blocks = (args.width + width - 1) / width;
  const C* values = static_cast<const C*>(args.values);
  C* grad_weight = static_cast<C*>(args.grad_weight);
  at::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
    std::vector<int64_t> next(args.rows);
    for (int64_t row = 0; row < args.rows; ++row) {
      const int64_t* columns = args.columns;
      next[row] = std::lower_bound(columns + args.starts[row], columns + args.starts[row + 1], first * width) - columns;
    }
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * width, end = std::min(begin + width, args.width);
      std::memset(grad_weight + begin * outputs, 0, (end - begin) * outputs * sizeof(C));
      for (int64_t row = 0; row < args.rows; ++row) {
        const int64_t from = next[row], to = find_end(args, row, from, end);
        next[row] = to;
        const C* grad = static_cast<const C*>(args.grad) + row * outputs;
        for_vectors<C>(outputs, [&](auto count, int64_t o) {
          constexpr int n = decltype(count)::value;
          const int64_t lanes = n == 1 ? std::min(W, outputs - o) : W;
          V g[n];
          for (int k = 0; k < n; ++k) g[k] = load_lanes(grad + o + k * W, lanes);
          for (int64_t i = from; i < to; ++i) {
            const V x(values[i]);
            C* w = grad_weight + args.columns[i] * outputs + o;
            for (int k = 0; k < n; ++k) store_lanes(math::Primitives<V>::fma(x, g[k], load_lanes(w + k * W, lanes)), w + k * W, lanes);
          }
        });
      }
    }
  });
}

}  // namespace

void sparse_product(const SparseProductArgs& args) {
  if (args.in_double) product_as<double>(args);
  else product_as<float>(args);
}

void sparse_product_grad(const SparseProductGradArgs& args) {
  if (args.in_double) product_grad_as<double>(args);
  else product_grad_as<float>(args);
}

}  // namespace fastvae::cpu::FASTVAE_ISA
