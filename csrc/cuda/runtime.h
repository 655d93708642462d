// Calls of the CUDA runtime: errors, the current device, memory and capture. A function that
// returns a string returns null on success and the error's text otherwise.
#pragma once

#if defined(LSTM_FUSED_EMULATION)
#include "emulation/runtime.h"
#else

#include <cuda_runtime.h>

#include <cstdint>

namespace lstm_fused::cuda {

inline const char* error_of(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Clears the last error once it is handled, so that later calls do not report it.
inline void clear_error() {
  cudaGetLastError();
}

inline void make_current(int device) {
  int current = -1;
  if (cudaGetDevice(&current) != cudaSuccess || current != device) cudaSetDevice(device);
}

inline const char* fill_async(void* to, int byte, int64_t bytes, void* stream) {
  return bytes ? error_of(cudaMemsetAsync(to, byte, bytes, static_cast<cudaStream_t>(stream)))
               : nullptr;
}

// Copies `rows` rows of `bytes` bytes each, which start pitch and from_pitch bytes apart.
inline const char* copy_rows_async(void* to, int64_t pitch, const void* from, int64_t from_pitch,
                                   int64_t bytes, int64_t rows, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  // cudaMemcpy2D takes pitches of at most 31 bits.
  if (rows == 1 || (pitch == bytes && from_pitch == bytes))
    return error_of(cudaMemcpyAsync(to, from, bytes * rows, cudaMemcpyDeviceToDevice, on));
  return error_of(
      cudaMemcpy2DAsync(to, pitch, from, from_pitch, bytes, rows, cudaMemcpyDeviceToDevice, on));
}

// Copies from pageable host memory, which the caller may free as soon as this returns.
inline const char* upload_async(void* to, const void* from, int64_t bytes, void* stream) {
  return error_of(
      cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, static_cast<cudaStream_t>(stream)));
}

// Whether the stream is being captured into a CUDA graph.
inline bool is_capturing(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaError_t error = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status);
  if (error != cudaSuccess) clear_error();
  return status != cudaStreamCaptureStatusNone;
}

}  // namespace lstm_fused::cuda
#endif
