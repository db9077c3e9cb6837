// The stored number formats as C++ types, and their exact conversions from and to float.
#pragma once

#include <cstdint>
#include <cstring>

#define INLINE inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))  // the same code, bit for bit, for all who call it

namespace dvpa {

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

template <class To, class From>
INLINE To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

INLINE float to_float(float value) { return value; }

INLINE float to_float(BF16 value) { return bit_cast<float>(uint32_t(value.bits) << 16); }

INLINE float to_float(F16 value) {
  // Shifted into place the exponent is 112 too small; a product mends it, subnormals included.
  uint32_t magnitude = uint32_t(value.bits & 0x7fff) << 13;
  float scaled = bit_cast<float>(magnitude) * bit_cast<float>(uint32_t(0x77800000));  // 2^112
  uint32_t finite = bit_cast<uint32_t>(scaled);
  uint32_t special = magnitude | 0x7f800000;  // infinity and NaN keep their mantissa
  uint32_t result = magnitude >= 0x0f800000 ? special : finite;
  return bit_cast<float>(result | uint32_t(value.bits & 0x8000) << 16);
}

INLINE void from_float(float value, float& out) { out = value; }

INLINE void from_float(float value, BF16& out) {
  uint32_t bits = bit_cast<uint32_t>(value);
  uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
  bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
  out.bits = uint16_t(is_nan ? (bits >> 16 | 0x40) : rounded);
}

INLINE void from_float(float value, F16& out) {
  uint32_t bits = bit_cast<uint32_t>(value);
  uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t result;
  if (magnitude > 0x7f800000) {
    result = 0x7e00;  // NaN
  } else if (magnitude >= 0x477ff000) {
    result = 0x7c00;  // from 65520 on: infinity
  } else if (magnitude < 0x38800000) {
    // Subnormal in fp16: adding 0.5 leaves exactly its last place in the sum, rounded to even.
    float shifted = bit_cast<float>(magnitude) + 0.5f;
    result = bit_cast<uint32_t>(shifted) - 0x3f000000;
  } else {
    result = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  out.bits = uint16_t(result | sign);
}

}  // namespace dvpa
