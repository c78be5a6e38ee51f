// Which instruction set the row arithmetic of an operator family runs on.
//
// A family writes its functions over rows once, in a file *_rows.inl, which ends in a table of
// them, `kRows<T>` of the type `Rows<T>`. row_sets.inl compiles that file for the processor every
// binary must run on, and on x86-64 for AVX2 (with FMA and half conversions), for AVX-512, and for
// AVX-512 with bfloat16 conversions. One binary holds them all; rows_for() gives the table of the
// best set that this processor has.
//
// This is for rows of half types in and out, by the processor's own conversions. Their intrinsics
// may only stand in functions that are themselves compiled for the set, and bfloat16 makes a set of
// its own: the widths of with_vectors() (lanes.h) offer neither. What works on float and double
// alone is written with those.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "numbers.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define GSALIGN_X86_ROWS 1
#endif
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace gsalign {

enum class RowSet { kBaseline, kAvx2, kAvx512, kAvx512Bf16 };

inline bool has_row_set(RowSet set) {
#if defined(GSALIGN_X86_ROWS)
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  switch (set) {
    case RowSet::kAvx512Bf16:
      return avx512 && __builtin_cpu_supports("avx512bf16");
    case RowSet::kAvx512:
      return avx512;
    case RowSet::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c");
    default:
      return true;
  }
#else
  return set == RowSet::kBaseline;
#endif
}

inline RowSet best_row_set() {
  for (RowSet set : {RowSet::kAvx512Bf16, RowSet::kAvx512, RowSet::kAvx2}) {
    if (has_row_set(set)) {
      return set;
    }
  }
  return RowSet::kBaseline;
}

}  // namespace gsalign
