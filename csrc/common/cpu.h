// What every CPU operator shares: run-time choice of instruction set, threads, row arithmetic.
#pragma once

#include <cstdint>
#include <new>

#include "numbers.h"

// Functions marked so are compiled once per instruction set and chosen when the library is loaded,
// so that one binary is fast on new processors and runs on old ones. They hold whole inner loops: a
// call is one indirect jump.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(GSALIGN_NO_CLONES)
#define GSALIGN_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define GSALIGN_CLONES
#endif

namespace gsalign {

// Channels are worked on in chunks of this many: a sample's chunk of tokens stays in the L2 cache,
// and samples times chunks give threads enough to do. Fixed, so that the order of every sum, and
// with it every bit of the result, is the same for any number of threads.
constexpr std::int64_t kChannelChunk = 256;

constexpr std::int64_t ceil_div(std::int64_t value, std::int64_t divisor) {
  return (value + divisor - 1) / divisor;
}

// sum_c a[c] b[c]
template <typename A, typename B>
GSALIGN_CLONES static Compute<A> row_dot(const A* a, const B* b, std::int64_t count) {
  Compute<A> sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t c = 0; c < count; ++c) {
    sum += load(a[c]) * load(b[c]);
  }
  return sum;
}

// y[c] += factor * x[c]
template <typename T>
GSALIGN_CLONES static void row_add(
    Compute<T>* __restrict y, Compute<T> factor, const T* __restrict x, std::int64_t count) {
#pragma omp simd
  for (std::int64_t c = 0; c < count; ++c) {
    y[c] += factor * load(x[c]);
  }
}

// y[c] = store(factor * x[c])
template <typename T>
GSALIGN_CLONES static void row_store(
    T* __restrict y, Compute<T> factor, const Compute<T>* __restrict x, std::int64_t count) {
#pragma omp simd
  for (std::int64_t c = 0; c < count; ++c) {
    y[c] = store<T>(factor * x[c]);
  }
}

// y[c] = load(x[c])
template <typename T>
GSALIGN_CLONES static void row_load(
    Compute<T>* __restrict y, const T* __restrict x, std::int64_t count) {
#pragma omp simd
  for (std::int64_t c = 0; c < count; ++c) {
    y[c] = load(x[c]);
  }
}

// Uninitialised working memory whose start is aligned for the widest vectors.
template <typename T>
class Scratch {
 public:
  explicit Scratch(std::int64_t count)
      : data_(static_cast<T*>(
            ::operator new(sizeof(T) * static_cast<std::size_t>(count), std::align_val_t(64)))) {}
  ~Scratch() { ::operator delete(data_, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  T* data() const { return data_; }
  T& operator[](std::int64_t index) const { return data_[index]; }

 private:
  T* data_;
};

}  // namespace gsalign
