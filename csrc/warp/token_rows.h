// Row arithmetic of the token warp for the processor it runs on.
//
// The functions of token_rows.inl exist once for the processor every binary must run on, and on
// x86-64 for AVX2 (with FMA and half conversions), for AVX-512, and for AVX-512 with bfloat16
// conversions. One binary holds them all; rows_for() takes the best that this processor has.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../common/numbers.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define GSALIGN_X86_ROWS 1
#endif
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace gsalign::warp {

template <typename T>
struct Rows {
  using R = Compute<T>;
  using Blend = void (*)(T*, const T*, const T* const[4], const R[4], std::int64_t);
  using Gather = void (*)(
      T*, const T*, const T*, std::int64_t, const std::int32_t*, const R*, std::int64_t,
      std::int64_t);
  using Dots = void (*)(const T*, const T* const[4], std::int64_t, R[4]);

  // Plain, and past the caches: rows there start at a multiple of `alignment` bytes.
  Blend blend, blend_streamed;
  Gather gather, gather_streamed;
  Dots dots;
  std::int64_t alignment;
};

namespace rows_baseline {
#define GSALIGN_VECTOR_BYTES 16
#define GSALIGN_TARGET
#define GSALIGN_ROWS_AVX2 0
#define GSALIGN_ROWS_AVX512 0
#define GSALIGN_ROWS_BF16 0
#include "token_rows.inl"
#undef GSALIGN_VECTOR_BYTES
#undef GSALIGN_TARGET
#undef GSALIGN_ROWS_AVX2
#undef GSALIGN_ROWS_AVX512
#undef GSALIGN_ROWS_BF16
}  // namespace rows_baseline

#if defined(GSALIGN_X86_ROWS)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 on its own intrinsics
// An attribute of every function, not a pragma: templates made later would not remember a pragma.
namespace rows_avx2 {
#define GSALIGN_VECTOR_BYTES 32
#define GSALIGN_TARGET __attribute__((target("avx2,fma,f16c")))
#define GSALIGN_ROWS_AVX2 1
#define GSALIGN_ROWS_AVX512 0
#define GSALIGN_ROWS_BF16 0
#include "token_rows.inl"
#undef GSALIGN_VECTOR_BYTES
#undef GSALIGN_TARGET
#undef GSALIGN_ROWS_AVX2
#undef GSALIGN_ROWS_AVX512
#undef GSALIGN_ROWS_BF16
}  // namespace rows_avx2

namespace rows_avx512 {
#define GSALIGN_VECTOR_BYTES 64
#define GSALIGN_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define GSALIGN_ROWS_AVX2 1
#define GSALIGN_ROWS_AVX512 1
#define GSALIGN_ROWS_BF16 0
#include "token_rows.inl"
#undef GSALIGN_VECTOR_BYTES
#undef GSALIGN_TARGET
#undef GSALIGN_ROWS_AVX2
#undef GSALIGN_ROWS_AVX512
#undef GSALIGN_ROWS_BF16
}  // namespace rows_avx512

namespace rows_avx512_bf16 {
#define GSALIGN_VECTOR_BYTES 64
#define GSALIGN_TARGET \
  __attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define GSALIGN_ROWS_AVX2 1
#define GSALIGN_ROWS_AVX512 1
#define GSALIGN_ROWS_BF16 1
#include "token_rows.inl"
#undef GSALIGN_VECTOR_BYTES
#undef GSALIGN_TARGET
#undef GSALIGN_ROWS_AVX2
#undef GSALIGN_ROWS_AVX512
#undef GSALIGN_ROWS_BF16
}  // namespace rows_avx512_bf16
#pragma GCC diagnostic pop
#endif

// The functions for this processor.
template <typename T>
const Rows<T>& rows_for() {
  static const Rows<T> chosen = [] {
#if defined(GSALIGN_X86_ROWS)
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && __builtin_cpu_supports("avx512bf16")) {
      return rows_avx512_bf16::kRows<T>;
    }
    if (avx512) {
      return rows_avx512::kRows<T>;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c")) {
      return rows_avx2::kRows<T>;
    }
#endif
    return rows_baseline::kRows<T>;
  }();
  return chosen;
}

}  // namespace gsalign::warp
