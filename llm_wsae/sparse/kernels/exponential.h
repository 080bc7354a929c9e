// e^x in float32, in a form that compilers vectorise.
#pragma once
#include "numbers.h"

// e^x for x ≤ 0 to a few units of the last place; NaN stays NaN. x = n·ln 2 + r with |r| ≤ ln 2 / 2,
// and e^r by its series. Adding 1.5·2^23 rounds to a whole number and leaves it in the low bits.
inline float exponential(float x) {
  constexpr float kRound = 12582912.0f;
  x = x < -87.0f ? -87.0f : x;
  const float shifted = x * 1.44269504f + kRound, n = shifted - kRound;
  const float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float sum = 1.0f / 5040;
  sum = sum * r + 1.0f / 720;
  sum = sum * r + 1.0f / 120;
  sum = sum * r + 1.0f / 24;
  sum = sum * r + 1.0f / 6;
  sum = sum * r + 0.5f;
  sum = sum * r + 1.0f;
  sum = sum * r + 1.0f;
  return sum * from_bits(int32_t(uint32_t(to_bits(shifted)) << 23) + 0x3f800000);
}
