// A prepared step called in a loop, and how long each call takes (bench/streams.py).
#include <chrono>
#include <cstdint>

namespace {

int64_t nanoseconds() {
  using namespace std::chrono;
  return duration_cast<std::chrono::nanoseconds>(steady_clock::now().time_since_epoch()).count();
}

// Arithmetic alone: a chain of `loops` multiplications, which neither reads nor writes memory.
void multiply(int64_t loops) {
  double a = 1.0;
  for (int64_t k = 0; k < loops; ++k) {
    a *= 0.999;
    asm volatile("" : "+x"(a));
  }
}

}  // namespace

extern "C" {

// What stream.c_step() is: x (N, I) -> y (N, R), in the stream's dtype; 0 if it was computed.
using Step = int (*)(void* handle, const void* x, void* y);

// Both return how many calls computed nothing.
int64_t repeat_step(Step step, void* handle, const void* x, void* y, int64_t calls) {
  int64_t failed = 0;
  for (int64_t k = 0; k < calls; ++k) failed += step(handle, x, y) != 0;
  return failed;
}

// stamps (calls + 1,): the clock before the first call, then after each.
int64_t time_step(Step step, void* handle, const void* x, void* y, int64_t calls, int64_t* stamps) {
  int64_t failed = 0;
  stamps[0] = nanoseconds();
  for (int64_t k = 1; k <= calls; ++k) {
    failed += step(handle, x, y) != 0;
    stamps[k] = nanoseconds();
  }
  return failed;
}

void time_arithmetic(int64_t loops, int64_t calls, int64_t* stamps) {
  stamps[0] = nanoseconds();
  for (int64_t k = 1; k <= calls; ++k) {
    multiply(loops);
    stamps[k] = nanoseconds();
  }
}

}  // extern "C"
