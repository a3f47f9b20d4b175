// A team of threads that walks through a step together: the caller is its first member.
//
// Work inside a phase is taken in runs from a shared counter, so a member that the system puts
// aside delays the phase by one run only. Members wait for each other by spinning, then asleep:
// where others want the cores too, whoever spins on is put aside just when it could go on.
#pragma once

#include <sched.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

namespace kernels {

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#else
  std::atomic_signal_fence(std::memory_order_seq_cst);
#endif
}

class Team {
 public:
  // Members beyond the caller are tied to `cpus[1..]` when there are as many as members.
  Team(int members, const int* cpus, int num_cpus) : members_(members) {
    for (int i = 1; i < members; ++i) {
      const int cpu = num_cpus >= members ? cpus[i] : -1;
      threads_.emplace_back([this, i, cpu] { serve(i, cpu); });
    }
  }

  ~Team() {
    stopping_ = true;
    epoch_.fetch_add(1);
    epoch_.notify_all();
    for (auto& thread : threads_) thread.join();
  }

  int members() const { return members_; }

  // Have every member call `work(member)`; `phases` bounds the calls of `runs` it makes.
  void run(int phases, const std::function<void(int)>& work) {
    if ((int)num_counters_ < phases) {
      counters_ = std::make_unique<Counter[]>(phases);
      num_counters_ = phases;
    }
    for (int i = 0; i < phases; ++i) counters_[i].next.store(0, std::memory_order_relaxed);
    work_ = &work;
    epoch_.fetch_add(1);
    epoch_.notify_all();
    work(0);
    barrier();
  }

  // Share `total` items out in runs of `size`: `body(first, last)`. `phase` is not used twice.
  template <class Body>
  void runs(int phase, int total, int size, Body body) {
    auto& next = counters_[phase].next;
    for (int first; (first = next.fetch_add(size, std::memory_order_relaxed)) < total;)
      body(first, first + size < total ? first + size : total);
  }

  void barrier() {
    if (members_ == 1) return;
    const uint32_t round = round_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == members_ - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      round_.notify_all();
      return;
    }
    wait_while(round_, round);
  }

 private:
  // About 50 us: longer than members differ while each has its core.
  static constexpr int SPINS = 2000;

  struct alignas(64) Counter { std::atomic<int> next{0}; };

  static void wait_while(const std::atomic<uint32_t>& value, uint32_t old) {
    for (int spins = 0; spins < SPINS; ++spins) {
      if (value.load(std::memory_order_acquire) != old) return;
      relax();
    }
    value.wait(old, std::memory_order_acquire);
  }

  void serve(int member, int cpu) {
    if (cpu >= 0) {
      cpu_set_t set;
      CPU_ZERO(&set);
      CPU_SET(cpu, &set);
      sched_setaffinity(0, sizeof set, &set);
    }
    for (uint32_t seen = 0;;) {
      wait_while(epoch_, seen);
      seen = epoch_.load(std::memory_order_acquire);
      if (stopping_) return;
      (*work_)(member);
      barrier();
    }
  }

  const int members_;
  std::vector<std::thread> threads_;
  std::unique_ptr<Counter[]> counters_;
  size_t num_counters_ = 0;
  const std::function<void(int)>* work_ = nullptr;
  std::atomic<bool> stopping_{false};
  alignas(64) std::atomic<uint32_t> epoch_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> round_{0};
};

}  // namespace kernels
