// Kernels of generation on a CPU, for the *_c.py files: float32, one call per operation, no intermediate tensors.
//
// Compiled by native.py with the machine's C compiler. Work is split over threads by rows or requests, never within a
// sum: results do not depend on the number of threads, nor on what else is in the batch.

#include <math.h>
#include <omp.h>
#include <stdint.h>

#include "cpu_vectors.h"

// Waking a thread takes longer than what is below so many simple operations.
#define LARGE (1 << 16)
#define THREADS(operations) num_threads((operations) < LARGE ? 1 : threads)

#define KEYS 64 // keys whose scores are held at a time; blocks count from the start of each context
#define ROWS 64 // query rows (queries times heads) that a thread takes through the keys together

// One step of AdamW in place; see adamw_reference.py. correction: of the root of the second moment.
void adamw(float *params, const float *grads, float *exp_avg, float *exp_avg_sq, int64_t count, float grad_scale,
           float one_less_beta1, float beta2, float one_less_beta2, float correction, float eps, float kept, float rate,
           int threads) {
#pragma omp parallel for simd THREADS(4 * count)
  for (int64_t i = 0; i < count; i++) {
    const float g = grads[i] * grad_scale;
    const float m = exp_avg[i] + one_less_beta1 * (g - exp_avg[i]), v = exp_avg_sq[i] * beta2 + one_less_beta2 * g * g;
    exp_avg[i] = m, exp_avg_sq[i] = v;
    params[i] = params[i] * kept + rate * m / (sqrtf(v) / correction + eps);
  }
}

// scales [rows] gets the factors of the rows, unless it is null.
void rms_norm(const float *x, int64_t x_stride, const float *weight, float *y, float *scales, int64_t rows,
              int64_t size, float eps, int threads) {
#pragma omp parallel for THREADS(rows * size)
  for (int64_t n = 0; n < rows; n++) {
    const float *in = x + n * x_stride;
    float *out = y + n * size, squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < size; i++) squares += in[i] * in[i];
    const float scale = 1 / sqrtf(squares / size + eps);
    if (scales) scales[n] = scale;
#pragma omp simd
    for (int64_t i = 0; i < size; i++) out[i] = in[i] * scale * weight[i];
  }
}

// Rows whose share of the weight's gradient is one row of `parts` [ceil(rows / NORM_ROWS), size]; rms_norm_c.py has it
// too.
#define NORM_ROWS 64

// grad_x [rows, size] and the parts, which add up to the weight's gradient; see rms_norm_reference.backward.
void rms_norm_backward(const float *grad, int64_t grad_stride, const float *x, int64_t x_stride, const float *weight,
                       const float *scales, float *grad_x, float *parts, int64_t rows, int64_t size, int threads) {
#pragma omp parallel for THREADS(rows * size)
  for (int64_t block = 0; block < (rows + NORM_ROWS - 1) / NORM_ROWS; block++) {
    const int64_t begin = block * NORM_ROWS, end = begin + NORM_ROWS < rows ? begin + NORM_ROWS : rows;
    float *part = parts + block * size;
    for (int64_t i = 0; i < size; i++) part[i] = 0;
    for (int64_t n = begin; n < end; n++) {
      const float *g = grad + n * grad_stride, *in = x + n * x_stride, scale = scales[n];
      float *out = grad_x + n * size, mean = 0;
#pragma omp simd reduction(+ : mean)
      for (int64_t i = 0; i < size; i++) mean += g[i] * weight[i] * in[i];
      mean *= scale * scale / size;
#pragma omp simd
      for (int64_t i = 0; i < size; i++) {
        out[i] = scale * (g[i] * weight[i] - in[i] * mean);
        part[i] += g[i] * in[i] * scale;
      }
    }
  }
}

// 1 / (1 + e^-x)
INLINE float sigmoid(float x) {
  const float negative = x > 87.0f ? -87.0f : -x;
  return 1 / (1 + exp_(negative > 87.0f ? 87.0f : negative));
}

void swiglu(const float *gate_up, int64_t stride, float *y, int64_t rows, int64_t size, int threads) {
#pragma omp parallel for THREADS(4 * rows * size)
  for (int64_t n = 0; n < rows; n++) {
    const float *gate = gate_up + n * stride, *up = gate + size;
    float *out = y + n * size;
#pragma omp simd
    for (int64_t i = 0; i < size; i++) out[i] = gate[i] * sigmoid(gate[i]) * up[i];
  }
}

// grad_gate_up [rows, 2 * size]; see swiglu_reference.backward.
void swiglu_backward(const float *grad, int64_t grad_stride, const float *gate_up, int64_t stride, float *grad_gate_up,
                     int64_t rows, int64_t size, int threads) {
#pragma omp parallel for THREADS(4 * rows * size)
  for (int64_t n = 0; n < rows; n++) {
    const float *g = grad + n * grad_stride, *gate = gate_up + n * stride, *up = gate + size;
    float *out = grad_gate_up + n * 2 * size;
#pragma omp simd
    for (int64_t i = 0; i < size; i++) {
      const float s = sigmoid(gate[i]), active = gate[i] * s;
      out[i] = g[i] * up[i] * (s + active * (1 - s));
      out[size + i] = g[i] * active;
    }
  }
}

INLINE void rotate(const float *x, const float *cos, const float *sin, float *y, int64_t half) {
#pragma omp simd
  for (int64_t i = 0; i < half; i++) {
    const float a = x[i], b = x[half + i];
    y[i] = a * cos[i] - b * sin[i];
    y[half + i] = b * cos[i] + a * sin[i];
  }
}

// y [N, heads, d] contiguous: x rotated by the angles of cos and sin [N, d / 2], or, with sign -1, back.
void rope(const float *x, int64_t token_stride, int64_t head_stride, const float *cos, int64_t cos_stride,
          const float *sin, int64_t sin_stride, float *y, int64_t tokens, int64_t heads, int64_t d, float sign,
          int threads) {
#pragma omp parallel for THREADS(tokens * heads * d)
  for (int64_t n = 0; n < tokens; n++) {
    const float *c = cos + n * cos_stride, *s = sin + n * sin_stride;
    for (int64_t h = 0; h < heads; h++) {
      const float *in = x + n * token_stride + h * head_stride;
      float *out = y + (n * heads + h) * d;
#pragma omp simd
      for (int64_t i = 0; i < d / 2; i++) {
        const float a = in[i], b = in[d / 2 + i], t = sign * s[i];
        out[i] = a * c[i] - b * t;
        out[d / 2 + i] = b * c[i] + a * t;
      }
    }
  }
}

// mixed [N, groups, heads_per_group + 2, d] contiguous; cos, sin [N, d / 2]; query [N, groups * heads_per_group, d];
// pages [pages, page_size, groups, d] contiguous; slots [N], negative: not stored.
void rope_store(const float *mixed, const float *cos, const float *sin, float *query, float *key_pages,
                float *value_pages, const int32_t *slots, int64_t tokens, int64_t groups, int64_t heads_per_group,
                int64_t d, int threads) {
#pragma omp parallel for THREADS(tokens * groups * (heads_per_group + 2) * d)
  for (int64_t n = 0; n < tokens; n++) {
    const float *c = cos + n * (d / 2), *s = sin + n * (d / 2);
    for (int64_t g = 0; g < groups; g++) {
      const float *in = mixed + (n * groups + g) * (heads_per_group + 2) * d;
      for (int64_t h = 0; h < heads_per_group; h++)
        rotate(in + h * d, c, s, query + ((n * groups + g) * heads_per_group + h) * d, d / 2);
      if (slots[n] < 0) continue;
      const int64_t target = (slots[n] * groups + g) * d;
      const float *value = in + (heads_per_group + 1) * d;
      rotate(in + heads_per_group * d, c, s, key_pages + target, d / 2);
      for (int64_t i = 0; i < d; i++) value_pages[target + i] = value[i];
    }
  }
}

typedef struct {
  const float *key_pages, *value_pages;
  int64_t page_size, page_stride, token_stride, group_stride;
} Pages;

// places[i]: where the keys or values of position start + i begin, in entries of the pages, for i < num <= KEYS. Those
// behind are the last one once more: what is computed of them is not looked at.
INLINE void find(const Pages *pages, const int32_t *table, int64_t start, int64_t num, int64_t offset, int64_t *places) {
  int64_t page = start / pages->page_size, in_page = start % pages->page_size;
  for (int64_t i = 0; i < num; in_page = 0, page++)
    for (int64_t at = table[page] * pages->page_stride + offset; in_page < pages->page_size && i < num; i++, in_page++)
      places[i] = at + in_page * pages->token_stride;
  for (int64_t i = num; i < KEYS; i++) places[i] = places[num - 1];
}

// Halves the number of vectors: sums of neighbours among those of x[2 i], x[2 i + 1].
#define FOLD(x, num, even, odd)                                                                                        \
  for (int i = 0; i < (num) / 2; i++)                                                                                  \
  x[i] = SHUFFLE(x[2 * i], x[2 * i + 1], even) + SHUFFLE(x[2 * i], x[2 * i + 1], odd)

// Lane i of the result is the sum of the lanes of x[i]. Overwrites x.
INLINE vec lane_sums(vec *x) {
  FOLD(x, LANES, SHUFFLE_EVEN, SHUFFLE_ODD);
  FOLD(x, LANES / 2, SHUFFLE_EVEN_PAIRS, SHUFFLE_ODD_PAIRS);
#if LANES >= 8
  FOLD(x, LANES / 4, SHUFFLE_EVEN_FOURS, SHUFFLE_ODD_FOURS);
#endif
#if LANES >= 16
  FOLD(x, LANES / 8, SHUFFLE_EVEN_EIGHTS, SHUFFLE_ODD_EIGHTS);
#endif
  return x[0];
}

// Of one query row: its running sum of values, divided by `total` at the end, and what the scores were taken from.
typedef struct {
  float *sums, peak, total;
} Row;

// scores of LANES keys, whose data begin at places[0 .. LANES - 1] of `keys`; d = parts * LANES.
INLINE vec scores_of(const float *query, const float *keys, const int64_t *places, const int parts) {
  vec products[LANES];
#pragma GCC unroll 16
  for (int t = 0; t < LANES; t++) {
    const float *key = keys + places[t];
    products[t] = LOAD(query) * LOAD(key);
    for (int i = 1; i < parts; i++) products[t] += LOAD(query + i * LANES) * LOAD(key + i * LANES);
  }
  return lane_sums(products);
}

// Replaces scores [seen] of a row by e^(score - peak), with a new peak where one is larger, and adds them to total.
INLINE void exponentiate(Row *row, float *scores, int64_t seen, const int parts) {
  float peak = row->peak;
  const float total = exponentials(scores, seen, &peak), decay = exp_(row->peak - peak);
  row->peak = peak, row->total = row->total * decay + total;
  for (int i = 0; i < parts; i++) *(vec *)(row->sums + i * LANES) *= decay;
}

#define CHAINS 4 // vectors of sums that stay in registers, twice

INLINE void add_values(float *sums, const float *scores, const float *values, const int64_t *places, int64_t seen,
                       const int parts) {
  for (int from = 0; from < parts; from += CHAINS) {
    const int to = parts - from < CHAINS ? parts : from + CHAINS;
    vec even[CHAINS], odd[CHAINS]; // two chains of additions run beside each other
    for (int i = from; i < to; i++) even[i - from] = LOAD(sums + i * LANES), odd[i - from] = (vec){0};
    for (int64_t t = 0; t + 1 < seen; t += 2)
      for (int i = from; i < to; i++) {
        even[i - from] += scores[t] * LOAD(values + places[t] + i * LANES);
        odd[i - from] += scores[t + 1] * LOAD(values + places[t + 1] + i * LANES);
      }
    for (int i = from; i < to; i++) {
      if (seen % 2) even[i - from] += scores[seen - 1] * LOAD(values + places[seen - 1] + i * LANES);
      *(vec *)(sums + i * LANES) = even[i - from] + odd[i - from];
    }
  }
}

// Some query heads of some queries of one request: `rows` rows, of which `width` belong to each query, the first of
// which stands at position `first` and sees all up to itself. Row r: query + r / width * stride + r % width * d, and so
// is its output; its group is r % width / heads. d = parts * LANES.
INLINE void attend(const Pages *pages, const int32_t *table, int64_t group_offset, const float *query, float *output,
                   int64_t stride, int64_t rows, int64_t width, int64_t heads, int64_t first, float scale,
                   const int parts) {
  const int64_t d = parts * LANES;
  float scores[KEYS], sums[rows * d];
  Row state[ROWS];
  for (int64_t i = 0; i < rows * d; i++) sums[i] = 0;
  for (int64_t r = 0; r < rows; r++) state[r] = (Row){sums + r * d, -INFINITY, 0};
  const int64_t context = first + (rows - 1) / width + 1;
  for (int64_t start = 0; start < context; start += KEYS) {
    const int64_t keys = context - start < KEYS ? context - start : KEYS;
    int64_t places[KEYS];
    find(pages, table, start, keys, group_offset, places);
    for (int64_t r = 0; r < rows; r++) {
      const int64_t visible = first + r / width + 1 - start, seen = visible < keys ? visible : keys;
      if (seen <= 0) continue;
      const float *q = query + r / width * stride + r % width * d;
      const int64_t group = r % width / heads * pages->group_stride;
      for (int64_t t = 0; t < seen; t += LANES)
        *(vec *)(scores + t) = scores_of(q, pages->key_pages + group, places + t, parts) * scale;
      exponentiate(&state[r], scores, seen, parts);
      add_values(state[r].sums, scores, pages->value_pages + group, places, seen, parts);
    }
  }
  for (int64_t r = 0; r < rows; r++)
    for (int i = 0; i < parts; i++)
      *(vec *)(output + r / width * stride + r % width * d + i * LANES) =
          LOAD(state[r].sums + i * LANES) / state[r].total;
}

// query, output [N, groups * heads, d] contiguous, d a multiple of LANES, heads <= ROWS; see paged_attention.py for the
// rest. Threads take turns with tiles of queries and heads.
void paged_attention(const float *query, const float *key_pages, const float *value_pages, const int32_t *page_tables,
                     const int32_t *context_lengths, const int32_t *cu_queries, float *output, int64_t requests,
                     int64_t columns, int64_t groups, int64_t heads, int64_t d, int64_t page_size, int64_t page_stride,
                     int64_t token_stride, int64_t group_stride, float scale, int threads) {
  const Pages pages = {key_pages, value_pages, page_size, page_stride, token_stride, group_stride};
  const int64_t all = groups * heads, whole = ROWS / heads * heads, width = all < whole ? all : whole;
  const int64_t queries = ROWS / width;
  int64_t scores = 0;
  for (int64_t i = 0; i < requests; i++) scores += (cu_queries[i + 1] - cu_queries[i]) * context_lengths[i];
#pragma omp parallel THREADS(scores * all * d / 4)
  {
    int64_t tile = omp_get_thread_num();
    const int64_t step = omp_get_num_threads();
    for (int64_t request = 0, before = 0; request < requests; request++) {
      const int64_t begin = cu_queries[request], count = cu_queries[request + 1] - begin;
      const int64_t down = (count + queries - 1) / queries, across = (all + width - 1) / width;
      for (; tile - before < down * across; tile += step) {
        const int64_t i = (tile - before) / across * queries, column = (tile - before) % across * width;
        const int64_t num = count - i < queries ? count - i : queries, wide = all - column < width ? all - column : width;
        const int64_t at = ((begin + i) * all + column) * d, first = context_lengths[request] - count + i;
        const int32_t *table = page_tables + request * columns;
#define ATTEND(P)                                                                                                      \
  attend(&pages, table, column / heads * group_stride, query + at, output + at, all * d, num * wide, wide, heads,      \
         first, scale, P)
        switch (d) { // known sizes stay in registers
        case 32: ATTEND(32 / LANES); break;
        case 64: ATTEND(64 / LANES); break;
        case 128: ATTEND(128 / LANES); break;
        default: ATTEND(d / LANES);
        }
      }
      before += down * across;
    }
  }
}

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

#define WIDE 32           // columns of a panel
#define NARROW (2 * LANES) // of which so many are summed at a time

// Some rows of y (+)= x panel, for NARROW columns of a panel [size, WIDE]; `next` is
// what is wanted soon, of which `step` numbers are fetched for each k.
INLINE void multiply(const float *x, const float *panel, float *y, int64_t size, int64_t stride, int64_t columns,
                     int64_t adds, const float *next, int64_t step, const int rows) {
  vec sum[TALL][2]; // in registers: hence the unrolled loops
#pragma GCC unroll 12
  for (int r = 0; r < rows; r++) sum[r][0] = sum[r][1] = (vec){0};
  for (int64_t k = 0; k < size; k++) {
    for (int64_t i = 0; i < step; i += 16) __builtin_prefetch(next + k * step + i, 0, 2);
    const vec left = LOAD(panel + k * WIDE), right = LOAD(panel + k * WIDE + LANES);
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) {
      sum[r][0] += x[r * size + k] * left;
      sum[r][1] += x[r * size + k] * right;
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < rows; r++) {
    float out[NARROW];
    *(vec *)out = sum[r][0], *(vec *)(out + LANES) = sum[r][1];
    float *to = y + r * stride;
    if (adds)
      for (int64_t c = 0; c < columns; c++) to[c] += out[c];
    else
      for (int64_t c = 0; c < columns; c++) to[c] = out[c];
  }
}

// y [rows, columns] (+)= x [rows, size] w, where w is kept as panels [ceil(columns / WIDE)][size][WIDE]: they are read
// once and in order, and while one is used the next comes from memory. Each row has the same bits in any batch.
void product(const float *x, const float *panels, float *y, int64_t rows, int64_t size, int64_t columns, int64_t adds,
             int threads) {
  if (rows == 0) return;
  const int64_t tiles = (rows + TALL - 1) / TALL, num = (columns + WIDE - 1) / WIDE;
  // Each tile of rows fetches its part of the next panel, a multiple of 16 numbers (a cache line) for each k.
  const int64_t step = (WIDE / tiles + 15) / 16 * 16;
#pragma omp parallel for schedule(static) THREADS(rows * size * columns / 8)
  for (int64_t p = 0; p < num; p++) {
    const float *panel = panels + p * size * WIDE, *behind = p + 1 < num ? panel + size * WIDE : panel;
    for (int64_t t = 0; t < tiles; t++) {
      const float *from = x + t * TALL * size, *next = behind + t * step * size % (size * WIDE);
      for (int64_t c = 0; c < WIDE && p * WIDE + c < columns; c += NARROW) {
        const int64_t left = columns - p * WIDE - c, wide = left < NARROW ? left : NARROW;
        float *to = y + t * TALL * columns + p * WIDE + c;
        const int64_t fetched = c == 0 && t * step < WIDE ? step : 0;
#define MULTIPLY(R) multiply(from, panel + c, to, size, columns, wide, adds, next, fetched, R)
        switch (rows - t * TALL) {
        case 1: MULTIPLY(1); break;
        case 2: MULTIPLY(2); break;
        case 3: MULTIPLY(3); break;
        case 4: MULTIPLY(4); break;
        case 5: MULTIPLY(5); break;
#if TALL > 6
        case 6: MULTIPLY(6); break;
        case 7: MULTIPLY(7); break;
        case 8: MULTIPLY(8); break;
        case 9: MULTIPLY(9); break;
        case 10: MULTIPLY(10); break;
        case 11: MULTIPLY(11); break;
#endif
        default: MULTIPLY(TALL);
        }
      }
    }
  }
}

// Weights of a layer on this rank, matrices as panels; qkv_bias may be null.
typedef struct {
  const float *input_norm, *qkv, *qkv_bias, *projection, *mlp_norm, *gate_up, *down;
} Layer;

// A step: its tokens [tokens, size] belong to requests, cu_queries[i] to cu_queries[i + 1] to request i. space: for each
// token normed [size], mixed [(heads + 2) groups d], query and attended [groups heads d], gate_up [2 wide] and active
// [wide]. heads: of a group. key_pages, value_pages [layers, layer_stride].
typedef struct {
  const Layer *layers;
  const float *cos, *sin;
  float *hidden, *key_pages, *value_pages, *space;
  const int32_t *slots, *page_tables, *context_lengths, *cu_queries;
  int64_t num_layers, layer_stride, tokens, size, requests, columns, groups, heads, d, wide, page_size;
  float eps;
} Step;

// The tokens of a step through its layers, in place.
static void decode_step(Step s, int threads) {
  const int64_t inner = s.groups * s.heads * s.d, mixes = s.groups * (s.heads + 2) * s.d, token = s.groups * s.d;
  float *normed = s.space, *mixed = normed + s.tokens * s.size, *query = mixed + s.tokens * mixes;
  float *attended = query + s.tokens * inner, *gate_up = attended + s.tokens * inner;
  float *active = gate_up + 2 * s.tokens * s.wide;
  for (int64_t i = 0; i < s.num_layers; i++) {
    const Layer layer = s.layers[i];
    float *keys = s.key_pages + i * s.layer_stride, *values = s.value_pages + i * s.layer_stride;
    rms_norm(s.hidden, s.size, layer.input_norm, normed, 0, s.tokens, s.size, s.eps, threads);
    product(normed, layer.qkv, mixed, s.tokens, s.size, mixes, 0, threads);
    if (layer.qkv_bias)
      for (int64_t n = 0; n < s.tokens; n++)
        for (int64_t c = 0; c < mixes; c++) mixed[n * mixes + c] += layer.qkv_bias[c];
    rope_store(mixed, s.cos, s.sin, query, keys, values, s.slots, s.tokens, s.groups, s.heads, s.d, threads);
    paged_attention(query, keys, values, s.page_tables, s.context_lengths, s.cu_queries, attended, s.requests,
                    s.columns, s.groups, s.heads, s.d, s.page_size, s.page_size * token, token, s.d, 1 / sqrtf(s.d),
                    threads);
    product(attended, layer.projection, s.hidden, s.tokens, inner, s.size, 1, threads);
    rms_norm(s.hidden, s.size, layer.mlp_norm, normed, 0, s.tokens, s.size, s.eps, threads);
    product(normed, layer.gate_up, gate_up, s.tokens, s.size, 2 * s.wide, 0, threads);
    swiglu(gate_up, 2 * s.wide, active, s.tokens, s.wide, threads);
    product(active, layer.down, s.hidden, s.tokens, s.wide, s.size, 1, threads);
  }
}

// A step of some of the requests, `starts` their cu_queries from 0 on.
INLINE Step part_of(Step s, int64_t first, int64_t end, int64_t token_space, int32_t *starts) {
  const int64_t token = s.cu_queries[first];
  for (int64_t i = first; i <= end; i++) starts[i - first] = s.cu_queries[i] - (int32_t)token;
  s.hidden += token * s.size, s.space += token * token_space;
  s.cos += token * (s.d / 2), s.sin += token * (s.d / 2), s.slots += token;
  s.page_tables += first * s.columns, s.context_lengths += first, s.cu_queries = starts;
  s.tokens = starts[end - first], s.requests = end - first;
  return s;
}

#define SHARE (1ll << 21) // products of numbers that are worth waking a thread for

// hidden [tokens, size] through some layers, in place; see Step. by_requests: each thread takes some of the requests
// through all layers, without waiting for another: all of them read all weights, which should be in the cache.
void decode(float *hidden, const Layer *layers, int64_t num_layers, const float *cos, const float *sin,
            float *key_pages, float *value_pages, int64_t layer_stride, const int32_t *slots,
            const int32_t *page_tables, const int32_t *context_lengths, const int32_t *cu_queries, float *space,
            int64_t tokens, int64_t size, int64_t requests, int64_t columns, int64_t groups, int64_t heads, int64_t d,
            int64_t wide, int64_t page_size, float eps, int64_t by_requests, int threads) {
  const Step all = {layers, cos, sin, hidden, key_pages, value_pages, space, slots, page_tables, context_lengths,
                    cu_queries, num_layers, layer_stride, tokens, size, requests, columns, groups, heads, d, wide,
                    page_size, eps};
  if (!by_requests) {
    decode_step(all, threads);
    return;
  }
  const int64_t inner = groups * heads * d, mixes = groups * (heads + 2) * d;
  const int64_t weights = num_layers * (size * (mixes + 3 * wide) + inner * size);
  const int64_t most = tokens * weights / SHARE, parts = most < 1 ? 1 : most < threads ? most : threads;
#pragma omp parallel for num_threads((int)parts)
  for (int64_t part = 0; part < parts; part++) {
    int64_t first = 0, end = 0;
    while (first < requests && cu_queries[first] < tokens * part / parts) first++;
    while (end < requests && cu_queries[end] < tokens * (part + 1) / parts) end++;
    int32_t starts[requests + 1];
    if (first < end) decode_step(part_of(all, first, end, size + mixes + 2 * inner + 3 * wide, starts), 1);
  }
}
