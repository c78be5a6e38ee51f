// Row arithmetic for every instruction set. Included once by a family, inside its namespace and
// after row_sets.h, with GSALIGN_ROWS the family's file, as seen from this folder.

namespace rows_baseline {
#define GSALIGN_VECTOR_BYTES 16
#define GSALIGN_TARGET
#define GSALIGN_ROWS_AVX2 0
#define GSALIGN_ROWS_AVX512 0
#define GSALIGN_ROWS_BF16 0
#include "row_vectors.inl"
#include GSALIGN_ROWS
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
#include "row_vectors.inl"
#include GSALIGN_ROWS
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
#include "row_vectors.inl"
#include GSALIGN_ROWS
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
#include "row_vectors.inl"
#include GSALIGN_ROWS
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
    switch (best_row_set()) {
      case RowSet::kAvx512Bf16:
        return rows_avx512_bf16::kRows<T>;
      case RowSet::kAvx512:
        return rows_avx512::kRows<T>;
      case RowSet::kAvx2:
        return rows_avx2::kRows<T>;
      default:
        break;
    }
#endif
    return rows_baseline::kRows<T>;
  }();
  return chosen;
}
