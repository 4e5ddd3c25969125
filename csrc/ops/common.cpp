#include "common.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/ops/empty.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/variable.h>

namespace fastvae {

at::MemoryFormat memory_order(const Tensor& lead) {
  const auto order = lead.suggest_memory_format();
  return order != at::MemoryFormat::Contiguous && lead.is_contiguous(order) ? order : at::MemoryFormat::Contiguous;
}

c10::SmallVector<int64_t, 5> strides_in(at::IntArrayRef sizes, at::MemoryFormat order) {
  if (order == at::MemoryFormat::ChannelsLast) {
    const auto strides = c10::get_channels_last_strides_2d(sizes);
    return {strides.begin(), strides.end()};
  }
  if (order == at::MemoryFormat::ChannelsLast3d) {
    const auto strides = c10::get_channels_last_strides_3d(sizes);
    return {strides.begin(), strides.end()};
  }
  c10::SmallVector<int64_t, 5> strides(sizes.begin(), sizes.end());
  int64_t stride = 1;
  for (int64_t i = int64_t(sizes.size()) - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= sizes[i];
  }
  return strides;
}

Tensor dense_rows(const Tensor& t, at::MemoryFormat order) {
  const auto wanted = strides_in(t.sizes(), order);
  for (int64_t i = 1; i < t.dim(); ++i)
    if (t.size(i) != 1 && t.stride(i) != wanted[i]) return t.contiguous(order);
  return t;
}

cpu::DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat: return cpu::DType::f32;
    case at::kDouble: return cpu::DType::f64;
    case at::kHalf: return cpu::DType::f16;
    case at::kBFloat16: return cpu::DType::bf16;
    case at::kByte: return cpu::DType::u8;
    case at::kBool: return cpu::DType::boolean;
    case at::kUInt16: return cpu::DType::u16;
    case at::kInt: return cpu::DType::i32;
    case at::kLong: return cpu::DType::i64;
    default: TORCH_CHECK_TYPE(false, "fastvae: unsupported dtype ", t.scalar_type());
  }
}

int64_t event_size(const Tensor& t) {
  int64_t size = 1;
  for (int64_t i = 1; i < t.dim(); ++i) size *= t.size(i);
  return size;
}

cpu::Operand operand(const Tensor& dense) {
  return {dense.const_data_ptr(), dtype_of(dense), dense.stride(0), event_size(dense), 0};
}

cpu::Operand count_operand(const Tensor& dense) {
  cpu::Operand view = operand(dense);
  if (view.type == cpu::DType::u8) view.type = cpu::DType::byte;
  return view;
}

cpu::Result result(const Tensor& dense) {
  return {dense.mutable_data_ptr(), dtype_of(dense), dense.stride(0), event_size(dense), 0};
}

std::vector<double> to_doubles(const Tensor& t) {
  const int64_t n = t.numel(), stride = t.dim() ? t.stride(0) : 1;
  std::vector<double> values(n);
  const auto read = [&](const auto* data) {
    for (int64_t i = 0; i < n; ++i) values[i] = static_cast<double>(data[i * stride]);
  };
  if (t.scalar_type() == at::kFloat) read(t.const_data_ptr<float>());
  else if (t.scalar_type() == at::kDouble) read(t.const_data_ptr<double>());
  else return to_doubles(t.to(at::kDouble));
  return values;
}

Tensor from_doubles(const std::vector<double>& values, at::IntArrayRef sizes, at::ScalarType dtype) {
  const bool half = dtype != at::kFloat && dtype != at::kDouble;
  Tensor t = at::empty(sizes, at::TensorOptions().dtype(half ? at::kFloat : dtype));
  if (dtype == at::kDouble) std::copy(values.begin(), values.end(), t.mutable_data_ptr<double>());
  else std::copy(values.begin(), values.end(), t.mutable_data_ptr<float>());
  return half ? t.to(dtype) : t;
}

Tensors once_differentiable(Tensors gradients) {
  if (!c10::GradMode::is_enabled()) return gradients;
  const size_t count = gradients.size();
  for (auto& g : gradients)
    if (g.defined()) g = g.detach();
  // The error is connected to the inputs of the current node, because torch.autograd.grad(..., inputs) follows only edges that lead to
  // its inputs, and would otherwise report the gradient as unused.
  for (const auto& edge : torch::autograd::get_current_node()->next_edges()) {
    if (!edge.is_valid()) continue;
    gradients.push_back(at::empty({0}));
    torch::autograd::impl::set_gradient_edge(gradients.back(), edge);
  }
  torch::autograd::DelayedError error(
      "fastvae: the fused kernels have no second derivative. Differentiate twice through the reference: "
      "with fastvae.use_backend(\"reference\"): ...",
      static_cast<int64_t>(gradients.size()));
  gradients = error(std::move(gradients));
  gradients.resize(count);
  return gradients;
}

Tensors placed(Tensors gradients, int64_t needs, size_t arguments, std::initializer_list<size_t> places) {
  Tensors results(arguments);
  size_t next = 0;
  int64_t bit = 1;
  for (const size_t place : places) {
    if (needs & bit) results[place] = gradients[next++];
    bit <<= 1;
  }
  return once_differentiable(std::move(results));
}

void refuse_tangent(const OptionalTensor& t) {
  TORCH_CHECK(!t || !t->defined() || !t->_fw_grad(0).defined(),
              "fastvae: forward-mode AD cannot cross the fused kernels; differentiate the reference: "
              "with fastvae.use_backend(\"reference\"): ...");
}

bool traced(const Tensor& t) { return t.defined() && at::isTensorSubclassLike(t); }

}  // namespace fastvae
