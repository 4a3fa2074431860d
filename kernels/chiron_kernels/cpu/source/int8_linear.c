/* Linear layers with 8-bit weights and activations, for AVX-512 with VNNI.

   Both are cut into groups of 32 along the input axis, each group with a scale of its own, so that
   one large input spoils the precision of its group only. Activations are rounded to [-127, 127];
   weights, in the same range, are stored plus 128, since the instruction multiplies unsigned by
   signed: what that adds, 128 times the sum of the activations, is taken off again.

   The result of a row depends on that row alone, bit for bit: a row's sums are made in the same
   order whatever rows stand beside it. */

#include "vectors.h"

#define GROUP 32
#define COLUMNS 32
#define TILE_ROWS 6
#define WEIGHT_OFFSET 128
#define GROUP_LINES (GROUP * COLUMNS / LINE) /* cache lines of a group's weights */

/* Rows of activations. values [rows, inputs]; scales, offsets [rows, groups], the latter what to
   begin a group's sum with. */
typedef struct {
  const int8_t *values;
  const float *scales;
  const int32_t *offsets;
  int64_t inputs, groups;
} Activations;

static void quantise_row(const float *x, int64_t groups, int8_t *values, float *scales, int32_t *offsets) {
  for (int64_t g = 0; g < groups; g++, x += GROUP, values += GROUP) {
    __m512 part[GROUP / LANES];
    __m512i largest = _mm512_setzero_si512();
    for (int i = 0; i < GROUP / LANES; i++) {
      part[i] = _mm512_loadu_ps(x + i * LANES);
      /* As whole numbers, floats without sign are in the same order, and NaN is above all: it then makes
         the scale NaN, and all that comes of the row. */
      largest = _mm512_max_epi32(largest, _mm512_castps_si512(_mm512_abs_ps(part[i])));
    }
    const int32_t bits = _mm512_reduce_max_epi32(largest);
    float top;
    __builtin_memcpy(&top, &bits, sizeof top);
    /* What is so small that its scale overflows counts as 0. */
    __m512 steps = _mm512_set1_ps(top >= 0x1p-118f ? 127.0f / top : 0.0f);
    __m512i sum = _mm512_setzero_si512();
    for (int i = 0; i < GROUP / LANES; i++) {
      __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(part[i], steps));
      sum = _mm512_add_epi32(sum, rounded);
      _mm_storeu_si128((__m128i *)(values + i * LANES), _mm512_cvtsepi32_epi8(rounded));
    }
    scales[g] = top / 127.0f;
    offsets[g] = -WEIGHT_OFFSET * _mm512_reduce_add_epi32(sum);
  }
}

INLINE __m512 load_bfloat16(const uint16_t *from) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16));
}

/* One block of 32 columns: weights [inputs / 4, 32, 4], scales [groups, 32] in bfloat16, bias [32] or NULL.
   gated: the first 16 columns are gates and the others what they let through; 16 come out. */
typedef struct {
  const uint8_t *weights;
  const uint16_t *scales;
  const float *bias;
  int gated;
} Block;

/* Which lines of a group of the next block's weights to have fetched meanwhile: [from, to). */
typedef struct {
  int from, to;
} Ahead;

/* `rows` rows times a block. */
INLINE void multiply_tile(int rows, Activations a, Block block, float *out, int64_t out_stride, Ahead ahead) {
  const uint8_t *weights = block.weights, *next = weights + a.inputs * COLUMNS;
  const uint16_t *scales = block.scales;
  const float *bias = block.bias;
  __m512 total[TILE_ROWS][2];
  for (int r = 0; r < rows; r++) {
    total[r][0] = bias ? _mm512_loadu_ps(bias) : _mm512_setzero_ps();
    total[r][1] = bias ? _mm512_loadu_ps(bias + LANES) : _mm512_setzero_ps();
  }
  for (int64_t g = 0; g < a.groups; g++) {
    __m512i sum[TILE_ROWS][2];
    for (int r = 0; r < rows; r++)
      sum[r][0] = sum[r][1] = _mm512_set1_epi32(a.offsets[r * a.groups + g]);
    for (int line = ahead.from; line < ahead.to; line++)
      _mm_prefetch((const char *)next + (g * GROUP_LINES + line) * LINE, _MM_HINT_T1);
#pragma GCC unroll 8
    for (int k = 0; k < GROUP; k += 4, weights += 4 * COLUMNS) {
      __m512i left = _mm512_loadu_si512(weights), right = _mm512_loadu_si512(weights + 4 * LANES);
      for (int r = 0; r < rows; r++) {
        int32_t four;
        __builtin_memcpy(&four, a.values + r * a.inputs + g * GROUP + k, sizeof four);
        __m512i x = _mm512_set1_epi32(four);
        sum[r][0] = _mm512_dpbusd_epi32(sum[r][0], left, x);
        sum[r][1] = _mm512_dpbusd_epi32(sum[r][1], right, x);
      }
    }
    __m512 left = load_bfloat16(scales + g * COLUMNS), right = load_bfloat16(scales + g * COLUMNS + LANES);
    for (int r = 0; r < rows; r++) {
      __m512 scale = _mm512_set1_ps(a.scales[r * a.groups + g]);
      total[r][0] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r][0]), _mm512_mul_ps(scale, left), total[r][0]);
      total[r][1] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r][1]), _mm512_mul_ps(scale, right), total[r][1]);
    }
  }
  for (int r = 0; r < rows; r++) {
    float *to = out + r * out_stride;
    if (block.gated) {
      _mm512_storeu_ps(to, _mm512_mul_ps(silu(total[r][0]), total[r][1]));
    } else {
      _mm512_storeu_ps(to, total[r][0]);
      _mm512_storeu_ps(to + LANES, total[r][1]);
    }
  }
}

static void multiply_rows(int64_t rows, Activations a, Block block, float *out, int64_t out_stride) {
  const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
  for (int64_t tile = 0; tile < tiles; tile++, rows -= TILE_ROWS) {
    const Ahead ahead = {(int)(GROUP_LINES * tile / tiles), (int)(GROUP_LINES * (tile + 1) / tiles)};
    switch (rows) {
    case 1: multiply_tile(1, a, block, out, out_stride, ahead); break;
    case 2: multiply_tile(2, a, block, out, out_stride, ahead); break;
    case 3: multiply_tile(3, a, block, out, out_stride, ahead); break;
    case 4: multiply_tile(4, a, block, out, out_stride, ahead); break;
    case 5: multiply_tile(5, a, block, out, out_stride, ahead); break;
    default: multiply_tile(TILE_ROWS, a, block, out, out_stride, ahead);
    }
    a.values += TILE_ROWS * a.inputs;
    a.scales += TILE_ROWS * a.groups;
    a.offsets += TILE_ROWS * a.groups;
    out += TILE_ROWS * out_stride;
  }
}

/* out [rows, outputs] = x [rows, inputs] W^T + bias [outputs] or NULL. inputs and
   outputs are multiples of 32. weights [outputs / 32, inputs / 4, 32, 4] plus 128, scales [outputs / 32,
   groups, 32] in bfloat16. gated: out [rows, outputs / 2] = silu(gate) * up, of blocks as Block says.
   values, value_scales, offsets: room for the rounded x, as Activations has it. */
void chiron_int8_linear(const float *x, int64_t rows, int64_t inputs, int64_t outputs, int64_t gated,
                        const uint8_t *weights, const uint16_t *scales, const float *bias, float *out,
                        int8_t *values, float *value_scales, int32_t *offsets) {
  const int64_t groups = inputs / GROUP, fold = gated ? 2 : 1;
  const Activations activations = {values, value_scales, offsets, inputs, groups};
#pragma omp parallel
  {
#pragma omp for
    for (int64_t row = 0; row < rows; row++)
      quantise_row(x + row * inputs, groups, values + row * inputs, value_scales + row * groups,
                   offsets + row * groups);
#pragma omp for
    for (int64_t column = 0; column < outputs; column += COLUMNS) {
      const Block block = {weights + column * inputs, scales + column * groups, bias ? bias + column : 0,
                           (int)gated};
      multiply_rows(rows, activations, block, out + column / fold, outputs / fold);
    }
  }
}

INLINE float largest_of_group(const float *x) {
  __m512i a = _mm512_castps_si512(_mm512_abs_ps(_mm512_loadu_ps(x)));
  __m512i b = _mm512_castps_si512(_mm512_abs_ps(_mm512_loadu_ps(x + LANES)));
  const int32_t bits = _mm512_reduce_max_epi32(_mm512_max_epi32(a, b)); /* as in quantise_row */
  float top;
  __builtin_memcpy(&top, &bits, sizeof top);
  return top;
}

/* The bfloat16 nearest to x >= 0, ties to even. */
INLINE uint16_t nearest_bfloat16(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  if (x != x) return 0x7fc0;
  return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE float widen_bfloat16(uint16_t x) {
  const uint32_t bits = (uint32_t)x << 16;
  float wide;
  __builtin_memcpy(&wide, &bits, sizeof wide);
  return wide;
}

/* Rounds weight [outputs, inputs], both multiples of 32, to the layout that chiron_int8_linear reads. A
   group's scale is its largest value's 127th, rounded up to a bfloat16; below the smallest normal one,
   all of the group is 0. A group with NaN or infinity has such a scale. */
void chiron_pack_int8(const float *weight, int64_t inputs, int64_t outputs, uint8_t *values, uint16_t *scales) {
  const int64_t groups = inputs / GROUP;
#pragma omp parallel for
  for (int64_t column = 0; column < outputs; column++) {
    const float *row = weight + column * inputs;
    uint8_t *to = values + column / COLUMNS * COLUMNS * inputs + column % COLUMNS * 4;
    for (int64_t g = 0; g < groups; g++, row += GROUP) {
      const uint16_t scale = nearest_bfloat16(largest_of_group(row) / 127.0f * (1.0f + 1.0f / 128));
      scales[(column / COLUMNS * groups + g) * COLUMNS + column % COLUMNS] = scale;
      const float wide = widen_bfloat16(scale);
      const __m512 steps = _mm512_set1_ps(wide >= 0x1p-126f ? 1.0f / wide : 0.0f);
      for (int half = 0; half < GROUP; half += LANES) {
        __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(row + half), steps));
        rounded = _mm512_max_epi32(_mm512_min_epi32(rounded, _mm512_set1_epi32(127)), _mm512_set1_epi32(-127));
        int32_t fours[LANES / 4];
        _mm_storeu_si128((__m128i *)fours,
                         _mm512_cvtepi32_epi8(_mm512_add_epi32(rounded, _mm512_set1_epi32(WEIGHT_OFFSET))));
        for (int k = 0; k < LANES / 4; k++)
          __builtin_memcpy(to + ((g * GROUP + half) / 4 + k) * 4 * COLUMNS, &fours[k], 4);
      }
    }
  }
}
