// The k nearest of a stream, for many queries at once.
//
// Distances are compared as bits: none is negative, so their order is that of integers, with
// infinity behind every finite distance and NaN behind infinity. Of equal distances the lower index
// comes first, so the order is total and the result does not depend on how the stream is cut.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "../common/cpu.h"
#include "embeddings.h"

namespace gsalign::distance {

template <typename S>
struct Candidate {
  std::make_signed_t<typename Bits<S>::Word> key;  // a distance's bits
  std::int64_t index;

  bool operator<(const Candidate& other) const {
    return key != other.key ? key < other.key : index < other.index;
  }
};

template <typename S>
using Key = decltype(Candidate<S>::key);

// Greater than every distance's.
template <typename S>
constexpr Key<S> kOpen = std::numeric_limits<Key<S>>::max();

// Every NaN is the same one, and 0 has no sign.
template <typename S>
GSALIGN_INLINE Key<S> key_of(S distance) {
  const Key<S> magnitude =
      static_cast<Key<S>>(bit_cast<typename Bits<S>::Word>(distance) & Bits<S>::kMagnitude);
  constexpr Key<S> kNan = static_cast<Key<S>>(Bits<S>::kNan);
  return magnitude < kNan ? magnitude : kNan;
}

// Whether any of a tile's distances [rows][lanes] is below its lane's bound.
template <typename S>
GSALIGN_CLONES static bool any_nearer(
    const S* tile, const Key<S>* bounds, std::int64_t rows, std::int64_t lanes) {
  Key<S> found = 0;
  for (std::int64_t r = 0; r < rows; ++r) {
#pragma omp simd reduction(| : found)
    for (std::int64_t l = 0; l < lanes; ++l) {
      found |= key_of(tile[r * lanes + l]) - bounds[l];  // negative where nearer
    }
  }
  return found < 0;
}

// Offers a candidate to a heap of at most k, the farthest on top; returns the new bound.
template <typename S>
Key<S> offer(
    Candidate<S>* heap, std::int64_t* size, std::int64_t most, const Candidate<S>& candidate) {
  if (*size == most) {
    std::pop_heap(heap, heap + most);
    heap[most - 1] = candidate;
  } else {
    heap[(*size)++] = candidate;
  }
  std::push_heap(heap, heap + *size);
  return *size == most ? heap->key : kOpen<S>;
}

}  // namespace gsalign::distance
