// What the code asks of a compiler beyond C++20. g++ and clang have it, as has clang-cl, the
// compiler for Windows: Microsoft's own has no vectors. No other file uses their names for it.
#pragma once

#if defined(__x86_64__) && !defined(__CUDACC__)
#include <cpuid.h>
#if defined(__clang__)
#include <immintrin.h>  // before LSTM_FUSED_TARGET, which would change the targets of its functions
#endif
#endif

// For functions in headers that the ISA files include. Without inlining, one ISA file's copy could
// become the one the linker keeps for all of them, with instructions that a machine may lack.
#if defined(__CUDACC__)
#define LSTM_FUSED_INLINE __host__ __device__ __forceinline__
#else
#define LSTM_FUSED_INLINE inline __attribute__((always_inline))
#endif

#define LSTM_FUSED_SQRT(x) __builtin_sqrt(x)

// For functions that most calls do not need: inlined, they would slow the loops around them down.
// A cold one is made small instead of fast.
#define LSTM_FUSED_NOINLINE __attribute__((noinline))
#define LSTM_FUSED_COLD __attribute__((noinline, cold))

#define LSTM_FUSED_PRAGMA(...) _Pragma(#__VA_ARGS__)

// The instructions that functions from here to LSTM_FUSED_TARGET_END may use beyond those of every
// machine, such as "avx2,fma".
#if defined(__clang__)
#define LSTM_FUSED_TARGET(features) \
  LSTM_FUSED_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define LSTM_FUSED_TARGET_END LSTM_FUSED_PRAGMA(clang attribute pop)
#else
#define LSTM_FUSED_TARGET(features) LSTM_FUSED_PRAGMA(GCC target(features))
#define LSTM_FUSED_TARGET_END
#endif

// For a file whose code hardly any machine runs: less optimisation halves the time it compiles.
#if defined(__clang__)
#define LSTM_FUSED_OPTIMIZE_LESS
#else
#define LSTM_FUSED_OPTIMIZE_LESS LSTM_FUSED_PRAGMA(GCC optimize("O1"))
#endif

// For a file of arm64: g++ 12 would move the loads of a tile's step to its begin, before it knows
// that registers do not suffice for all of them.
#if defined(__clang__)
#define LSTM_FUSED_KEEP_ORDER_OF_LOADS
#else
#define LSTM_FUSED_KEEP_ORDER_OF_LOADS LSTM_FUSED_PRAGMA(GCC optimize("no-schedule-insns"))
#endif

// Whether vectors of 32 bytes are SVE's: g++ makes them so by -msve-vector-bits=256.
#if defined(__aarch64__) && defined(__linux__) && !defined(__clang__)
#define LSTM_FUSED_SVE_VECTORS
#endif

// A loop of a constant count up to 16, unrolled: its counter indexes arrays that lie in registers.
#if defined(__clang__) || defined(__CUDACC__)
#define LSTM_FUSED_UNROLLED_FOR LSTM_FUSED_PRAGMA(unroll) for
#else
#define LSTM_FUSED_UNROLLED_FOR LSTM_FUSED_PRAGMA(GCC unroll 16) for
#endif

// In a typedef: a vector of so many bytes, with arithmetic, comparisons and ?: lane by lane.
#define LSTM_FUSED_VECTOR(bytes) __attribute__((vector_size(bytes)))

// v's lanes as those of the vector To.
#define LSTM_FUSED_CONVERT(v, To) __builtin_convertvector(v, To)

// The lanes of a and b, numbered one vector after the other, that follow; Bits is a vector of
// integers as wide.
#if defined(__clang__)
#define LSTM_FUSED_SHUFFLE(Bits, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define LSTM_FUSED_SHUFFLE(Bits, a, b, ...) __builtin_shuffle(a, b, Bits{__VA_ARGS__})
#endif

// Keeps the vector v in a register: g++ 12 would load it anew where it is used.
#if defined(__x86_64__)
#define LSTM_FUSED_IN_REGISTER(v) asm("" : "+v"(v))
#elif defined(__aarch64__)
#define LSTM_FUSED_IN_REGISTER(v) asm("" : "+w"(v))
#else
#define LSTM_FUSED_IN_REGISTER(v)
#endif

// Whether this x86-64 machine has a feature, by a name that is a literal.
#define LSTM_FUSED_CPU_HAS(feature) static_cast<bool>(__builtin_cpu_supports(feature))

// A symbol that may be missing where the library is loaded.
#if defined(_WIN32)
#define LSTM_FUSED_WEAK(symbol)
#else
#define LSTM_FUSED_WEAK(symbol) LSTM_FUSED_PRAGMA(weak symbol)
#endif

#if !defined(__CUDACC__)  // device code has other names for these
namespace lstm_fused {

LSTM_FUSED_INLINE void prefetch(const void* line) {
  __builtin_prefetch(line);
}
LSTM_FUSED_INLINE void prefetch_to_write(const void* line) {
  __builtin_prefetch(line, 1);
}
LSTM_FUSED_INLINE void prefetch_into_l2(const void* line) {
  __builtin_prefetch(line, 0, 2);
}

#if defined(__x86_64__)
// A feature whose name clang 14 does not know.
LSTM_FUSED_INLINE bool cpu_has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & 1u << 29);
}
#endif

// For a loop that waits for another thread.
LSTM_FUSED_INLINE void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace lstm_fused
#endif
