// The CPU side of the rows of Family::logistic.
#include "mixture.h"

#include <cmath>

#include "buffer_pool.h"
#include "cpu_kernels.h"

namespace fastvae {

LogisticConstants logistic_constants(const LikelihoodRow& row, at::ArrayRef<double> constants) {
  const bool mixture = row.constants == 4;
  const double components = mixture ? constants[0] : 0, bits = constants[mixture];
  TORCH_CHECK_VALUE(!mixture || (components >= 1 && components == std::floor(components)),
                    "fastvae::nll: the components of ", std::string(row.name), " must be a whole number from 1 on, got ", components);
  TORCH_CHECK_VALUE(bits >= 1 && bits <= 8 && bits == std::floor(bits), "fastvae::nll: the bits of ", std::string(row.name),
                    " must be a whole number from 1 to 8, got ", bits);
  // Beyond these a scale, or data in units of it, would leave fp32.
  const double floor = constants[mixture + 1], small = constants[mixture + 2];
  TORCH_CHECK_VALUE(floor >= -60 && floor <= 60, "fastvae::nll: the least log-scale must be between -60 and 60, got ", floor);
  TORCH_CHECK_VALUE(small >= 0 && small < 1, "fastvae::nll: the small mass must be at least 0 and less than 1, got ", small);
  return {static_cast<int64_t>(components), (int64_t(1) << static_cast<int64_t>(bits)) - 1, floor, small};
}

void check_logistic(const LikelihoodRow& row, const Tensor& params, const Tensor& target, at::ArrayRef<double> constants) {
  const auto found = logistic_constants(row, constants);
  TORCH_CHECK_TYPE(c10::isFloatingType(params.scalar_type()), "fastvae::nll: `params` must be floating point, got ",
                   params.scalar_type());
  TORCH_CHECK_TYPE(target.scalar_type() == at::kByte, "fastvae::nll: the `target` of ", std::string(row.name),
                   " must be uint8, got ", target.scalar_type());
  TORCH_CHECK_VALUE(params.dim() >= 2 && target.dim() == params.dim(), "fastvae::nll: `params` (B, planes, ...) and `target` "
                    "(B, C, ...) must have one rank, got ", params.sizes(), " and ", target.sizes());
  const int64_t channels = target.size(1), components = found.components;
  TORCH_CHECK_VALUE(components == 0 || channels == 1 || channels == 3, "fastvae::nll: the `target` of ", std::string(row.name),
                    " must have 1 or 3 channels, got ", channels);
  auto expected = target.sizes().vec();
  expected[1] = components == 0 ? 2 * channels : components * (channels == 3 ? 10 : 3);
  TORCH_CHECK_VALUE(params.sizes() == at::IntArrayRef(expected), "fastvae::nll: `params` must have the shape ",
                    at::IntArrayRef(expected), ", got ", params.sizes());
}

void evaluate_logistic(const LikelihoodRow& row, const Tensor& params, const Tensor& target, at::ArrayRef<double> constants,
                       bool wanted, const double* weights, int64_t weight_stride, std::vector<double>& nll, Tensors& gradients) {
  const auto order = memory_order(params);
  const auto found = logistic_constants(row, constants);
  const Tensor dense = dense_rows(params, order), dense_target = dense_rows(target, order);
  nll.resize(params.size(0));
  cpu::LogisticArgs args{};
  args.in_double = params.scalar_type() == at::kDouble;
  args.alternate = order != at::MemoryFormat::Contiguous;
  args.rows = params.size(0);
  args.channels = target.size(1);
  args.pixels = args.channels ? event_size(target) / args.channels : 0;
  args.components = found.components;
  if (found.components == 0 && !args.alternate) {  // every channel is for itself: one long plane
    args.pixels *= args.channels;
    args.channels = 1;
  }
  args.levels = static_cast<double>(found.levels);
  args.log_scale_floor = found.log_scale_floor;
  args.small_mass = found.small_mass;
  args.params = operand(dense);
  args.target = operand(dense_target);
  if (wanted) {
    gradients.push_back(pooled_empty(params.sizes(), params, order));
    args.slopes = result(gradients.back());
  }
  args.weight = weights;
  args.weight_stride = weight_stride;
  args.row_nll = nll.data();
  cpu::kernels().discretized_logistic(args);
}

}  // namespace fastvae
