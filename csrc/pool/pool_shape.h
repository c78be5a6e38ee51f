// How the work of the masked part pooling is cut into units on the CPU.
#pragma once

#include "../common/cpu.h"
#include "pool_arguments.h"
#include "pool_rows.h"

namespace gsalign::pool {

constexpr std::int64_t kFewSamples = 8;

struct Shape : Arguments {
  // Channels of a unit of work: fewer where few samples would leave threads without any. It hangs
  // on the tensors' sizes alone, as do all bits of a result.
  std::int64_t chunk() const { return batch < kFewSamples ? kChannelChunk : kPoolChunk; }
  std::int64_t chunks() const { return ceil_div(channels, chunk()); }
  std::int64_t mask_sets() const { return shared ? 1 : batch; }
  std::int64_t part_size() const { return parts * positions; }
  // Where a sample's masks begin, and where those of its parts do.
  std::int64_t set_offset(std::int64_t sample) const { return shared ? 0 : sample * set_size(); }
  std::int64_t part_offset(std::int64_t sample) const {
    return set_offset(sample) + set_size() - part_size();
  }
};

}  // namespace gsalign::pool
