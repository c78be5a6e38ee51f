// The two qualifiers that let one function serve the host compiler and nvcc.
#pragma once

#if defined(__CUDACC__)
#define GSALIGN_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Always inlined, so that it is compiled for the instruction set of whoever calls it.
#define GSALIGN_HOST_DEVICE inline __attribute__((always_inline))
#endif
