// Drawing tokens on a CPU, for sampling_c.py: penalty, temperature, filters, noise; see sampling_reference.py.
//
// Compiled by native.py. A thread takes whole rows: results do not depend on the number of threads.

#include <math.h>
#include <omp.h>
#include <stdint.h>

#include "cpu_kernels.h"

// ln x for x > 0, within 2e-7 and, near 1, within 2e-7 of itself.
INLINE float log_(float x) {
  const union {
    float f;
    uint32_t i;
  } bits = {x};
  const int32_t exponent = (int32_t)(bits.i - 0x3f3504f3u) >> 23; // mantissa in [sqrt 1/2, sqrt 2)
  const union {
    uint32_t i;
    float f;
  } mantissa = {bits.i - ((uint32_t)exponent << 23)};
  const float s = (mantissa.f - 1) / (mantissa.f + 1), z = s * s;
  const float series = s * (2 + z * (2.0f / 3 + z * (2.0f / 5 + z * (2.0f / 7 + z * (2.0f / 9)))));
  return exponent * 0.693145751953125f + (series + exponent * 1.42860682030941723e-6f);
}

// -ln(-ln u) for u = (word + 1/2) / 2^32; -ln u comes from 1 - u where that is small.
INLINE float gumbel(uint32_t word) {
  const float u = ((float)word + 0.5f) * 0x1p-32f, v = ((float)~word + 0.5f) * 0x1p-32f;
  const float s = v / (2 - v), z = s * s;
  const float small = s * (2 + z * (2.0f / 3 + z * (2.0f / 5 + z * (2.0f / 7 + z * (2.0f / 9 + z * (2.0f / 11 +
                      z * (2.0f / 13)))))));
  return -log_(v < 0.5f ? small : -log_(u));
}

#define BLOCKS 64 // of four token ids, whose noise is made at a time

// words[4 i + k] of token ids 4 (first + i) + k; Philox4x32-10, see philox.py.
INLINE void random_words(uint64_t seed, uint64_t position, uint32_t first, uint32_t *words) {
#pragma omp simd
  for (uint32_t i = 0; i < BLOCKS; i++) {
    uint32_t c0 = first + i, c1 = (uint32_t)position, c2 = (uint32_t)(position >> 32), c3 = 0;
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++) {
      const uint64_t p0 = (uint64_t)c0 * 0xD2511F53u, p1 = (uint64_t)c2 * 0xCD9E8D57u;
      c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0, c1 = (uint32_t)p1;
      c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1, c3 = (uint32_t)p0;
      k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    words[4 * i] = c0, words[4 * i + 1] = c1, words[4 * i + 2] = c2, words[4 * i + 3] = c3;
  }
}

// What gumbel(word) is below: -ln(-ln u) < -ln(1 - u), and 1 - u > 2^-k, where k leading bits of the word are 1.
INLINE float noise_bound(uint32_t word) {
  const int32_t rest = (int32_t)(~word >> 1);
  const union {
    float f;
    int32_t i;
  } bits = {(float)(rest | 1)};
  return 0.6932f * (31 + 127 - (bits.i >> 23) + (rest < 2 ? 2 : 0));
}

// ln of the sum of e^x; -inf for nothing but -inf, NaN where there is a NaN or +inf.
INLINE double log_sum_exp(const float *x, int64_t size) {
  float peak = -INFINITY;
#pragma omp simd reduction(max : peak)
  for (int64_t i = 0; i < size; i++) peak = x[i] > peak ? x[i] : peak;
  double total = 0;
  for (int64_t start = 0; start < size; start += 1024) {
    const int64_t end = start + 1024 < size ? start + 1024 : size;
    float part = 0;
    // -inf - -inf is NaN; such a row has no total.
#pragma omp simd reduction(+ : part)
    for (int64_t i = start; i < end; i++) part += x[i] == -INFINITY ? 0 : exp_(x[i] - peak);
    total += part;
  }
  return total == 0 ? -INFINITY : peak + log(total);
}

// scores [rows, stride] of logits: sampling_reference.modified, bit for bit, with -inf from `columns` on. marks: null,
// or flags of token ids, marks_stride apart: 1 penalised, 2 not drawn.
void modify(const float *logits, const uint8_t *marks, int64_t marks_stride, float *scores, int64_t rows,
            int64_t columns, int64_t stride, float penalty, float temperature, int threads) {
#pragma omp parallel for THREADS(rows * columns)
  for (int64_t r = 0; r < rows; r++) {
    const float *from = logits + r * stride;
    float *to = scores + r * stride;
    for (int64_t i = 0; i < columns; i++) {
      const int mark = marks ? marks[r * marks_stride + i] : 0;
      float score = from[i];
      if (mark & 1) score = score < 0 ? score * penalty : score / penalty;
      if (temperature > 0) score = score / temperature;
      to[i] = score != score || mark & 2 ? -INFINITY : score;
    }
    for (int64_t i = columns; i < stride; i++) to[i] = -INFINITY;
  }
}

// records [rows, 7]: see sampling_reference.sample. logits, scores [rows, columns] of token ids from first_id on;
// noisy: scores get noise. NaN scores are not drawn.
void sample(const float *logits, const float *scores, const int64_t *seeds, const int64_t *positions, double *records,
            int64_t rows, int64_t columns, int64_t stride, int64_t first_id, int64_t noisy, int threads) {
#pragma omp parallel for schedule(dynamic) THREADS(4 * rows * columns)
  for (int64_t r = 0; r < rows; r++) {
    const float *x = scores + r * stride;
    uint32_t words[4 * BLOCKS];
    float bounds[4 * BLOCKS];
    double best = -INFINITY, second = -INFINITY;
    int64_t token = 0;
    for (int64_t start = 0; start < columns;) {
      // A chunk ends where a block of token ids ends.
      const int64_t id = first_id + start, skipped = id % 4, left = columns - start;
      const int64_t size = left < 4 * BLOCKS - skipped ? left : 4 * BLOCKS - skipped;
      if (noisy) {
        random_words((uint64_t)seeds[r], (uint64_t)positions[r], (uint32_t)(id / 4), words);
#pragma omp simd
        for (int64_t i = 0; i < 4 * BLOCKS; i++) bounds[i] = noise_bound(words[i]);
      }
      for (int64_t i = 0; i < size; i++) {
        // Few tokens could still win: only they need the logarithms.
        if (noisy && !((double)x[start + i] + bounds[skipped + i] > second)) continue;
        const double score = noisy ? (double)x[start + i] + gumbel(words[skipped + i]) : x[start + i];
        if (score > best) second = best, best = score, token = start + i;
        else if (score > second) second = score;
      }
      start += size;
    }
    double *record = records + r * 7;
    record[0] = best, record[1] = second, record[2] = first_id + token;
    record[3] = columns ? logits[r * stride + token] : -INFINITY;
    record[4] = columns ? x[token] : -INFINITY;
    record[5] = log_sum_exp(logits + r * stride, columns);
    record[6] = scores == logits ? record[5] : log_sum_exp(x, columns);
  }
}

#define FARTHEST 0xFFFFFFFFll

// Of scores within +-2^35: how far below the largest, in units of 2^-26. sampling_reference.fixed_point and filtered.
INLINE int64_t fixed_point(float score) {
  const double bound = 0x1p35, x = score < -bound ? -bound : score > bound ? bound : score;
  return (int64_t)(x * 0x1p26);
}

// 2^42 e^(-distance / 2^26) by integers alone: sampling_reference.mass, bit for bit.
INLINE int64_t mass(int64_t distance) {
  const uint64_t power = (uint64_t)distance * 3098164010u; // log2 e in units of 2^-31
  const uint64_t whole = (power >> 57) & 127, fraction = (power >> 25) & 0xFFFFFFFFu;
  uint64_t drop = 493839;
  drop = 5548193 - (drop * fraction >> 32);
  drop = 41219527 - (drop * fraction >> 32);
  drop = 238367582 - (drop * fraction >> 32);
  drop = 1031763232 - (drop * fraction >> 32);
  drop = 2977044448u - (drop * fraction >> 32);
  drop = drop * fraction >> 32;
  return (int64_t)(((1ull << 42) - (drop << 10)) >> (whole < 63 ? whole : 63));
}

// The least distance within which the weights reach `wanted`, and the weights of what is closer.
static int64_t last_distance(const int64_t *distances, const int64_t *weights, int64_t size, int64_t wanted,
                             int64_t *closer) {
  int64_t last = 0;
  *closer = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    int64_t bins[256] = {0};
    for (int64_t i = 0; i < size; i++)
      if (distances[i] >> shift >> 8 == last >> shift >> 8) bins[distances[i] >> shift & 255] += weights ? weights[i] : 1;
    int64_t digit = 0;
    while (digit < 255 && *closer + bins[digit] < wanted) *closer += bins[digit++];
    last += digit << shift;
  }
  return last;
}

// What is closer than `last` stays, and of what is as far the first `equals`; the rest becomes -inf.
INLINE void keep_prefix(float *scores, const int64_t *distances, int64_t size, int64_t last, int64_t equals) {
  for (int64_t i = 0; i < size; i++)
    if (distances[i] > last || (distances[i] == last && equals-- <= 0)) scores[i] = -INFINITY;
}

// sampling_reference.filtered in place, for a vocabulary on one rank. scores [rows, columns] without NaN; part:
// top_p in units of 2^-31, 2^31 for all; space [threads, 2, columns].
void filter_scores(float *scores, int64_t *space, int64_t rows, int64_t columns, int64_t stride, int64_t top_k,
                   int64_t part, int threads) {
#pragma omp parallel for schedule(dynamic) THREADS(8 * rows * columns)
  for (int64_t r = 0; r < rows; r++) {
    float *x = scores + r * stride;
    int64_t *distances = space + omp_get_thread_num() * 2 * columns, *masses = distances + columns, closer, last;
    int64_t largest = INT64_MIN;
    for (int64_t i = 0; i < columns; i++) {
      distances[i] = fixed_point(x[i]);
      largest = distances[i] > largest ? distances[i] : largest;
    }
    for (int64_t i = 0; i < columns; i++) {
      const int64_t distance = largest - distances[i];
      distances[i] = distance < FARTHEST ? distance : FARTHEST;
    }
    if (top_k > 0) {
      last = last_distance(distances, 0, columns, top_k, &closer);
      keep_prefix(x, distances, columns, last, top_k - closer);
    }
    if (part < 1ll << 31) {
      int64_t total = 0;
      for (int64_t i = 0; i < columns; i++) {
        masses[i] = x[i] == -INFINITY ? 0 : mass(distances[i]);
        total += masses[i];
      }
      int64_t wanted = (total >> 31) * part + (((total & 0x7FFFFFFF) * part + 0x7FFFFFFF) >> 31);
      wanted = wanted > 1 ? wanted : 1;
      last = last_distance(distances, masses, columns, wanted, &closer);
      const int64_t each = mass(last) > 1 ? mass(last) : 1;
      keep_prefix(x, distances, columns, last, (wanted - closer + each - 1) / each);
    }
  }
}
