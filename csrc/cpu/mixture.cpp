// Mixtures of diagonal Gaussians: the log-density of points, jointly and in each dimension, and its gradients. The lanes of a vector are
// components. These go by in tiles, and no tensor has an element for each point, component and dimension.
#include "../math/mixture.h"

#include <ATen/Parallel.h>
#include <c10/core/Allocator.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "staging.h"

namespace fastvae::cpu::FASTVAE_ISA {
namespace {

constexpr int kRows = 4;     // the number of points that share what is loaded of a component
constexpr int kVectors = 4;  // the number of vectors of components in a tile
constexpr int64_t kChunks = 8;  // the maximum number of parts into which gradients cut the points, and the components

template <class C>
constexpr int64_t kTile = kVectors * Vec<C>::size();

inline int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Memory from torch's allocator, so that its profiler counts it.
template <class C>
class Scratch {
 public:
  explicit Scratch(int64_t size, bool zeroed = false)
      : memory_(size ? c10::GetAllocator(c10::DeviceType::CPU)->allocate(size * sizeof(C)) : c10::DataPtr()) {
    if (zeroed && size) std::memset(memory_.mutable_get(), 0, size * sizeof(C));
  }
  C* data() { return static_cast<C*>(memory_.mutable_get()); }
  const C* data() const { return static_cast<const C*>(memory_.get()); }

 private:
  c10::DataPtr memory_;
};

// The components, transposed: a tile has its `kTile` components side by side, for one dimension after another.
template <class C>
class Components {
 public:
  explicit Components(const MixtureArgs& args)
      : tiles(parts(args.components, kTile<C>)), dims_(args.dims), base_(tiles * kTile<C>), data_(3 * tiles * dims_ * kTile<C>) {
    const C* all_mu = static_cast<const C*>(args.mu);
    const C* all_logvar = static_cast<const C*>(args.logvar);
    at::parallel_for(0, tiles, grain(8 * kTile<C> * args.dims), [&](int64_t first, int64_t last) {
      for (int64_t tile = first; tile < last; ++tile)
        for (int64_t lane = 0; lane < kTile<C>; ++lane) {
          const int64_t place = tile * kTile<C> + lane;
          // The last tile is filled up with copies of the last component, which have the density 0. (Means and variances of their own
          // could make a NaN of an infinite point.)
          const bool real = place < args.components;
          const int64_t m = real ? place : args.components - 1;
          double sum = 0;
          for (int64_t d = 0; d < dims_; d += Vec<C>::size()) {
            const int64_t n = std::min<int64_t>(Vec<C>::size(), dims_ - d);
            const Vec<C> logvar = load_lanes(all_logvar + m * dims_ + d, n);
            C roots[Vec<C>::size()], terms[Vec<C>::size()];
            math::half_inverse_root(logvar).store(roots);
            math::log_normaliser(logvar).store(terms);
            for (int64_t i = 0; i < n; ++i) {
              const int64_t at = (d + i) * kTile<C> + lane;
              block(tile, 0)[at] = all_mu[m * dims_ + d + i];
              block(tile, 1)[at] = roots[i];
              block(tile, 2)[at] = real ? terms[i] : -std::numeric_limits<C>::infinity();
              sum += terms[i];
            }
          }
          base_.data()[place] = real ? static_cast<C>(sum) : -std::numeric_limits<C>::infinity();
        }
    });
  }

  const C* mu(int64_t tile) const { return block(tile, 0); }
  const C* root(int64_t tile) const { return block(tile, 1); }
  const C* term(int64_t tile) const { return block(tile, 2); }  // the normaliser of each dimension
  const C* base(int64_t tile) const { return base_.data() + tile * kTile<C>; }  // the sum of the normalisers

  const int64_t tiles;

 private:
  const C* block(int64_t tile, int64_t which) const { return data_.data() + (3 * tile + which) * dims_ * kTile<C>; }
  C* block(int64_t tile, int64_t which) { return data_.data() + (3 * tile + which) * dims_ * kTile<C>; }

  int64_t dims_;
  Scratch<C> base_, data_;
};

// kRows points, the last of which is repeated if there are fewer.
struct Group {
  int64_t row[kRows], rows;

  Group(int64_t first, int64_t points) : rows(std::min<int64_t>(kRows, points - first)) {
    for (int64_t r = 0; r < kRows; ++r) row[r] = first + std::min(r, rows - 1);
  }
};

// A value for each point of a group and each component of a tile.
template <class C>
struct Plane {
  Vec<C> at[kRows][kVectors];

  void clear() {
    for (auto& row : at)
      for (auto& v : row) v = Vec<C>(0);
  }
};

template <class C>
void load_log_weights(const MixtureArgs& args, const Group& group, int64_t tile, Plane<C>& out) {
  const int64_t begin = tile * kTile<C>, n = std::min(kTile<C>, args.components - begin);
  for (int r = 0; r < kRows; ++r) {
    const C* from = static_cast<const C*>(args.log_weight) + group.row[r] * args.log_weight_stride + begin;
    for (int64_t v = 0; v < kVectors; ++v) {
      const int64_t left = n - v * Vec<C>::size();
      out.at[r][v] = left > 0 ? load_lanes(from + v * Vec<C>::size(), left) : Vec<C>(0);
    }
  }
}

// Sums of squares over the dimensions, t^2 in math/mixture.h.
template <class C>
void squares(const Components<C>& components, int64_t tile, const C* const (&z)[kRows], int64_t dims, Plane<C>& out) {
  using V = Vec<C>;
  constexpr int64_t W = V::size();
  constexpr int kPair = 2;  // these sums stay in registers
  for (int64_t v = 0; v < kVectors; v += kPair) {
    V sum[kRows][kPair];
    for (auto& row : sum)
      for (auto& s : row) s = V(0);
    const C* mu = components.mu(tile) + v * W;
    const C* root = components.root(tile) + v * W;
    for (int64_t d = 0; d < dims; ++d, mu += kTile<C>, root += kTile<C>)
      for (int k = 0; k < kPair; ++k) {
        const V m = V::loadu(mu + k * W), s = V::loadu(root + k * W);
        for (int r = 0; r < kRows; ++r) {
          const V t = (V(z[r][d]) - m) * s;
          sum[r][k] = math::Primitives<V>::fma(t, t, sum[r][k]);
        }
      }
    for (int r = 0; r < kRows; ++r)
      for (int k = 0; k < kPair; ++k) out.at[r][v + k] = sum[r][k];
  }
}

// A sum over all lanes and tiles.
template <class C>
struct Total {
  double max = -std::numeric_limits<double>::infinity(), sum = 0;

  void add(const math::RunningSum<Vec<C>>& part) {
    C maxima[Vec<C>::size()], sums[Vec<C>::size()], top = -std::numeric_limits<C>::infinity();
    part.max.store(maxima);
    for (C m : maxima) top = m > top ? m : top;
    (part.sum * math::Primitives<Vec<C>>::exp_bounded(part.max - Vec<C>(top))).store(sums);
    double part_sum = 0;
    for (C s : sums) part_sum += static_cast<double>(s);
    const double larger = std::max<double>(max, top);
    if (!(sum == 0)) sum *= std::exp(max - larger);
    sum += part_sum * std::exp(top - larger);
    max = larger;
  }

  C log() const {
    if (max > math::kInfiniteLogDensity) return std::numeric_limits<C>::infinity();
    return static_cast<C>(sum == 0 ? -std::numeric_limits<double>::infinity() : max + std::log(sum));
  }
};

// Rounding errors of a lane's running sum grow with the number of its summands, so totals are taken after so many tiles.
constexpr int64_t kTilesPerTotal = 64;

// kEach says whether the densities of each dimension are wanted. The joint one costs little beside them.
template <class C, bool kEach>
void value_as(const MixtureValueArgs& args) {
  using V = Vec<C>;
  constexpr int64_t W = V::size();
  const Components<C> components(args);
  const int64_t dims = args.dims, work = kRows * args.components * std::max<int64_t>(1, dims) / 4;
  at::parallel_for(0, parts(args.points, kRows), grain(work), [&](int64_t first, int64_t last) {
    std::vector<math::RunningSum<V>> each(kEach ? kRows * dims : 0);
    std::vector<Total<C>> each_total(kEach ? kRows * dims : 0);
    Plane<C> weights, sums;
    for (int64_t task = first; task < last; ++task) {
      const Group group(task * kRows, args.points);
      const C* z[kRows];
      for (int r = 0; r < kRows; ++r) z[r] = static_cast<const C*>(args.z) + group.row[r] * dims;
      math::RunningSum<V> joint[kRows];
      Total<C> joint_total[kRows];
      std::fill(each.begin(), each.end(), math::RunningSum<V>());
      std::fill(each_total.begin(), each_total.end(), Total<C>());
      for (int64_t tile = 0; tile < components.tiles; ++tile) {
        load_log_weights(args, group, tile, weights);
        if constexpr (kEach) {
          sums.clear();
          const C *mu = components.mu(tile), *root = components.root(tile), *term = components.term(tile);
          for (int64_t d = 0; d < dims; ++d)
            for (int v = 0; v < kVectors; ++v, mu += W, root += W, term += W) {
              const V m = V::loadu(mu), s = V::loadu(root), c = V::loadu(term);
              for (int r = 0; r < kRows; ++r) {
                const V t = (V(z[r][d]) - m) * s, square = t * t;
                sums.at[r][v] = sums.at[r][v] + square;
                each[d * kRows + r].add(c + weights.at[r][v] - square);
              }
            }
        } else {
          squares(components, tile, z, dims, sums);
        }
        for (int v = 0; v < kVectors; ++v) {
          const V base = V::loadu(components.base(tile) + v * W);
          for (int r = 0; r < kRows; ++r) joint[r].add(base + weights.at[r][v] - sums.at[r][v]);
        }
        if ((tile + 1) % kTilesPerTotal == 0 || tile + 1 == components.tiles) {
          for (int r = 0; r < kRows; ++r) {
            joint_total[r].add(joint[r]);
            joint[r] = {};
          }
          for (size_t i = 0; i < each.size(); ++i) {
            each_total[i].add(each[i]);
            each[i] = {};
          }
        }
      }
      for (int64_t r = 0; r < group.rows; ++r) {
        if (args.joint) static_cast<C*>(args.joint)[group.row[r]] = joint_total[r].log();
        if (kEach)
          for (int64_t d = 0; d < dims; ++d)
            static_cast<C*>(args.per_dimension)[group.row[r] * dims + d] = each_total[d * kRows + r].log();
      }
    }
  });
}

// The logarithm of a total and its incoming gradient, such that a point without density has no gradient, and none is NaN.
template <class C>
void usable(C& total, C& grad) {
  if (total == -std::numeric_limits<C>::infinity()) {
    total = 0;
    grad = 0;
  } else if (total == std::numeric_limits<C>::infinity()) {
    total = math::kInfiniteLogDensity;
  }
}

// How the gradients divide their work. Each task takes a range of points and a range of components; it depends on the shapes alone.
template <class C>
struct Division {
  int64_t points, components, groups, tiles;  // how many ranges there are, and the length of each

  explicit Division(const MixtureArgs& args)
      : groups(parts(parts(args.points, kRows), kChunks)), tiles(parts(parts(args.components, kTile<C>), kChunks)) {
    points = parts(parts(args.points, kRows), groups);
    components = parts(parts(args.components, kTile<C>), tiles);
  }
};

template <class C>
C sum_of_lanes(Vec<C> v) {
  C lanes[Vec<C>::size()], sum = 0;
  v.store(lanes);
  for (C lane : lanes) sum += lane;
  return sum;
}

template <class C, bool kEach>
void grad_as(const MixtureGradArgs& args) {
  using V = Vec<C>;
  using P = math::Primitives<V>;
  constexpr int64_t W = V::size();
  const Components<C> components(args);
  const Division<C> division(args);
  const int64_t dims = args.dims, tile_size = dims * kTile<C>, padded = components.tiles * kTile<C>;
  const bool of_rows = args.log_weight_stride != 0, with_joint = !kEach || args.grad_joint;
  // Every range of points has its own sums for the components, and every range of components its own sums for the points.
  const int64_t of_components = components.tiles * tile_size, of_points = args.points * dims;
  Scratch<C> all_mu(division.points * of_components, true), all_logvar(division.points * of_components, true);
  Scratch<C> all_z(division.components * of_points);
  Scratch<C> all_weights(args.grad_log_weight && !of_rows ? division.points * padded : 0, true);

  at::parallel_for(0, division.points * division.components, 1, [&](int64_t first, int64_t last) {
    std::vector<V> z_sums(kRows * dims);
    std::vector<C> totals(kEach ? kRows * dims : 0), grads(totals.size());
    Plane<C> weights, sums, shares, each_shares;
    for (int64_t task = first; task < last; ++task) {
      const int64_t point_range = task / division.components, component_range = task % division.components;
      const int64_t first_tile = component_range * division.tiles;
      const int64_t last_tile = std::min(first_tile + division.tiles, components.tiles);
      const int64_t first_row = point_range * division.groups * kRows;
      const int64_t last_row = std::min(first_row + division.groups * kRows, args.points);
      for (int64_t row = first_row; row < last_row; row += kRows) {
        const Group group(row, args.points);
        const C* z[kRows];
        C total[kRows] = {}, grad[kRows] = {};
        for (int r = 0; r < kRows; ++r) {
          z[r] = static_cast<const C*>(args.z) + group.row[r] * dims;
          const bool repeated = r >= group.rows;  // counted once, by its first copy
          if (with_joint) {
            total[r] = static_cast<const C*>(args.joint)[group.row[r]];
            grad[r] = repeated ? C(0) : static_cast<const C*>(args.grad_joint)[group.row[r]];
            usable(total[r], grad[r]);
          }
          if (kEach)
            for (int64_t d = 0; d < dims; ++d) {
              C &t = totals[d * kRows + r], &g = grads[d * kRows + r];
              t = static_cast<const C*>(args.per_dimension)[group.row[r] * dims + d];
              g = repeated ? C(0) : static_cast<const C*>(args.grad_per_dimension)[group.row[r] * dims + d];
              usable(t, g);
            }
        }
        std::fill(z_sums.begin(), z_sums.end(), V(0));
        for (int64_t tile = first_tile; tile < last_tile; ++tile) {
          load_log_weights(args, group, tile, weights);
          V largest(0);
          if (with_joint) {
            squares(components, tile, z, dims, sums);
            for (int v = 0; v < kVectors; ++v) {
              const V base = V::loadu(components.base(tile) + v * W);
              for (int r = 0; r < kRows; ++r) {
                largest = P::at_least(sums.at[r][v], largest);
                shares.at[r][v] = math::share(base + weights.at[r][v] - sums.at[r][v], V(total[r])) * V(grad[r]);
              }
            }
          } else {
            shares.clear();
          }
          if (kEach && args.grad_log_weight) each_shares.clear();
          const int64_t place = (point_range * components.tiles + tile) * tile_size;
          // A component that is infinitely far away has share 0, and 0 times its distance must not be NaN.
          const auto accumulate = [&](auto with_infinite) FASTVAE_INLINE {
            const C *mu = components.mu(tile), *root = components.root(tile), *term = components.term(tile);
            C *mu_sums = all_mu.data() + place, *logvar_sums = all_logvar.data() + place;
            for (int64_t d = 0; d < dims; ++d) {
              V z_sum[kRows];
              for (int r = 0; r < kRows; ++r) z_sum[r] = z_sums[d * kRows + r];
              for (int v = 0; v < kVectors; ++v, mu += W, root += W, term += W, mu_sums += W, logvar_sums += W) {
                const V m = V::loadu(mu), s = V::loadu(root), c = kEach ? V::loadu(term) : V(0);
                V mu_sum = V::loadu(mu_sums), logvar_sum = V::loadu(logvar_sums);
                for (int r = 0; r < kRows; ++r) {
                  V t = (V(z[r][d]) - m) * s, square = t * t, w = shares.at[r][v];
                  if constexpr (kEach) {
                    const V own = math::share(c + weights.at[r][v] - square, V(totals[d * kRows + r])) * V(grads[d * kRows + r]);
                    if (args.grad_log_weight) each_shares.at[r][v] = each_shares.at[r][v] + own;
                    w = w + own;
                  }
                  if (with_infinite) {
                    const V infinite = P::less(V(math::largest<C>()), square);
                    t = P::zero_where(infinite, t);
                    square = P::zero_where(infinite, square);
                  }
                  const V by_mu = w * t * s;
                  z_sum[r] = z_sum[r] + by_mu;
                  mu_sum = mu_sum + by_mu;
                  logvar_sum = P::fma(w, square - V(0.5), logvar_sum);
                }
                mu_sum.store(mu_sums);
                logvar_sum.store(logvar_sums);
              }
              for (int r = 0; r < kRows; ++r) z_sums[d * kRows + r] = z_sum[r];
            }
          };
          if (kEach || P::any_less(V(math::largest<C>()), largest)) accumulate(std::true_type());
          else accumulate(std::false_type());

          if (!args.grad_log_weight) continue;
          for (int r = 0; r < group.rows; ++r)
            for (int v = 0; v < kVectors; ++v) {
              const V share = kEach ? shares.at[r][v] + each_shares.at[r][v] : shares.at[r][v];
              const int64_t m = tile * kTile<C> + v * W, left = std::min(W, args.components - m);
              if (left <= 0) continue;
              if (of_rows) store_lanes(share, static_cast<C*>(args.grad_log_weight) + group.row[r] * args.components + m, left);
              else {
                C* sum = all_weights.data() + point_range * padded + m;
                (V::loadu(sum) + share).store(sum);
              }
            }
        }
        for (int64_t r = 0; r < group.rows; ++r)
          for (int64_t d = 0; d < dims; ++d)
            all_z.data()[(component_range * args.points + group.row[r]) * dims + d] = sum_of_lanes(z_sums[d * kRows + r]);
      }
    }
  });

  const auto total = [](const Scratch<C>& sums, int64_t count, int64_t size, int64_t at) {
    C sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += sums.data()[i * size + at];
    return sum;
  };
  at::parallel_for(0, args.points * dims, kGrain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) static_cast<C*>(args.grad_z)[i] = -2 * total(all_z, division.components, of_points, i);
  });
  at::parallel_for(0, args.components, grain(dims), [&](int64_t first, int64_t last) {
    for (int64_t m = first; m < last; ++m) {
      const int64_t at = m / kTile<C> * tile_size + m % kTile<C>;
      for (int64_t d = 0; d < dims; ++d) {
        static_cast<C*>(args.grad_mu)[m * dims + d] = 2 * total(all_mu, division.points, of_components, at + d * kTile<C>);
        static_cast<C*>(args.grad_logvar)[m * dims + d] = total(all_logvar, division.points, of_components, at + d * kTile<C>);
      }
      if (args.grad_log_weight && !of_rows) static_cast<C*>(args.grad_log_weight)[m] = total(all_weights, division.points, padded, m);
    }
  });
}

template <class C>
void value_in(const MixtureValueArgs& args) {
  args.per_dimension ? value_as<C, true>(args) : value_as<C, false>(args);
}

template <class C>
void grad_in(const MixtureGradArgs& args) {
  args.grad_per_dimension ? grad_as<C, true>(args) : grad_as<C, false>(args);
}

}  // namespace

void mixture(const MixtureValueArgs& args) { args.in_double ? value_in<double>(args) : value_in<float>(args); }
void mixture_grad(const MixtureGradArgs& args) { args.in_double ? grad_in<double>(args) : grad_in<float>(args); }

}  // namespace fastvae::cpu::FASTVAE_ISA
