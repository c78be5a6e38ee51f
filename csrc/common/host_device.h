// The two qualifiers that let one function serve the host compiler and nvcc.
#pragma once

#if defined(__CUDACC__)
#define GSALIGN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define GSALIGN_HOST_DEVICE inline
#endif
