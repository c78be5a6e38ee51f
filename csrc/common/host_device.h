// What lets one function serve the host compiler and nvcc.
#pragma once

#include <type_traits>

#if defined(__CUDACC__)
#define GSALIGN_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Always inlined, so that it is compiled for the instruction set of whoever calls it.
#define GSALIGN_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace gsalign {

GSALIGN_HOST_DEVICE int divide_up(int a, int b) {
  return (a + b - 1) / b;
}
GSALIGN_HOST_DEVICE int round_up_16(int bytes) {
  return (bytes + 15) & ~15;
}

// A product that nvcc may not fuse with the sum it goes into, for values that two kernels compute
// and must find alike.
template <typename R>
GSALIGN_HOST_DEVICE R rounded_product(R a, R b) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<R, float>) {
    return __fmul_rn(a, b);
  } else {
    return __dmul_rn(a, b);
  }
#else
  return a * b;
#endif
}

}  // namespace gsalign
