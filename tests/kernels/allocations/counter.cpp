// Counts allocations of a process: preloaded (LD_PRELOAD), it stands before the C library's
// functions, which operator new calls, too.
#include <atomic>
#include <cerrno>
#include <cstddef>

extern "C" {
void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);
}

namespace {
std::atomic<long> count{0};
}

extern "C" {

long allocations() {
  return count.load();
}

void* malloc(size_t bytes) {
  ++count;
  return __libc_malloc(bytes);
}
void* calloc(size_t items, size_t bytes) {
  ++count;
  return __libc_calloc(items, bytes);
}
void* realloc(void* memory, size_t bytes) {
  ++count;
  return __libc_realloc(memory, bytes);
}
void* memalign(size_t alignment, size_t bytes) {
  ++count;
  return __libc_memalign(alignment, bytes);
}
void* aligned_alloc(size_t alignment, size_t bytes) {
  return memalign(alignment, bytes);
}
int posix_memalign(void** memory, size_t alignment, size_t bytes) {
  *memory = memalign(alignment, bytes);
  return *memory ? 0 : ENOMEM;
}

// The allocations of so many steps of a stream (csrc/cpu/stream.h), or -1 where one fails.
long allocations_of_steps(int (*step)(void*, const void*, void*), void* handle, const void* x,
                          void* y, int steps) {
  const long before = count;
  for (int i = 0; i < steps; ++i)
    if (step(handle, x, y) != 0) return -1;
  return count - before;
}

}  // extern "C"
