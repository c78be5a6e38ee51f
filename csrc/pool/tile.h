// Sums of a few rows kept in vector registers. Included once per instruction set, with
//   GSALIGN_TILE_SET     namespace of this copy
//   GSALIGN_TILE_TARGET  function attribute that chooses the instruction set
//   GSALIGN_TILE_BYTES   bytes of a vector
// defined. Written with vector types, because a compiler asked for several targets at once
// (GSALIGN_CLONES) vectorises inner loops only, and here the outer one, over channels, must be.

namespace gsalign::pool::GSALIGN_TILE_SET {

// y_i[c] = (Start ? 0 : y_i[c]) + sum_j w_ij x_j[c] for i in [0, Count), where rows of y and x lie
// `y_stride` and `x_stride` apart, and w_ij at w[i w_stride + j w_step].
template <int Count, bool Start, typename S>
GSALIGN_TILE_TARGET void tile(
    S* __restrict y, std::int64_t y_stride, const S* __restrict w, std::int64_t w_stride,
    std::int64_t w_step, const S* __restrict x, std::int64_t x_stride, std::int64_t inputs,
    std::int64_t count) {
  typedef S Vector __attribute__((vector_size(GSALIGN_TILE_BYTES), aligned(sizeof(S)), may_alias));
  constexpr std::int64_t kLanes = GSALIGN_TILE_BYTES / sizeof(S);
  std::int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) {
    Vector sum[Count];
    for (int i = 0; i < Count; ++i) {
      sum[i] = Start ? Vector{} : *reinterpret_cast<const Vector*>(y + i * y_stride + c);
    }
    for (std::int64_t j = 0; j < inputs; ++j) {
      const Vector value = *reinterpret_cast<const Vector*>(x + j * x_stride + c);
      for (int i = 0; i < Count; ++i) {
        sum[i] += w[i * w_stride + j * w_step] * value;
      }
    }
    for (int i = 0; i < Count; ++i) {
      *reinterpret_cast<Vector*>(y + i * y_stride + c) = sum[i];
    }
  }
  for (; c < count; ++c) {
    for (int i = 0; i < Count; ++i) {
      S sum = Start ? S(0) : y[i * y_stride + c];
      for (std::int64_t j = 0; j < inputs; ++j) {
        sum += w[i * w_stride + j * w_step] * x[j * x_stride + c];
      }
      y[i * y_stride + c] = sum;
    }
  }
}

}  // namespace gsalign::pool::GSALIGN_TILE_SET

#undef GSALIGN_TILE_SET
#undef GSALIGN_TILE_TARGET
#undef GSALIGN_TILE_BYTES
