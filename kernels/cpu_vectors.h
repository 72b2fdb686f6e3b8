// What the C kernels share: vectors as wide as a register, and e^x.

#include <math.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))

// e^x within 2e-7 of it for x <= 88; NaN stays NaN, what is below -87 gives e^-87.
INLINE float exp_(float x) {
  x = x < -87.0f ? -87.0f : x;
  const float t = x * 1.44269504088896341f;
  const float n = rintf(t);
  const float f = (x - n * 0.693145751953125f) - n * 1.42860682030941723e-6f; // ln 2 in two parts
  float p = 1.0f / 5040;
  p = p * f + 1.0f / 720;
  p = p * f + 1.0f / 120;
  p = p * f + 1.0f / 24;
  p = p * f + 1.0f / 6;
  p = p * f + 0.5f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  const union {
    uint32_t i;
    float f;
  } power = {((uint32_t)(int32_t)n + 127) << 23};
  return p * power.f;
}

// As many neighbouring numbers as a register holds: compilers make code many times slower of vectors that are wider.
#if defined(__AVX512F__)
#define LANES 16
#define LANE_BITS 4
#define SHUFFLE_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define SHUFFLE_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#define SHUFFLE_EVEN 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30
#define SHUFFLE_ODD 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31
#define SHUFFLE_EVEN_PAIRS 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define SHUFFLE_ODD_PAIRS 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#define SHUFFLE_EVEN_FOURS 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27
#define SHUFFLE_ODD_FOURS 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31
#define SHUFFLE_EVEN_EIGHTS 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define SHUFFLE_ODD_EIGHTS 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
#elif defined(__AVX__)
#define LANES 8
#define LANE_BITS 3
#define SHUFFLE_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define SHUFFLE_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#define SHUFFLE_EVEN 0, 8, 2, 10, 4, 12, 6, 14
#define SHUFFLE_ODD 1, 9, 3, 11, 5, 13, 7, 15
#define SHUFFLE_EVEN_PAIRS 0, 1, 8, 9, 4, 5, 12, 13
#define SHUFFLE_ODD_PAIRS 2, 3, 10, 11, 6, 7, 14, 15
#define SHUFFLE_EVEN_FOURS 0, 1, 2, 3, 8, 9, 10, 11
#define SHUFFLE_ODD_FOURS 4, 5, 6, 7, 12, 13, 14, 15
#else
#define LANES 4
#define LANE_BITS 2
#define SHUFFLE_LOW 0, 4, 1, 5
#define SHUFFLE_HIGH 2, 6, 3, 7
#define SHUFFLE_EVEN 0, 4, 2, 6
#define SHUFFLE_ODD 1, 5, 3, 7
#define SHUFFLE_EVEN_PAIRS 0, 1, 4, 5
#define SHUFFLE_ODD_PAIRS 2, 3, 6, 7
#endif
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
#define LOAD(p) (*(const vec *)(p))

// Folds LANES numbers into the first one by halves, as vectors, where one after the other would wait for each other.
#define FOLD_HALVES(STEP)                                                                                              \
  _Pragma("GCC unroll 4") for (int half = LANES / 2; half > 0; half /= 2)                                              \
      _Pragma("omp simd") for (int l = 0; l < half; l++) STEP;

// Replaces x [seen] by e^(x - *peak), where *peak rises to the largest of them; returns their sum. x has whole vectors:
// numbers left over at the end, taken one by one, would cost more than all others. What is behind `seen` becomes 0.
INLINE float exponentials(float *x, int64_t seen, float *peak) {
  float peaks[LANES], sums[LANES], top = *peak;
  for (int l = 0; l < LANES; l++) peaks[l] = top, sums[l] = 0;
  for (int64_t t = seen; t % LANES; t++) x[t] = -INFINITY;
  for (int64_t t = 0; t < seen; t += LANES)
#pragma omp simd
    for (int l = 0; l < LANES; l++) peaks[l] = x[t + l] > peaks[l] ? x[t + l] : peaks[l];
  FOLD_HALVES(peaks[l] = peaks[half + l] > peaks[l] ? peaks[half + l] : peaks[l])
  top = peaks[0];
  for (int64_t t = 0; t < seen; t += LANES)
#pragma omp simd
    for (int l = 0; l < LANES; l++) {
      const float e = exp_(x[t + l] - top);
      x[t + l] = e;
      sums[l] += e;
    }
  for (int64_t t = seen; t % LANES; t++) x[t] = 0; // e^-87 each in the sum, which is nothing beside it
  FOLD_HALVES(sums[l] += sums[half + l])
  *peak = top;
  return sums[0];
}

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t lanes __attribute__((vector_size(4 * LANES)));
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (lanes){__VA_ARGS__})
#endif

// Lane i of x[k] becomes lane k of x[i]: LANE_BITS times, the first half of the vectors is interleaved with the second.
INLINE void transpose_lanes(vec *x) {
#pragma GCC unroll 4
  for (int bit = 0; bit < LANE_BITS; bit++) {
    vec y[LANES];
#pragma GCC unroll 8
    for (int i = 0; i < LANES / 2; i++) {
      y[2 * i] = SHUFFLE(x[i], x[LANES / 2 + i], SHUFFLE_LOW);
      y[2 * i + 1] = SHUFFLE(x[i], x[LANES / 2 + i], SHUFFLE_HIGH);
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) x[i] = y[i];
  }
}

#if defined(__AVX512F__) || defined(__aarch64__)
#define TALL 12 // rows whose products are summed together: 2 * TALL sums in 32 registers
#else
#define TALL 6 // in 16
#endif
