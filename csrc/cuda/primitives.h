// Every instruction that plain C++ cannot name, behind a function each. The host's version, for
// tests, is tests/cuda/emulation/primitives_host.h.
#pragma once

#if defined(LSTM_FUSED_EMULATION)
#include "primitives_host.h"
#else

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

#include "plan.h"

#define LSTM_FUSED_DEVICE __device__ __forceinline__
#define LSTM_FUSED_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
#define LSTM_FUSED_CONSTANT __grid_constant__
#define LSTM_FUSED_UNROLL _Pragma("unroll")
#define LSTM_FUSED_ROLLED _Pragma("unroll 1")

namespace lstm_fused::cuda {

LSTM_FUSED_DEVICE int thread_index() {
  return threadIdx.x;
}
LSTM_FUSED_DEVICE int thread_count() {
  return blockDim.x;
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

LSTM_FUSED_DEVICE void sync_block() {
  __syncthreads();
}

// Lanes that went different ways are together again: instructions of a whole warp want that.
LSTM_FUSED_DEVICE void sync_warp() {
  __syncwarp();
}

LSTM_FUSED_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes from global to shared memory, zeros if not valid; seen after wait_copies and a barrier.
// Past the first-level cache: other SMs may have written them in this launch.
LSTM_FUSED_DEVICE void copy_async(void* to, const void* from, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(bytes)
               : "memory");
}
LSTM_FUSED_DEVICE void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Until at most kPending of this thread's newest groups are under way.
template <int kPending>
LSTM_FUSED_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four, or two, matrices of 8 rows x 16 bytes: lane l gives the address of row l % 8 of matrix
// l / 8, and receives 4 bytes at l % 4 of row l / 4 of each.
LSTM_FUSED_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
LSTM_FUSED_DEVICE void load_matrices(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

// c (16, 8) += a (16, k) b (k, 8), k of 32 bytes, all fragments as PTX lays them out.
LSTM_FUSED_DEVICE void multiply_bfloat16(float (&c)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
LSTM_FUSED_DEVICE void multiply_float16(float (&c)[4], const uint32_t (&a)[4],
                                        const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
LSTM_FUSED_DEVICE void multiply_tf32(float (&c)[4], const uint32_t (&a)[4],
                                     const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

LSTM_FUSED_DEVICE uint32_t round_to_tf32(uint32_t bits) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(bits)));
  return rounded;
}
LSTM_FUSED_DEVICE float float_of_bfloat16(uint16_t bits) {
  return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}
LSTM_FUSED_DEVICE uint16_t bfloat16_of_float(float x) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
LSTM_FUSED_DEVICE float float_of_float16(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
LSTM_FUSED_DEVICE uint16_t float16_of_float(float x) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

// A meeting of CTAs in two halves. The counter only ever grows, in 64 bits, so that no CTA can take
// one meeting for another. What any thread of a CTA wrote before the sync_block before it arrived
// is seen by every thread of those that waited, past their first-level caches.
LSTM_FUSED_DEVICE void arrive_ctas(void* counter) {
  if (threadIdx.x == 0)
    asm volatile("red.release.gpu.global.add.u64 [%0], 1;" ::"l"(counter) : "memory");
}
// Until `target` CTAs have arrived since the counter was zero. An acquire empties the first-level
// cache: one, once they are there, not one with each look.
LSTM_FUSED_DEVICE void wait_ctas(void* counter, unsigned long long target) {
  if (threadIdx.x == 0) {
    unsigned long long seen;
    do {
      asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(seen) : "l"(counter) : "memory");
    } while (seen < target);
    asm volatile("fence.acq_rel.gpu;" ::: "memory");
  }
  __syncthreads();
}

#if __CUDA_ARCH__ >= 900
inline constexpr bool kHasClusters = true;
LSTM_FUSED_DEVICE int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
LSTM_FUSED_DEVICE int cluster_size() {
  int size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}
// All threads of all CTAs of the cluster; orders their accesses to each other's shared memory.
LSTM_FUSED_DEVICE void arrive_cluster() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}
LSTM_FUSED_DEVICE void wait_cluster() {
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}
// 16 bytes from this CTA's shared memory into the same place of another CTA's.
LSTM_FUSED_DEVICE void send_shared(void* place, int rank) {
  const uint4 v = *static_cast<const uint4*>(place);
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(place)), "r"(rank));
  asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(there), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}
#else
// Never run: the plan asks for clusters on 9.0 and later only.
inline constexpr bool kHasClusters = false;
LSTM_FUSED_DEVICE int cluster_rank() {
  return 0;
}
LSTM_FUSED_DEVICE int cluster_size() {
  return 1;
}
LSTM_FUSED_DEVICE void arrive_cluster() {
  __trap();
}
LSTM_FUSED_DEVICE void wait_cluster() {
  __trap();
}
LSTM_FUSED_DEVICE void send_shared(void*, int) {
  __trap();
}
#endif

// Host side.
//
// Torch's cuBLAS, which is there where torch has CUDA, and torch's handle of it for the current
// device, on the current stream: the types as their ABI has them, since nvcc comes without cuBLAS.
extern "C" {
[[gnu::weak]] int cublasSetMathMode(void* handle, int mode);
[[gnu::weak]] int cublasGemmEx_64(void* handle, int turn_a, int turn_b, int64_t m, int64_t n,
                                  int64_t k, const void* alpha, const void* a, int a_type,
                                  int64_t a_stride, const void* b, int b_type, int64_t b_stride,
                                  const void* beta, void* c, int c_type, int64_t c_stride,
                                  int compute, int algorithm);
[[gnu::weak]] const char* cublasGetStatusString(int status);
[[gnu::weak]] int32_t torch_get_current_cuda_blas_handle(void** handle);
}

inline bool has_library() {
  return cublasSetMathMode && cublasGemmEx_64 && cublasGetStatusString &&
         torch_get_current_cuda_blas_handle;
}
inline const char* library_error(int status) {
  return status == 0 ? nullptr : cublasGetStatusString(status);
}

inline const char* error_of(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

inline void make_current(int device) {
  int current = -1;
  if (cudaGetDevice(&current) != cudaSuccess || current != device) cudaSetDevice(device);
}

inline const char* fill_async(void* to, int byte, int64_t bytes, void* stream) {
  return bytes ? error_of(cudaMemsetAsync(to, byte, bytes, static_cast<cudaStream_t>(stream)))
               : nullptr;
}
// Rows of `bytes` bytes each, the rows apart by their pitches.
inline const char* copy_rows_async(void* to, int64_t pitch, const void* from, int64_t from_pitch,
                                   int64_t bytes, int64_t rows, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  // A pitch may have 31 bits.
  if (rows == 1 || (pitch == bytes && from_pitch == bytes))
    return error_of(cudaMemcpyAsync(to, from, bytes * rows, cudaMemcpyDeviceToDevice, on));
  return error_of(
      cudaMemcpy2DAsync(to, pitch, from, from_pitch, bytes, rows, cudaMemcpyDeviceToDevice, on));
}
// From the host's pageable memory, which may be freed when this returns.
inline const char* upload_async(void* to, const void* from, int64_t bytes, void* stream) {
  return error_of(
      cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, static_cast<cudaStream_t>(stream)));
}
// Whether what is launched there goes into a CUDA graph.
inline bool is_capturing(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaError_t error = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status);
  if (error != cudaSuccess) cudaGetLastError();  // it is nobody else's
  return status != cudaStreamCaptureStatusNone;
}

static __global__ void probe_kernel() {}

// How many clusters of so many CTAs, each with all the shared memory of its SM, run at once: of 16
// CTAs perhaps none, where a chip has too few SMs together.
inline int clusters_of(int ctas, int shared_bytes) {
  const void* function = reinterpret_cast<const void*>(probe_kernel);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = ctas;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(ctas);
  config.blockDim = dim3(most_threads(PlanKind::kCluster, kMostUnitTiles));
  config.dynamicSmemBytes = shared_bytes;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = 0;
  const bool answered =
      cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes) ==
          cudaSuccess &&
      cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) ==
          cudaSuccess &&
      cudaOccupancyMaxActiveClusters(&clusters, function, &config) == cudaSuccess;
  if (!answered) cudaGetLastError();  // it is nobody else's
  return answered ? clusters : 0;
}

// The device must be current.
inline const char* read_device(int index, Device& device) {
  const auto read = [&](cudaDeviceAttr attribute, int& value) {
    return error_of(cudaDeviceGetAttribute(&value, attribute, index));
  };
  if (const char* error = read(cudaDevAttrComputeCapabilityMajor, device.major)) return error;
  if (const char* error = read(cudaDevAttrComputeCapabilityMinor, device.minor)) return error;
  if (const char* error = read(cudaDevAttrMultiProcessorCount, device.sms)) return error;
  if (const char* error = read(cudaDevAttrMaxSharedMemoryPerBlockOptin, device.shared_bytes))
    return error;
  device.cluster_ctas = 16;
  device.clusters = 0;
  while (device.cluster_ctas > 1) {
    if (device.major >= 9) device.clusters = clusters_of(device.cluster_ctas, device.shared_bytes);
    if (device.clusters > 0) break;
    device.cluster_ctas /= 2;
  }
  return nullptr;
}

struct Launch {
  dim3 grid;
  int threads;
  int64_t shared_bytes;
  int cluster;       // CTAs of a cluster along x, 0 for none
  bool cooperative;  // all CTAs must be resident at once
  void* stream;
};

// What was asked of the driver for one kernel already, a bit for each device.
struct Prepared {
  std::atomic<uint64_t> devices{0};
};

// All the shared memory there is, and clusters of more than 8.
inline const char* prepare(const void* function, Prepared& prepared, bool clusters) {
  int device = 0, bytes = 0;
  if (const char* error = error_of(cudaGetDevice(&device))) return error;
  const uint64_t bit = uint64_t{1} << (device & 63);
  if (device < 64 && prepared.devices.load(std::memory_order_acquire) & bit) return nullptr;
  if (const char* error =
          error_of(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)))
    return error;
  if (const char* error = error_of(
          cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)))
    return error;
  if (clusters)
    if (const char* error = error_of(
            cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1)))
      return error;
  prepared.devices.fetch_or(bit, std::memory_order_release);
  return nullptr;
}

// Null, or what went wrong.
template <class Params>
const char* launch_kernel(void (*kernel)(Params), const Launch& launch, const Params& params,
                          Prepared& prepared) {
  const void* function = reinterpret_cast<const void*>(kernel);
  if (const char* error = prepare(function, prepared, launch.cluster > 0)) return error;
  cudaLaunchAttribute attributes[2] = {};
  int count = 0;
  if (launch.cluster) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = launch.cluster;
    attributes[count].val.clusterDim.y = attributes[count].val.clusterDim.z = 1;
    ++count;
  }
  if (launch.cooperative) {
    attributes[count].id = cudaLaunchAttributeCooperative;
    attributes[count].val.cooperative = 1;
    ++count;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = launch.grid;
  config.blockDim = dim3(launch.threads);
  config.dynamicSmemBytes = static_cast<size_t>(launch.shared_bytes);
  config.stream = static_cast<cudaStream_t>(launch.stream);
  config.attrs = attributes;
  config.numAttrs = count;
  void* arguments[] = {const_cast<Params*>(&params)};
  return error_of(cudaLaunchKernelExC(&config, function, arguments));
}

}  // namespace lstm_fused::cuda
#endif
