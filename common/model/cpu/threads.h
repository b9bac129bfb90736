// The threads of one model and how they share the work of a step.
//
// A step is a sequence of phases; a phase is a number of pieces that are independent of each other.
// All threads walk through the phases and take pieces of each as they come. A phase is over when
// its pieces are done, not when every thread has been there: on a machine whose cores are shared a
// thread may be off its core for milliseconds, and then only the piece that it holds is waited for.
//
// A waiting thread looks for a fifth of a millisecond, which is longer than the threads of a phase
// differ, and then sleeps in the kernel. Sleeping is the worst that it can do beside batch jobs:
// the scheduler lets those finish their slice of milliseconds before it wakes up again.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

namespace tandem {

constexpr int SPINS = 10000;

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Returns the value once `accept` takes it. Whoever makes it acceptable must notify.
template <class Accept>
inline uint32_t wait_for(const std::atomic<uint32_t>& value, Accept accept) {
    uint32_t seen = value.load(std::memory_order_acquire);
    for (int i = 0; i < SPINS && !accept(seen); ++i) {
        pause();
        seen = value.load(std::memory_order_acquire);
    }
    for (; !accept(seen); seen = value.load(std::memory_order_acquire))
        value.wait(seen, std::memory_order_acquire);
    return seen;
}

class Team {
 public:
    // `size` threads, of which the caller of `run` is one; they inherit its CPU affinity.
    explicit Team(int size) : size_(size), state_(std::make_unique<State[]>(size)) {
        for (int id = 1; id < size; ++id) threads_.emplace_back([this, id] { serve(id); });
    }
    ~Team() {
        for (int id = 1; id < size_; ++id) set(id, ENDING);
        for (auto& thread : threads_) thread.join();
    }
    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    int size() const { return size_; }

    // job(id) in every thread, id 0 in this one; returns when job(0) has returned and no other is
    // in it. A thread that did not wake up before that is not waited for: job(0) must see to it
    // that all is done.
    template <class Job>
    void run(Job& job) {
        argument_ = &job;
        call_ = [](void* argument, int id) { (*static_cast<Job*>(argument))(id); };
        for (int id = 1; id < size_; ++id) set(id, CALLED);
        job(0);
        for (int id = 1; id < size_; ++id) {
            uint32_t called = CALLED;
            if (!state_[id].value.compare_exchange_strong(called, IDLE, std::memory_order_acq_rel))
                wait_for(state_[id].value, [](uint32_t now) { return now == IDLE; });
        }
    }

 private:
    enum : uint32_t { IDLE, CALLED, WORKING, ENDING };
    struct State {
        alignas(64) std::atomic<uint32_t> value{IDLE};
    };

    void set(int id, uint32_t state) {
        state_[id].value.store(state, std::memory_order_release);
        state_[id].value.notify_all();
    }
    void serve(int id) {
        for (;;) {
            if (wait_for(state_[id].value, [](uint32_t now) { return now != IDLE; }) == ENDING)
                return;
            uint32_t called = CALLED;
            if (!state_[id].value.compare_exchange_strong(called, WORKING,
                                                          std::memory_order_acq_rel))
                continue;
            call_(argument_, id);
            set(id, IDLE);
        }
    }

    const int size_;
    void (*call_)(void*, int) = nullptr;
    void* argument_ = nullptr;
    std::unique_ptr<State[]> state_;
    std::vector<std::thread> threads_;
};

struct Part {  // first <= i < last
    int first, last;
};

class Phases {
 public:
    // Before a job begins: `count` phases, none begun.
    void reset(int count) {
        if (count != count_) phases_ = std::make_unique<Phase[]>(count_ = count);
        for (int i = 0; i < count; ++i) {
            phases_[i].next.store(0, std::memory_order_relaxed);
            phases_[i].done.store(0, std::memory_order_relaxed);
        }
    }

    // Does some of the pieces of one phase, `grain` of them at a time: f(Part). All pieces are
    // done on return, and what the other threads wrote is visible. `count` and `grain` must be the
    // same in every thread.
    template <class F>
    void share(int number, int count, int grain, F&& f) {
        Phase& phase = phases_[number];
        const uint32_t grains = uint32_t((count + grain - 1) / grain);
        while (phase.next.load(std::memory_order_relaxed) < grains) {
            const uint32_t i = phase.next.fetch_add(1, std::memory_order_relaxed);
            if (i >= grains) break;
            f(Part{int(i) * grain, std::min(count, (int(i) + 1) * grain)});
            if (phase.done.fetch_add(1, std::memory_order_acq_rel) + 1 == grains)
                phase.done.notify_all();
        }
        wait_for(phase.done, [=](uint32_t done) { return done == grains; });
    }

 private:
    struct Phase {
        alignas(64) std::atomic<uint32_t> next{0};
        alignas(64) std::atomic<uint32_t> done{0};
    };
    int count_ = 0;
    std::unique_ptr<Phase[]> phases_;
};

}  // namespace tandem
