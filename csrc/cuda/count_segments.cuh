// Segments of rows of counts. A warp processes a segment at a time: it first computes all elements as if their counts were 0, which most
// are, and then those that are listed as others.
#pragma once
#include "counts_elements.cuh"

namespace fastvae::cuda {

constexpr int kSegment = 256;  // the number of features that a warp computes at a time
constexpr int kQuads = kSegment / (kWarp * kQuad);

template <class C>
FASTVAE_DEVICE C warp_sum(C value) {
  return group_sum(value, kWarp, static_cast<C*>(nullptr));
}

// The factor of the derivatives of a row.
template <class C>
FASTVAE_DEVICE C weight_of_row(const CountArgs& args, int64_t row) {
  if (!args.grad_loss.data && !args.grad_nll.data) return static_cast<C>(args.weight);
  return static_cast<C>(row_factor(args.grad_loss, args.grad_nll, args.weight, row));
}

// Lists the elements of a segment that are others, in ascending order like the positions of a sparse target, and returns their number
// to all lanes of the warp. Bit kQuad u + j of `others` belongs to element j of the quad u * kWarp + lane. `list` has room for kSegment
// entries, and may be read after a __syncwarp().
FASTVAE_DEVICE int list_others(uint32_t others, uint8_t* list) {
  static_assert(kQuads == 2);  // the counters of both quads take one half of a number each
  const int lane = threadIdx.x % kWarp;
  const int own = __popc(others & 15) | __popc(others >> 4) << 16;
  int until = own;  // the others of this lane and of those before it
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int before = __shfl_up_sync(0xffffffff, until, distance);
    if (lane >= distance) until += before;
  }
  const int total = __shfl_sync(0xffffffff, until, kWarp - 1), first_quad = total & 0xffff;
  until -= own;
  int at = until & 0xffff;
  for (int quad = 0; quad < kQuads; ++quad, at = first_quad + (until >> 16))
    for (uint32_t left = others >> kQuad * quad & 15; left; left &= left - 1)
      list[at++] = static_cast<uint8_t>(kQuad * (quad * kWarp + lane) + __ffs(left) - 1);
  return first_quad + (total >> 16);
}

// The first of the positions from `first` to `last` whose column is at least `column`, found by a warp. If columns are out of order, it
// is some position, and the same one in every call.
FASTVAE_DEVICE int64_t lower_bound(const int64_t* columns, int64_t first, int64_t last, int64_t column) {
  const int lane = threadIdx.x % kWarp;
  while (first < last) {
    const int64_t step = (last - first + kWarp - 1) / kWarp, probe = first + lane * step;
    const bool below = probe < last && __ldg(reinterpret_cast<const long long*>(columns) + probe) < column;
    const int n = __popc(__ballot_sync(0xffffffff, below));
    if (n == 0) return first;
    const int64_t end = first + n * step;
    first += (n - 1) * step + 1;
    last = end < last ? end : last;
  }
  return first;
}

// The stored values of a row in the columns from `begin` to `begin + count`.
struct Stored {
  int64_t first = 0, last = 0;
  bool valid = true;  // false if the row's positions are out of range or out of order here

  FASTVAE_DEVICE Stored() {}
  // Sets the bit of each column whose value is not zero in `bits`, of which a warp has kSegment.
  FASTVAE_DEVICE Stored(const CountArgs& args, int64_t row, int64_t begin, uint32_t count, uint32_t* bits) {
    const int lane = threadIdx.x % kWarp;
    const int64_t start = __ldg(reinterpret_cast<const long long*>(args.starts) + row),
                  end = __ldg(reinterpret_cast<const long long*>(args.starts) + row + 1);
    valid = start >= 0 && start <= end && end <= args.stored;
    if (valid) {
      // Each position of the row lies in the range of one segment, whatever its column is.
      first = begin == 0 ? start : lower_bound(args.columns, start, end, begin);
      last = begin + count == args.size ? end : lower_bound(args.columns, start, end, begin + count);
      valid = first <= last && last - first <= count;
    }
    if (lane < kSegment / 32) bits[lane] = 0;
    __syncwarp();
    bool good = true;
    for (int64_t i = first + lane; valid && i < last; i += kWarp) {
      const int64_t column = args.columns[i];
      const bool inside = column >= begin && column < begin + count && (i == first || args.columns[i - 1] < column);
      good &= inside;
      if (inside && load_count<float>(static_cast<const char*>(args.target.data), args.target.type, i) != 0) {
        const int g = static_cast<int>(column - begin);
        atomicOr(&bits[g / 32], 1u << g % 32);
      }
    }
    __syncwarp();
    if (__ballot_sync(0xffffffff, !good)) valid = false;
    if (!valid) first = last = 0;
  }
};

}  // namespace fastvae::cuda
