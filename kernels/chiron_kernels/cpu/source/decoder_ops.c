/* What stands between the matrix products of a decoder layer, each in one pass over its rows. */

#include <math.h>

#include "vectors.h"

/* From this many elements on, waking a second thread costs less than the work it takes. */
#define WORTH_A_THREAD 16384

static void normalise_row(float *x, const float *delta, const float *weight, float *out, int64_t size, float eps) {
  __m512 squares = _mm512_setzero_ps();
  for (int64_t i = 0; i < size; i += LANES) {
    __mmask16 lanes = first_lanes(size - i);
    __m512 value = _mm512_maskz_loadu_ps(lanes, x + i);
    if (delta) {
      value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(lanes, delta + i));
      _mm512_mask_storeu_ps(x + i, lanes, value);
    }
    squares = _mm512_fmadd_ps(value, value, squares);
  }
  __m512 factor = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(squares) / (float)size + eps));
  for (int64_t i = 0; i < size; i += LANES) {
    __mmask16 lanes = first_lanes(size - i);
    __m512 value = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, x + i), factor);
    _mm512_mask_storeu_ps(out + i, lanes, _mm512_mul_ps(value, _mm512_maskz_loadu_ps(lanes, weight + i)));
  }
}

/* x [rows, size] += delta, unless that is NULL; out = x / rms(x) * weight [size]. */
void chiron_add_rms_norm(float *x, const float *delta, const float *weight, float *out, int64_t rows, int64_t size,
                         float eps) {
#pragma omp parallel for if (rows * size >= WORTH_A_THREAD)
  for (int64_t row = 0; row < rows; row++)
    normalise_row(x + row * size, delta ? delta + row * size : 0, weight, out + row * size, size, eps);
}

/* out [rows, size] = silu(gate) * up, for gate_up [rows, 2 size]. */
void chiron_silu_multiply(const float *gate_up, float *out, int64_t rows, int64_t size) {
#pragma omp parallel for if (rows * size >= WORTH_A_THREAD)
  for (int64_t row = 0; row < rows; row++) {
    const float *gate = gate_up + row * 2 * size, *up = gate + size;
    for (int64_t i = 0; i < size; i += LANES) {
      __mmask16 lanes = first_lanes(size - i);
      __m512 g = _mm512_maskz_loadu_ps(lanes, gate + i);
      _mm512_mask_storeu_ps(out + row * size + i, lanes,
                            _mm512_mul_ps(silu(g), _mm512_maskz_loadu_ps(lanes, up + i)));
    }
  }
}

/* Rotates, in place, the first `heads` heads of each row of x, rows `stride` floats apart, heads of
   `size` floats. cosines, sines [rows, size]: element i pairs with i + size / 2, and the sine's sign
   is that of the element it belongs to. */
void chiron_rotate(float *x, int64_t rows, int64_t stride, int64_t heads, int64_t size, const float *cosines,
                   const float *sines) {
  const int64_t half = size / 2;
#pragma omp parallel for if (rows * heads * size >= WORTH_A_THREAD)
  for (int64_t row = 0; row < rows; row++) {
    const float *cosine = cosines + row * size, *sine = sines + row * size;
    for (int64_t head = 0; head < heads; head++) {
      float *low = x + row * stride + head * size, *high = low + half;
      for (int64_t i = 0; i < half; i += LANES) {
        __mmask16 lanes = first_lanes(half - i);
        __m512 a = _mm512_maskz_loadu_ps(lanes, low + i), b = _mm512_maskz_loadu_ps(lanes, high + i);
        __m512 turned_a = _mm512_mul_ps(a, _mm512_maskz_loadu_ps(lanes, cosine + i));
        __m512 turned_b = _mm512_mul_ps(b, _mm512_maskz_loadu_ps(lanes, cosine + half + i));
        turned_a = _mm512_fmadd_ps(b, _mm512_maskz_loadu_ps(lanes, sine + i), turned_a);
        turned_b = _mm512_fmadd_ps(a, _mm512_maskz_loadu_ps(lanes, sine + half + i), turned_b);
        _mm512_mask_storeu_ps(low + i, lanes, turned_a);
        _mm512_mask_storeu_ps(high + i, lanes, turned_b);
      }
    }
  }
}
