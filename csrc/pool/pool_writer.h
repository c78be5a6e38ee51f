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
        row_(streamed_ ? kPoolChunk : 0) {}
  ~RowWriter() {
    if (streamed_) {
      stream_fence();
    }
  }

  // Calls fill(target, streamed), which is to write `count` values to `target`, past the caches if
  // told so: then `target` is aligned for it.
  template <typename Fill>
  void write(T* target, std::int64_t count, const Fill& fill) const {
    if (!streamed_) {
      fill(target, false);
    } else if (reinterpret_cast<std::uintptr_t>(target) % alignment_ == 0) {
      fill(target, true);
    } else {
      fill(row_.data(), false);
      stream_row(target, row_.data(), count * sizeof(T));
    }
  }

 private:
  bool streamed_;
  std::uintptr_t alignment_;
  Scratch<T> row_;
};

}  // namespace gsalign::pool
