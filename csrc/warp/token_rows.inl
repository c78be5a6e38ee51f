// Row arithmetic of the token warp, written once and compiled once per instruction set (see
// common/row_sets.inl) on the vectors of common/row_vectors.inl.

// out[c] = x[c] + sum_i weights[i] * taps[i][c]
template <typename T, bool kStream>
GSALIGN_TARGET static void blend_row(
    T* out, const T* x, const T* const taps[4], const Compute<T> weights[4], std::int64_t count) {
  using R = Compute<T>;
  const T *t0 = taps[0], *t1 = taps[1], *t2 = taps[2], *t3 = taps[3];
  const R w0 = weights[0], w1 = weights[1], w2 = weights[2], w3 = weights[3];
  std::int64_t c = 0;
  for (; c + kPair<T> <= count; c += kPair<T>) {
    const Pair<T> p0 = load_pair(t0 + c), p1 = load_pair(t1 + c);
    const Pair<T> p2 = load_pair(t2 + c), p3 = load_pair(t3 + c);
    Pair<T> sum = load_pair(x + c);
    sum.first += (w0 * p0.first + w1 * p1.first) + (w2 * p2.first + w3 * p3.first);
    sum.second += (w0 * p0.second + w1 * p1.second) + (w2 * p2.second + w3 * p3.second);
    store_pair<kStream>(out + c, sum);
  }
  for (; c < count; ++c) {
    const R sampled = (w0 * load(t0[c]) + w1 * load(t1[c])) + (w2 * load(t2[c]) + w3 * load(t3[c]));
    out[c] = store<T>(load(x[c]) + sampled);
  }
}

// out[c] = base[c] + sum_i weights[i] * (source + rows[i] * stride)[c], the sums in registers
template <typename T, bool kStream>
GSALIGN_TARGET static void gather_row(
    T* out, const T* base, const T* source, std::int64_t stride, const std::int32_t* rows,
    const Compute<T>* weights, std::int64_t entries, std::int64_t count) {
  using R = Compute<T>;
  constexpr std::int64_t kTile = 2;  // pairs of sums
  std::int64_t c = 0;
  for (; c + kTile * kPair<T> <= count; c += kTile * kPair<T>) {
    Pair<T> sums[kTile];
    for (std::int64_t j = 0; j < kTile; ++j) {
      sums[j] = load_pair(base + c + j * kPair<T>);
    }
    for (std::int64_t i = 0; i < entries; ++i) {
      const T* row = source + rows[i] * stride + c;
      for (std::int64_t j = 0; j < kTile; ++j) {
        const Pair<T> values = load_pair(row + j * kPair<T>);
        sums[j].first += weights[i] * values.first;
        sums[j].second += weights[i] * values.second;
      }
    }
    for (std::int64_t j = 0; j < kTile; ++j) {
      store_pair<kStream>(out + c + j * kPair<T>, sums[j]);
    }
  }
  for (; c < count; ++c) {
    R sum = load(base[c]);
    for (std::int64_t i = 0; i < entries; ++i) {
      sum += weights[i] * load(source[rows[i] * stride + c]);
    }
    out[c] = store<T>(sum);
  }
}

// dots[i] = sum_c gradient[c] * taps[i][c], for four taps in one pass
template <typename T>
GSALIGN_TARGET static void four_dots(
    const T* gradient, const T* const taps[4], std::int64_t count, Compute<T> dots[4]) {
  using R = Compute<T>;
  V<R> sums[4][2] = {};  // two of each in flight
  std::int64_t c = 0;
  for (; c + kPair<T> <= count; c += kPair<T>) {
    const Pair<T> g = load_pair(gradient + c);
    for (int i = 0; i < 4; ++i) {
      const Pair<T> t = load_pair(taps[i] + c);
      sums[i][0] += g.first * t.first;
      sums[i][1] += g.second * t.second;
    }
  }
  for (int i = 0; i < 4; ++i) {
    dots[i] = sum_of_lanes<R>(sums[i][0] + sums[i][1]);
  }
  for (; c < count; ++c) {
    for (int i = 0; i < 4; ++i) {
      dots[i] += load(gradient[c]) * load(taps[i][c]);
    }
  }
}

template <typename T>
constexpr Rows<T> kRows{&blend_row<T, false>, &blend_row<T, true>, &gather_row<T, false>,
                        &gather_row<T, true>, &four_dots<T>,       kVectorBytes};
