// The optimizer's step and the operations of a layer on a CPU, for the *_c.py files: float32, one call per operation, no
// intermediate tensors.
//
// Compiled by native.py with the machine's C compiler. Work is split over threads by rows or requests, never within a
// sum: results do not depend on the number of threads, nor on what else is in the batch.

#include <math.h>
#include <omp.h>
#include <stdint.h>

#include "cpu_kernels.h"

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
