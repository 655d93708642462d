// What is asked of the operating system beside its description of the machine (topology.h). Each
// function says what it does where the system lacks the service.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lstm_fused {

// Memory at a multiple of `alignment`, a power of two that divides `bytes`; null where there is
// none left. In large pages, where the system lends them and `large` asks for them.
void* allocate_aligned(size_t alignment, size_t bytes, bool large);
void free_aligned(void* memory);

// CPU time of the calling thread, by a system call; 0 where it is not known.
int64_t thread_nanoseconds();

// Calls f in every child that this process forks, if processes fork.
void after_fork(void (*f)());

// The instructions of this arm64 processor that not all have; none on another.
struct Arm64Features {
  bool bf16 = false;  // bfdot
  int sve_bytes = 0;  // of a vector of SVE; 0: no SVE
};
Arm64Features arm64_features();

}  // namespace lstm_fused
