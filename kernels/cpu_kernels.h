// What the files of C kernels call of each other.

#include <stdint.h>

#include "cpu_vectors.h"

// Waking a thread takes longer than what is below so many simple operations.
#define LARGE (1 << 16)
#define THREADS(operations) num_threads((operations) < LARGE ? 1 : threads)

void rms_norm(const float *x, int64_t x_stride, const float *weight, float *y, float *scales, int64_t rows,
              int64_t size, float eps, int threads);
void swiglu(const float *gate_up, int64_t stride, float *y, int64_t rows, int64_t size, int threads);
void rope_store(const float *mixed, const float *cos, const float *sin, float *query, float *key_pages,
                float *value_pages, const int32_t *slots, int64_t tokens, int64_t groups, int64_t heads_per_group,
                int64_t d, int threads);
void paged_attention(const float *query, const float *key_pages, const float *value_pages, const int32_t *page_tables,
                     const int32_t *context_lengths, const int32_t *cu_queries, float *output, int64_t requests,
                     int64_t columns, int64_t groups, int64_t heads, int64_t d, int64_t page_size, int64_t page_stride,
                     int64_t token_stride, int64_t group_stride, float scale, int threads);
void modify(const float *logits, const uint8_t *marks, int64_t marks_stride, float *scores, int64_t rows,
            int64_t columns, int64_t stride, float penalty, float temperature, int threads);
void filter_scores(float *scores, int64_t *space, int64_t rows, int64_t columns, int64_t stride, int64_t top_k,
                   int64_t part, int threads);
void sample(const float *logits, const float *scores, const int64_t *seeds, const int64_t *positions, double *records,
            int64_t rows, int64_t columns, int64_t stride, int64_t first_id, int64_t noisy, int threads);
