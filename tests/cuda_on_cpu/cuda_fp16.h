// float16 as two bytes and its conversions; the compiler's own _Float16 does the rounding.
#pragma once

#include <cstdint>
#include <cstring>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half x) {
  _Float16 half;
  std::memcpy(&half, &x, sizeof(half));
  return static_cast<float>(half);
}

inline __half __float2half_rn(float x) {
  const _Float16 half = static_cast<_Float16>(x);
  __half result;
  std::memcpy(&result, &half, sizeof(half));
  return result;
}
