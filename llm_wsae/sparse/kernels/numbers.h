// The number formats of the sparse operations on the CPU, which
// ../backends/build.py has built when they are first needed.
//
// Portable C++: loops over neighbouring numbers are left to the compiler to vectorise, and threads
// split rows or latents so that no two add to the same number. Every result is therefore the same
// for any number of threads.
#pragma once
#include <cstdint>
#include <cstring>

using bfloat16 = uint16_t;  // its bits

inline float from_bits(int32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline int32_t to_bits(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float widen(float value) { return value; }
inline float widen(bfloat16 value) { return from_bits(int32_t(uint32_t(value) << 16)); }

inline void narrow(float value, float& out) { out = value; }
inline void narrow(float value, bfloat16& out) {  // to the nearest, ties to even, NaN stays NaN
  const uint32_t bits = uint32_t(to_bits(value));
  out = value != value ? 0x7fc0 : bfloat16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
