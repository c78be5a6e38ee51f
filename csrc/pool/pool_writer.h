// Where rows of the tokens' gradient are put.
#pragma once

#include "../common/memory.h"
#include "pool_shape.h"

namespace gsalign::pool {

// Stores rows, past the caches when there are many.
template <typename T>
class RowWriter {
 public:
  explicit RowWriter(const Shape& shape)
      : streamed_(
            shape.batch * shape.tokens() * shape.channels * static_cast<std::int64_t>(sizeof(T)) >
            kStreamedBytes),
        alignment_(rows_for<T>().alignment),
        rows_(2 * kPoolChunk) {}
  ~RowWriter() {
    if (streamed_) {
      stream_fence();
    }
  }

  // Where to write a row meant for `target`, and whether past the caches: it is aligned for that.
  struct Place {
    T* row;
    bool streamed;
  };
  // `buffer` 0 or 1: which of the rows under way this is.
  Place place(T* target, int buffer) const {
    if (!streamed_) {
      return {target, false};
    }
    const bool aligned = reinterpret_cast<std::uintptr_t>(target) % alignment_ == 0;
    return {aligned ? target : spare(buffer), aligned};
  }
  // To be called when the row is written.
  void put(T* target, const Place& place, std::int64_t count) const {
    if (place.row != target) {
      stream_row(target, place.row, count * sizeof(T));
    }
  }
  T* spare(int buffer) const { return rows_.data() + buffer * kPoolChunk; }

 private:
  bool streamed_;
  std::uintptr_t alignment_;
  Scratch<T> rows_;
};

}  // namespace gsalign::pool
