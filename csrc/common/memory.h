// Writing past the caches.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace gsalign {

// Results greater than this are written past the caches: they would push out what is still needed,
// and every line would be read before it is overwritten.
constexpr std::int64_t kStreamedBytes = std::int64_t(16) << 20;

// memcpy past the caches. Call stream_fence() when all rows of a unit of work are written.
inline void stream_row(void* target, const void* source, std::int64_t bytes) {
#if defined(__SSE2__)
  char* to = static_cast<char*>(target);
  const char* from = static_cast<const char*>(source);
  const auto misaligned = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(to) & 15);
  std::int64_t offset = std::min((16 - misaligned) & 15, bytes);
  std::memcpy(to, from, offset);
  for (; offset + 16 <= bytes; offset += 16) {
    _mm_stream_si128(
        reinterpret_cast<__m128i*>(to + offset),
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + offset)));
  }
  std::memcpy(to + offset, from + offset, bytes - offset);
#else
  std::memcpy(target, source, bytes);
#endif
}

// Makes streamed rows visible to other threads in the order of ordinary writes.
inline void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace gsalign
