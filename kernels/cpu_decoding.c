// Products of few rows, whole layers, and several steps of generation on a CPU, for decoding_c.py.
//
// Compiled by native.py. No sum crosses rows or requests: results do not depend on the number of threads, nor on what
// else is in the batch.

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "cpu_kernels.h"

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

// Numbers of `space` for each token; decoding_c.py has it too.
static int64_t step_space(Step s) { return s.size + (3 * s.heads + 2) * s.groups * s.d + 3 * s.wide; }

// A step of some of the requests, `starts` their cu_queries from 0 on.
INLINE Step part_of(Step s, int64_t first, int64_t end, int32_t *starts) {
  const int64_t token = s.cu_queries[first];
  for (int64_t i = first; i <= end; i++) starts[i - first] = s.cu_queries[i] - (int32_t)token;
  s.hidden += token * s.size, s.space += token * step_space(s);
  s.cos += token * (s.d / 2), s.sin += token * (s.d / 2), s.slots += token;
  s.page_tables += first * s.columns, s.context_lengths += first, s.cu_queries = starts;
  s.tokens = starts[end - first], s.requests = end - first;
  return s;
}

// Products of numbers for each token.
static int64_t weights_of(Step s) {
  return s.num_layers * s.size * (2 * s.groups * (s.heads + 1) * s.d + 3 * s.wide);
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
  const int64_t most = tokens * weights_of(all) / SHARE, parts = most < 1 ? 1 : most < threads ? most : threads;
#pragma omp parallel for num_threads((int)parts)
  for (int64_t part = 0; part < parts; part++) {
    int64_t first = 0, end = 0;
    while (first < requests && cu_queries[first] < tokens * part / parts) first++;
    while (end < requests && cu_queries[end] < tokens * (part + 1) / parts) end++;
    int32_t starts[requests + 1];
    if (first < end) decode_step(part_of(all, first, end, starts), 1);
  }
}

// How tokens are drawn; see sampling.py. part: top_p in units of 2^-31, 2^31 for all. eos: ends a request, -1 for none.
// is_plain: scores are the logits, and all of the vocabulary may be drawn.
typedef struct {
  int64_t vocab, top_k, part, eos, is_plain;
  float temperature;
} Rule;

// Requests that each go on from one token. `step` has the layers, the cache, and sizes; its tokens are filled in. head:
// panels of `outputs` columns. cos, sin: of every position. tokens, logprobs, drawn_logprobs, margins [.., width] and
// seeds: of Batch. requests, positions, first_ends [num], and page_tables: each request's row of these, where its token
// stands, where eos may come first; all are overwritten. space: see request_space. filter_space: of filter_scores.
typedef struct {
  Step step;
  Rule rule;
  const float *embedding, *final_norm, *head, *cos, *sin;
  int64_t *tokens;
  float *logprobs, *drawn_logprobs, *margins;
  int64_t width;
  const int64_t *seeds;
  int32_t *requests, *positions, *first_ends, *page_tables;
  float *space;
  int64_t *filter_space;
  int64_t num, outputs;
} Requests;

// Numbers of `space` for each request.
static int64_t request_space(Requests q) { return 2 * q.step.size + q.step.d + 2 * q.outputs + step_space(q.step); }

// Writes what was drawn for the request in row r behind its token; returns whether it goes on.
static int keep_token(Requests q, int64_t r, const double *record) {
  const int64_t position = ++q.positions[r], at = q.requests[r] * q.width + position, token = (int64_t)record[2];
  const double logprob = record[3] - record[5];
  q.tokens[at] = token;
  q.logprobs[at] = (float)logprob;
  q.drawn_logprobs[at] = logprob != logprob ? NAN : q.rule.temperature > 0 ? (float)(record[4] - record[6]) : 0;
  q.margins[at] = (float)(record[0] - record[1]);
  return token != q.rule.eos || position < q.first_ends[r];
}

static void run_steps(Requests q, int64_t steps) {
  Step s = q.step;
  const int64_t half = s.d / 2, num = q.num;
  float *hidden = q.space, *normed = hidden + num * s.size, *cos = normed + num * s.size, *sin = cos + num * half;
  float *logits = sin + num * half, *scores = logits + num * q.outputs;
  int32_t slots[num], contexts[num], starts[num + 1];
  int64_t seeds[num], places[num];
  double records[num][7];
  s.space = scores + num * q.outputs, s.hidden = hidden, s.cos = cos, s.sin = sin, s.slots = slots;
  s.page_tables = q.page_tables, s.context_lengths = contexts, s.cu_queries = starts;
  for (int64_t n = num; steps > 0 && n > 0; steps--) {
    for (int64_t r = 0; r < n; r++) {
      const int64_t position = q.positions[r], token = q.tokens[q.requests[r] * q.width + position];
      memcpy(hidden + r * s.size, q.embedding + token * s.size, s.size * sizeof(float));
      memcpy(cos + r * half, q.cos + position * half, half * sizeof(float));
      memcpy(sin + r * half, q.sin + position * half, half * sizeof(float));
      const int32_t page = q.page_tables[r * s.columns + position / s.page_size];
      slots[r] = (int32_t)(page * s.page_size + position % s.page_size);
      contexts[r] = (int32_t)position + 1, places[r] = position + 1;
      starts[r] = (int32_t)r, seeds[r] = q.seeds[q.requests[r]];
    }
    starts[n] = (int32_t)n, s.tokens = s.requests = n;
    decode_step(s, 1);
    rms_norm(hidden, s.size, q.final_norm, normed, 0, n, s.size, s.eps, 1);
    product(normed, q.head, logits, n, s.size, q.outputs, 0, 1);
    if (!q.rule.is_plain) {
      modify(logits, 0, 0, scores, n, q.rule.vocab, q.outputs, 1, q.rule.temperature, 1);
      for (int64_t r = 0; r < n; r++)
        if (q.rule.eos >= 0 && places[r] < q.first_ends[r]) scores[r * q.outputs + q.rule.eos] = -INFINITY;
      if (q.rule.temperature > 0 && (q.rule.top_k > 0 || q.rule.part < 1ll << 31))
        filter_scores(scores, q.filter_space, n, q.rule.vocab, q.outputs, q.rule.top_k, q.rule.part, 1);
    }
    sample(logits, q.rule.is_plain ? logits : scores, seeds, places, records[0], n, q.rule.vocab, q.outputs, 0,
           q.rule.temperature > 0, 1);
    // From the last row on: the last one takes the place of one that has ended.
    for (int64_t r = n - 1; r >= 0; r--)
      if (!keep_token(q, r, records[r])) {
        n--;
        q.requests[r] = q.requests[n], q.positions[r] = q.positions[n], q.first_ends[r] = q.first_ends[n];
        memmove(q.page_tables + r * s.columns, q.page_tables + n * s.columns, s.columns * sizeof(int32_t));
      }
  }
}

// Up to `steps` tokens for each of `num` requests, to eos: the operations of one step after the other. Each thread takes
// some of the requests through all steps; all of them read all weights, which should be in the cache. See Requests and
// Rule.
void decode_steps(const Layer *layers, int64_t num_layers, const float *embedding, const float *final_norm,
                  const float *head, const float *cos, const float *sin, float *key_pages, float *value_pages,
                  int64_t layer_stride, int64_t *tokens, float *logprobs, float *drawn_logprobs, float *margins,
                  int64_t width, const int64_t *seeds, int32_t *requests, int32_t *positions, int32_t *first_ends,
                  int32_t *page_tables, float *space, int64_t *filter_space, int64_t num, int64_t steps, int64_t size,
                  int64_t columns, int64_t groups, int64_t heads, int64_t d, int64_t wide, int64_t page_size,
                  int64_t outputs, int64_t vocab, int64_t top_k, int64_t part, int64_t eos, int64_t is_plain, float eps,
                  float temperature, int threads) {
  const Step step = {.layers = layers, .key_pages = key_pages, .value_pages = value_pages, .num_layers = num_layers,
                     .layer_stride = layer_stride, .size = size, .columns = columns, .groups = groups, .heads = heads,
                     .d = d, .wide = wide, .page_size = page_size, .eps = eps};
  const Requests all = {step, {vocab, top_k, part, eos, is_plain, temperature}, embedding, final_norm, head, cos, sin,
                        tokens, logprobs, drawn_logprobs, margins, width, seeds, requests, positions, first_ends,
                        page_tables, space, filter_space, num, outputs};
  const int64_t most = num * steps * weights_of(step) / SHARE, shares = most < num ? most : num;
  const int64_t parts = shares < 1 ? 1 : shares < threads ? shares : threads;
#pragma omp parallel for num_threads((int)parts)
  for (int64_t i = 0; i < parts; i++) {
    Requests own = all;
    const int64_t first = num * i / parts;
    own.requests += first, own.positions += first, own.first_ends += first, own.page_tables += first * columns;
    own.space += first * request_space(all), own.num = num * (i + 1) / parts - first;
    if (filter_space) own.filter_space += 2 * vocab * i;
    run_steps(own, steps);
  }
}
