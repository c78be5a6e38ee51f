// Row arithmetic of the masked part pooling, written once and compiled once per instruction set
// (see common/row_sets.inl) on the vectors of common/row_vectors.inl.

// Kept rows: pairs of vectors as load_pair() makes them, then single numbers.
template <typename T>
GSALIGN_TARGET GSALIGN_INLINE Pair<T> load_kept(const Compute<T>* from) {
  Pair<T> result;
  std::memcpy(&result.first, from, sizeof result.first);
  std::memcpy(&result.second, from + kStep<T>, sizeof result.second);
  return result;
}
template <typename T>
GSALIGN_TARGET GSALIGN_INLINE void store_kept(Compute<T>* to, const Pair<T>& values) {
  std::memcpy(to, &values.first, sizeof values.first);
  std::memcpy(to + kStep<T>, &values.second, sizeof values.second);
}

// Asks for the pair of values at the same place of a row that is read next.
template <typename T>
GSALIGN_TARGET GSALIGN_INLINE void fetch_pair(const T* from) {
  constexpr std::int64_t kLine = 64, kBytes = kPair<T> * std::int64_t(sizeof(T));
  for (std::int64_t offset = 0; offset < kBytes; offset += kLine) {
    __builtin_prefetch(reinterpret_cast<const char*>(from) + offset, 0, 2);
  }
}

template <typename T, int kParts>
GSALIGN_TARGET static void add_rows(const RowSums<T>& work) {
  using R = Compute<T>;
  constexpr std::int64_t kStride = kKeptStride<R>;
  std::int64_t c = 0;
  for (; c + kPair<T> <= work.channels; c += kPair<T>) {
    Pair<T> sums[kParts];
    for (int p = 0; p < kParts; ++p) {
      sums[p] = work.start ? Pair<T>{} : load_kept<T>(work.kept + p * kStride + c);
    }
    const T* row = work.rows + c;
    const R* w = work.weights;
    for (std::int64_t i = 0; i < work.count; ++i, row += work.stride, w += kParts) {
      const Pair<T> x = load_pair(row);
      fetch_pair(row + kRowGroup * work.stride);
      for (int p = 0; p < kParts; ++p) {
        sums[p].first += w[p] * x.first;
        sums[p].second += w[p] * x.second;
      }
    }
    for (int p = 0; p < kParts; ++p) {
      store_kept<T>(work.kept + p * kStride + c, sums[p]);
    }
  }
  for (; c < work.channels; ++c) {
    for (int p = 0; p < kParts; ++p) {
      R sum = work.start ? R(0) : work.kept[p * kStride + c];
      for (std::int64_t i = 0; i < work.count; ++i) {
        sum += work.weights[i * kParts + p] * load(work.rows[i * work.stride + c]);
      }
      work.kept[p * kStride + c] = sum;
    }
  }
}

template <typename T, int kParts>
GSALIGN_TARGET static void token_gradients(const TokenGradients<T>& work) {
  using R = Compute<T>;
  constexpr std::int64_t kStride = kKeptStride<R>;
  // Copied: the compiler would read them anew after every store.
  const R* const kept = work.kept;
  const T *const row0 = work.rows[0], *const row1 = work.rows[1];
  const R *const carried0 = work.carried[0], *const carried1 = work.carried[1];
  R *const carry0 = work.carry[0], *const carry1 = work.carry[1];
  T *const gradient0 = work.gradients[0], *const gradient1 = work.gradients[1];
  const bool streamed = work.streamed;
  V<R> sums0[kParts] = {}, sums1[kParts] = {};  // in registers, as the loops over them are unrolled
  const R *const w0 = work.weights[0], *const w1 = work.weights[1];
  std::int64_t c = 0;
  for (; c + kPair<T> <= work.channels; c += kPair<T>) {
    const Pair<T> x0 = load_pair(row0 + c), x1 = load_pair(row1 + c);
    fetch_pair(row0 + c + work.ahead);
    fetch_pair(row1 + c + work.ahead);
    Pair<T> y0 = carried0 != nullptr ? load_kept<T>(carried0 + c) : Pair<T>{};
    Pair<T> y1 = carried0 != nullptr ? load_kept<T>(carried1 + c) : Pair<T>{};
#pragma GCC unroll 8
    for (int p = 0; p < kParts; ++p) {
      const Pair<T> g = load_kept<T>(kept + p * kStride + c);
      sums0[p] += g.first * x0.first;
      sums1[p] += g.first * x1.first;
      y0.first += w0[p] * g.first;
      y0.second += w0[p] * g.second;
      y1.first += w1[p] * g.first;
      y1.second += w1[p] * g.second;
      sums0[p] += g.second * x0.second;
      sums1[p] += g.second * x1.second;
    }
    if (carry0 != nullptr) {
      store_kept<T>(carry0 + c, y0);
      store_kept<T>(carry1 + c, y1);
    } else if (streamed) {
      store_pair<true>(gradient0 + c, y0);
      store_pair<true>(gradient1 + c, y1);
    } else {
      store_pair<false>(gradient0 + c, y0);
      store_pair<false>(gradient1 + c, y1);
    }
  }
  R dots[2][kParts];
#pragma GCC unroll 8
  for (int p = 0; p < kParts; ++p) {
    dots[0][p] = sum_of_lanes<R>(sums0[p]);
    dots[1][p] = sum_of_lanes<R>(sums1[p]);
  }
  for (int i = 0; i < 2; ++i) {
    for (std::int64_t rest = c; rest < work.channels; ++rest) {
      const R x = load(work.rows[i][rest]);
      R y = carried0 != nullptr ? work.carried[i][rest] : R(0);
      for (int p = 0; p < kParts; ++p) {
        const R g = kept[p * kStride + rest];
        dots[i][p] += g * x;
        y += work.weights[i][p] * g;
      }
      if (carry0 != nullptr) {
        work.carry[i][rest] = y;
      } else {
        work.gradients[i][rest] = store<T>(y);
      }
    }
    for (int p = 0; p < kParts; ++p) {
      work.dots[i][p] = dots[i][p];
    }
  }
}

template <typename T>
GSALIGN_TARGET static void keep_row(
    Compute<T>* kept, const T* row, Compute<T> divisor, std::int64_t channels) {
  std::int64_t c = 0;
  for (; c + kPair<T> <= channels; c += kPair<T>) {
    const Pair<T> x = load_pair(row + c);
    store_kept<T>(kept + c, {x.first / divisor, x.second / divisor});
  }
  for (; c < channels; ++c) {
    kept[c] = load(row[c]) / divisor;
  }
}

template <typename T>
GSALIGN_TARGET static void release_row(
    T* row, const Compute<T>* kept, Compute<T> divisor, std::int64_t channels) {
  std::int64_t c = 0;
  for (; c + kPair<T> <= channels; c += kPair<T>) {
    const Pair<T> y = load_kept<T>(kept + c);
    store_pair<false>(row + c, Pair<T>{y.first / divisor, y.second / divisor});
  }
  for (; c < channels; ++c) {
    row[c] = store<T>(kept[c] / divisor);
  }
}

template <typename T>
constexpr Rows<T> kRows{
    {&add_rows<T, 1>, &add_rows<T, 2>, &add_rows<T, 3>, &add_rows<T, 4>, &add_rows<T, 5>,
     &add_rows<T, 6>, &add_rows<T, 7>, &add_rows<T, 8>},
    {&token_gradients<T, 1>, &token_gradients<T, 2>, &token_gradients<T, 3>, &token_gradients<T, 4>,
     &token_gradients<T, 5>, &token_gradients<T, 6>, &token_gradients<T, 7>,
     &token_gradients<T, 8>},
    &keep_row<T>,
    &release_row<T>,
    kVectorBytes};
