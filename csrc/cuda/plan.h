// How (rows, size) is cut up: a function of the shape and of the device's figures alone, as is then the order in which numbers are
// added up.
#pragma once
#include <algorithm>
#include <cstdint>

namespace fastvae::cuda {

#ifndef FASTVAE_THREADS
#define FASTVAE_THREADS 256
#endif
constexpr int kThreads = FASTVAE_THREADS;  // of a block
constexpr int kWarp = 32;
constexpr int64_t kLongest = int64_t(1) << 30;  // no split is longer, so that 32 bits count its elements

// A block takes kThreads / lanes rows at a time, `lanes` threads each; of long rows, a split. That is an item; block b takes the items
// b, b + blocks, ...
struct Plan {
  int lanes, lanes_log2;
  int splits;          // of a row; more than one only where lanes == kThreads, and then 32 bits count the items
  int64_t split_size;  // in elements
  int64_t items;
  int blocks;
};

// Rows of `size` cut up into whole steps where that keeps the device busy: many blocks, so that the last ones to end leave little idle;
// but not more than the last one can sum up in no time.
inline void split_rows(Plan& plan, int64_t rows, int64_t size, int64_t step, int64_t slots) {
  const int64_t steps = (size + step - 1) / step;
  if (steps <= 1 || rows == 0 || (rows >= 4 * slots && size <= kLongest)) return;
  // Short rows that nearly fill the device: the last of them leave it idle for less time than one block takes to sum up all splits.
  if (4 * rows >= 3 * slots && steps <= 8) return;
  const int64_t wanted = std::min(steps, std::max<int64_t>(1, 4 * slots / rows));
  int64_t each = std::min((steps + wanted - 1) / wanted, kLongest / step);
  // Of few steps, the number that leaves the last split the least short.
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

// `unit`: the elements of one access; `unroll`: accesses that a thread has under way at a time; `slots`: blocks that the device runs
// at a time; `turns`: how often a thread goes on to the next accesses of a row, where there are rows enough, for what it does once for
// a row to be little beside that.
inline Plan plan_for(int64_t rows, int64_t size, int unit, int unroll, int64_t slots, int turns = 1) {
  const int64_t accesses = std::max<int64_t>(1, (size + unit - 1) / unit);
  Plan plan{};
  plan.lanes = 1;
  // As few threads as keep `unroll` accesses under way `turns` times, or as many as there are, while the device has room.
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
