// What follows the choice of latents: sums of few rows, for a row of the batch or for a latent, and
// Adam. Encoder and decoder are [d_sae, width]: latents are rows.
#include <algorithm>
#include <cmath>
#include <vector>

#include "numbers.h"

namespace {

template <class T>
inline void prefetch(const T* row, int64_t width) {
#ifdef __GNUC__
  const char* at = reinterpret_cast<const char*>(row);
  for (int64_t offset = 0; offset < width * int64_t(sizeof(T)); offset += 64)
    __builtin_prefetch(at + offset);
#endif
}

constexpr int kAhead = 4;  // rows that are fetched before they are needed: memory answers late

template <class T>
inline void add_scaled(float* __restrict sum, const T* __restrict row, float by, int64_t width) {
#pragma omp simd
  for (int64_t i = 0; i < width; i++) sum[i] += by * widen(row[i]);
}

// Four rows at a time, so that the sum is read and written a quarter as often.
template <class T>
inline void add_four(float* __restrict sum, const T* __restrict a, const T* __restrict b,
                     const T* __restrict c, const T* __restrict d, const float* by,
                     int64_t width) {
  const float by_a = by[0], by_b = by[1], by_c = by[2], by_d = by[3];
#pragma omp simd
  for (int64_t i = 0; i < width; i++)
    sum[i] += (by_a * widen(a[i]) + by_b * widen(b[i])) + (by_c * widen(c[i]) + by_d * widen(d[i]));
}

template <class T>
inline float dot(const T* __restrict a, const float* __restrict b, int64_t width) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < width; i++) sum += widen(a[i]) * b[i];
  return sum;
}

void decode_row(const int64_t* indices, const float* values, int64_t begin, int64_t end,
                const float* decoder, const float* bias, float* out, int64_t width) {
  const auto row = [=](int64_t slot) { return decoder + indices[slot] * width; };
  std::memcpy(out, bias, width * sizeof(float));
  int64_t slot = begin;
  for (; slot + 4 <= end; slot += 4) {
    for (int64_t next = slot + 4; next < std::min(end, slot + 4 + kAhead); next++)
      prefetch(row(next), width);
    add_four(out, row(slot), row(slot + 1), row(slot + 2), row(slot + 3), values + slot, width);
  }
  for (; slot < end; slot++) add_scaled(out, row(slot), values[slot], width);
}

template <class T>
void reconstruct(const int64_t* indices, const float* values, const int64_t* offsets,
                 const float* decoder, const float* bias, const float* x, const float* row_weights,
                 const float* column_weights, float* residual, T* output_gradient,
                 float* by_value, float* row_errors, int64_t batch, int64_t width,
                 int64_t threads) {
#pragma omp parallel num_threads(int(threads))
  {
    std::vector<float> sums(width), gradients(width);
    float* const sum = sums.data();
    float* const gradient = gradients.data();
#pragma omp for schedule(static)
    for (int64_t row = 0; row < batch; row++) {
      const int64_t begin = offsets[row], end = offsets[row + 1];
      decode_row(indices, values, begin, end, decoder, bias, sum, width);
      const float* const wanted = x + row * width;
      float* const left = residual + row * width;
      T* const by_output = output_gradient + row * width;
      const float weight = row_weights[row];
      float error = 0;
#pragma omp simd reduction(+ : error)
      for (int64_t i = 0; i < width; i++) {
        left[i] = (sum[i] - wanted[i]) * weight;
        gradient[i] = left[i] * column_weights[i];
        error += left[i] * gradient[i];
        narrow(gradient[i], by_output[i]);
      }
      row_errors[row] = error;
      for (int64_t slot = begin; slot < end; slot++)  // the decoder's rows are still in cache
        by_value[slot] =
            values[slot] > 0 ? dot(decoder + indices[slot] * width, gradient, width) : 0;
    }
  }
}

template <class T>
void value_gradients(const int64_t* indices, const float* values, const int64_t* offsets,
                     const T* decoder, const float* output_gradient, float* out, int64_t batch,
                     int64_t width, int64_t threads) {
#pragma omp parallel for num_threads(int(threads)) schedule(static)
  for (int64_t row = 0; row < batch; row++) {
    for (int64_t slot = offsets[row]; slot < offsets[row + 1]; slot++) {
      if (slot + kAhead < offsets[batch])
        prefetch(decoder + indices[slot + kAhead] * width, width);
      const T* const direction = decoder + indices[slot] * width;
      out[slot] = values[slot] > 0 ? dot(direction, output_gradient + row * width, width) : 0;
    }
  }
}

// A latent's gradients: sums over its occurrences, which lie side by side. Several rows of the codes
// and of the output gradient may belong to one of x, `batch` apart.
template <class T>
struct Occurrences {
  const int64_t* bounds;
  const int32_t *slots, *rows;
  const T *x, *output_gradient;
  const float *by_value, *values;
  int64_t batch, d_sae, width;

  const T* of_x(int64_t at) const { return x + rows[at] % batch * width; }
  const T* of_output(int64_t at) const { return output_gradient + rows[at] * width; }

  void fetch(int64_t at) const {
    if (at >= bounds[d_sae]) return;
    prefetch(of_x(at), width);
    prefetch(of_output(at), width);
  }

  // Adds them to the latent's rows; that by its bias is returned.
  float add(int64_t latent, float* by_encoder, float* by_decoder) const {
    float by_bias = 0;
    const int64_t end = bounds[latent + 1];
    int64_t at = bounds[latent];
    for (; at + 4 <= end; at += 4) {
      float of_encoder[4], of_decoder[4];
      for (int i = 0; i < 4; i++) {
        fetch(at + 4 + i);
        of_encoder[i] = by_value[slots[at + i]];
        of_decoder[i] = values[slots[at + i]];
        by_bias += of_encoder[i];
      }
      add_four(by_encoder, of_x(at), of_x(at + 1), of_x(at + 2), of_x(at + 3), of_encoder, width);
      add_four(by_decoder, of_output(at), of_output(at + 1), of_output(at + 2), of_output(at + 3),
               of_decoder, width);
    }
    for (; at < end; at++) {
      fetch(at + 1);
      add_scaled(by_encoder, of_x(at), by_value[slots[at]], width);
      add_scaled(by_decoder, of_output(at), values[slots[at]], width);
      by_bias += by_value[slots[at]];
    }
    return by_bias;
  }
};

// Adam over a latent's rows, the decoder's then divided by its norm; the encoder's also goes to
// `fast` unless that is null. With `lengths`, what is moved are the raw rows length · decoder and
// encoder / length, and the new length is the raw decoder's.
struct Adam {
  float *encoder, *decoder, *encoder_mean, *decoder_mean, *encoder_square, *decoder_square;
  bfloat16* fast;
  float* lengths;
  const float* bias;
  int64_t width;
  float step_size, root_scale, keep_square, new_mean, new_square, epsilon, smallest_norm;

  float moved(float parameter, float gradient, float& mean, float& square) const {
    mean += (gradient - mean) * new_mean;
    square = square * keep_square + gradient * gradient * new_square;
    return parameter - step_size * mean / (std::sqrt(square) * root_scale + epsilon);
  }

  void move_raw(int64_t latent, const float* __restrict by_encoder,
                const float* __restrict by_decoder, float by_bias) const {
    const int64_t begin = latent * width;
    float* __restrict in = encoder + begin;
    float* out = decoder + begin;
    const float length = lengths[latent];
    float by_length = by_bias * bias[latent];
#pragma omp simd reduction(+ : by_length)
    for (int64_t i = 0; i < width; i++) by_length += by_encoder[i] * in[i] - by_decoder[i] * out[i];
    float norm = 0;
    {
      float* __restrict mean = decoder_mean + begin;
      float* __restrict square = decoder_square + begin;
#pragma omp simd reduction(+ : norm)
      for (int64_t i = 0; i < width; i++) {
        const float gradient = (by_decoder[i] + by_length * out[i]) / length;
        out[i] = moved(out[i] * length, gradient, mean[i], square[i]);
        norm += out[i] * out[i];
      }
    }
    const float now = std::max(std::sqrt(norm), smallest_norm);
    lengths[latent] = now;
    float* __restrict mean = encoder_mean + begin;
    float* __restrict square = encoder_square + begin;
#pragma omp simd
    for (int64_t i = 0; i < width; i++) {
      out[i] /= now;
      in[i] = now * moved(in[i] / length, by_encoder[i] * length, mean[i], square[i]);
    }
    if (fast) {
      bfloat16* __restrict copy = fast + begin;
#pragma omp simd
      for (int64_t i = 0; i < width; i++) narrow(in[i], copy[i]);
    }
  }

  void move(int64_t latent, const float* __restrict by_encoder,
            const float* __restrict by_decoder) const {
    const int64_t begin = latent * width;
    {
      float* __restrict row = encoder + begin;
      float* __restrict mean = encoder_mean + begin;
      float* __restrict square = encoder_square + begin;
#pragma omp simd
      for (int64_t i = 0; i < width; i++) row[i] = moved(row[i], by_encoder[i], mean[i], square[i]);
      if (fast) {
        bfloat16* __restrict copy = fast + begin;
#pragma omp simd
        for (int64_t i = 0; i < width; i++) narrow(row[i], copy[i]);
      }
    }
    float* __restrict row = decoder + begin;
    float* __restrict mean = decoder_mean + begin;
    float* __restrict square = decoder_square + begin;
    float norm = 0;
#pragma omp simd reduction(+ : norm)
    for (int64_t i = 0; i < width; i++) {
      row[i] = moved(row[i], by_decoder[i], mean[i], square[i]);
      norm += row[i] * row[i];
    }
    const float scale = 1 / std::max(std::sqrt(norm), smallest_norm);
#pragma omp simd
    for (int64_t i = 0; i < width; i++) row[i] *= scale;
  }
};

template <class T>
void weight_gradients(const Occurrences<T>& occurrences, float* by_encoder, float* by_decoder,
                      float* by_bias, int64_t threads) {
  const int64_t d_sae = occurrences.d_sae, width = occurrences.width;
#pragma omp parallel for num_threads(int(threads)) schedule(dynamic, 64)
  for (int64_t latent = 0; latent < d_sae; latent++) {
    float* const encoder = by_encoder + latent * width;
    float* const decoder = by_decoder + latent * width;
    std::memset(encoder, 0, width * sizeof(float));
    std::memset(decoder, 0, width * sizeof(float));
    by_bias[latent] = occurrences.add(latent, encoder, decoder);
  }
}

// Each latent's gradients go straight into Adam, and never to memory. `place` tells which of the
// latents begin with a row of `more_encoder`, `more_decoder` and `more_bias`, and which row; -1
// begins with 0.
template <class T>
void sparse_adam(const Occurrences<T>& occurrences, const int32_t* place, const float* more_encoder,
                const float* more_decoder, const float* more_bias, float* by_bias,
                const Adam& adam, int64_t threads) {
  const int64_t d_sae = occurrences.d_sae, width = occurrences.width;
#pragma omp parallel num_threads(int(threads))
  {
    std::vector<float> by_encoder(width), by_decoder(width);
#pragma omp for schedule(dynamic, 64)
    for (int64_t latent = 0; latent < d_sae; latent++) {
      if (place[latent] < 0) {
        std::fill(by_encoder.begin(), by_encoder.end(), 0.0f);
        std::fill(by_decoder.begin(), by_decoder.end(), 0.0f);
      } else {
        std::copy_n(more_encoder + place[latent] * width, width, by_encoder.begin());
        std::copy_n(more_decoder + place[latent] * width, width, by_decoder.begin());
      }
      by_bias[latent] = occurrences.add(latent, by_encoder.data(), by_decoder.data());
      if (place[latent] >= 0) by_bias[latent] += more_bias[place[latent]];
      if (adam.lengths)
        adam.move_raw(latent, by_encoder.data(), by_decoder.data(), by_bias[latent]);
      else
        adam.move(latent, by_encoder.data(), by_decoder.data());
    }
  }
}

}  // namespace

extern "C" {

void decode(const int64_t* indices, const float* values, const int64_t* offsets,
            const float* decoder, const float* bias, float* out, int64_t batch, int64_t width,
            int64_t threads) {
#pragma omp parallel for num_threads(int(threads)) schedule(static)
  for (int64_t row = 0; row < batch; row++)
    decode_row(indices, values, offsets[row], offsets[row + 1], decoder, bias, out + row * width,
               width);
}

#define ROWS(T, NAME)                                                                              \
  void value_gradients_##NAME(const int64_t* indices, const float* values, const int64_t* offsets, \
                              const T* decoder, const float* output_gradient, float* out,          \
                              int64_t batch, int64_t width, int64_t threads) {                     \
    value_gradients(indices, values, offsets, decoder, output_gradient, out, batch, width,         \
                    threads);                                                                      \
  }                                                                                                \
  void reconstruct_##NAME(const int64_t* indices, const float* values, const int64_t* offsets,     \
                          const float* decoder, const float* bias, const float* x,                 \
                          const float* row_weights, const float* column_weights, float* residual,  \
                          T* output_gradient, float* by_value, float* row_errors, int64_t batch,   \
                          int64_t width, int64_t threads) {                                        \
    reconstruct(indices, values, offsets, decoder, bias, x, row_weights, column_weights, residual, \
                output_gradient, by_value, row_errors, batch, width, threads);                     \
  }                                                                                                \
  void weight_gradients_##NAME(const int64_t* bounds, const int32_t* slots, const int32_t* rows,   \
                               const T* x, const T* output_gradient, const float* by_value,        \
                               const float* values, int64_t batch, int64_t d_sae, int64_t width,   \
                               float* by_encoder, float* by_decoder, float* by_bias,               \
                               int64_t threads) {                                                  \
    const Occurrences<T> occurrences{bounds,   slots,  rows,  x,     output_gradient,              \
                                     by_value, values, batch, d_sae, width};                       \
    weight_gradients(occurrences, by_encoder, by_decoder, by_bias, threads);                       \
  }                                                                                                \
  void sparse_adam_##NAME(                                                                          \
      const int64_t* bounds, const int32_t* slots, const int32_t* rows, const T* x,                \
      const T* output_gradient, const float* by_value, const float* values, int64_t batch,         \
      int64_t d_sae, int64_t width, const int32_t* place, const float* more_encoder,               \
      const float* more_decoder, const float* more_bias, float* by_bias, float* encoder,           \
      float* decoder,                                                                              \
      float* encoder_mean, float* decoder_mean, float* encoder_square, float* decoder_square,      \
      bfloat16* fast, float* lengths, const float* bias, double step_size,                         \
      double root_scale, double keep_mean, double keep_square, double epsilon,                     \
      double smallest_norm, int64_t threads) {                                                     \
    const Occurrences<T> occurrences{bounds,   slots,  rows,  x,     output_gradient,              \
                                     by_value, values, batch, d_sae, width};                       \
    const Adam adam{encoder, decoder, encoder_mean, decoder_mean, encoder_square, decoder_square,  \
                    fast, lengths, bias, width, float(step_size), float(root_scale),               \
                    float(keep_square),                                                            \
                    float(1 - keep_mean), float(1 - keep_square), float(epsilon),                  \
                    float(smallest_norm)};                                                         \
    sparse_adam(occurrences, place, more_encoder, more_decoder, more_bias, by_bias, adam, threads); \
  }
ROWS(float, float32)
ROWS(bfloat16, bfloat16)

// Slots in order of their latents, those of one latent in the order of the batch: a counting sort.
// Latent j owns bounds[j] up to bounds[j + 1] of `slots` and of `rows`, the rows they come from.
void group_by_latent(const int64_t* indices, const int64_t* offsets, int64_t batch, int64_t d_sae,
                     int64_t* bounds, int32_t* slots, int32_t* rows) {
  std::fill(bounds, bounds + d_sae + 1, 0);
  for (int64_t slot = 0; slot < offsets[batch]; slot++) bounds[indices[slot] + 1]++;
  for (int64_t latent = 0; latent < d_sae; latent++) bounds[latent + 1] += bounds[latent];
  std::vector<int64_t> next(bounds, bounds + d_sae);
  for (int64_t row = 0; row < batch; row++) {
    for (int64_t slot = offsets[row]; slot < offsets[row + 1]; slot++) {
      const int64_t place = next[indices[slot]]++;
      slots[place] = int32_t(slot);
      rows[place] = int32_t(row);
    }
  }
}

// Whether a number is not in [0, d_sae).
int64_t any_outside(const int64_t* indices, int64_t count, int64_t d_sae) {
  int64_t outside = 0;
  for (int64_t i = 0; i < count; i++) outside |= uint64_t(indices[i]) >= uint64_t(d_sae);
  return outside;
}

void adam_rows(const float* by_encoder, const float* by_decoder, int64_t d_sae, int64_t width,
               float* encoder, float* decoder, float* encoder_mean, float* decoder_mean,
               float* encoder_square, float* decoder_square, bfloat16* fast, double step_size,
               double root_scale, double keep_mean, double keep_square, double epsilon,
               double smallest_norm, int64_t threads) {
  const Adam adam{encoder, decoder, encoder_mean, decoder_mean, encoder_square, decoder_square,
                  fast, nullptr, nullptr, width, float(step_size), float(root_scale),
                  float(keep_square),
                  float(1 - keep_mean), float(1 - keep_square), float(epsilon),
                  float(smallest_norm)};
#pragma omp parallel for num_threads(int(threads)) schedule(static)
  for (int64_t latent = 0; latent < d_sae; latent++)
    adam.move(latent, by_encoder + latent * width, by_decoder + latent * width);
}

}  // extern "C"
