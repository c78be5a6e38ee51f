// Storage types of features and the arithmetic type each is computed in.
//
// Half types are plain 16-bit words converted by integer arithmetic without branches, which every
// compiler vectorises for every instruction set; nothing here needs the processor to know them.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace gsalign {

#define GSALIGN_INLINE inline __attribute__((always_inline))

struct Half {
  std::uint16_t bits;
};

struct BFloat16 {
  std::uint16_t bits;
};

template <typename To, typename From>
GSALIGN_INLINE To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

// What a storage type is computed in: double stays double, everything else is float.
template <typename T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

GSALIGN_INLINE float load(float value) {
  return value;
}
GSALIGN_INLINE double load(double value) {
  return value;
}

GSALIGN_INLINE float load(BFloat16 value) {
  return bit_cast<float>(static_cast<std::uint32_t>(value.bits) << 16);
}

GSALIGN_INLINE float load(Half value) {
  const std::uint32_t word = value.bits;
  const std::uint32_t sign = (word & 0x8000u) << 16;
  const std::uint32_t magnitude = (word & 0x7fffu) << 13;
  // Moved into float's exponent field the number is 2^112 too small; the product also normalises
  // half's denormals. Infinity and NaN keep float's full exponent instead.
  const float scaled = bit_cast<float>(magnitude) * 0x1p112f;
  const std::uint32_t special = magnitude | 0x7f800000u;
  const std::uint32_t finite = bit_cast<std::uint32_t>(scaled);
  return bit_cast<float>(sign | ((word & 0x7c00u) == 0x7c00u ? special : finite));
}

template <typename T>
GSALIGN_INLINE T store(Compute<T> value) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const std::uint32_t word = bit_cast<std::uint32_t>(value);
    const std::uint32_t rounded = word + 0x7fffu + ((word >> 16) & 1u);  // to nearest, ties to even
    const bool nan = (word & 0x7fffffffu) > 0x7f800000u;
    return {static_cast<std::uint16_t>((nan ? 0x7fc00000u : rounded) >> 16)};
  } else if constexpr (std::is_same_v<T, Half>) {
    const std::uint32_t word = bit_cast<std::uint32_t>(value);
    const std::uint32_t sign = (word >> 16) & 0x8000u;
    const std::uint32_t magnitude = word & 0x7fffffffu;
    // Normal range: shift the exponent's bias and round to nearest, ties to even.
    const std::uint32_t normal =
        (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Below 2^-14: adding one half aligns the last kept bit with half's smallest denormal.
    const std::uint32_t tiny =
        bit_cast<std::uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    const std::uint32_t huge = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    const std::uint32_t result =
        magnitude >= 0x47800000u ? huge : (magnitude < 0x38800000u ? tiny : normal);
    return {static_cast<std::uint16_t>(sign | result)};
  } else {
    return value;
  }
}

}  // namespace gsalign
