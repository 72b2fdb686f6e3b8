// Causal attention over packed sequences on a CPU, forward and backward, for packed_attention.py: float32.
//
// Compiled by native.py. A thread takes one sequence and one group of heads at a time, so that it alone adds up what
// belongs to them: results do not depend on the number of threads, nor on the other sequences.

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#include "cpu_vectors.h"

#define TILE 48 // queries, and keys, whose scores are held at a time; a multiple of TALL and LANES

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

// TALL rows of c (+)= a b, for `vecs` vectors of columns. a: its rows are a_row apart, what one row is summed over a_k.
INLINE void block(const float *a, int64_t a_row, int64_t a_k, const float *b, int64_t b_k, float *c, int64_t c_row,
                  int64_t size, const int adds, const int vecs) {
  vec sum[TALL][2]; // in registers: hence the unrolled loops
#pragma GCC unroll 12
  for (int r = 0; r < TALL; r++)
    for (int v = 0; v < vecs; v++) sum[r][v] = adds ? LOAD(c + r * c_row + v * LANES) : (vec){0};
  for (int64_t k = 0; k < size; k++, a += a_k, b += b_k) {
    vec right[2];
    for (int v = 0; v < vecs; v++) right[v] = LOAD(b + v * LANES);
#pragma GCC unroll 12
    for (int r = 0; r < TALL; r++)
      for (int v = 0; v < vecs; v++) sum[r][v] += a[r * a_row] * right[v];
  }
#pragma GCC unroll 12
  for (int r = 0; r < TALL; r++)
    for (int v = 0; v < vecs; v++) *(vec *)(c + r * c_row + v * LANES) = sum[r][v];
}

// c (+)= a b: `rows`, rounded up to TALL, by `columns`, a multiple of LANES; b and c have rows of their own.
INLINE void multiply(const float *a, int64_t a_row, int64_t a_k, const float *b, int64_t b_k, float *c, int64_t c_row,
                     int64_t rows, int64_t size, int64_t columns, const int adds) {
  int64_t at = 0;
  for (; at + 2 * LANES <= columns; at += 2 * LANES)
    for (int64_t r = 0; r < rows; r += TALL)
      block(a + r * a_row, a_row, a_k, b + at, b_k, c + r * c_row + at, c_row, size, adds, 2);
  if (at < columns)
    for (int64_t r = 0; r < rows; r += TALL)
      block(a + r * a_row, a_row, a_k, b + at, b_k, c + r * c_row + at, c_row, size, adds, 1);
}

// One of query, key, value or their gradients: tokens lie `token` apart, heads or groups `head`, numbers side by side.
typedef struct {
  float *data;
  int64_t token, head;
} Heads;

INLINE float *at(Heads x, int64_t token, int64_t head) { return x.data + token * x.token + head * x.head; }

// to [d][stride]: `tokens` vectors of x as columns. Up to `stride` the last row of sums may read what is behind them: 0.
static void transpose(Heads x, int64_t start, int64_t head, int64_t tokens, float *to, int64_t stride, int64_t d) {
  for (int64_t first = 0; first < stride; first += TILE) { // a tile's columns stay in the nearest cache
    const int64_t end = least(first + TILE, tokens);
    for (int64_t i = 0; i < d; i++)
      for (int64_t t = end > first ? end : first; t < first + TILE; t++) to[i * stride + t] = 0;
    for (int64_t t = first; t < end; t++) {
      const float *from = at(x, start + t, head);
      for (int64_t i = 0; i < d; i++) to[i * stride + t] = from[i];
    }
  }
}

// to [TILE][d]: vectors of x times a factor, then 0.
INLINE void load_tile(Heads x, int64_t start, int64_t head, int64_t tokens, float factor, float *to, int64_t d) {
  for (int64_t t = 0; t < tokens; t++) {
    const float *from = at(x, start + t, head);
    for (int64_t i = 0; i < d; i++) to[t * d + i] = from[i] * factor;
  }
  memset(to + tokens * d, 0, (TILE - tokens) * d * sizeof(float));
}

// What a thread works in: parts of `space`, which has space_size(longest, d) numbers.
typedef struct {
  float *keys, *values;           // [d][stride]: of a sequence, transposed
  float *grad_keys, *grad_values; // [stride][d]
  float *query, *grad, *result;   // [TILE][d]
  float *weights, *grads;         // [TILE][TILE]
} Space;

static Space parts_of(float *space, int64_t longest, int64_t d) {
  const int64_t whole = round_up(longest, TILE) * d, tile = TILE * d;
  float *tiles = space + 4 * whole, *squares = tiles + 3 * tile;
  return (Space){space, space + whole, space + 2 * whole, space + 3 * whole, tiles, tiles + tile, tiles + 2 * tile,
                 squares, squares + TILE * TILE};
}

int64_t space_size(int64_t longest, int64_t d) { return (4 * round_up(longest, TILE) + 3 * TILE) * d + 2 * TILE * TILE; }

static void forward(Heads query, Heads value, Heads output, float *totals, int64_t heads, int64_t start, int64_t length,
                    int64_t head, int64_t group, float scale, Space space, int64_t stride, const int64_t d) {
  for (int64_t i = 0; i < length; i += TILE) {
    const int64_t num = least(TILE, length - i);
    float peaks[TILE], sums[TILE];
    for (int64_t r = 0; r < num; r++) peaks[r] = -INFINITY, sums[r] = 0;
    load_tile(query, start + i, head, num, scale, space.query, d);
    memset(space.result, 0, TILE * d * sizeof(float));
    for (int64_t k = 0; k < i + num; k += TILE) {
      const int64_t keys = least(TILE, i + num - k);
      multiply(space.query, d, 1, space.keys + k, stride, space.weights, TILE, num, d, round_up(keys, LANES), 0);
      for (int64_t r = 0; r < num; r++) {
        const int64_t seen = least(keys, i + r + 1 - k);
        float *row = space.weights + r * TILE, *out = space.result + r * d, peak = peaks[r], total = 0;
#pragma omp simd reduction(max : peak)
        for (int64_t t = 0; t < seen; t++) peak = row[t] > peak ? row[t] : peak;
#pragma omp simd reduction(+ : total)
        for (int64_t t = 0; t < seen; t++) {
          row[t] = exp_(row[t] - peak);
          total += row[t];
        }
        for (int64_t t = seen; t < keys; t++) row[t] = 0;
        if (k > 0) {
          const float decay = exp_(peaks[r] - peak);
          sums[r] *= decay;
          for (int64_t c = 0; c < d; c++) out[c] *= decay;
        }
        peaks[r] = peak, sums[r] += total;
      }
      multiply(space.weights, TILE, 1, at(value, start + k, group), value.token, space.result, d, num, keys, d, 1);
    }
    for (int64_t r = 0; r < num; r++) {
      float *out = at(output, start + i + r, head);
      for (int64_t c = 0; c < d; c++) out[c] = space.result[r * d + c] / sums[r];
      totals[(start + i + r) * heads + head] = peaks[r] + logf(sums[r]);
    }
  }
}

// Gradients of one head; those of keys and values are added to `space`.
static void backward(Heads query, Heads key, Heads output, Heads grad, Heads grad_query, const float *totals,
                     int64_t heads, int64_t start, int64_t length, int64_t head, int64_t group, float scale,
                     Space space, int64_t stride, const int64_t d) {
  for (int64_t i = 0; i < length; i += TILE) {
    const int64_t num = least(TILE, length - i);
    float means[TILE]; // of a query's weights' gradients
    load_tile(query, start + i, head, num, scale, space.query, d);
    load_tile(grad, start + i, head, num, 1, space.grad, d);
    memset(space.result, 0, TILE * d * sizeof(float));
    for (int64_t r = 0; r < num; r++) {
      const float *out = at(output, start + i + r, head), *from = space.grad + r * d;
      float mean = 0;
#pragma omp simd reduction(+ : mean)
      for (int64_t c = 0; c < d; c++) mean += out[c] * from[c];
      means[r] = mean;
    }
    for (int64_t k = 0; k < i + num; k += TILE) {
      const int64_t keys = least(TILE, i + num - k), columns = round_up(keys, LANES);
      multiply(space.query, d, 1, space.keys + k, stride, space.weights, TILE, num, d, columns, 0);
      multiply(space.grad, d, 1, space.values + k, stride, space.grads, TILE, num, d, columns, 0);
      for (int64_t r = 0; r < num; r++) {
        const int64_t seen = least(keys, i + r + 1 - k);
        const float total = totals[(start + i + r) * heads + head], mean = means[r];
        float *weights = space.weights + r * TILE, *grads = space.grads + r * TILE;
#pragma omp simd
        for (int64_t t = 0; t < seen; t++) {
          weights[t] = exp_(weights[t] - total);
          grads[t] = weights[t] * (grads[t] - mean);
        }
        for (int64_t t = seen; t < TILE; t++) weights[t] = grads[t] = 0;
      }
      multiply(space.weights, 1, TILE, space.grad, d, space.grad_values + k * d, d, keys, num, d, 1);
      multiply(space.grads, 1, TILE, space.query, d, space.grad_keys + k * d, d, keys, num, d, 1);
      multiply(space.grads, TILE, 1, at(key, start + k, group), key.token, space.result, d, num, keys, d, 1);
    }
    for (int64_t r = 0; r < num; r++) {
      float *to = at(grad_query, start + i + r, head);
      for (int64_t c = 0; c < d; c++) to[c] = space.result[r * d + c] * scale;
    }
  }
}

// Known sizes of heads make loops that stay in registers.
#define FOR_SIZE(CALL)                                                                                                 \
  switch (d) {                                                                                                         \
  case 32: CALL(32); break;                                                                                            \
  case 64: CALL(64); break;                                                                                            \
  case 128: CALL(128); break;                                                                                          \
  default: CALL(d);                                                                                                    \
  }

// output [N, heads, d], totals [N, heads]: see packed_attention.py. d a multiple of LANES; space [threads][space_size].
void attention(const float *query, int64_t query_token, int64_t query_head, const float *key, int64_t key_token,
               int64_t key_head, const float *value, int64_t value_token, int64_t value_head, const int32_t *cu_seqlens,
               int64_t sequences, int64_t longest, float *output, float *totals, float *space, int64_t heads,
               int64_t groups, int64_t d, float scale, int threads) {
  const Heads q = {(float *)query, query_token, query_head}, k = {(float *)key, key_token, key_head};
  const Heads v = {(float *)value, value_token, value_head}, o = {output, heads * d, d};
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t task = 0; task < sequences * groups; task++) {
    const int64_t start = cu_seqlens[task / groups], length = cu_seqlens[task / groups + 1] - start, g = task % groups;
    const int64_t stride = round_up(length, TILE), per_group = heads / groups;
    const Space own = parts_of(space + omp_get_thread_num() * space_size(longest, d), longest, d);
    transpose(k, start, g, length, own.keys, stride, d);
    for (int64_t h = g * per_group; h < (g + 1) * per_group; h++)
#define FORWARD(D) forward(q, v, o, totals, heads, start, length, h, g, scale, own, stride, D)
      FOR_SIZE(FORWARD)
  }
}

// The gradients [N, heads, d] and twice [N, groups, d] from grad, that of the output.
void attention_backward(const float *grad, int64_t grad_token, int64_t grad_head, const float *query,
                        int64_t query_token, int64_t query_head, const float *key, int64_t key_token, int64_t key_head,
                        const float *value, int64_t value_token, int64_t value_head, const int32_t *cu_seqlens,
                        int64_t sequences, int64_t longest, const float *output, const float *totals, float *grad_query,
                        float *grad_key, float *grad_value, float *space, int64_t heads, int64_t groups, int64_t d,
                        float scale, int threads) {
  const Heads q = {(float *)query, query_token, query_head}, k = {(float *)key, key_token, key_head};
  const Heads v = {(float *)value, value_token, value_head}, o = {(float *)output, heads * d, d};
  const Heads g = {(float *)grad, grad_token, grad_head}, grad_q = {grad_query, heads * d, d};
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t task = 0; task < sequences * groups; task++) {
    const int64_t start = cu_seqlens[task / groups], length = cu_seqlens[task / groups + 1] - start;
    const int64_t group = task % groups, stride = round_up(length, TILE), per_group = heads / groups;
    const Space own = parts_of(space + omp_get_thread_num() * space_size(longest, d), longest, d);
    transpose(k, start, group, length, own.keys, stride, d);
    transpose(v, start, group, length, own.values, stride, d);
    memset(own.grad_keys, 0, stride * d * sizeof(float));
    memset(own.grad_values, 0, stride * d * sizeof(float));
    for (int64_t h = group * per_group; h < (group + 1) * per_group; h++)
#define BACKWARD(D) backward(q, k, o, g, grad_q, totals, heads, start, length, h, group, scale, own, stride, D)
      FOR_SIZE(BACKWARD)
    for (int64_t t = 0; t < length; t++) {
      memcpy(grad_key + ((start + t) * groups + group) * d, own.grad_keys + t * d, d * sizeof(float));
      memcpy(grad_value + ((start + t) * groups + group) * d, own.grad_values + t * d, d * sizeof(float));
    }
  }
}
