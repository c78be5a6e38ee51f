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
GSALIGN_TARGET static void token_gradient(const TokenGradient<T>& work) {
  using R = Compute<T>;
  constexpr std::int64_t kStride = kKeptStride<R>;
  V<R> first[kParts] = {}, second[kParts] = {};  // dot products of the two vectors of a pair
  R w[kParts];
  for (int p = 0; p < kParts; ++p) {
    w[p] = work.weights[p];
  }
  std::int64_t c = 0;
  for (; c + kPair<T> <= work.channels; c += kPair<T>) {
    const Pair<T> x = load_pair(work.row + c);
    Pair<T> y = work.carried != nullptr ? load_kept<T>(work.carried + c) : Pair<T>{};
    for (int p = 0; p < kParts; ++p) {
      const Pair<T> g = load_kept<T>(work.kept + p * kStride + c);
      first[p] += g.first * x.first;
      // Few sums are too short a chain each, many take all registers.
      (kParts > 4 ? first : second)[p] += g.second * x.second;
      y.first += w[p] * g.first;
      y.second += w[p] * g.second;
    }
    if (work.carry != nullptr) {
      store_kept<T>(work.carry + c, y);
    } else if (work.streamed) {
      store_pair<true>(work.gradient + c, y);
    } else {
      store_pair<false>(work.gradient + c, y);
    }
  }
  for (int p = 0; p < kParts; ++p) {
    work.dots[p] = sum_of_lanes<R>(kParts > 4 ? first[p] : first[p] + second[p]);
  }
  for (; c < work.channels; ++c) {
    const R x = load(work.row[c]);
    R y = work.carried != nullptr ? work.carried[c] : R(0);
    for (int p = 0; p < kParts; ++p) {
      const R g = work.kept[p * kStride + c];
      work.dots[p] += g * x;
      y += w[p] * g;
    }
    if (work.carry != nullptr) {
      work.carry[c] = y;
    } else {
      work.gradient[c] = store<T>(y);
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
    {&token_gradient<T, 1>, &token_gradient<T, 2>, &token_gradient<T, 3>, &token_gradient<T, 4>,
     &token_gradient<T, 5>, &token_gradient<T, 6>, &token_gradient<T, 7>, &token_gradient<T, 8>},
    &keep_row<T>,
    &release_row<T>,
    kVectorBytes};
