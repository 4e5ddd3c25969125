// The threads of a block as fibers of one thread of the operating system, which switches only at barriers. A barrier costs microseconds,
// and every run is the same. In one of two launches the first thread of a block goes first, and in the other the last one, so that a
// missing barrier shows whichever side it should hold back.
#pragma once
#include <ucontext.h>

#include <cstdio>
#include <functional>
#include <memory>
#include <vector>

// The state of a launching thread: the device, and the shared memory of a block.
#define SHIM_OF_EACH thread_local

namespace shim {

class Device;

// The number of threads that have arrived at a barrier, and how often it has opened.
struct Gate {
  unsigned arrived = 0, opened = 0;
};

struct Team {
  const unsigned threads;
  Gate block;
  std::vector<Gate> warps;
  std::vector<uint64_t> exchange;
  unsigned running = 0;  // the number of threads that have not finished the block
  dim3 place;            // blockIdx

  explicit Team(unsigned threads) : threads(threads), warps(threads / kWarp), exchange(threads) {}
  void wait_for_block() { wait(block, threads); }
  void wait_for_warp(unsigned thread) { wait(warps[thread / kWarp], kWarp); }

 private:
  static void wait(Gate& gate, unsigned threads);
};

inline thread_local Team* team;
inline thread_local int team_index;
inline thread_local Device* running_device;

}  // namespace shim

inline thread_local dim3 threadIdx, blockIdx, gridDim;

namespace shim {

// One for each launching thread of the operating system.
class Device {
 public:
  explicit Device(int threads) {
    for (int t = 0; t < kTeams; ++t) {
      teams_.push_back(std::make_unique<Team>(threads));
      for (int i = 0; i < threads; ++i) fibers_.push_back(std::make_unique<Fiber>(t, i));
    }
  }

  template <class F>
  void launch(dim3 grid, const F& body) {
    running_device = this;
    gridDim = grid;
    body_ = [&body] { body(); };
    const unsigned blocks = grid.x * grid.y;
    unsigned next = 0;
    const auto begin_block = [&](int t) {
      Team& its = *teams_[t];
      its.running = next < blocks ? its.threads : 0;
      if (!its.running) return;
      its.place = dim3(next % grid.x, next / grid.x);
      ++next;
      for (auto& fiber : fibers_)
        if (fiber->team == t) fiber->waiting = true;
    };
    for (int t = 0; t < kTeams; ++t) begin_block(t);
    const bool backwards = ++launches % 2;
    while (teams_[0]->running || teams_[1]->running) {
      const unsigned before = progress_;
      for (size_t k = 0; k < fibers_.size(); ++k) {
        Fiber& fiber = *fibers_[backwards ? fibers_.size() - 1 - k : k];
        if (fiber.waiting) resume(fiber);
      }
      if (progress_ == before) {
        std::fputs("cuda_shim: some threads of a block wait at a barrier that the others never reach\n", stderr);
        std::abort();
      }
      for (int t = 0; t < kTeams; ++t)
        if (!teams_[t]->running) begin_block(t);
    }
  }

  // Called by the running fiber to let the others run.
  void yield() { swapcontext(&current_->context, &main_); }
  void opened() { ++progress_; }

 private:
  struct Fiber {
    const int team;
    const unsigned thread;
    bool waiting = false, begun = false;  // whether it has work to do, and a stack
    ucontext_t context;
    std::unique_ptr<char[]> stack;

    Fiber(int team, unsigned thread) : team(team), thread(thread) {}
  };

  void resume(Fiber& fiber) {
    constexpr size_t kStack = 256 << 10;
    if (!fiber.begun) {
      fiber.stack.reset(new char[kStack]);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStack;
      makecontext(&fiber.context, work, 0);
      fiber.begun = true;
    }
    current_ = &fiber;
    team = teams_[fiber.team].get();
    team_index = fiber.team;
    threadIdx = dim3(fiber.thread);
    blockIdx = team->place;
    swapcontext(&main_, &fiber.context);
  }

  static void work() {
    while (true) {
      Device& device = *running_device;
      device.body_();
      device.current_->waiting = false;
      --team->running;
      device.opened();
      device.yield();
    }
  }

  std::vector<std::unique_ptr<Team>> teams_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  Fiber* current_ = nullptr;
  ucontext_t main_;
  std::function<void()> body_;
  unsigned progress_ = 0;
};

inline void Team::wait(Gate& gate, unsigned threads) {
  const unsigned before = gate.opened;
  if (++gate.arrived == threads) {
    gate.arrived = 0;
    ++gate.opened;
    running_device->opened();
    return;
  }
  while (gate.opened == before) running_device->yield();
}

}  // namespace shim
