// The last step of every reconstruction loss: turns the sums of rows, or of their splits, into the nll of each row and the loss.
#pragma once
#include "device.cuh"

namespace fastvae::cuda {

FASTVAE_DEVICE double beta_of(const NllArgs& args) { return args.kl.data && args.beta.data ? number(args.beta) : 1.0; }
FASTVAE_DEVICE double kl_of(const NllArgs& args, int64_t row) { return args.kl.data ? number(args.kl, row) : 0.0; }

// Writes the nll of a row and, unless the loss is reduced, its loss, to which `weighted_kl` is added. Returns the row's loss.
FASTVAE_DEVICE double put_row(const NllArgs& args, int64_t row, double value, double weighted_kl) {
  put(args.nll, row, value);
  if (args.kl.data) value += weighted_kl;
  if (!args.reduced) put(args.loss, row, value);
  return value;
}

// A plan for rows of places (pixels or positions), each of which several threads process together. A block takes a tile of `tile`
// adjacent places at a time, `width` in each of `rows_each` rows. An item consists of the tiles of these rows, or of one split of a row.
struct TilePlan : Plan {
  int tile, width, rows_each;
};

inline void cut_into_tiles(TilePlan& plan, int64_t rows, int64_t places, int tile, int64_t slots) {
  plan.tile = tile;
  plan.width = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(places, tile)));
  plan.rows_each = tile / plan.width;
  plan.items = (rows + plan.rows_each - 1) / plan.rows_each;
  plan.splits = 1;
  plan.split_size = places;
  if (plan.rows_each == 1) split_rows(plan, rows, places, tile, slots);
  count_blocks(plan, slots);
}

struct TileItem {
  int64_t first_row, begin, end;  // places from `begin` to `end`

  FASTVAE_DEVICE TileItem(const TilePlan& plan, int64_t item, int64_t places) {
    first_row = plan.splits > 1 ? uint32_t(item) / uint32_t(plan.splits) : item * plan.rows_each;
    begin = plan.splits > 1 ? (item - first_row * plan.splits) * plan.split_size : 0;
    end = begin + plan.split_size < places ? begin + plan.split_size : places;
  }
};

// All threads of a block call this when the tiles of an item are done. `place` is the place in the tile for which this thread has `sum`;
// it is negative if there is none, and `sum` must then be 0. `sums` has kThreads numbers, which no thread may still be using, and
// `scratch` has one for each warp. Returns this thread's part of the loss.
FASTVAE_DEVICE double finish_item(const NllArgs& args, const TilePlan& plan, int64_t item, int64_t first_row, int place, double sum,
                                  double* sums, double* scratch) {
  if (plan.rows_each == 1) {
    sum = group_sum(sum, kThreads, scratch);
    if (threadIdx.x != 0 || first_row >= args.rows) return 0;
    if (plan.splits == 1) return put_row(args, first_row, sum, beta_of(args) * kl_of(args, first_row));
    static_cast<double*>(args.workspace.scratch)[item] = sum;
    return 0;
  }
  if (place >= 0) sums[place] = sum;
  __syncthreads();
  const int thread = threadIdx.x;
  double loss = 0;
  if (thread < plan.rows_each && first_row + thread < args.rows) {
    for (int i = 0; i < plan.width; ++i) loss += sums[thread * plan.width + i];
    loss = put_row(args, first_row + thread, loss, beta_of(args) * kl_of(args, first_row + thread));
  }
  __syncthreads();
  return loss;
}

// All threads of a block call this when its items are done. If rows are split, the sums of the splits (of type C) are in the scratch,
// one per item, and if `scale_grads`, as many further sums follow them; otherwise `loss` is this thread's part of the loss.
// finish_row(row, sum, scale_grad) writes the results of a row and returns its part of the loss.
template <class C, class F>
FASTVAE_DEVICE void finish(const NllArgs& args, const Plan& plan, bool scale_grads, double loss, double* loss_scratch, const F& finish_row) {
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
      const double sum = total(partials), scale_grad = scale_grads ? total(partials + plan.items) : 0;
      if (first == 0 && row < args.rows) loss += finish_row(row, sum, scale_grad);
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
  const int64_t numbers = plan.splits > 1 ? (args.scalar_rows.data ? 2 : 1) * plan.items : args.reduced && plan.blocks > 1 ? plan.blocks : 0;
  return numbers * int64_t(sizeof(double));
}

}  // namespace fastvae::cuda
