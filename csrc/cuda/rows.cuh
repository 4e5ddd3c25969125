// The end of every pass over a reconstruction: from the sums of rows, or of their splits, to the nll of each and the loss.
#pragma once
#include "device.cuh"

namespace fastvae::cuda {

// Writes the nll of a row, and its loss where that is wanted; returns its part of the loss.
FASTVAE_DEVICE double put_row(const NllArgs& args, int64_t row, double value) {
  put(args.nll, row, value);
  if (args.kl.data) value += (args.beta.data ? number(args.beta) : 1.0) * number(args.kl, row);
  if (!args.reduced) put(args.loss, row, value);
  return value;
}

// All threads of a block call this when its items are done. Where rows are split, its sums of splits (of type C) lie in the scratch, by
// items, and, where `pulls`, as many more behind them; else `loss` is this thread's part of the loss.
// finish_row(row, sum, pull) writes what there is of a row, and returns its part of the loss.
template <class C, class F>
FASTVAE_DEVICE void finish(const NllArgs& args, const Plan& plan, bool pulls, double loss, double* loss_scratch, const F& finish_row) {
  if (plan.splits > 1) {
    // The last block adds up the splits of all rows.
    if (!is_last_block(args.workspace.counter, gridDim.x)) return;
    const C* partials = static_cast<const C*>(args.workspace.scratch);
    int lanes = 1;
    while (lanes < kWarp && lanes < plan.splits) lanes *= 2;
    const int first = threadIdx.x & (lanes - 1), groups = kThreads / lanes;
    for (int64_t base = 0; base < args.rows; base += groups) {
      const int64_t row = base + threadIdx.x / lanes;
      const auto total = [&](const C* parts) {
        double sum = 0;
        if (row < args.rows) {
#pragma unroll 4
          for (int i = first; i < plan.splits; i += lanes) sum += load_written(parts + row * plan.splits + i);
        }
        return group_sum(sum, lanes, static_cast<double*>(nullptr));
      };
      const double sum = total(partials), pull = pulls ? total(partials + plan.items) : 0;
      if (first == 0 && row < args.rows) loss += finish_row(row, sum, pull);
    }
    if (args.reduced) {
      loss = group_sum(loss, kThreads, loss_scratch);
      if (threadIdx.x == 0) put(args.loss, 0, args.weight * loss);
    }
  } else if (args.reduced) {
    loss = group_sum(loss, kThreads, loss_scratch);
    if (gridDim.x > 1) {
      double* partials = static_cast<double*>(args.workspace.scratch);
      if (threadIdx.x == 0) partials[blockIdx.x] = loss;
      if (!is_last_block(args.workspace.counter, gridDim.x)) return;
      loss = sum_written(partials, gridDim.x, loss_scratch);
    }
    if (threadIdx.x == 0) put(args.loss, 0, args.weight * loss);
  }
}

// The scratch that `finish` needs.
inline int64_t scratch_of(const NllArgs& args, const Plan& plan) {
  if (!args.loss.data) return 0;
  return (plan.splits > 1 ? (args.scalar_rows.data ? 2 : 1) * plan.items : args.reduced && plan.blocks > 1 ? plan.blocks : 0) * int64_t(sizeof(double));
}

}  // namespace fastvae::cuda
