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

// Values of a vector, whose arithmetic is in Compute<T>.
template <typename T>
constexpr std::int64_t kStep = kVectorBytes / sizeof(Compute<T>);

template <typename T>
GSALIGN_TARGET GSALIGN_INLINE V<Compute<T>> load_step(const T* from) {
  [[maybe_unused]] constexpr std::int64_t step = kStep<T>;
  if constexpr (std::is_same_v<T, BFloat16>) {
    // By name: what GCC makes of the generic conversion takes three times as long.
#if GSALIGN_ROWS_AVX512
    const __m256i stored = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return bit_cast<V<float>>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(stored), 16));
#elif GSALIGN_ROWS_AVX2
    const __m128i stored = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return bit_cast<V<float>>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(stored), 16));
#else
    typedef std::uint16_t Stored __attribute__((vector_size(kVectorBytes / 2)));
    typedef std::uint32_t Wide __attribute__((vector_size(kVectorBytes)));
    Stored stored;
    std::memcpy(&stored, from, sizeof stored);
    return bit_cast<V<float>>(__builtin_convertvector(stored, Wide) << 16);
#endif
  } else if constexpr (std::is_same_v<T, Half>) {
#if GSALIGN_ROWS_AVX512
    return bit_cast<V<float>>(
        _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif GSALIGN_ROWS_AVX2
    return bit_cast<V<float>>(
        _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
    V<float> result{};
    for (std::int64_t i = 0; i < step; ++i) {
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
        reinterpret_cast<__m256i*>(to),
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
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
  [[maybe_unused]] constexpr std::int64_t step = kStep<T>;
  if constexpr (std::is_same_v<T, BFloat16>) {
#if GSALIGN_ROWS_BF16
    // Flushes denormals, which are below every bfloat16 that matters, to zero.
    const __m256bh rounded = _mm512_cvtneps_pbh(bit_cast<__m512>(value));
    store_bytes<kStream>(to, &rounded, sizeof rounded);
#else
    typedef std::uint16_t Stored __attribute__((vector_size(kVectorBytes / 2)));
    typedef std::uint32_t Wide __attribute__((vector_size(kVectorBytes)));
    const Wide word = bit_cast<Wide>(value);
    const Wide rounded = word + 0x7fffu + ((word >> 16) & 1u);  // to nearest, ties to even
    const Wide result = (word & 0x7fffffffu) > 0x7f800000u ? Wide{} + 0x7fc00000u : rounded;
    const Stored stored = __builtin_convertvector(result >> 16, Stored);
    store_bytes<kStream>(to, &stored, sizeof stored);
#endif
  } else if constexpr (std::is_same_v<T, Half>) {
#if GSALIGN_ROWS_AVX512
    const __m256i rounded =
        _mm512_cvtps_ph(bit_cast<__m512>(value), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    store_bytes<kStream>(to, &rounded, sizeof rounded);
#elif GSALIGN_ROWS_AVX2
    const __m128i rounded = _mm256_cvtps_ph(bit_cast<__m256>(value), _MM_FROUND_TO_NEAREST_INT);
    store_bytes<kStream>(to, &rounded, sizeof rounded);
#else
    T rounded[step];
    for (std::int64_t i = 0; i < step; ++i) {
      rounded[i] = store<T>(value[i]);
    }
    std::memcpy(to, rounded, sizeof rounded);
#endif
  } else {
    store_bytes<kStream>(to, &value, sizeof value);
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
  for (; c + kStep<T> <= count; c += kStep<T>) {
    const V<R> upper = w0 * load_step(t0 + c) + w1 * load_step(t1 + c);
    const V<R> lower = w2 * load_step(t2 + c) + w3 * load_step(t3 + c);
    store_step<kStream>(out + c, load_step(x + c) + (upper + lower));
  }
  for (; c < count; ++c) {
    const R sampled =
        (w0 * load(t0[c]) + w1 * load(t1[c])) + (w2 * load(t2[c]) + w3 * load(t3[c]));
    out[c] = store<T>(load(x[c]) + sampled);
  }
}

// out[c] = base[c] + sum_i weights[i] * (source + rows[i] * stride)[c], the sums in registers
template <typename T, bool kStream>
GSALIGN_TARGET static void gather_row(
    T* out, const T* base, const T* source, std::int64_t stride, const std::int32_t* rows,
    const Compute<T>* weights, std::int64_t entries, std::int64_t count) {
  using R = Compute<T>;
  constexpr std::int64_t kTile = 4;  // vectors of sums
  std::int64_t c = 0;
  for (; c + kTile * kStep<T> <= count; c += kTile * kStep<T>) {
    V<R> sum[kTile];
    for (std::int64_t j = 0; j < kTile; ++j) {
      sum[j] = load_step(base + c + j * kStep<T>);
    }
    for (std::int64_t i = 0; i < entries; ++i) {
      const T* row = source + rows[i] * stride + c;
      for (std::int64_t j = 0; j < kTile; ++j) {
        sum[j] += weights[i] * load_step(row + j * kStep<T>);
      }
    }
    for (std::int64_t j = 0; j < kTile; ++j) {
      store_step<kStream>(out + c + j * kStep<T>, sum[j]);
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
#if GSALIGN_ROWS_BF16
  if constexpr (std::is_same_v<T, BFloat16>) {
    for (; c + 32 <= count; c += 32) {  // products of bfloat16 are exact in float
      const __m512bh g = bit_cast<__m512bh>(_mm512_loadu_si512(gradient + c));
      for (int i = 0; i < 4; ++i) {
        const __m512bh t = bit_cast<__m512bh>(_mm512_loadu_si512(taps[i] + c));
        sums[i][c >> 5 & 1] = bit_cast<V<float>>(
            _mm512_dpbf16_ps(bit_cast<__m512>(sums[i][c >> 5 & 1]), g, t));
      }
    }
  }
#endif
  for (; c + 2 * kStep<T> <= count; c += 2 * kStep<T>) {
    for (std::int64_t j = 0; j < 2; ++j) {
      const V<R> g = load_step(gradient + c + j * kStep<T>);
      for (int i = 0; i < 4; ++i) {
        sums[i][j] += g * load_step(taps[i] + c + j * kStep<T>);
      }
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
constexpr Rows<T> kRows{
    &blend_row<T, false>, &blend_row<T, true>, &gather_row<T, false>, &gather_row<T, true>,
    &four_dots<T>,        kVectorBytes};
