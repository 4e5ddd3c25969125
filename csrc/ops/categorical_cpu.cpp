// The CPU side of the variant "categorical".
#include "categorical.h"

#include "buffer_pool.h"
#include "cpu_kernels.h"
#include "nll_views.h"

namespace fastvae {

void evaluate_categorical(const Tensor& logits, const Tensor& target, at::ArrayRef<double> constants, bool wanted, const OptionalTensor& weight,
                          const double* weights, int64_t weight_stride, std::vector<double>& nll, Tensors& gradients) {
  const Tensor dense = dense_rows(logits, at::MemoryFormat::Contiguous);
  const Tensor dense_target = dense_rows(target, at::MemoryFormat::Contiguous);
  Tensors kept;
  cpu::CategoricalArgs args{};
  args.in_double = logits.scalar_type() == at::kDouble;
  args.rows = logits.size(0);
  args.classes = logits.size(-1);
  args.positions = event_size(target);
  args.logits = operand(dense);
  args.row_stride = dense.stride(0);
  args.logits.row_stride = args.logits.run = args.classes;
  args.target = dense_target.const_data_ptr<int64_t>();
  args.target_rows = repeated_rows(target.size(0), args.rows);
  args.target_row_stride = dense_target.stride(0);
  args.weights = weights_view(weight, target.sizes(), at::MemoryFormat::Contiguous, kept);
  args.ignored = static_cast<int64_t>(constants[0]);
  for (int64_t row = 0; row < target.size(0); ++row)
    for (int64_t t = 0; t < args.positions; ++t) {
      const int64_t number = args.target[row * args.target_row_stride + t];
      TORCH_CHECK_VALUE((number >= 0 && number < args.classes) || number == args.ignored,
                        "fastvae::nll: the `target` of categorical must be from 0 to ", args.classes - 1, ", or ", args.ignored,
                        " (ignored), got ", number);
    }
  if (wanted) {
    gradients.push_back(pooled_empty(logits.sizes(), logits));
    args.grads = result(gradients.back());
    args.grads.row_stride = args.grads.run = args.classes;
  }
  args.weight = weights;
  args.weight_stride = weight_stride;
  nll.resize(args.rows);
  args.row_nll = nll.data();
  cpu::kernels().categorical(args);
}

}  // namespace fastvae
