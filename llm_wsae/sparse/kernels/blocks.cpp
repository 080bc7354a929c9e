// What a transformer's block does between its matrix products: every number is read and written once.
// In bfloat16, numbers are rounded wherever a model that computes in it rounds them.
#include <cmath>

#include "exponential.h"
#include "numbers.h"

namespace {

template <class T>
inline float rounded(float value) {
  T number;
  narrow(value, number);
  return widen(number);
}

// 1 / (1 + e^-x), and 0 where `exponential` ends
inline float sigmoid(float x) {
  const float small = exponential(-std::fabs(x));
  return x < -87.0f ? 0.0f : (x < 0 ? small : 1.0f) / (1.0f + small);
}

struct Silu {
  float operator()(float x) const { return x * sigmoid(x); }
};

struct GeluTanh {  // x/2 · (1 + tanh y) = x · sigmoid(2y)
  float operator()(float x) const {
    return x * sigmoid(1.5957691216f * (x + 0.044715f * x * x * x));
  }
};

// gates ← activation(gates) · values
template <class Activation, class T>
void gate(T* gates, const T* values, int64_t rows, int64_t width, int64_t threads) {
  const Activation activation;
#pragma omp parallel for num_threads(int(threads)) schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    T* const own = gates + row * width;
    const T* const its = values + row * width;
#pragma omp simd
    for (int64_t i = 0; i < width; i++)
      narrow(rounded<T>(activation(widen(own[i]))) * widen(its[i]), own[i]);
  }
}

// out ← x / sqrt(mean x² + epsilon), times the weights, or times one more than these. In the first
// case the quotient is rounded before.
template <class T>
void rms_norm(const T* x, const T* weights, int64_t rows, int64_t width, int64_t one_more,
              double epsilon, T* out, int64_t threads) {
#pragma omp parallel for num_threads(int(threads)) schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    const T* const own = x + row * width;
    T* const to = out + row * width;
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < width; i++) squares += widen(own[i]) * widen(own[i]);
    const float scale = 1.0f / std::sqrt(squares / float(width) + float(epsilon));
    if (one_more) {
#pragma omp simd
      for (int64_t i = 0; i < width; i++)
        narrow(widen(own[i]) * scale * (1.0f + widen(weights[i])), to[i]);
    } else {
#pragma omp simd
      for (int64_t i = 0; i < width; i++)
        narrow(rounded<T>(widen(own[i]) * scale) * widen(weights[i]), to[i]);
    }
  }
}

}  // namespace

extern "C" {

#define BLOCKS(T, NAME)                                                                           \
  void rms_norm_##NAME(const T* x, const T* weights, int64_t rows, int64_t width,                 \
                       int64_t one_more, double epsilon, T* out, int64_t threads) {               \
    rms_norm(x, weights, rows, width, one_more, epsilon, out, threads);                           \
  }                                                                                               \
  void gate_silu_##NAME(T* gates, const T* values, int64_t rows, int64_t width, int64_t threads) { \
    gate<Silu>(gates, values, rows, width, threads);                                              \
  }                                                                                               \
  void gate_gelu_tanh_##NAME(T* gates, const T* values, int64_t rows, int64_t width,              \
                             int64_t threads) {                                                   \
    gate<GeluTanh>(gates, values, rows, width, threads);                                          \
  }
BLOCKS(float, float32)
BLOCKS(bfloat16, bfloat16)

}  // extern "C"
