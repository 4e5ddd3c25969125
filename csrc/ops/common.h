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

// The op of that name, to be called through the dispatcher.
template <class Signature>
auto op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

enum Reduction : int64_t { kNone = 0, kSum = 1, kMean = 2 };

// Per-row results are fp32 whatever the input, fp64 for fp64.
inline at::ScalarType row_dtype(at::ScalarType input) { return input == at::kDouble ? at::kDouble : at::kFloat; }

// The memory order that rows are read and gradients written in: the lead operand's own where it is dense, else contiguous.
at::MemoryFormat memory_order(const Tensor& lead);

// `t` with the event dimensions dense in `order` (any batch stride, so slices of a packed head and expanded targets pass as they
// are); a copy where they are not.
Tensor dense_rows(const Tensor& t, at::MemoryFormat order);

// The strides of a dense tensor of those sizes in `order`.
c10::SmallVector<int64_t, 5> strides_in(at::IntArrayRef sizes, at::MemoryFormat order);

cpu::DType dtype_of(const Tensor& t);
int64_t event_size(const Tensor& t);
cpu::Operand operand(const Tensor& dense);
// The same of counts: uint8 is a number like the wider integers, and no pixel.
cpu::Operand count_operand(const Tensor& dense);
cpu::Result result(const Tensor& dense);

// The values of a (B,) or 0-dim CPU tensor.
std::vector<double> to_doubles(const Tensor& t);
// A CPU tensor of `values`, in `dtype`.
Tensor from_doubles(const std::vector<double>& values, at::IntArrayRef sizes, at::ScalarType dtype);

// Where the graph is to be differentiated again, results that raise when somebody does: the kernels have no second derivative.
Tensors once_differentiable(Tensors gradients);

inline bool needs_grad(const OptionalTensor& t) { return t && t->defined() && t->requires_grad(); }

// Raises where `t` carries a tangent of forward-mode AD, which would be lost in silence.
void refuse_tangent(const OptionalTensor& t);

// True under torch.compile and other tracers, where ops must not write to their inputs or read values.
bool traced(const Tensor& t);

// The rows of a target: as many as the params have, or one for the same row of each draw, which lie one behind the other.
inline bool serves_rows(int64_t target_rows, int64_t rows) {
  return target_rows == rows || (target_rows > 0 && rows % target_rows == 0);
}
// What `target_rows` is in the kernels' arguments.
inline int64_t repeated_rows(int64_t target_rows, int64_t rows) { return target_rows == rows ? 0 : target_rows; }

}  // namespace fastvae
