// What cross-entropy and KL divergence need of rows of logits, each read while it is in cache.
#include <algorithm>
#include <limits>

#include "exponential.h"
#include "numbers.h"

namespace {

constexpr int64_t kChunk = 256;  // summed in float32; chunks are added in float64
constexpr float kInfinity = std::numeric_limits<float>::infinity();

template <class T>
float largest(const T* row, int64_t count) {
  float found = widen(row[0]);
#pragma omp simd reduction(max : found)
  for (int64_t i = 0; i < count; i++) found = std::max(found, widen(row[i]));
  return found;
}

// Σ exp(row − shift).
template <class T>
double total(const T* row, int64_t count, float shift) {
  double sum = 0;
  for (int64_t begin = 0; begin < count; begin += kChunk) {
    const int64_t end = std::min(begin + kChunk, count);
    float part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t i = begin; i < end; i++) part += exponential(widen(row[i]) - shift);
    sum += part;
  }
  return sum;
}

// The same, and in `difference` Σ exp(clean − clean_shift)·(clean − row) without tokens that `clean`
// excludes by −∞: their probability is 0.
template <class T>
double total(const T* row, const T* clean, int64_t count, float shift, float clean_shift,
             double& difference) {
  double sum = 0;
  difference = 0;
  for (int64_t begin = 0; begin < count; begin += kChunk) {
    const int64_t end = std::min(begin + kChunk, count);
    float part = 0, apart = 0;
#pragma omp simd reduction(+ : part, apart)
    for (int64_t i = begin; i < end; i++) {
      const float own = widen(row[i]), other = widen(clean[i]);
      part += exponential(own - shift);
      const float apart_here = other == -kInfinity ? 0.0f : other - own;
      apart += exponential(other - clean_shift) * apart_here;
    }
    sum += part;
    difference += apart;
  }
  return sum;
}

// Of every row of `logits` its maximum and Σ exp(logit − maximum), and in `differences`
// Σ exp(clean − clean maximum)·(clean − logit), where clean is not −∞. Without `clean`, no differences.
template <class T>
void softmax_sums(const T* logits, const T* clean, const float* clean_maxima, int64_t rows,
                  int64_t vocab, float* maxima, double* sums, double* differences,
                  int64_t threads) {
#pragma omp parallel for num_threads(int(threads)) schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    const T* const own = logits + row * vocab;
    maxima[row] = largest(own, vocab);
    sums[row] = clean ? total(own, clean + row * vocab, vocab, maxima[row], clean_maxima[row],
                              differences[row])
                      : total(own, vocab, maxima[row]);
  }
}

}  // namespace

extern "C" {

void softmax_sums_float32(const float* logits, const float* clean, const float* clean_maxima,
                          int64_t rows, int64_t vocab, float* maxima, double* sums,
                          double* differences, int64_t threads) {
  softmax_sums(logits, clean, clean_maxima, rows, vocab, maxima, sums, differences, threads);
}

void softmax_sums_bfloat16(const bfloat16* logits, const bfloat16* clean, const float* clean_maxima,
                           int64_t rows, int64_t vocab, float* maxima, double* sums,
                           double* differences, int64_t threads) {
  softmax_sums(logits, clean, clean_maxima, rows, vocab, maxima, sums, differences, threads);
}

}  // extern "C"
