// Choosing latents by their pre-activations.
//
// The encoder's product comes transposed, [latents, rows], a block of latents at a time, so that a
// block stays in cache and neighbouring entries belong to different rows: what must be compared
// with a row's own bound is then one vector comparison. Each row has a list of candidates.
#include <algorithm>
#include <vector>

#include "numbers.h"

namespace {

constexpr int kLatents = 8;  // of a strip: as many rows and latents are looked at together
constexpr int kRows = 64;  // a bit each in a word
constexpr int64_t kStrip = 1024;  // latents whose sums stay in cache
constexpr int64_t kCountedAtOnce = 1 << 14;  // a count as narrow as the entries does not overflow

struct Lists {
  int64_t capacity;
  int32_t* latents;  // [rows, capacity]
  float* values;     // [rows, capacity]
  int32_t* counts;   // [rows]
};

int at_least(const float* values, int count, float bound) {
  int found = 0;
#pragma omp simd reduction(+ : found)
  for (int i = 0; i < count; i++) found += values[i] >= bound;
  return found;
}

// Keep the k largest, or up to `slack` more if that is found sooner; of equal ones the first come
// first. No value is below `bound`, which rises to what a later value must exceed. Positive
// floats are ordered as their bits are, so that the bound is found by halving an interval of bits.
int keep_largest(float* values, int32_t* latents, int count, int k, int slack, float& bound) {
  float largest = 0;
#pragma omp simd reduction(max : largest)
  for (int i = 0; i < count; i++) largest = std::max(largest, values[i]);
  int32_t low = to_bits(bound), high = to_bits(largest) + 1;  // at least k; fewer than k
  int kept = count;
  while (kept > k + slack && high - low > 1) {
    const int32_t middle = low + (high - low) / 2;
    const int found = at_least(values, count, from_bits(middle));
    if (found >= k) {
      low = middle;
      kept = found;
    } else {
      high = middle;
    }
  }
  bound = from_bits(low);
  int ties = kept <= k + slack ? count : k - at_least(values, count, from_bits(low + 1));
  int out = 0;
  for (int i = 0; i < count; i++) {
    bool keep = values[i] > bound;
    if (values[i] == bound && ties > 0) {
      keep = true;
      ties--;
    }
    values[out] = values[i];
    latents[out] = latents[i];
    out += keep;
  }
  return out;
}

template <class T>
struct TopK {  // candidates above the row's own bound
  const T* product;
  const T* bias;
  int64_t rows, first;
  int k;
  Lists lists;
  float* bounds;

  float entry(int64_t latent, int64_t row) const {
    return widen(product[latent * rows + row]) + widen(bias[latent]);
  }
  float level(int64_t) const { return 0; }
  const float* limits(int64_t row) const { return bounds + row; }

  void add(int64_t latent, int64_t latents, int64_t row) const {
    int32_t* const numbers = lists.latents + row * lists.capacity;
    float* const values = lists.values + row * lists.capacity;
    const float bound = bounds[row];
    int count = lists.counts[row];
    for (int64_t l = 0; l < latents; l++) {
      const float value = entry(latent + l, row);
      values[count] = value;
      numbers[count] = int32_t(first + latent + l);
      count += value > bound;
    }
    if (count + kLatents >= lists.capacity)
      count = keep_largest(values, numbers, count, k, k / 2, bounds[row]);
    lists.counts[row] = count;
  }

  // The first block: bounds from the maxima of groups of latents. The k-th largest of those is
  // below the k-th largest of all, and close, since the k largest mostly fall in different groups.
  void begin(int64_t latents, int64_t row, int count) const {
    const int groups = 4 * k;
    std::vector<float> maxima(size_t(groups) * kRows, 0.0f);
    for (int64_t latent = 0; latent < latents; latent++) {
      float* const group = maxima.data() + (latent % groups) * kRows;
      const T* const entries = product + latent * rows + row;
      const float shift = widen(bias[latent]);
      for (int s = 0; s < count; s++) group[s] = std::max(group[s], widen(entries[s]) + shift);
    }
    int32_t low[kRows] = {}, high[kRows], middle[kRows], found[kRows];
    std::fill(high, high + kRows, 0x7f800000);
    for (int halving = 0; halving < 16; halving++) {
      for (int s = 0; s < kRows; s++) middle[s] = low[s] + (high[s] - low[s]) / 2;
      std::fill(found, found + kRows, 0);
      for (int g = 0; g < groups; g++) {
        int32_t bits[kRows];
        std::memcpy(bits, maxima.data() + g * kRows, sizeof bits);
        for (int s = 0; s < kRows; s++) found[s] += bits[s] >= middle[s];
      }
      for (int s = 0; s < kRows; s++) {
        low[s] = found[s] >= k ? middle[s] : low[s];
        high[s] = found[s] >= k ? high[s] : middle[s];
      }
    }
    for (int s = 0; s < count; s++) {
      bounds[row + s] = from_bits(std::max(low[s] - 1, 0));  // entries must exceed it
      lists.counts[row + s] = 0;
    }
  }
};

template <class T>
struct Above {  // candidates above their latent's threshold
  const T* product;
  const T* bias;
  int64_t rows, first;
  const float* thresholds;
  Lists lists;

  float entry(int64_t latent, int64_t row) const {
    return widen(product[latent * rows + row]) + widen(bias[latent]);
  }
  float level(int64_t latent) const { return thresholds[latent]; }
  const float* limits(int64_t) const {
    static const float zeros[kRows] = {};
    return zeros;
  }

  void add(int64_t latent, int64_t latents, int64_t row) const {
    int32_t* const numbers = lists.latents + row * lists.capacity;
    float* const values = lists.values + row * lists.capacity;
    int count = lists.counts[row];  // counts on when the list is full: the caller makes it longer
    for (int64_t l = 0; l < latents; l++) {
      const int64_t slot = std::min<int64_t>(count, lists.capacity - 1);
      const float value = entry(latent + l, row);
      values[slot] = value;
      numbers[slot] = int32_t(first + latent + l);
      count += value > level(latent + l);
    }
    lists.counts[row] = count;
  }

  void begin(int64_t, int64_t row, int count) const {
    std::fill(lists.counts + row, lists.counts + row + count, 0);
  }
};

// kRows rows (or `some` of them) by some latents: one comparison tells whether there is any
// candidate, and for which rows.
template <bool whole, class Rule>
inline void look(const Rule& rule, int64_t latent, int64_t latents, int64_t row, int some) {
  const int count = whole ? kRows : some;
  float excess[kRows];
  for (int s = 0; s < count; s++) excess[s] = -1;
  for (int64_t l = latent; l < latent + latents; l++) {
    const auto* const entries = rule.product + l * rule.rows + row;
    const float shift = widen(rule.bias[l]), level = rule.level(l);
    for (int s = 0; s < count; s++)
      excess[s] = std::max(excess[s], widen(entries[s]) + shift - level);
  }
  const float* const limits = rule.limits(row);
  int any = 0;
  for (int s = 0; s < count; s++) any |= excess[s] > limits[s];
  if (!any) return;
  uint8_t flags[kRows] = {};
  for (int s = 0; s < count; s++) flags[s] = excess[s] > limits[s];
  uint64_t rows_left = 0;  // a bit each: a loop over those that are set is easier to predict
  for (int eight = 0; eight < kRows / 8; eight++) {
    uint64_t word;
    std::memcpy(&word, flags + 8 * eight, sizeof word);
    rows_left |= (word * 0x0102040810204080 >> 56) << (8 * eight);
  }
  for (; rows_left; rows_left &= rows_left - 1)
    rule.add(latent, latents, row + __builtin_ctzll(rows_left));
}

template <class Rule>
void look_through(const Rule& rule, int64_t latents, int64_t threads) {
  const int64_t share = (rule.rows + threads * kRows - 1) / (threads * kRows) * kRows;
#pragma omp parallel for num_threads(int(threads)) schedule(static)
  for (int64_t thread = 0; thread < threads; thread++) {
    const int64_t begin = std::min(rule.rows, thread * share);
    const int64_t end = std::min(rule.rows, begin + share);
    if (rule.first == 0)
      for (int64_t row = begin; row < end; row += kRows)
        rule.begin(latents, row, int(std::min<int64_t>(kRows, end - row)));
    for (int64_t latent = 0; latent < latents; latent += kLatents) {
      const int64_t some = std::min<int64_t>(kLatents, latents - latent);
      for (int64_t row = begin; row < end; row += kRows) {
        if (row + kRows <= end && some == kLatents)
          look<true>(rule, latent, kLatents, row, kRows);
        else
          look<false>(rule, latent, some, row, int(std::min<int64_t>(kRows, end - row)));
      }
    }
  }
}

// Signed, so that those of numbers ≥ 0 are in the order of the numbers and -0 comes before 0.
inline int32_t ordered_bits(float value) { return to_bits(value); }
inline int16_t ordered_bits(bfloat16 value) { return int16_t(value); }

// The bits of the k-th largest of entries ≥ 0.
template <class T>
auto kth_largest(const T* entries, int64_t count, int64_t k) {
  using Bits = decltype(ordered_bits(*entries));
  Bits largest = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < count; i++) largest = std::max(largest, ordered_bits(entries[i]));
  int64_t low = 0, high = int64_t(largest) + 1;  // at least k are as large; fewer than k are
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    const Bits bound = Bits(middle);
    int64_t found = 0;
    for (int64_t begin = 0; begin < count; begin += kCountedAtOnce) {
      const int64_t end = std::min(count, begin + kCountedAtOnce);
      Bits some = 0;
#pragma omp simd reduction(+ : some)
      for (int64_t i = begin; i < end; i++) some += ordered_bits(entries[i]) >= bound;
      found += some;
    }
    (found >= k ? low : high) = middle;
  }
  return Bits(low);
}

// Pre-activations become activations: 0 where negative, where `dead` is 0, and where not among the k
// largest of their row.
template <class T>
void activate_dead(T* pre, const uint8_t* dead, int64_t rows, int64_t count, int64_t k,
                   int64_t threads) {
#pragma omp parallel for num_threads(int(threads)) schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    T* const entries = pre + row * count;
    for (int64_t i = 0; i < count; i++) entries[i] = widen(entries[i]) < 0 ? T(0) : entries[i];
    if (dead)
      for (int64_t i = 0; i < count; i++) entries[i] = dead[i] ? entries[i] : T(0);
    if (k >= count) continue;
    const auto smallest = kth_largest(entries, count, k);
    for (int64_t i = 0; i < count; i++)
      entries[i] = ordered_bits(entries[i]) >= smallest ? entries[i] : T(0);
  }
}

// Gradients by the latents are 0 where those are, and are added up over rows. Threads split latents.
template <class T>
void mask_dead(const T* active, T* by_latent, float* sums, int64_t rows, int64_t count,
               int64_t threads) {
  const int64_t strip = std::clamp<int64_t>((count + threads - 1) / threads, 1, kStrip);
#pragma omp parallel for num_threads(int(threads)) schedule(static)
  for (int64_t begin = 0; begin < count; begin += strip) {
    const int64_t end = std::min(count, begin + strip);
    for (int64_t row = 0; row < rows; row++) {
      const T* const latents = active + row * count;
      T* const gradients = by_latent + row * count;
#pragma omp simd
      for (int64_t i = begin; i < end; i++) {
        gradients[i] = widen(latents[i]) > 0 ? gradients[i] : T(0);
        sums[i] += widen(gradients[i]);
      }
    }
  }
}

}  // namespace

extern "C" {

#define ENCODERS(T, NAME)                                                                         \
  void topk_##NAME(const T* product, const T* bias, int64_t latents, int64_t rows, int64_t first, \
                   int64_t k, int64_t capacity, int32_t* numbers, float* values, int32_t* counts, \
                   float* bounds, int64_t threads) {                                              \
    const Lists lists{capacity, numbers, values, counts};                                         \
    look_through(TopK<T>{product, bias, rows, first, int(k), lists, bounds}, latents, threads);   \
  }                                                                                               \
  void above_##NAME(const T* product, const T* bias, const float* thresholds, int64_t latents,    \
                    int64_t rows, int64_t first, int64_t capacity, int32_t* numbers,              \
                    float* values, int32_t* counts, int64_t threads) {                            \
    const Lists lists{capacity, numbers, values, counts};                                         \
    look_through(Above<T>{product, bias, rows, first, thresholds, lists}, latents, threads);      \
  }
ENCODERS(float, float32)
ENCODERS(bfloat16, bfloat16)

void finish_topk(int64_t rows, int64_t k, int64_t capacity, int32_t* numbers, float* values,
                 const int32_t* counts, float* bounds, int64_t* indices, float* best,
                 int64_t threads) {
#pragma omp parallel for num_threads(int(threads)) schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    int32_t* const from = numbers + row * capacity;
    float* const value = values + row * capacity;
    int64_t count = counts[row];
    if (count > k) count = keep_largest(value, from, int(count), int(k), 0, bounds[row]);
    for (int64_t i = 0; i < k; i++) {
      indices[row * k + i] = i < count ? from[i] : 0;
      best[row * k + i] = i < count ? value[i] : 0;
    }
  }
}

void finish_above(int64_t rows, int64_t capacity, const int32_t* numbers, const float* values,
                  const int64_t* offsets, int64_t* indices, float* found, int64_t threads) {
#pragma omp parallel for num_threads(int(threads)) schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    const int64_t count = offsets[row + 1] - offsets[row];
    std::copy_n(numbers + row * capacity, count, indices + offsets[row]);
    std::copy_n(values + row * capacity, count, found + offsets[row]);
  }
}

#define DEAD(T, NAME)                                                                           \
  void activate_dead_##NAME(T* pre, const uint8_t* dead, int64_t rows, int64_t count, int64_t k, \
                            int64_t threads) {                                                  \
    activate_dead(pre, dead, rows, count, k, threads);                                          \
  }                                                                                             \
  void mask_dead_##NAME(const T* active, T* by_latent, float* sums, int64_t rows, int64_t count, \
                        int64_t threads) {                                                      \
    mask_dead(active, by_latent, sums, rows, count, threads);                                   \
  }
DEAD(float, float32)
DEAD(bfloat16, bfloat16)

}  // extern "C"
