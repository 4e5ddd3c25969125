// The CPU side of the variants of Family::discretized.
#include "discretized.h"

#include "buffer_pool.h"
#include "cpu_kernels.h"
#include "nll_views.h"

namespace fastvae {

void evaluate_discretized(const LikelihoodVariant& variant, const Tensor& params, const Tensor& target, at::ArrayRef<double> constants,
                       bool wanted, const OptionalTensor& weight, const double* weights, int64_t weight_stride, std::vector<double>& nll, Tensors& gradients) {
  const auto order = memory_order(params);
  const auto found = logistic_constants(variant, constants);
  const Tensor dense = dense_rows(params, order), dense_target = dense_rows(target, order);
  Tensors kept;
  nll.resize(params.size(0));
  cpu::LogisticArgs args{};
  args.in_double = params.scalar_type() == at::kDouble;
  args.alternate = order != at::MemoryFormat::Contiguous;
  args.rows = params.size(0);
  args.channels = target.size(1);
  args.pixels = args.channels ? event_size(target) / args.channels : 0;
  args.components = found.components;
  if (found.components == 0 && !args.alternate) {  // the channels are independent, so they form one long plane
    args.pixels *= args.channels;
    args.channels = 1;
  }
  args.levels = static_cast<double>(found.levels);
  args.log_scale_floor = found.log_scale_floor;
  args.min_mass = found.min_mass;
  args.params = operand(dense);
  args.target = operand(dense_target);
  args.target_rows = repeated_rows(target.size(0), args.rows);
  // The kernel numbers elements channel by channel, whatever their order in memory.
  args.weights = weights_view(weight, weighted_sizes(variant, params, target), at::MemoryFormat::Contiguous, kept);
  if (wanted) {
    gradients.push_back(pooled_empty(params.sizes(), params, order));
    args.grads = result(gradients.back());
  }
  args.weight = weights;
  args.weight_stride = weight_stride;
  args.row_nll = nll.data();
  cpu::kernels().discretized_logistic(args);
}

}  // namespace fastvae
