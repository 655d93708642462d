// Threads of a CTA: their indices, shared memory and barriers inside the CTA, and the keywords that
// nvcc has and a host compiler has not. Every header of this folder has a host version of the same
// name in tests/cuda/emulation/ptx.
#pragma once

#if defined(LSTM_FUSED_EMULATION)
#include "emulation/ptx/threads.h"
#else

#include <cstdint>

#define LSTM_FUSED_DEVICE __device__ __forceinline__
// With so few registers that an SM has space for so many CTAs.
#define LSTM_FUSED_KERNEL(threads, ctas) __global__ void __launch_bounds__(threads, ctas)
#define LSTM_FUSED_CONSTANT __grid_constant__
#define LSTM_FUSED_UNROLL _Pragma("unroll")
#define LSTM_FUSED_NO_UNROLL _Pragma("unroll 1")

namespace lstm_fused::cuda {

LSTM_FUSED_DEVICE int thread_index() {
  return threadIdx.x;
}
LSTM_FUSED_DEVICE int thread_count() {
  return blockDim.x;
}
// The same value in all lanes, which the compiler then knows: branches on it do not diverge.
LSTM_FUSED_DEVICE int warp_index() {
  return __shfl_sync(0xffffffff, threadIdx.x / 32, 0);
}
// The pointer, without how it was computed: the compiler keeps it instead of computing it again at
// each use.
template <class T>
LSTM_FUSED_DEVICE T* kept(T* p) {
  asm("" : "+l"(p));
  return p;
}
LSTM_FUSED_DEVICE dim3 block_index() {
  return blockIdx;
}
LSTM_FUSED_DEVICE dim3 block_count() {
  return gridDim;
}

LSTM_FUSED_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}
LSTM_FUSED_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

LSTM_FUSED_DEVICE void sync_block() {
  __syncthreads();
}

// Reconverges the lanes of a warp after divergent branches: ldmatrix and mma need all of them.
LSTM_FUSED_DEVICE void sync_warp() {
  __syncwarp();
}

}  // namespace lstm_fused::cuda
#endif
