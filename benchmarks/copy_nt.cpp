// The yardstick: a copy with non-temporal stores, by any number of threads, timed from inside.
//
// Plain C interface for ctypes; no PyTorch. A non-temporal store writes to memory without first
// reading the line it overwrites, so this is the fastest way to move the bytes, where memcpy and
// Tensor.copy_ pay for a third stream below their own thresholds.

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#include <emmintrin.h>

namespace {

constexpr std::size_t kLine = 64;

void copy_part(char* target, const char* source, std::size_t bytes) {
  // Streaming stores want aligned targets; the ragged ends go the plain way.
  const auto misalignment = reinterpret_cast<std::uintptr_t>(target) % kLine;
  const std::size_t wanted = misalignment == 0 ? 0 : kLine - misalignment;
  const std::size_t head = wanted < bytes ? wanted : bytes;
  std::memcpy(target, source, head);
  target += head;
  source += head;
  bytes -= head;
  const std::size_t lines = bytes / kLine;
  for (std::size_t line = 0; line < lines; ++line) {
    const auto* from = reinterpret_cast<const __m128i*>(source + line * kLine);
    auto* to = reinterpret_cast<__m128i*>(target + line * kLine);
    const __m128i a = _mm_loadu_si128(from);
    const __m128i b = _mm_loadu_si128(from + 1);
    const __m128i c = _mm_loadu_si128(from + 2);
    const __m128i d = _mm_loadu_si128(from + 3);
    _mm_stream_si128(to, a);
    _mm_stream_si128(to + 1, b);
    _mm_stream_si128(to + 2, c);
    _mm_stream_si128(to + 3, d);
  }
  std::memcpy(target + lines * kLine, source + lines * kLine, bytes % kLine);
  _mm_sfence();
}

}  // namespace

// Copies `bytes` from `source` to `target` and returns the seconds between the moment when all
// threads stand ready and the moment when the last one is done; starting them is not counted.
extern "C" double gsalign_copy_nt(
    void* target, const void* source, std::int64_t bytes, int threads) {
  using clock = std::chrono::steady_clock;
  auto* to = static_cast<char*>(target);
  const auto* from = static_cast<const char*>(source);
  const auto total = static_cast<std::size_t>(bytes);
  const auto workers = static_cast<std::size_t>(threads < 1 ? 1 : threads);
  // Parts end on cache lines, so that no two threads write one line.
  const std::size_t part = (total / workers + kLine) / kLine * kLine;

  std::atomic<std::size_t> ready{0};
  std::atomic<bool> go{false};
  const auto work = [&](std::size_t index) {
    const std::size_t begin = index * part < total ? index * part : total;
    const std::size_t end = begin + part < total ? begin + part : total;
    copy_part(to + begin, from + begin, end - begin);
  };
  std::vector<std::thread> others;
  for (std::size_t index = 1; index < workers; ++index) {
    others.emplace_back([&, index] {
      ready.fetch_add(1);
      while (!go.load(std::memory_order_acquire))
        std::this_thread::yield();
      work(index);
    });
  }
  while (ready.load() != workers - 1)
    std::this_thread::yield();
  const auto begin = clock::now();
  go.store(true, std::memory_order_release);
  work(0);
  for (auto& other : others)
    other.join();
  return std::chrono::duration<double>(clock::now() - begin).count();
}
