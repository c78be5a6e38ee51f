// Neighbouring values of a row as vectors, in the arithmetic type of what is stored: loads, stores,
// sums. Compiled once per instruction set: row_sets.inl includes this in a namespace of its own,
// with GSALIGN_VECTOR_BYTES the width of a vector there, GSALIGN_TARGET the attribute that tells
// the compiler what the processor has, and GSALIGN_ROWS_AVX2, _AVX512, _BF16 whether (1 or 0) it
// has that.

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

// The sum of a vector's numbers, by halves and always in the same order.
template <typename R, typename W>
GSALIGN_TARGET GSALIGN_INLINE R sum_of_lanes(const W& value) {
  constexpr int kCount = sizeof(W) / sizeof(R);
  if constexpr (kCount == 16) {
    return sum_of_lanes<R>(
        __builtin_shufflevector(value, value, 0, 1, 2, 3, 4, 5, 6, 7) +
        __builtin_shufflevector(value, value, 8, 9, 10, 11, 12, 13, 14, 15));
  } else if constexpr (kCount == 8) {
    return sum_of_lanes<R>(
        __builtin_shufflevector(value, value, 0, 1, 2, 3) +
        __builtin_shufflevector(value, value, 4, 5, 6, 7));
  } else if constexpr (kCount == 4) {
    return (value[0] + value[2]) + (value[1] + value[3]);
  } else {
    static_assert(kCount == 2);
    return value[0] + value[1];
  }
}
