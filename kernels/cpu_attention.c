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

// Queries, keys and values before rotation, or their gradients: tokens lie `token` apart, groups `group`; a group has the
// vectors of its query heads, then its key and its value.
typedef struct {
  float *data;
  int64_t token, group;
} Mixed;

INLINE float *at(Mixed x, int64_t token, int64_t group, int64_t vector, int64_t d) {
  return x.data + token * x.token + group * x.group + vector * d;
}

// [N][d / 2]
typedef struct {
  const float *cos, *sin;
} Angles;

// to = factor times x rotated by the angles of a token, or, with sign -1, back.
INLINE void rotate(const float *x, Angles angles, int64_t token, float factor, float sign, float *to, const int64_t d) {
  const int64_t half = d / 2;
  const float *cos = angles.cos + token * half, *sin = angles.sin + token * half;
#pragma omp simd
  for (int64_t i = 0; i < half; i++) {
    const float a = x[i] * factor, b = x[half + i] * factor, c = cos[i], s = sign * sin[i];
    to[i] = a * c - b * s;
    to[half + i] = b * c + a * s;
  }
}

// to [d][stride]: `tokens` vectors [d] as columns, then columns of 0; stride and d are multiples of LANES.
static void transpose(const float *from, int64_t distance, int64_t tokens, float *to, int64_t stride, int64_t d) {
  for (int64_t t = 0; t < stride; t += LANES)
    for (int64_t i = 0; i < d; i += LANES) {
      vec block[LANES];
#pragma GCC unroll 16
      for (int64_t l = 0; l < LANES; l++) block[l] = t + l < tokens ? LOAD(from + (t + l) * distance + i) : (vec){0};
      transpose_lanes(block);
#pragma GCC unroll 16
      for (int64_t l = 0; l < LANES; l++) *(vec *)(to + (i + l) * stride + t) = block[l];
    }
}

// What a thread works in: parts of `space`, which has space_size(longest, d) numbers.
typedef struct {
  float *rows, *keys, *values;    // keys [stride][d], the same [d][stride], values [d][stride]
  float *grad_keys, *grad_values; // [stride][d]
  float *query, *grad, *result;   // [TILE][d]
  float *weights, *grads;         // [TILE][TILE]
} Space;

static Space parts_of(float *space, int64_t longest, int64_t d) {
  const int64_t whole = round_up(longest, TILE) * d, tile = TILE * d;
  float *tiles = space + 5 * whole, *squares = tiles + 3 * tile;
  return (Space){space, space + whole, space + 2 * whole, space + 3 * whole, space + 4 * whole,
                 tiles, tiles + tile, tiles + 2 * tile, squares, squares + TILE * TILE};
}

int64_t space_size(int64_t longest, int64_t d) { return (5 * round_up(longest, TILE) + 3 * TILE) * d + 2 * TILE * TILE; }

// One sequence and group.
typedef struct {
  int64_t start, length, stride, group, per_group, heads; // stride: length rounded up to TILE
  float scale;
  Angles angles;
} Task;

INLINE Task task_of(int64_t number, const int32_t *cu_seqlens, int64_t groups, int64_t per_group, int64_t d,
                    Angles angles) {
  const int64_t start = cu_seqlens[number / groups], length = cu_seqlens[number / groups + 1] - start;
  return (Task){start, length, round_up(length, TILE), number % groups, per_group, groups * per_group, 1 / sqrtf(d),
                angles};
}

// The rotated keys of a task.
INLINE void load_keys(Task task, Mixed mixed, Space space, const int64_t d) {
  for (int64_t t = 0; t < task.length; t++)
    rotate(at(mixed, task.start + t, task.group, task.per_group, d), task.angles, task.start + t, 1, 1,
           space.rows + t * d, d);
  transpose(space.rows, d, task.length, space.keys, task.stride, d);
}

// The rotated queries of a tile times the scale, then 0.
INLINE void load_queries(Task task, Mixed mixed, int64_t head, int64_t first, int64_t num, Space space, const int64_t d) {
  for (int64_t t = first; t < first + num; t++)
    rotate(at(mixed, task.start + t, task.group, head, d), task.angles, task.start + t, task.scale, 1,
           space.query + (t - first) * d, d);
  memset(space.query + num * d, 0, (TILE - num) * d * sizeof(float));
}

static void forward(Task task, Mixed mixed, float *output, float *totals, int64_t head, Space space, const int64_t d) {
  const int64_t column = task.group * task.per_group + head;
  for (int64_t i = 0; i < task.length; i += TILE) {
    const int64_t num = least(TILE, task.length - i);
    float peaks[TILE], sums[TILE];
    for (int64_t r = 0; r < num; r++) peaks[r] = -INFINITY, sums[r] = 0;
    load_queries(task, mixed, head, i, num, space, d);
    memset(space.result, 0, TILE * d * sizeof(float));
    for (int64_t k = 0; k < i + num; k += TILE) {
      const int64_t keys = least(TILE, i + num - k);
      multiply(space.query, d, 1, space.keys + k, task.stride, space.weights, TILE, num, d, round_up(keys, LANES), 0);
      for (int64_t r = 0; r < num; r++) {
        const int64_t seen = least(keys, i + r + 1 - k);
        float *row = space.weights + r * TILE, *out = space.result + r * d, peak = peaks[r];
        const float total = exponentials(row, seen, &peak);
        for (int64_t t = seen; t < keys; t++) row[t] = 0;
        if (k > 0) {
          const float decay = exp_(peaks[r] - peak);
          sums[r] *= decay;
          for (int64_t c = 0; c < d; c++) out[c] *= decay;
        }
        peaks[r] = peak, sums[r] += total;
      }
      multiply(space.weights, TILE, 1, at(mixed, task.start + k, task.group, task.per_group + 1, d), mixed.token,
               space.result, d, num, keys, d, 1);
    }
    for (int64_t r = 0; r < num; r++) {
      const int64_t row = (task.start + i + r) * task.heads + column;
      for (int64_t c = 0; c < d; c++) output[row * d + c] = space.result[r * d + c] / sums[r];
      totals[row] = peaks[r] + logf(sums[r]);
    }
  }
}

// Gradients of one head; those of rotated keys and of values are added to `space`.
static void backward(Task task, Mixed mixed, const float *output, const float *totals, const float *grad,
                     Mixed grad_mixed, int64_t head, Space space, const int64_t d) {
  const int64_t column = task.group * task.per_group + head;
  for (int64_t i = 0; i < task.length; i += TILE) {
    const int64_t num = least(TILE, task.length - i);
    float means[TILE]; // of a query's weights' gradients
    load_queries(task, mixed, head, i, num, space, d);
    memset(space.grad + num * d, 0, (TILE - num) * d * sizeof(float));
    memset(space.result, 0, TILE * d * sizeof(float));
    for (int64_t r = 0; r < num; r++) {
      const int64_t row = (task.start + i + r) * task.heads + column;
      const float *out = output + row * d, *from = grad + row * d;
      float mean = 0, *to = space.grad + r * d;
#pragma omp simd reduction(+ : mean)
      for (int64_t c = 0; c < d; c++) {
        to[c] = from[c];
        mean += out[c] * from[c];
      }
      means[r] = mean;
    }
    for (int64_t k = 0; k < i + num; k += TILE) {
      const int64_t keys = least(TILE, i + num - k), columns = round_up(keys, LANES);
      multiply(space.query, d, 1, space.keys + k, task.stride, space.weights, TILE, num, d, columns, 0);
      multiply(space.grad, d, 1, space.values + k, task.stride, space.grads, TILE, num, d, columns, 0);
      for (int64_t r = 0; r < num; r++) {
        const int64_t seen = least(keys, i + r + 1 - k);
        const float total = totals[(task.start + i + r) * task.heads + column], mean = means[r];
        float *weights = space.weights + r * TILE, *grads = space.grads + r * TILE;
        for (int64_t t = 0; t < seen; t += LANES) // whole vectors: see exponentials
#pragma omp simd
          for (int64_t l = t; l < t + LANES; l++) {
            weights[l] = exp_(weights[l] - total);
            grads[l] = weights[l] * (grads[l] - mean);
          }
        for (int64_t t = seen; t < TILE; t++) weights[t] = grads[t] = 0;
      }
      multiply(space.weights, 1, TILE, space.grad, d, space.grad_values + k * d, d, keys, num, d, 1);
      multiply(space.grads, 1, TILE, space.query, d, space.grad_keys + k * d, d, keys, num, d, 1);
      multiply(space.grads, TILE, 1, space.rows + k * d, d, space.result, d, num, keys, d, 1);
    }
    for (int64_t t = i; t < i + num; t++)
      rotate(space.result + (t - i) * d, task.angles, task.start + t, task.scale, -1,
             at(grad_mixed, task.start + t, task.group, head, d), d);
  }
}

INLINE void forward_task(Task task, Mixed mixed, float *output, float *totals, Space space, const int64_t d) {
  load_keys(task, mixed, space, d);
  for (int64_t head = 0; head < task.per_group; head++) forward(task, mixed, output, totals, head, space, d);
}

INLINE void backward_task(Task task, Mixed mixed, const float *output, const float *totals, const float *grad,
                          Mixed grad_mixed, Space space, const int64_t d) {
  load_keys(task, mixed, space, d);
  transpose(at(mixed, task.start, task.group, task.per_group + 1, d), mixed.token, task.length, space.values,
            task.stride, d);
  memset(space.grad_keys, 0, task.stride * d * sizeof(float));
  memset(space.grad_values, 0, task.stride * d * sizeof(float));
  for (int64_t head = 0; head < task.per_group; head++)
    backward(task, mixed, output, totals, grad, grad_mixed, head, space, d);
  for (int64_t t = 0; t < task.length; t++) {
    rotate(space.grad_keys + t * d, task.angles, task.start + t, 1, -1,
           at(grad_mixed, task.start + t, task.group, task.per_group, d), d);
    memcpy(at(grad_mixed, task.start + t, task.group, task.per_group + 1, d), space.grad_values + t * d,
           d * sizeof(float));
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

// mixed [N, groups, per_group + 2, d], cos, sin [N, d / 2], output [N, groups * per_group, d], totals the same without
// d: see packed_attention.py. d a multiple of 2 LANES; space [threads, space_size].
void attention(const float *mixed, int64_t token, const float *cos, const float *sin, const int32_t *cu_seqlens,
               int64_t sequences, int64_t longest, float *output, float *totals, float *space, int64_t groups,
               int64_t per_group, int64_t d, int threads) {
  const Mixed x = {(float *)mixed, token, (per_group + 2) * d};
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t number = 0; number < sequences * groups; number++) {
    const Task task = task_of(number, cu_seqlens, groups, per_group, d, (Angles){cos, sin});
    const Space own = parts_of(space + omp_get_thread_num() * space_size(longest, d), longest, d);
#define FORWARD(D) forward_task(task, x, output, totals, own, D)
    FOR_SIZE(FORWARD)
  }
}

// grad_mixed, contiguous, from grad, that of the output.
void attention_backward(const float *grad, const float *mixed, int64_t token, const float *cos, const float *sin,
                        const int32_t *cu_seqlens, int64_t sequences, int64_t longest, const float *output,
                        const float *totals, float *grad_mixed, float *space, int64_t groups, int64_t per_group,
                        int64_t d, int threads) {
  const int64_t width = (per_group + 2) * d;
  const Mixed x = {(float *)mixed, token, width}, grad_x = {grad_mixed, groups * width, width};
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t number = 0; number < sequences * groups; number++) {
    const Task task = task_of(number, cu_seqlens, groups, per_group, d, (Angles){cos, sin});
    const Space own = parts_of(space + omp_get_thread_num() * space_size(longest, d), longest, d);
#define BACKWARD(D) backward_task(task, x, output, totals, grad, grad_x, own, D)
    FOR_SIZE(BACKWARD)
  }
}
