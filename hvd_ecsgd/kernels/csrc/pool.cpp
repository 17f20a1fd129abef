// Threads: torch's, lent by its OpenMP runtime. After their work they look for more for some milliseconds, so threads of our own would have to share the
// processors with them, and two would be slower than one. Where there is no such runtime, and in a child of fork, which has none of its parent's
// threads, own threads wait for work.
#include "common.h"

#include <atomic>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

#include <pthread.h>

namespace {

struct Job {
    int64_t n;
    void (*task)(void*, int64_t);
    void* context;
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};

    void work() {
        for (int64_t i = next++; i < n; i = next++) {
            try {
                task(context, i);
            } catch (...) {
                failed = true;
            }
        }
    }
};

// As std::condition_variable, whose wait() in libstdc++ has a symbol of GCC 12 when that compiles it: the library would not load on older systems.
class Condition {
  public:
    void wait(std::unique_lock<std::mutex>& lock) { pthread_cond_wait(&condition_, lock.mutex()->native_handle()); }
    void notify_one() { pthread_cond_signal(&condition_); }
    void notify_all() { pthread_cond_broadcast(&condition_); }

  private:
    pthread_cond_t condition_ = PTHREAD_COND_INITIALIZER;
};

class Pool {
  public:
    void run(Job& job, int helpers) {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            try {
                for (; workers_ < helpers; ++workers_) std::thread([this] { serve(); }).detach();
            } catch (const std::system_error&) {  // the system gives no more threads: those that are there do it
            }
            job_ = &job;
            open_ = std::min(helpers, workers_);
        }
        wake_.notify_all();
        job.work();
        std::unique_lock<std::mutex> lock(mutex_);
        open_ = 0;  // who has not woken by now need not
        while (running_ > 0) finished_.wait(lock);
    }

  private:
    void serve() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            while (open_ == 0) wake_.wait(lock);
            --open_;
            ++running_;
            Job* job = job_;
            lock.unlock();
            job->work();
            lock.lock();
            if (--running_ == 0) finished_.notify_one();
        }
    }

    std::mutex mutex_;
    Condition wake_, finished_;
    Job* job_ = nullptr;
    int workers_ = 0, open_ = 0, running_ = 0;
};

std::atomic<bool> busy{false};
Pool* pool = nullptr;  // never deleted: its threads wait in it until the process ends

using Fork = void (*)(void (*)(void*), void*, unsigned, unsigned);
Fork openmp = nullptr;

void in_a_child() {  // of fork: the threads are the parent's, and a lock may be held by one of them
    openmp = nullptr;
    pool = nullptr;
    busy = false;
}

void survive_forks() {
    static const int once = pthread_atfork(nullptr, nullptr, in_a_child);
    static_cast<void>(once);
}

}  // namespace

// GOMP_parallel of the OpenMP runtime that torch uses, or null.
extern "C" __attribute__((visibility("default"))) void hvd_ecsgd_use_openmp(void* fork) {
    survive_forks();
    openmp = reinterpret_cast<Fork>(fork);
}

void parallel(int64_t n, int threads, void (*task)(void*, int64_t), void* context) {
    Job job{n, task, context};
    if (threads > 1 && n > 1 && openmp != nullptr) {
        openmp([](void* given) { static_cast<Job*>(given)->work(); }, &job, static_cast<unsigned>(std::min<int64_t>(threads, n)), 0);
    } else if (threads > 1 && n > 1 && !busy.exchange(true)) {  // two threads of the program at once: the second one works alone
        if (pool == nullptr) {
            survive_forks();
            pool = new (std::nothrow) Pool;
        }
        if (pool != nullptr) pool->run(job, static_cast<int>(std::min<int64_t>(threads, n)) - 1);
        busy = false;
    }
    job.work();  // what nobody has done yet
    if (job.failed) throw std::bad_alloc();
}
