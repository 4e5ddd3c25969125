// The threads of a block as threads of the operating system.
#pragma once
#include <barrier>
#include <memory>
#include <thread>
#include <vector>

// There is one device, shared by all launching threads.
#define SHIM_OF_EACH

namespace shim {

struct Team {
  std::barrier<> block;
  std::vector<std::unique_ptr<std::barrier<>>> warps;
  std::vector<uint64_t> exchange;

  explicit Team(int threads) : block(threads), exchange(threads) {
    for (int i = 0; i < threads; i += kWarp) warps.push_back(std::make_unique<std::barrier<>>(kWarp));
  }
  void wait_for_block() { block.arrive_and_wait(); }
  void wait_for_warp(unsigned thread) { warps[thread / kWarp]->arrive_and_wait(); }
};

inline thread_local Team* team;
inline thread_local int team_index;

}  // namespace shim

inline thread_local dim3 threadIdx, blockIdx, gridDim;

namespace shim {

// The threads are created once, and outlive the launches.
class Device {
 public:
  explicit Device(int threads) : threads_(threads), start_(kTeams * threads + 1), end_(kTeams * threads + 1) {
    for (int t = 0; t < kTeams; ++t) teams_.push_back(std::make_unique<Team>(threads));
    for (int t = 0; t < kTeams; ++t)
      for (int i = 0; i < threads; ++i) workers_.emplace_back([this, t, i] { work(t, i); });
  }
  ~Device() {
    stop_ = true;
    start_.arrive_and_wait();
    for (auto& worker : workers_) worker.join();
  }

  template <class F>
  void launch(dim3 grid, const F& body) {
    ++launches;
    grid_ = grid;
    run_ = [](const void* f) { (*static_cast<const F*>(f))(); };
    body_ = &body;
    next_ = 0;
    start_.arrive_and_wait();
    end_.arrive_and_wait();
  }

 private:
  void work(int t, int i) {
    team = teams_[t].get();
    team_index = t;
    threadIdx = dim3(i);
    while (true) {
      start_.arrive_and_wait();
      if (stop_) return;
      gridDim = grid_;
      const unsigned blocks = grid_.x * grid_.y;
      while (true) {
        if (i == 0) block_of_[t] = next_++;
        team->wait_for_block();
        const unsigned block = block_of_[t];
        if (block >= blocks) break;
        blockIdx = dim3(block % grid_.x, block / grid_.x);
        run_(body_);
        team->wait_for_block();
      }
      end_.arrive_and_wait();
    }
  }

  const int threads_;
  std::barrier<> start_, end_;
  std::vector<std::unique_ptr<Team>> teams_;
  std::vector<std::thread> workers_;
  bool stop_ = false;
  dim3 grid_;
  void (*run_)(const void*) = nullptr;
  const void* body_ = nullptr;
  std::atomic<unsigned> next_{0};
  unsigned block_of_[kTeams] = {};
};

}  // namespace shim
