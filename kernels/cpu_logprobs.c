// Log-probabilities and entropies from logits on a CPU, for logprobs_c.py: float32, the equations of
// logprobs_reference.py, each row read once or twice and no copy of it.
//
// Compiled by native.py. A thread takes whole rows: results do not depend on the number of threads.

#include <math.h>
#include <stdint.h>

#include "cpu_vectors.h"

#define IMPOSSIBLE -1e30f // stands for a logit of -inf
#define PART 1024         // numbers that are added up in float32 before they join a sum in float64

// e^x that goes down to 0, as a probability does.
INLINE float probability(float x) { return x < -87.0f ? 0 : exp_(x); }

// The sum of e^z over z = (x - peak) / temperature goes to statistics[stride], that of z e^z to statistics[2 * stride].
INLINE void sums(const float *x, int64_t size, float peak, float temperature, float *statistics, int64_t stride) {
  double total = 0, weighted = 0;
  for (int64_t start = 0; start < size; start += PART) {
    const int64_t end = start + PART < size ? start + PART : size;
    float part = 0, weighted_part = 0;
#pragma omp simd reduction(+ : part, weighted_part)
    for (int64_t i = start; i < end; i++) {
      const float z = ((x[i] < IMPOSSIBLE ? IMPOSSIBLE : x[i]) - peak) / temperature, e = probability(z);
      part += e;
      weighted_part += e * z;
    }
    total += part, weighted += weighted_part;
  }
  statistics[stride] = (float)total, statistics[2 * stride] = (float)weighted;
}

// statistics [4, stride], rows of them: logprobs_reference.shard_statistics. logits [rows, logits_stride].
void logprob_statistics(const float *logits, int64_t logits_stride, const int64_t *labels, float *statistics,
                        int64_t stride, int64_t rows, int64_t first, int64_t num_real, float temperature, int threads) {
#pragma omp parallel for num_threads(rows * num_real < 1 << 12 ? 1 : threads)
  for (int64_t n = 0; n < rows; n++) {
    const float *x = logits + n * logits_stride;
    const int64_t label = labels[n], column = label - first;
    const int is_masked = label < 0, is_here = column >= 0 && column < num_real;
    float *out = statistics + n;
    out[3 * stride] = is_masked || !is_here ? IMPOSSIBLE : x[column] < IMPOSSIBLE ? IMPOSSIBLE : x[column];
    if (is_masked || num_real == 0) {
      out[0] = is_masked ? 0 : IMPOSSIBLE, out[stride] = is_masked, out[2 * stride] = 0;
      continue;
    }
    float peak = IMPOSSIBLE;
#pragma omp simd reduction(max : peak)
    for (int64_t i = 0; i < num_real; i++) peak = x[i] > peak ? x[i] : peak;
    out[0] = peak;
    sums(x, num_real, peak, temperature, out, stride);
  }
}

// out [rows, out_stride] of logits [rows, logits_stride], `columns` of them: logprobs_reference.logits_gradient. `out`
// may be `logits`; grad_logprobs, grad_entropy [rows] may be null.
void logprob_gradient(const float *logits, int64_t logits_stride, const int64_t *labels, const float *row_max,
                      const float *log_sum, const float *entropy, const float *grad_logprobs, const float *grad_entropy,
                      float *out, int64_t out_stride, int64_t rows, int64_t columns, int64_t first, int64_t num_real,
                      float temperature, int threads) {
#pragma omp parallel for num_threads(rows * columns < 1 << 12 ? 1 : threads)
  for (int64_t n = 0; n < rows; n++) {
    const float *x = logits + n * logits_stride;
    float *to = out + n * out_stride;
    const int64_t column = labels[n] - first;
    if (labels[n] < 0) {
      for (int64_t i = 0; i < columns; i++) to[i] = 0;
      continue;
    }
    const float peak = row_max[n], log_total = log_sum[n], g = grad_logprobs ? grad_logprobs[n] : 0;
    if (grad_entropy) {
      const float h = grad_entropy[n], H = entropy[n];
#pragma omp simd
      for (int64_t i = 0; i < num_real; i++) {
        const float logp = ((x[i] < IMPOSSIBLE ? IMPOSSIBLE : x[i]) - peak) / temperature - log_total;
        const float p = probability(logp);
        to[i] = p == 0 ? 0 : -p * ((logp + H) * h + g) / temperature;
      }
    } else {
#pragma omp simd
      for (int64_t i = 0; i < num_real; i++) {
        const float logp = ((x[i] < IMPOSSIBLE ? IMPOSSIBLE : x[i]) - peak) / temperature - log_total;
        to[i] = -probability(logp) * g / temperature;
      }
    }
    if (column >= 0 && column < num_real) to[column] += g / temperature;
    for (int64_t i = num_real; i < columns; i++) to[i] = 0;
  }
}
