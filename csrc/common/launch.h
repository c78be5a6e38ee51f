// The handful of wrappers through which every CUDA kernel here touches the machine.
//
// Kernels use nothing else of CUDA, so that a test-only header, named by the macro
// GSALIGN_HOST_LAUNCH, can stand in for these definitions and run the very same kernels with host
// threads under AddressSanitizer and ThreadSanitizer.
//
// Contract of a kernel: one-dimensional grid and block, a block size that is a multiple of 32, no
// early return (all threads meet every barrier and every shuffle), dynamic shared memory only.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>

namespace gsalign {

// Storage of the 16-bit types: bits only, so that host and device see the same layout.
struct Half {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

constexpr int kWarpSize = 32;

struct Int4 {
  int a, b, c, d;
};

}  // namespace gsalign

#if defined(GSALIGN_HOST_LAUNCH)
#include GSALIGN_HOST_LAUNCH
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define GSALIGN_DEVICE __device__ __forceinline__
#define GSALIGN_UNROLL _Pragma("unroll")
#define GSALIGN_PRAGMA(text) _Pragma(#text)
#define GSALIGN_UNROLL_BY(times) GSALIGN_PRAGMA(unroll times)
// Most threads of a block; then, where given, how many blocks a multiprocessor's registers must
// hold.
#define GSALIGN_KERNEL(...) static __global__ void __launch_bounds__(__VA_ARGS__)

// Launches; launch_status() after it says whether that went well.
#define GSALIGN_LAUNCH(kernel, blocks, threads, shared_bytes, stream, ...) \
  kernel<<<dim3(blocks), dim3(threads), shared_bytes, stream>>>(__VA_ARGS__)

namespace gsalign {

using LaunchStatus = cudaError_t;
constexpr LaunchStatus kLaunched = cudaSuccess;
inline LaunchStatus launch_status() {
  return cudaGetLastError();
}

GSALIGN_DEVICE int thread_index() {
  return static_cast<int>(threadIdx.x);
}
GSALIGN_DEVICE int block_size() {
  return static_cast<int>(blockDim.x);
}
GSALIGN_DEVICE int block_index() {
  return static_cast<int>(blockIdx.x);
}

// Dynamic shared memory of the block, aligned to 16 bytes.
GSALIGN_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char gsalign_shared_memory[];
  return gsalign_shared_memory;
}

GSALIGN_DEVICE void barrier() {
  __syncthreads();
}

// The compiler keeps no copies of memory in registers beyond this point. At the head of a loop it
// makes every round read its tables again, where the copies would push out what is worked on.
GSALIGN_DEVICE void forget_memory() {
  asm volatile("" ::: "memory");
}
// The value, of which the compiler does not know that it had it before: what is derived from it is
// derived anew, instead of being carried through a loop that needs the registers.
GSALIGN_DEVICE int afresh(int value) {
  asm volatile("" : "+r"(value));
  return value;
}
template <typename T>
GSALIGN_DEVICE T* afresh(T* pointer) {
  asm volatile("" : "+l"(pointer));
  return pointer;
}

GSALIGN_DEVICE float shuffle_xor(float value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
GSALIGN_DEVICE double shuffle_xor(double value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
GSALIGN_DEVICE int shuffle_xor(int value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
// The value of the lane `distance` below; lanes with none below keep their own.
GSALIGN_DEVICE int shuffle_up(int value, int distance) {
  return __shfl_up_sync(0xffffffffu, value, distance);
}

// Which lanes say yes, lane 0 in the lowest bit, and how many bits of a word are set.
GSALIGN_DEVICE unsigned ballot(bool yes) {
  return __ballot_sync(0xffffffffu, yes);
}
GSALIGN_DEVICE int count_bits(unsigned word) {
  return __popc(word);
}

// Integer count in shared memory. The sum does not depend on the order of arrival; the value before
// is deliberately not returned, because it does.
GSALIGN_DEVICE void count_one(int* counter) {
  atomicAdd(counter, 1);
}

// Arithmetic that the compiler may not fuse or split otherwise, for values that are computed in two
// places and must come out alike.
GSALIGN_DEVICE float multiply(float a, float b) {
  return __fmul_rn(a, b);
}
GSALIGN_DEVICE float multiply_add(float a, float b, float c) {
  return __fmaf_rn(a, b, c);
}

// log2 of a normal positive number in one instruction; its error is within 2^-22, absolute for
// numbers from 1/2 to 2 and relative elsewhere.
GSALIGN_DEVICE float fast_log2(float value) {
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}

GSALIGN_DEVICE void sine_cosine(float angle, float* sine, float* cosine) {
  sincosf(angle, sine, cosine);
}

// 16 bytes from global to shared memory, both aligned to 16, visible after a wait below and a
// barrier.
GSALIGN_DEVICE void copy_async_16(void* shared_target, const void* global_source) {
#if __CUDA_ARCH__ >= 800
  const unsigned target = static_cast<unsigned>(__cvta_generic_to_shared(shared_target));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(global_source)
               : "memory");
#else
  *reinterpret_cast<uint4*>(shared_target) = *reinterpret_cast<const uint4*>(global_source);
#endif
}
GSALIGN_DEVICE void wait_async_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}
// The copies since the last commit become a group; a thread waits for all its groups but the last.
GSALIGN_DEVICE void commit_async_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
GSALIGN_DEVICE void wait_older_async_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group 1;" ::: "memory");
#endif
}

GSALIGN_DEVICE float to_float(float value) {
  return value;
}
GSALIGN_DEVICE float to_float(Half value) {
  return __half2float(__ushort_as_half(value.bits));
}
GSALIGN_DEVICE float to_float(BFloat16 value) {
  return __uint_as_float(static_cast<unsigned>(value.bits) << 16);
}

template <typename T>
GSALIGN_DEVICE T from_float(float value);
template <>
GSALIGN_DEVICE float from_float<float>(float value) {
  return value;
}
template <>
GSALIGN_DEVICE Half from_float<Half>(float value) {
  return {__half_as_ushort(__float2half_rn(value))};
}
template <>
GSALIGN_DEVICE BFloat16 from_float<BFloat16>(float value) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
}

// Four ints at an address aligned to 16.
GSALIGN_DEVICE Int4 load_four(const int* source) {
  const int4 four = *reinterpret_cast<const int4*>(source);
  return {four.x, four.y, four.z, four.w};
}
GSALIGN_DEVICE void store_four(int* target, Int4 four) {
  *reinterpret_cast<int4*>(target) = make_int4(four.a, four.b, four.c, four.d);
}

namespace detail {

// Two 16-bit values in one 32-bit word, the lower address in the lower half.
template <typename T>
GSALIGN_DEVICE float2 unpack(unsigned word);
template <>
GSALIGN_DEVICE float2 unpack<BFloat16>(unsigned word) {
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
}
template <>
GSALIGN_DEVICE float2 unpack<Half>(unsigned word) {
  return __half22float2(*reinterpret_cast<const __half2*>(&word));
}

template <typename T>
GSALIGN_DEVICE unsigned pack(float low, float high);
template <>
GSALIGN_DEVICE unsigned pack<BFloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const unsigned*>(&pair);
}
template <>
GSALIGN_DEVICE unsigned pack<Half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const unsigned*>(&pair);
}

template <typename T, int N>
struct VectorAccess;  // N * sizeof(T) is 16, or N is 1

template <typename T>
struct VectorAccess<T, 1> {
  using Packed = T;

  static GSALIGN_DEVICE T read(const T* source, bool exists) { return exists ? *source : T{}; }
  static GSALIGN_DEVICE void unpack(T packed, float (&values)[1]) { values[0] = to_float(packed); }
  static GSALIGN_DEVICE void store(T* target, const float (&values)[1]) {
    *target = from_float<T>(values[0]);
  }
};

template <>
struct VectorAccess<float, 4> {
  using Packed = float4;

  static GSALIGN_DEVICE float4 read(const float* source, bool exists) {
    float4 four = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (exists) {
      four = *reinterpret_cast<const float4*>(source);
    }
    return four;
  }
  static GSALIGN_DEVICE void unpack(float4 four, float (&values)[4]) {
    values[0] = four.x;
    values[1] = four.y;
    values[2] = four.z;
    values[3] = four.w;
  }
  static GSALIGN_DEVICE void store(float* target, const float (&values)[4]) {
    *reinterpret_cast<float4*>(target) = make_float4(values[0], values[1], values[2], values[3]);
  }
};

template <typename T>
struct VectorAccess<T, 8> {
  using Packed = uint4;

  static GSALIGN_DEVICE uint4 read(const T* source, bool exists) {
    uint4 words = make_uint4(0u, 0u, 0u, 0u);
    if (exists) {
      words = *reinterpret_cast<const uint4*>(source);
    }
    return words;
  }
  static GSALIGN_DEVICE void unpack(uint4 words, float (&values)[8]) {
    const unsigned word[4] = {words.x, words.y, words.z, words.w};
    GSALIGN_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float2 two = detail::unpack<T>(word[i]);
      values[2 * i] = two.x;
      values[2 * i + 1] = two.y;
    }
  }
  static GSALIGN_DEVICE void store(T* target, const float (&values)[8]) {
    *reinterpret_cast<uint4*>(target) = make_uint4(
        pack<T>(values[0], values[1]), pack<T>(values[2], values[3]), pack<T>(values[4], values[5]),
        pack<T>(values[6], values[7]));
  }
};

}  // namespace detail

// N consecutive values as float32; 16-byte accesses where N * sizeof(T) is 16 (aligned to 16).
// Where they do not exist, nothing is read and the values are zero.
template <typename T, int N>
GSALIGN_DEVICE void load_values(const T* source, float (&values)[N], bool exists = true) {
  detail::VectorAccess<T, N>::unpack(detail::VectorAccess<T, N>::read(source, exists), values);
}
template <typename T, int N>
GSALIGN_DEVICE void store_values(T* target, const float (&values)[N]) {
  detail::VectorAccess<T, N>::store(target, values);
}

// The same values as they are stored: what is asked for ahead of its use takes no more registers
// than it has bytes.
template <typename T, int N>
using Packed = typename detail::VectorAccess<T, N>::Packed;

template <typename T, int N>
GSALIGN_DEVICE Packed<T, N> load_packed(const T* source, bool exists = true) {
  return detail::VectorAccess<T, N>::read(source, exists);
}
template <typename T, int N>
GSALIGN_DEVICE void unpack_values(const Packed<T, N>& packed, float (&values)[N]) {
  detail::VectorAccess<T, N>::unpack(packed, values);
}

// Lets a kernel ask for more dynamic shared memory than the 48 KB every kernel may have. The driver
// is asked once per kernel and device; it is no stream operation, so graph capture may be under
// way.
template <auto kKernel>
inline LaunchStatus allow_shared_memory(int bytes, int device) {
  constexpr int kDevices = 64;
  static std::atomic<int> allowed[kDevices];
  if (bytes <= 48 * 1024) {
    return kLaunched;
  }
  if (device < kDevices && allowed[device].load(std::memory_order_relaxed) >= bytes) {
    return kLaunched;
  }
  int most = 0;
  LaunchStatus status =
      cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (status == kLaunched) {
    status = cudaFuncSetAttribute(
        reinterpret_cast<const void*>(kKernel), cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  }
  if (status == kLaunched && device < kDevices) {
    allowed[device].store(most, std::memory_order_relaxed);
  }
  return status;
}

}  // namespace gsalign

#endif  // GSALIGN_HOST_LAUNCH
