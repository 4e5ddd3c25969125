// The CPU kernels of fastvae::sparse_linear_*.
#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>

#include "buffer_pool.h"
#include "cpu_kernels.h"
#include "sparse.h"

namespace fastvae {
namespace {

// The sparse matrix as the kernels expect it: checked, and with ascending columns.
struct SparseViews {
  Tensor values, starts, columns;

  SparseViews(const Tensor& values_, const Tensor& starts_, const Tensor& columns_, const Tensor& weight)
      : values(values_.contiguous()), starts(starts_.contiguous()), columns(columns_.contiguous()) {
    const int64_t rows = starts.size(0) - 1, width = weight.size(1), stored = values.size(0);
    const int64_t* start = starts.const_data_ptr<int64_t>();
    const int64_t* column = columns.const_data_ptr<int64_t>();
    bool good = start[0] == 0 && start[rows] == stored;
    for (int64_t r = 0; r < rows; ++r) good &= start[r] <= start[r + 1];
    TORCH_CHECK_VALUE(good, "fastvae::sparse_linear: the crow_indices of the input must rise from 0 to its ", stored, " values");
    bool ascending = true;
    for (int64_t r = 0; r < rows; ++r) {
      int64_t before = 0;
      for (int64_t i = start[r]; i < start[r + 1]; ++i) {
        good &= column[i] >= 0 && column[i] < width;
        ascending &= column[i] >= before;
        before = column[i];
      }
    }
    TORCH_CHECK_INDEX(good, "fastvae::sparse_linear: the col_indices of the input must lie between 0 and ", width - 1);
    if (!ascending) values.scalar_type() == at::kDouble ? sort<double>(rows) : sort<float>(rows);
  }

 private:
  // Sorts the columns of every row in a copy. Values in the same column keep their order.
  template <class C>
  void sort(int64_t rows) {
    const Tensor sorted_values = at::empty_like(values), sorted_columns = at::empty_like(columns);
    const int64_t* start = starts.const_data_ptr<int64_t>();
    const int64_t* column = columns.const_data_ptr<int64_t>();
    const C* value = values.const_data_ptr<C>();
    std::vector<int64_t> order;
    for (int64_t r = 0; r < rows; ++r) {
      order.resize(start[r + 1] - start[r]);
      std::iota(order.begin(), order.end(), start[r]);
      std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return column[a] < column[b]; });
      for (size_t i = 0; i < order.size(); ++i) {
        sorted_columns.mutable_data_ptr<int64_t>()[start[r] + i] = column[order[i]];
        sorted_values.mutable_data_ptr<C>()[start[r] + i] = value[order[i]];
      }
    }
    values = sorted_values;
    columns = sorted_columns;
  }
};

void fill(cpu::SparseArgs& args, const SparseViews& views, const Tensor& weight) {
  args.in_double = weight.scalar_type() == at::kDouble;
  args.rows = views.starts.size(0) - 1;
  args.width = weight.size(1);
  args.outputs = weight.size(0);
  args.starts = views.starts.const_data_ptr<int64_t>();
  args.columns = views.columns.const_data_ptr<int64_t>();
  args.values = views.values.const_data_ptr();
}

Tensor sparse_linear_cpu(const Tensor& values, const Tensor& starts, const Tensor& columns, const Tensor& weight,
                         const OptionalTensor& bias) {
  check_sparse_linear(values, starts, columns, weight, bias);
  const SparseViews views(values, starts, columns, weight);
  const Tensor transposed = weight.t().contiguous();  // no copy for a SparseLinear, which stores its weight in this order
  const Tensor bias_view = bias ? bias->contiguous() : Tensor();
  const Tensor out = uninitialized({starts.size(0) - 1, weight.size(0)}, weight.options());
  cpu::SparseProductArgs args{};
  fill(args, views, weight);
  args.weight = transposed.const_data_ptr();
  args.bias = bias ? bias_view.const_data_ptr() : nullptr;
  args.out = out.mutable_data_ptr();
  if (out.numel()) cpu::kernels().sparse_product(args);
  return out;
}

Tensors sparse_linear_grad_cpu(const Tensor& grad, const Tensor& values, const Tensor& starts, const Tensor& columns, const Tensor& weight,
                               int64_t needs) {
  check_sparse_linear(values, starts, columns, weight, OptionalTensor());
  Tensors gradients;
  if (needs & kWeight) {
    const SparseViews views(values, starts, columns, weight);
    const Tensor dense = grad.contiguous(), grad_weight = pooled_empty({weight.size(1), weight.size(0)}, weight);
    cpu::SparseProductGradArgs args{};
    fill(args, views, weight);
    args.grad = dense.const_data_ptr();
    args.grad_weight = grad_weight.mutable_data_ptr();
    if (grad_weight.numel()) cpu::kernels().sparse_product_grad(args);
    gradients.push_back(grad_weight.t());
  }
  if (needs & kBias) gradients.push_back(grad.sum(0));
  return gradients;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastvae, CPU, m) {
  m.impl("sparse_linear_forward", sparse_linear_cpu);
  m.impl("sparse_linear_backward", sparse_linear_grad_cpu);
}

}  // namespace fastvae
