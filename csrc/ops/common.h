// Shared by the ops: views of tensors for the kernels, and the guard against second derivatives.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/autograd/variable.h>

#include <vector>

#include "../cpu/kernels.h"

namespace fastvae {

using at::Tensor;
using Tensors = std::vector<at::Tensor>;
using OptionalTensor = std::optional<at::Tensor>;

inline OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : OptionalTensor(); }

// The op with this name, for a call through the dispatcher.
template <class Signature>
auto op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

enum Reduction : int64_t { kNone = 0, kSum = 1, kMean = 2 };

// Results per row are fp32 for every input dtype except fp64, for which they are fp64.
inline at::ScalarType row_dtype(at::ScalarType input) { return input == at::kDouble ? at::kDouble : at::kFloat; }

// The memory order in which rows are read and gradients written: that of the lead operand if it is dense, otherwise contiguous.
at::MemoryFormat memory_order(const Tensor& lead);

// `t` with its event dimensions dense in `order`, or a copy if they are not. The batch stride is arbitrary, so slices of a packed head
// and expanded targets are not copied.
Tensor dense_rows(const Tensor& t, at::MemoryFormat order);

// The strides of a dense tensor with these sizes in `order`.
c10::SmallVector<int64_t, 5> strides_in(at::IntArrayRef sizes, at::MemoryFormat order);

cpu::DType dtype_of(const Tensor& t);
int64_t event_size(const Tensor& t);
cpu::Operand operand(const Tensor& dense);
// The same for counts: uint8 is a count like the wider integers, and not read as x / 255.
cpu::Operand count_operand(const Tensor& dense);
cpu::Result result(const Tensor& dense);

// The values of a (B,) or 0-dim CPU tensor.
std::vector<double> to_doubles(const Tensor& t);
// A CPU tensor of `values`, in `dtype`.
Tensor from_doubles(const std::vector<double>& values, at::IntArrayRef sizes, at::ScalarType dtype);

// If the graph may be differentiated again, makes the results raise an error then: the kernels have no second derivative.
Tensors once_differentiable(Tensors gradients);

// Arranges the computed gradients as Function::backward returns them, among `arguments` of the op. `places` has a position for each bit
// of `needs`.
Tensors placed(Tensors gradients, int64_t needs, size_t arguments, std::initializer_list<size_t> places);

inline bool needs_grad(const OptionalTensor& t) { return t && t->defined() && t->requires_grad(); }

// Raises if `t` carries a tangent of forward-mode AD, which would be lost silently.
void refuse_tangent(const OptionalTensor& t);

// Whether torch.compile or another tracer is active, under which ops must not write to their inputs or read values.
bool traced(const Tensor& t);

// Whether a target with `target_rows` rows fits params with `rows` rows: it has as many, or params are draws, stored one after another,
// and each draw has `target_rows` rows.
inline bool serves_rows(int64_t target_rows, int64_t rows) {
  return target_rows == rows || (target_rows > 0 && rows % target_rows == 0);
}
// The argument `target_rows` of the kernels, which is 0 if the target is not repeated.
inline int64_t repeated_rows(int64_t target_rows, int64_t rows) { return target_rows == rows ? 0 : target_rows; }

}  // namespace fastvae
