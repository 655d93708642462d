#include "system.h"

#include <cstdlib>

#if defined(_WIN32)
#include <malloc.h>
#else
#include <pthread.h>
#include <time.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__linux__) && defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#include <sys/prctl.h>
#endif
#if defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace lstm_fused {

void* allocate_aligned(size_t alignment, size_t bytes, bool large) {
#if defined(_WIN32)
  return _aligned_malloc(bytes, alignment);
#else
  void* memory = std::aligned_alloc(alignment, bytes);
#if defined(__linux__)
  if (memory && large) madvise(memory, bytes, MADV_HUGEPAGE);
#endif
  return memory;
#endif
}

void free_aligned(void* memory) {
#if defined(_WIN32)
  _aligned_free(memory);
#else
  std::free(memory);
#endif
}

int64_t thread_nanoseconds() {
#if defined(_WIN32)
  return 0;
#else
  timespec time;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return int64_t{time.tv_sec} * 1'000'000'000 + time.tv_nsec;
#endif
}

void after_fork(void (*f)()) {
#if !defined(_WIN32)
  pthread_atfork(nullptr, nullptr, f);
#endif
}

Arm64Features arm64_features() {
  Arm64Features features;
#if defined(__aarch64__) && defined(__linux__)
  features.bf16 = getauxval(AT_HWCAP2) & HWCAP2_BF16;
  if (getauxval(AT_HWCAP) & HWCAP_SVE)
    features.sve_bytes = prctl(PR_SVE_GET_VL) & PR_SVE_VL_LEN_MASK;
#elif defined(__aarch64__) && defined(__APPLE__)
  int has = 0;
  size_t size = sizeof(has);
  features.bf16 = sysctlbyname("hw.optional.arm.FEAT_BF16", &has, &size, nullptr, 0) == 0 && has;
#endif
  return features;
}

}  // namespace lstm_fused
