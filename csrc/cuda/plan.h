// How work of shape (rows, size) is divided. The division, and with it the order in which numbers are added, depends only on the shape
// and on the properties of the device.
#pragma once
#include <algorithm>
#include <cstdint>

namespace fastvae::cuda {

#ifndef FASTVAE_THREADS
#define FASTVAE_THREADS 256
#endif
constexpr int kThreads = FASTVAE_THREADS;  // threads per block
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr int64_t kLongest = int64_t(1) << 30;  // the maximum length of a split, so that 32 bits can count its elements

// A block processes one item at a time: kThreads / lanes rows with `lanes` threads each or, if rows are long, one split of a row. Block b
// takes the items b, b + blocks, ...
struct Plan {
  int lanes, lanes_log2;
  int splits;          // splits per row; more than one only if lanes == kThreads, and then 32 bits can count the items
  int64_t split_size;  // in elements
  int64_t items;
  int blocks;
};

// Splits rows of `size` elements into multiples of `step` if that keeps the device busier. There should be many blocks, so that little of
// the device is idle while the last ones finish, but no more than the last block can sum in negligible time.
inline void split_rows(Plan& plan, int64_t rows, int64_t size, int64_t step, int64_t slots) {
  const int64_t steps = (size + step - 1) / step;
  if (steps <= 1 || rows == 0 || (rows >= 4 * slots && size <= kLongest)) return;
  // If short rows nearly fill the device, it is idle at the end for less time than one block would take to sum all splits.
  if (4 * rows >= 3 * slots && steps <= 8) return;
  const int64_t wanted = std::min(steps, std::max<int64_t>(1, 4 * slots / rows));
  int64_t each = std::min((steps + wanted - 1) / wanted, kLongest / step);
  // If a split has few steps, choose their number such that the last split is as full as possible.
  const auto missing = [&](int64_t n) { return (n - steps % n) % n; };
  if (each < 16)
    for (int64_t fewer = each - 1, least = (each + 1) / 2; fewer >= least; --fewer)
      if (missing(fewer) < missing(each)) each = fewer;
  plan.splits = static_cast<int>((steps + each - 1) / each);
  plan.split_size = each * step;
  plan.items = rows * plan.splits;
}

inline void count_blocks(Plan& plan, int64_t slots) {
  const int64_t each = std::max<int64_t>(1, (plan.items + 8 * slots - 1) / (8 * slots));
  plan.blocks = static_cast<int>(std::max<int64_t>(1, (plan.items + each - 1) / each));
}

// `unit` is the number of elements per access, `unroll` the number of accesses that a thread has in flight, and `slots` the number of
// blocks that the device runs at a time. If there are enough rows, a thread goes through `turns` rounds of accesses per row, so that its
// fixed work per row is small in comparison.
inline Plan plan_for(int64_t rows, int64_t size, int unit, int unroll, int64_t slots, int turns = 1) {
  const int64_t accesses = std::max<int64_t>(1, (size + unit - 1) / unit);
  Plan plan{};
  plan.lanes = 1;
  // Use the fewest threads that still have `turns` rounds of `unroll` accesses, but more, up to one per access, while the device has room.
  const auto more = [&] {
    return plan.lanes * unroll * turns < accesses || (plan.lanes < accesses && rows <= slots * kThreads / (2 * plan.lanes));
  };
  while (plan.lanes < kThreads && more()) plan.lanes *= 2, ++plan.lanes_log2;
  const int groups = kThreads / plan.lanes;
  plan.items = (rows + groups - 1) / groups;
  plan.splits = 1;
  plan.split_size = size;

  const int64_t step = int64_t(kThreads) * unit * unroll;
  if (plan.lanes == kThreads) split_rows(plan, rows, size, step, slots);
  count_blocks(plan, slots);
  return plan;
}

}  // namespace fastvae::cuda
