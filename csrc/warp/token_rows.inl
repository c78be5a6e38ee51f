// Row arithmetic of the token warp, written once and compiled once per instruction set.
//
// Included by token_rows.h inside a namespace of its own, with GSALIGN_VECTOR_BYTES the width of a
// vector there, GSALIGN_TARGET the attribute that tells the compiler what the processor has, and
// GSALIGN_ROWS_AVX2, _AVX512, _BF16 whether (1 or 0) it has that.

constexpr std::int64_t kVectorBytes = GSALIGN_VECTOR_BYTES;

template <typename R>
struct VectorOf {
  typedef R Type __attribute__((vector_size(kVectorBytes)));
};
template <typename R>
using V = typename VectorOf<R>::Type;
typedef std::uint32_t Words __attribute__((vector_size(kVectorBytes)));

// Values of a vector, whose arithmetic is in Compute<T>, and of a pair of vectors.
template <typename T>
constexpr std::int64_t kStep = kVectorBytes / sizeof(Compute<T>);
template <typename T>
constexpr std::int64_t kPair = 2 * kStep<T>;

// kPair neighbouring values, each in one of two vectors; which, only load_pair() and store_pair()
// know. What is done to both alike does not depend on it.
template <typename T>
struct Pair {
  V<Compute<T>> first, second;
};

template <typename T>
GSALIGN_TARGET GSALIGN_INLINE V<Compute<T>> load_step(const T* from) {
  if constexpr (std::is_same_v<T, Half>) {
#if GSALIGN_ROWS_AVX512
    return bit_cast<V<float>>(
        _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif GSALIGN_ROWS_AVX2
    return bit_cast<V<float>>(
        _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
    V<float> result{};
    for (std::int64_t i = 0; i < kStep<T>; ++i) {
      result[i] = load(from[i]);
    }
    return result;
#endif
  } else {
    V<T> result;
    std::memcpy(&result, from, sizeof result);
    return result;
  }
}

template <typename T>
GSALIGN_TARGET GSALIGN_INLINE Pair<T> load_pair(const T* from) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    // Even and odd indices: one operation a vector, where keeping the order takes two.
    Words words;
    std::memcpy(&words, from, sizeof words);
    return {bit_cast<V<float>>(words << 16), bit_cast<V<float>>(words & 0xffff0000u)};
  } else {
    return {load_step(from), load_step(from + kStep<T>)};
  }
}

// `kStream` writes past the caches; the address is then a multiple of what is written.
template <bool kStream, typename T>
GSALIGN_TARGET GSALIGN_INLINE void store_bytes(T* to, const void* from, std::int64_t bytes) {
#if GSALIGN_ROWS_AVX512
  if (kStream && bytes == 64) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
    return;
  }
#endif
#if GSALIGN_ROWS_AVX2
  if (kStream && bytes == 32) {
    _mm256_stream_si256(
        reinterpret_cast<__m256i*>(to), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    return;
  }
#endif
#if defined(__SSE2__)
  if (kStream && bytes == 16) {
    _mm_stream_si128(
        reinterpret_cast<__m128i*>(to), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    return;
  }
#endif
  std::memcpy(to, from, bytes);
}

template <bool kStream, typename T>
GSALIGN_TARGET GSALIGN_INLINE void store_step(T* to, const V<Compute<T>>& value) {
  if constexpr (std::is_same_v<T, Half>) {
#if GSALIGN_ROWS_AVX512
    const __m256i rounded =
        _mm512_cvtps_ph(bit_cast<__m512>(value), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    store_bytes<kStream>(to, &rounded, sizeof rounded);
#elif GSALIGN_ROWS_AVX2
    const __m128i rounded = _mm256_cvtps_ph(bit_cast<__m256>(value), _MM_FROUND_TO_NEAREST_INT);
    store_bytes<kStream>(to, &rounded, sizeof rounded);
#else
    T rounded[kStep<T>];
    for (std::int64_t i = 0; i < kStep<T>; ++i) {
      rounded[i] = store<T>(value[i]);
    }
    std::memcpy(to, rounded, sizeof rounded);
#endif
  } else {
    store_bytes<kStream>(to, &value, sizeof value);
  }
}

// bfloat16 in the upper half of each word, the lower half not cleared.
GSALIGN_TARGET GSALIGN_INLINE Words rounded_words(const V<float>& value) {
  const Words word = bit_cast<Words>(value);
  const Words rounded = word + 0x7fffu + ((word >> 16) & 1u);  // to nearest, ties to even
  return (word & 0x7fffffffu) > 0x7f800000u ? Words{} + 0x7fc00000u : rounded;
}

template <bool kStream, typename T>
GSALIGN_TARGET GSALIGN_INLINE void store_pair(T* to, const Pair<T>& values) {
  if constexpr (std::is_same_v<T, BFloat16>) {
#if GSALIGN_ROWS_BF16
    // Flushes denormals, which are below every bfloat16 that matters, to zero.
    const __m512i both = bit_cast<__m512i>(
        _mm512_cvtne2ps_pbh(bit_cast<__m512>(values.second), bit_cast<__m512>(values.first)));
    // Where the values of index 31 down to 0 are in `both`.
    const __m512i order = _mm512_set_epi16(
        31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4,
        19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i stored = _mm512_permutexvar_epi16(order, both);
    store_bytes<kStream>(to, &stored, sizeof stored);
#else
    const Words stored =
        (rounded_words(values.first) >> 16) | (rounded_words(values.second) & 0xffff0000u);
    store_bytes<kStream>(to, &stored, sizeof stored);
#endif
  } else {
    store_step<kStream>(to, values.first);
    store_step<kStream>(to + kStep<T>, values.second);
  }
}

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

template <typename R>
GSALIGN_TARGET GSALIGN_INLINE R sum_of_lanes(const V<R>& value) {
  R sum = 0;
  for (std::int64_t i = 0; i < kVectorBytes / std::int64_t(sizeof(R)); ++i) {
    sum += value[i];
  }
  return sum;
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
