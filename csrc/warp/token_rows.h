// Row arithmetic of the token warp for the processor it runs on.
#pragma once

#include "../common/row_sets.h"

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

#define GSALIGN_ROWS "../warp/token_rows.inl"
#include "../common/row_sets.inl"
#undef GSALIGN_ROWS

}  // namespace gsalign::warp
