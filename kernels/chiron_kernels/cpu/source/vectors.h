/* What the kernels share: 16 floats at a time with AVX-512. */

#ifndef CHIRON_VECTORS_H
#define CHIRON_VECTORS_H

#include <immintrin.h>
#include <stdint.h>

#define LANES 16
#define LINE 64 /* bytes of a cache line */
#define INLINE static inline __attribute__((always_inline))

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* The first `count` lanes; all of them from 16 on. */
INLINE __mmask16 first_lanes(int64_t count) {
  return count >= LANES ? (__mmask16)0xffff : (__mmask16)((1u << count) - 1u);
}

/* exp(x) for x <= 88, 0 for -inf; relative error under 2e-7. Cody and Waite's reduction by ln 2 in two
   parts, then the Taylor series of exp up to the sixth power on [-ln 2 / 2, ln 2 / 2]. */
INLINE __m512 exponential(__m512 x) {
  const __m512 lowest = _mm512_set1_ps(-104.0f);
  x = _mm512_max_ps(lowest, x); /* this order keeps NaN */
  __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.0f / 720);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  __m512 y = _mm512_scalef_ps(p, n);
  return _mm512_mask_mov_ps(_mm512_setzero_ps(), _mm512_cmp_ps_mask(x, lowest, _CMP_NEQ_UQ), y);
}

/* x / (1 + exp(-x)). Of an x below -88 the exponential would overflow: there it is x / exp(88). */
INLINE __m512 silu(__m512 x) {
  __m512 below = _mm512_min_ps(_mm512_set1_ps(88.0f), _mm512_sub_ps(_mm512_setzero_ps(), x));
  return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), exponential(below)));
}

/* Rows of 16 elements of 32 bits to columns. */
INLINE void transpose_16x16(__m512i a[LANES]) {
  __m512i b[LANES];
  for (int i = 0; i < LANES; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < LANES; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
    b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
    b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
    b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; i++) {
    a[i] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88);
    a[i + 8] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd);
  }
}

#endif
