/* Linear layers with 8-bit weights and activations, for AVX-512 with VNNI.

   What rounding to 8 bits costs is the few inputs that are much larger than the rest, since the largest
   sets the step of all. So the input axis is first turned, 64 inputs at a time, by a Hadamard matrix H:
   x W^T = (x H) (W H)^T / 64 as H is symmetric and H H = 64. That spreads each large input over its 64,
   of activations and of weights alike (QuaRot, arXiv 2404.00456, does so with the whole axis). A row of
   weights then needs one scale, a row of activations one for every 192 inputs.

   Activations are rounded to [-127, 127]; weights, in the same range, are stored plus 128, since the
   instruction multiplies unsigned by signed: what that adds, 128 times the sum of the activations, is
   taken off again.

   The result of a row depends on that row alone, bit for bit: a row's sums are made in the same
   order whatever rows stand beside it. */

#include "vectors.h"

#define TURNED 64 /* inputs */
#define GROUP 192 /* inputs that share a scale; the last group may have fewer */
#define PARTS (TURNED / LANES)
#define COLUMNS 32
#define TILE_ROWS 14 /* times two vectors of columns: 28 of the 32 registers */
#define WEIGHT_OFFSET 128
#define LINES (GROUP * COLUMNS / LINE) /* cache lines of a group's weights */

/* Rows of activations. values [rows, inputs]; scales, offsets [rows, groups], the latter what to
   begin a group's sums with. */
typedef struct {
  const int8_t *values;
  const float *scales;
  const int32_t *offsets;
  int64_t inputs, groups;
} Activations;

/* Each lane with the one whose number differs in a bit: their sum where it is 0, their difference where
   it is 1. `signs` are 1 and -1 so. */
#define BUTTERFLY(x, exchanged, signs) _mm512_fmadd_ps(x, signs, exchanged)

INLINE __m512 signs_of(__mmask16 negative) {
  return _mm512_mask_blend_ps(negative, _mm512_set1_ps(1.0f), _mm512_set1_ps(-1.0f));
}

/* 64 values times H. */
INLINE void turn(__m512 x[PARTS]) {
  const __m512 by_1 = signs_of(0xaaaa), by_2 = signs_of(0xcccc), by_4 = signs_of(0xf0f0), by_8 = signs_of(0xff00);
  for (int i = 0; i < PARTS; i++) {
    x[i] = BUTTERFLY(x[i], _mm512_permute_ps(x[i], 0xb1), by_1);
    x[i] = BUTTERFLY(x[i], _mm512_permute_ps(x[i], 0x4e), by_2);
    x[i] = BUTTERFLY(x[i], _mm512_shuffle_f32x4(x[i], x[i], 0xb1), by_4);
    x[i] = BUTTERFLY(x[i], _mm512_shuffle_f32x4(x[i], x[i], 0x4e), by_8);
  }
  for (int apart = 1; apart < PARTS; apart *= 2)
    for (int i = 0; i < PARTS; i++)
      if (!(i & apart)) {
        const __m512 a = x[i], b = x[i + apart];
        x[i] = _mm512_add_ps(a, b);
        x[i + apart] = _mm512_sub_ps(a, b);
      }
}

/* Turns `inputs` values into `to` and returns the largest without its sign. As whole numbers, floats
   without sign are in the same order, and NaN is above all: it makes the scale NaN, and all that comes of
   the row. */
INLINE float turn_all(const float *x, int64_t inputs, float *to) {
  __m512i largest = _mm512_setzero_si512();
  for (int64_t at = 0; at < inputs; at += TURNED) {
    __m512 part[PARTS];
    for (int i = 0; i < PARTS; i++) part[i] = _mm512_loadu_ps(x + at + i * LANES);
    turn(part);
    for (int i = 0; i < PARTS; i++) {
      largest = _mm512_max_epi32(largest, _mm512_castps_si512(_mm512_abs_ps(part[i])));
      _mm512_storeu_ps(to + at + i * LANES, part[i]);
    }
  }
  const int32_t bits = _mm512_reduce_max_epi32(largest);
  float top;
  __builtin_memcpy(&top, &bits, sizeof top);
  return top;
}

/* How many steps there are in 1 where `top` is 127 of them; what is so small that this overflows counts
   as 0. */
INLINE __m512 steps_of(float top) { return _mm512_set1_ps(top >= 0x1p-118f ? 127.0f / top : 0.0f); }

static void quantise_row(const float *x, int64_t inputs, int8_t *values, float *scales, int32_t *offsets) {
  for (int64_t from = 0; from < inputs; from += GROUP) {
    const int64_t count = smaller(GROUP, inputs - from);
    float turned[GROUP];
    const float top = turn_all(x + from, count, turned);
    const __m512 steps = steps_of(top);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t at = 0; at < count; at += LANES) {
      __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(turned + at), steps));
      sum = _mm512_add_epi32(sum, rounded);
      _mm_storeu_si128((__m128i *)(values + from + at), _mm512_cvtsepi32_epi8(rounded));
    }
    scales[from / GROUP] = top / 127.0f;
    offsets[from / GROUP] = -WEIGHT_OFFSET * _mm512_reduce_add_epi32(sum);
  }
}

/* One block of 32 columns: weights [inputs / 4, 32, 4], scales [32], bias [32] or NULL.
   gated: the first 16 columns are gates and the others what they let through; 16 come out. */
typedef struct {
  const uint8_t *weights;
  const float *scales;
  const float *bias;
  int gated;
} Block;

/* Which lines of a group of the next block's weights to have fetched meanwhile: [from, to). */
typedef struct {
  int from, to;
} Ahead;

/* sum[r] += of `count` inputs. */
INLINE void add_products(int rows, const int8_t *values, int64_t stride, const uint8_t *weights, int64_t count,
                         __m512i sum[TILE_ROWS][2]) {
  for (int64_t k = 0; k < count; k += 4, weights += 4 * COLUMNS) {
    __m512i left = _mm512_loadu_si512(weights), right = _mm512_loadu_si512(weights + 4 * LANES);
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
      int32_t four;
      __builtin_memcpy(&four, values + r * stride + k, sizeof four);
      __m512i x = _mm512_set1_epi32(four);
      sum[r][0] = _mm512_dpbusd_epi32(sum[r][0], left, x);
      sum[r][1] = _mm512_dpbusd_epi32(sum[r][1], right, x);
    }
  }
}

INLINE void add_scaled(__m512i sum, float scale, float *total) {
  _mm512_store_ps(total, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(scale), _mm512_load_ps(total)));
}

/* The totals of a row, [32], times the scales of the columns. */
INLINE void finish_row(const float *total, Block block, float *out) {
  __m512 left = _mm512_mul_ps(_mm512_load_ps(total), _mm512_loadu_ps(block.scales));
  __m512 right = _mm512_mul_ps(_mm512_load_ps(total + LANES), _mm512_loadu_ps(block.scales + LANES));
  if (block.bias) {
    left = _mm512_add_ps(left, _mm512_loadu_ps(block.bias));
    right = _mm512_add_ps(right, _mm512_loadu_ps(block.bias + LANES));
  }
  if (block.gated) {
    _mm512_storeu_ps(out, _mm512_mul_ps(silu(left), right));
  } else {
    _mm512_storeu_ps(out, left);
    _mm512_storeu_ps(out + LANES, right);
  }
}

/* `rows` rows times a block. Sums stay in registers for a group; totals, too many for them, do not. */
INLINE void multiply_tile(int rows, Activations a, Block block, float *out, int64_t out_stride, Ahead ahead) {
  const uint8_t *next = block.weights + a.inputs * COLUMNS;
  _Alignas(LINE) float total[TILE_ROWS][COLUMNS] = {0};
  for (int64_t g = 0; g < a.groups; g++) {
    __m512i sum[TILE_ROWS][2];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) sum[r][0] = sum[r][1] = _mm512_set1_epi32(a.offsets[r * a.groups + g]);
    for (int line = ahead.from; line < ahead.to; line++)
      _mm_prefetch((const char *)next + (g * LINES + line) * LINE, _MM_HINT_T1);
    const int64_t from = g * GROUP, count = smaller(GROUP, a.inputs - from);
    add_products(rows, a.values + from, a.inputs, block.weights + from * COLUMNS, count, sum);
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
      const float scale = a.scales[r * a.groups + g];
      add_scaled(sum[r][0], scale, total[r]);
      add_scaled(sum[r][1], scale, total[r] + LANES);
    }
  }
  for (int r = 0; r < rows; r++) finish_row(total[r], block, out + r * out_stride);
}

static void multiply_rows(int64_t rows, Activations a, Block block, float *out, int64_t out_stride) {
  const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
  for (int64_t tile = 0; tile < tiles; tile++, rows -= TILE_ROWS) {
    const Ahead ahead = {(int)(LINES * tile / tiles), (int)(LINES * (tile + 1) / tiles)};
    switch (rows) {
#define CASE(count) case count: multiply_tile(count, a, block, out, out_stride, ahead); break;
    CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12) CASE(13)
#undef CASE
    default: multiply_tile(TILE_ROWS, a, block, out, out_stride, ahead);
    }
    a.values += TILE_ROWS * a.inputs;
    a.scales += TILE_ROWS * a.groups;
    a.offsets += TILE_ROWS * a.groups;
    out += TILE_ROWS * out_stride;
  }
}

/* out [rows, outputs] = x [rows, inputs] W^T + bias [outputs] or NULL. inputs is a multiple of 64,
   outputs of 32. weights [outputs / 32, inputs / 4, 32, 4] plus 128, scales [outputs]. gated: out [rows,
   outputs / 2] = silu(gate) * up, of blocks as Block says.
   values, value_scales, offsets: room for the rounded x, as Activations has it. */
void chiron_int8_linear(const float *x, int64_t rows, int64_t inputs, int64_t outputs, int64_t gated,
                        const uint8_t *weights, const float *scales, const float *bias, float *out,
                        int8_t *values, float *value_scales, int32_t *offsets) {
  const int64_t groups = (inputs + GROUP - 1) / GROUP, fold = gated ? 2 : 1;
  const Activations activations = {values, value_scales, offsets, inputs, groups};
#pragma omp parallel
  {
#pragma omp for
    for (int64_t row = 0; row < rows; row++)
      quantise_row(x + row * inputs, inputs, values + row * inputs, value_scales + row * groups,
                   offsets + row * groups);
#pragma omp for
    for (int64_t column = 0; column < outputs; column += COLUMNS) {
      const Block block = {weights + column * inputs, scales + column, bias ? bias + column : 0, (int)gated};
      multiply_rows(rows, activations, block, out + column / fold, outputs / fold);
    }
  }
}

/* The largest turned value of a row without its sign; NaN if one is. */
static float largest_turned(const float *x, int64_t inputs) {
  float turned[TURNED], largest = 0.0f;
  for (int64_t at = 0; at < inputs; at += TURNED) {
    const float top = turn_all(x + at, TURNED, turned);
    if (top > largest || top != top) largest = top;
  }
  return largest;
}

/* Rounds weight [outputs, inputs], multiples of 32 and 64, to the layout that chiron_int8_linear reads. A
   row whose largest turned value is below 2**-118 is 0; one with NaN or infinity has such a scale. */
void chiron_pack_int8(const float *weight, int64_t inputs, int64_t outputs, uint8_t *values, float *scales) {
#pragma omp parallel for
  for (int64_t column = 0; column < outputs; column++) {
    const float *row = weight + column * inputs;
    const float top = largest_turned(row, inputs);
    const __m512 steps = steps_of(top);
    uint8_t *to = values + column / COLUMNS * COLUMNS * inputs + column % COLUMNS * 4;
    scales[column] = top / 127.0f / TURNED;
    for (int64_t at = 0; at < inputs; at += TURNED) {
      float turned[TURNED];
      turn_all(row + at, TURNED, turned);
      for (int part = 0; part < TURNED; part += LANES) {
        __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(turned + part), steps));
        int32_t fours[LANES / 4];
        _mm_storeu_si128((__m128i *)fours,
                         _mm512_cvtepi32_epi8(_mm512_add_epi32(rounded, _mm512_set1_epi32(WEIGHT_OFFSET))));
        for (int k = 0; k < LANES / 4; k++) __builtin_memcpy(to + ((at + part) / 4 + k) * 4 * COLUMNS, &fours[k], 4);
      }
    }
  }
}
