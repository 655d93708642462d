// csrc/cuda/ptx/threads.h for the host.
#pragma once

#include <cstdint>

#include "../fibers.h"

#define LSTM_FUSED_DEVICE inline
#define LSTM_FUSED_KERNEL(threads, ctas) void
#define LSTM_FUSED_CONSTANT
#define LSTM_FUSED_UNROLL
#define LSTM_FUSED_NO_UNROLL

namespace lstm_fused::cuda {

inline int thread_index() {
  return fibers::thread_index();
}
inline int thread_count() {
  return fibers::thread_count();
}
inline int warp_index() {
  return fibers::thread_index() / 32;
}
template <class T>
T* kept(T* p) {
  return p;
}
inline dim3 block_index() {
  return fibers::block_index();
}
inline dim3 block_count() {
  return fibers::block_count();
}
inline char* shared_memory() {
  return fibers::shared_memory(fibers::cluster_rank());
}
inline void sync_block() {
  fibers::sync_block();
}
inline void sync_warp() {
  fibers::sync_warp();
}

}  // namespace lstm_fused::cuda
