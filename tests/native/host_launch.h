// Stands in for the CUDA definitions of csrc/common/launch.h: kernels run with host threads.
//
// Each thread runs its part of every block, and only the kernel's own barriers hold the threads
// together, so that ThreadSanitizer sees a missing barrier, or two blocks that write one place, as
// the race it is. The block's shared memory is a heap block of exactly the size the launch asked
// for, so that AddressSanitizer sees a step past its end; it starts out poisoned. Two faults can be
// asked for, to show that the sanitizers do find them: the n-th barrier of every block left out,
// and less shared memory than asked for.
#pragma once

#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#define GSALIGN_DEVICE inline
#define GSALIGN_UNROLL
#define GSALIGN_UNROLL_BY(times)
#define GSALIGN_KERNEL(...) static void

#define GSALIGN_LAUNCH(kernel, blocks, threads, shared_bytes, stream, ...) \
  (static_cast<void>(stream),                                              \
   gsalign::host::run_grid(blocks, threads, shared_bytes, [&] { kernel(__VA_ARGS__); }))

namespace gsalign {

using LaunchStatus = int;
constexpr LaunchStatus kLaunched = 0;
inline LaunchStatus launch_status() {
  return kLaunched;
}

template <auto kKernel>
inline LaunchStatus allow_shared_memory(int, int) {
  return kLaunched;
}

namespace host {

struct Faults {
  int skipped_barrier = -1;  // which barrier call of every thread does nothing
  int missing_shared = 0;    // bytes of shared memory withheld
  int launch = -1;           // of which launch of the program; -1: of all
};
inline Faults faults;
inline int launches = 0;

struct WarpState {
  WarpState() : meeting(kWarpSize) {}
  std::barrier<> meeting;
  std::uint32_t slots[kWarpSize] = {};
};

struct BlockState {
  BlockState(int threads, int shared_bytes)
      : meeting(threads), shared_bytes(shared_bytes), warps(threads / kWarpSize) {
    const std::size_t room = shared_bytes > 0 ? shared_bytes : 1;
    // malloc aligns to 16, as shared memory is; aligned_alloc would round the size up.
    shared = static_cast<unsigned char*>(std::malloc(room));
    std::memset(shared, 0xff, room);
  }
  ~BlockState() { std::free(shared); }
  BlockState(const BlockState&) = delete;

  std::barrier<> meeting;
  int shared_bytes;
  unsigned char* shared;
  std::vector<WarpState> warps;
};

struct ThreadState {
  int thread = 0, threads = 0, block = 0, barriers = 0, skipped_barrier = -1;
  BlockState* state = nullptr;
  std::vector<std::pair<void*, const void*>> copies;  // asynchronous ones that are not yet made
  std::size_t committed = 0, older = 0;               // of them, in groups, and in groups but one
};
inline thread_local ThreadState self;

// Makes the first `count` copies of this thread.
inline void make_copies(std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) {
    std::memcpy(self.copies[i].first, self.copies[i].second, 16);
  }
  self.copies.erase(self.copies.begin(), self.copies.begin() + count);
  self.committed -= std::min(self.committed, count);
  self.older -= std::min(self.older, count);
}

template <typename Body>
void run_grid(int blocks, int threads, int shared_bytes, Body body) {
  if (blocks < 1 || threads % kWarpSize != 0 || threads < kWarpSize) {
    std::fprintf(stderr, "invalid launch: %d blocks of %d threads\n", blocks, threads);
    std::abort();
  }
  const bool faulty = faults.launch < 0 || faults.launch == launches;
  ++launches;
  const int missing = faulty ? faults.missing_shared : 0;
  const int skipped = faulty ? faults.skipped_barrier : -1;
  const int given = shared_bytes > missing ? shared_bytes - missing : 0;
  std::vector<std::unique_ptr<BlockState>> states;
  for (int block = 0; block < blocks; ++block) {
    states.push_back(std::make_unique<BlockState>(threads, given));
  }
  std::vector<std::thread> pool;
  for (int thread = 0; thread < threads; ++thread) {
    pool.emplace_back([&, thread] {
      for (int block = 0; block < blocks; ++block) {
        self = ThreadState{thread, threads, block, 0, skipped, states[block].get(), {}, 0, 0};
        body();  // no meeting between blocks: they must not depend on each other
      }
    });
  }
  for (std::thread& thread : pool) {
    thread.join();
  }
}

// The 32 lanes hand their values to each other; all of them must come.
inline std::uint32_t exchange(std::uint32_t bits, int source_lane) {
  WarpState& warp = self.state->warps[self.thread / kWarpSize];
  warp.slots[self.thread % kWarpSize] = bits;
  warp.meeting.arrive_and_wait();
  const std::uint32_t result = warp.slots[source_lane];
  warp.meeting.arrive_and_wait();
  return result;
}

template <typename To, typename From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

inline void require_aligned(const void* pointer, std::uintptr_t bytes) {
  if (reinterpret_cast<std::uintptr_t>(pointer) % bytes != 0) {
    std::fprintf(stderr, "misaligned access of %d bytes\n", static_cast<int>(bytes));
    std::abort();
  }
}

}  // namespace host

inline int thread_index() {
  return host::self.thread;
}
inline int block_size() {
  return host::self.threads;
}
inline int block_index() {
  return host::self.block;
}
inline unsigned char* shared_memory() {
  return host::self.state->shared;
}

inline void barrier() {
  if (host::self.barriers++ != host::self.skipped_barrier) {
    host::self.state->meeting.arrive_and_wait();
  }
}

inline void forget_memory() {}
template <typename V>
V afresh(V value) {
  return value;
}

inline float shuffle_xor(float value, int mask) {
  return host::bits_as<float>(
      host::exchange(host::bits_as<std::uint32_t>(value), (host::self.thread % kWarpSize) ^ mask));
}
inline double shuffle_xor(double value, int mask) {
  const std::uint64_t bits = host::bits_as<std::uint64_t>(value);
  const int source = (host::self.thread % kWarpSize) ^ mask;
  const std::uint64_t low = host::exchange(static_cast<std::uint32_t>(bits), source);
  const std::uint64_t high = host::exchange(static_cast<std::uint32_t>(bits >> 32), source);
  return host::bits_as<double>(high << 32 | low);
}
inline int shuffle_xor(int value, int mask) {
  return host::bits_as<int>(
      host::exchange(host::bits_as<std::uint32_t>(value), (host::self.thread % kWarpSize) ^ mask));
}
inline int shuffle_up(int value, int distance) {
  const int lane = host::self.thread % kWarpSize;
  return host::bits_as<int>(host::exchange(
      host::bits_as<std::uint32_t>(value), lane >= distance ? lane - distance : lane));
}

inline unsigned ballot(bool yes) {
  unsigned word = yes ? 1u << (host::self.thread % kWarpSize) : 0u;
  for (int mask = 1; mask < kWarpSize; mask *= 2) {
    word |= host::exchange(word, (host::self.thread % kWarpSize) ^ mask);
  }
  return word;
}
inline int count_bits(unsigned word) {
  return __builtin_popcount(word);
}

inline void count_one(int* counter) {
  __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED);
}

inline float multiply(float a, float b) {
  return a * b;
}
inline float multiply_add(float a, float b, float c) {
  return std::fma(a, b, c);
}

inline float fast_log2(float value) {
  return std::log2(value);
}

inline void sine_cosine(float angle, float* sine, float* cosine) {
  *sine = std::sin(angle);
  *cosine = std::cos(angle);
}

inline void copy_async_16(void* shared_target, const void* global_source) {
  host::require_aligned(shared_target, 16);
  host::require_aligned(global_source, 16);
  // The machine may begin at once. Assignments, since ThreadSanitizer overlooks a short memset.
  auto* words = static_cast<std::uint32_t*>(shared_target);
  words[0] = words[1] = words[2] = words[3] = 0xffffffffu;
  host::self.copies.push_back({shared_target, global_source});
}
// And it may end as late as when the thread waits.
inline void wait_async_copies() {
  host::make_copies(host::self.copies.size());
}
inline void commit_async_copies() {
  host::self.older = host::self.committed;
  host::self.committed = host::self.copies.size();
}
inline void wait_older_async_copies() {
  host::make_copies(host::self.older);
}

inline float to_float(float value) {
  return value;
}
inline float to_float(BFloat16 value) {
  return host::bits_as<float>(static_cast<std::uint32_t>(value.bits) << 16);
}
inline float to_float(Half value) {
  _Float16 half;
  std::memcpy(&half, &value.bits, 2);
  return static_cast<float>(half);
}

template <typename T>
T from_float(float value);
template <>
inline float from_float<float>(float value) {
  return value;
}
template <>
inline BFloat16 from_float<BFloat16>(float value) {
  const std::uint32_t bits = host::bits_as<std::uint32_t>(value);
  if (value != value) {
    return {0x7fff};
  }
  return {static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};  // to nearest even
}
template <>
inline Half from_float<Half>(float value) {
  const _Float16 half = static_cast<_Float16>(value);
  Half result;
  std::memcpy(&result.bits, &half, 2);
  return result;
}

inline Int4 load_four(const int* source) {
  host::require_aligned(source, 16);
  return {source[0], source[1], source[2], source[3]};
}
inline void store_four(int* target, Int4 four) {
  host::require_aligned(target, 16);
  target[0] = four.a;
  target[1] = four.b;
  target[2] = four.c;
  target[3] = four.d;
}

template <typename T, int N>
struct Packed {
  T values[N];
};
template <typename T, int N>
Packed<T, N> load_packed(const T* source, bool exists = true) {
  if (exists && N > 1) {
    host::require_aligned(source, 16);
  }
  Packed<T, N> packed{};
  for (int i = 0; exists && i < N; ++i) {
    packed.values[i] = source[i];
  }
  return packed;
}
template <typename T, int N>
void unpack_values(const Packed<T, N>& packed, float (&values)[N]) {
  for (int i = 0; i < N; ++i) {
    values[i] = to_float(packed.values[i]);
  }
}
template <typename T, int N>
void load_values(const T* source, float (&values)[N], bool exists = true) {
  unpack_values<T, N>(load_packed<T, N>(source, exists), values);
}
template <typename T, int N>
void store_values(T* target, const float (&values)[N]) {
  if (N > 1) {
    host::require_aligned(target, 16);
  }
  for (int i = 0; i < N; ++i) {
    target[i] = from_float<T>(values[i]);
  }
}

}  // namespace gsalign
