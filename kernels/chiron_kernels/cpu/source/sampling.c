/* From rows of logits to tokens: which are allowed, the likeliest, draws, and how likely tokens were.

   What is drawn is what sampling.py of the reference defines, step for step: weights are whole numbers below
   2^33, so that sums of 2^20 of them are exact in doubles, in whatever order they are added. Each row is one thread's
   work and depends on nothing but itself. */

#include <float.h>
#include <math.h>
#include <omp.h>

#include "vectors.h"

#define BLOCK 256            /* RACE_BLOCK of sampling.py */
#define WEIGHT_SCALE 0x1p32f /* as there */
#define GOLDEN UINT64_C(0x9e3779b97f4a7c15)

INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

INLINE float float_of(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

/* The next 16 of `count` logits, -inf from there on and for NaN. */
INLINE __m512 load_logits(const float *from, int64_t count) {
  const __m512 lowest = _mm512_set1_ps(-INFINITY);
  /* Of NaN and a number, this is the second. */
  return _mm512_max_ps(_mm512_mask_loadu_ps(lowest, first_lanes(count), from), lowest);
}

/* The same, and the largest finite number for +inf. */
INLINE __m512 load_finite(const float *from, int64_t count) {
  return _mm512_min_ps(load_logits(from, count), _mm512_set1_ps(FLT_MAX));
}

/* The largest of a row and, in `place`, the first that has it; -inf and 0 where none is above -inf. */
static float find_largest(const float *row, int64_t size, int64_t *place) {
  float best = -INFINITY;
  int64_t block = 0;
  for (int64_t start = 0; start < size; start += BLOCK) {
    __m512 top = _mm512_set1_ps(-INFINITY);
    for (int64_t i = start; i < smaller(start + BLOCK, size); i += LANES)
      top = _mm512_max_ps(top, load_finite(row + i, size - i));
    if (!_mm512_cmp_ps_mask(top, _mm512_set1_ps(best), _CMP_GT_OQ)) continue;
    best = _mm512_reduce_max_ps(top);
    block = start;
  }
  for (int64_t i = block; i < size; i += LANES) {
    __mmask16 found = _mm512_cmp_ps_mask(load_finite(row + i, size - i), _mm512_set1_ps(best), _CMP_EQ_OQ);
    if (!found) continue;
    *place = i + __builtin_ctz(found);
    return best;
  }
  return best;
}

/* best, places [rows]: the largest logit of each row and the first token that has it. NaN counts as -inf and
   +inf as the largest finite number. */
void chiron_row_maxima(const float *logits, int64_t rows, int64_t stride, int64_t vocab, float *best,
                       int64_t *places) {
#pragma omp parallel for if (rows > 1)
  for (int64_t row = 0; row < rows; row++) {
    places[row] = 0;
    best[row] = find_largest(logits + row * stride, vocab, places + row);
  }
}

/* What the keys of a set weigh: each 1, or what it is the bits of. */
typedef enum { ONE_EACH, THEIR_FLOAT } Mass;

/* Of keys: what those from a pivot on weigh, the least of these, and the most of the others. */
typedef struct {
  double mass;
  uint32_t least_above, most_below;
} Split;

/* Two sums of eight each. */
typedef struct {
  __m512d low, high;
} Sums;

INLINE Sums add_exactly(Sums sums, __m512 x) {
  sums.low = _mm512_add_pd(sums.low, _mm512_cvtps_pd(_mm512_castps512_ps256(x)));
  sums.high = _mm512_add_pd(sums.high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)));
  return sums;
}

INLINE double total_of(Sums sums) { return _mm512_reduce_add_pd(_mm512_add_pd(sums.low, sums.high)); }

INLINE Split split_keys(const uint32_t *keys, int64_t count, uint32_t pivot, Mass mass) {
  const __m512i from = _mm512_set1_epi32((int32_t)pivot);
  __m512i least = _mm512_set1_epi32(-1), most = _mm512_setzero_si512();
  Sums sums = {_mm512_setzero_pd(), _mm512_setzero_pd()};
  int64_t number = 0;
  for (int64_t i = 0; i < count; i += LANES) {
    __mmask16 lanes = first_lanes(count - i);
    __m512i key = _mm512_maskz_loadu_epi32(lanes, keys + i);
    __mmask16 above = _mm512_mask_cmpge_epu32_mask(lanes, key, from);
    least = _mm512_mask_min_epu32(least, above, least, key);
    most = _mm512_mask_max_epu32(most, (__mmask16)~above, most, key); /* a lane past the end is 0 */
    if (mass == ONE_EACH)
      number += __builtin_popcount(above);
    else
      sums = add_exactly(sums, _mm512_castsi512_ps(_mm512_maskz_mov_epi32(above, key)));
  }
  return (Split){mass == ONE_EACH ? (double)number : total_of(sums), _mm512_reduce_min_epu32(least),
                 _mm512_reduce_max_epu32(most)};
}

/* Writes the keys on one side of the pivot to `to`, which has room for `count` rounded up to 16 and may be
   `keys` itself. Returns how many they are. */
static int64_t keep_side(const uint32_t *keys, int64_t count, uint32_t pivot, int above, uint32_t *to) {
  const __m512i from = _mm512_set1_epi32((int32_t)pivot);
  int64_t kept = 0;
  for (int64_t i = 0; i < count; i += LANES) {
    __mmask16 lanes = first_lanes(count - i);
    __m512i key = _mm512_maskz_loadu_epi32(lanes, keys + i);
    __mmask16 side = _mm512_mask_cmpge_epu32_mask(lanes, key, from);
    if (!above) side = lanes & (__mmask16)~side;
    _mm512_storeu_si512(to + kept, _mm512_maskz_compress_epi32(side, key)); /* not past what was read */
    kept += __builtin_popcount(side);
  }
  return kept;
}

/* The largest t such that the keys from t on weigh at least `needed`, which is above 0 and at most what all of
   those in [least, most] weigh; keys below `least` weigh nothing and none is above `most`. Halves the range and
   goes on with the keys that are left in it, in `room`, as keep_side has it. */
INLINE uint32_t find_threshold(const uint32_t *keys, int64_t count, uint32_t least, uint32_t most, double needed,
                               Mass mass, uint32_t *room) {
  double over = 0.0; /* what the keys above the range weigh: less than needed */
  while (least < most) {
    const uint32_t pivot = least + (most - least) / 2 + 1;
    const Split split = split_keys(keys, count, pivot, mass);
    const int above = over + split.mass >= needed;
    if (above) {
      least = split.least_above;
    } else {
      over += split.mass;
      most = split.most_below;
    }
    count = keep_side(keys, count, pivot, above, room);
    keys = room;
  }
  return most;
}

/* Whole numbers in the order of the floats. */
INLINE __m512i ordered_keys(__m512 x) {
  __m512i bits = _mm512_castps_si512(x), sign = _mm512_srai_epi32(bits, 31);
  return _mm512_xor_si512(bits, _mm512_or_si512(sign, _mm512_set1_epi32(INT32_MIN)));
}

INLINE float float_of_key(uint32_t key) { return float_of(key >> 31 ? key ^ 0x80000000u : ~key); }

/* Keys of the largest of each lane in each block, [padded / 16]; the lowest where a lane has no token. */
static int64_t lane_maxima(const float *logits, int64_t vocab, uint32_t *keys) {
  int64_t count = 0;
  for (int64_t start = 0; start < vocab; start += BLOCK, count += LANES) {
    __m512 top = _mm512_set1_ps(-INFINITY);
    for (int64_t i = start; i < smaller(start + BLOCK, vocab); i += LANES)
      top = _mm512_max_ps(top, load_finite(logits + i, vocab - i));
    _mm512_storeu_si512(keys + count, ordered_keys(top));
  }
  return count;
}

/* The k-th largest logit, for k from 1 to vocab. It is at least the k-th largest of any of them: with that of a
   few, few are left to look through. keys: room for vocab rounded up to BLOCK. */
static float kth_largest(const float *logits, int64_t vocab, int64_t k, uint32_t *keys) {
  const int64_t some = lane_maxima(logits, vocab, keys);
  const uint32_t least = k > some ? 0 : find_threshold(keys, some, 0, UINT32_MAX, (double)k, ONE_EACH, keys);
  int64_t count = 0;
  for (int64_t i = 0; i < vocab; i += LANES) {
    const __m512i key = ordered_keys(load_finite(logits + i, vocab - i)), from = _mm512_set1_epi32((int32_t)least);
    const __mmask16 kept = _mm512_mask_cmpge_epu32_mask(first_lanes(vocab - i), key, from);
    _mm512_storeu_si512(keys + count, _mm512_maskz_compress_epi32(kept, key));
    count += __builtin_popcount(kept);
  }
  return float_of_key(find_threshold(keys, count, least, UINT32_MAX, (double)k, ONE_EACH, keys));
}

/* What is asked of one row. */
typedef struct {
  float temperature, min_p;
  int64_t top_k; /* 0: all */
  double top_p;
  uint64_t random; /* its bits for the position */
} Wanted;

/* What a thread needs, for rows of `padded` tokens, a multiple of BLOCK. */
typedef struct {
  float *weights; /* [padded] */
  uint32_t *keys; /* [padded] */
  double *sums;   /* [padded / BLOCK] */
} Room;

INLINE int64_t padded_to_blocks(int64_t vocab) { return (vocab + BLOCK - 1) / BLOCK * BLOCK; }

/* Weights of a row whose largest logit is `best`, up to the end of its last block; those below a limit are 0. So
   are those of logits so low that they are rounded down to 0, which need no exponential: 23 > 32 log(2). */
static void weigh(const float *logits, int64_t vocab, float best, Wanted wanted, float least_logit,
                  float *weights) {
  const __m512 largest = _mm512_set1_ps(best), inverse = _mm512_set1_ps(1.0f / wanted.temperature);
  const __m512 scale = _mm512_set1_ps(WEIGHT_SCALE), least = _mm512_set1_ps(wanted.min_p * WEIGHT_SCALE);
  const __m512 from = _mm512_set1_ps(fmaxf(least_logit, best - 23.0f * wanted.temperature));
  for (int64_t i = 0; i < vocab; i += LANES) {
    __m512 x = load_finite(logits + i, vocab - i);
    __mmask16 kept = _mm512_cmp_ps_mask(x, from, _CMP_GE_OQ);
    if (!kept) {
      _mm512_storeu_ps(weights + i, _mm512_setzero_ps());
      continue;
    }
    __m512 weight = exponential(_mm512_mul_ps(_mm512_sub_ps(x, largest), inverse));
    weight = _mm512_roundscale_ps(_mm512_mul_ps(weight, scale), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    kept = _mm512_mask_cmp_ps_mask(kept, weight, least, _CMP_GE_OQ);
    _mm512_storeu_ps(weights + i, _mm512_maskz_mov_ps(kept, weight));
  }
  for (int64_t i = (vocab + LANES - 1) / LANES * LANES; i < padded_to_blocks(vocab); i += LANES)
    _mm512_storeu_ps(weights + i, _mm512_setzero_ps());
}

/* sums [padded / BLOCK]: of the weights from `least` on. Returns their total. */
static double sum_blocks(const float *weights, int64_t padded, float least, double *sums) {
  double total = 0.0;
  for (int64_t start = 0; start < padded; start += BLOCK) {
    Sums block = {_mm512_setzero_pd(), _mm512_setzero_pd()};
    for (int64_t i = start; i < start + BLOCK; i += LANES) {
      __m512 weight = _mm512_loadu_ps(weights + i);
      __mmask16 kept = _mm512_cmp_ps_mask(weight, _mm512_set1_ps(least), _CMP_GE_OQ);
      if (kept) block = add_exactly(block, _mm512_maskz_mov_ps(kept, weight)); /* top-p leaves few */
    }
    total += sums[start / BLOCK] = total_of(block);
  }
  return total;
}

/* The finaliser of splitmix64, as counter_noise.py of the reference has it. */
INLINE uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
  x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
  return x ^ (x >> 31);
}

/* Score of the item with the mixed key `key`, its weight over exponential noise of its own, or 0 where that is
   not above `best`. The noise -log(1 - u) is at least u: most need no logarithm. */
INLINE double score_above(double best, double weight, uint64_t random, uint64_t key) {
  const double uniform = ((double)(mix(random + key) >> 12) + 0.5) * 0x1p-52;
  if (uniform * best >= weight) return 0.0;
  const double score = weight / -log1p(-uniform);
  return score > best ? score : 0.0;
}

/* Two races: among blocks, then among the tokens of the one that won that weigh at least `least`. */
static int64_t race(const float *weights, int64_t padded, float least, const double *sums, uint64_t random) {
  double best = 0.0;
  int64_t block = 0, token = 0;
  for (int64_t b = 0; b < padded / BLOCK; b++) {
    const double score = score_above(best, sums[b], random, mix(-(uint64_t)(b + 1) * GOLDEN));
    if (score > 0.0) best = score, block = b;
  }
  best = 0.0;
  for (int64_t t = block * BLOCK; t < (block + 1) * BLOCK; t++) {
    if (weights[t] < least) continue;
    const double score = score_above(best, (double)weights[t], random, mix((uint64_t)(t + 1) * GOLDEN));
    if (score > 0.0) best = score, token = t;
  }
  return token;
}

static int64_t draw_token(const float *logits, int64_t vocab, float best, Wanted wanted, Room room) {
  const int64_t padded = padded_to_blocks(vocab);
  const int cuts = wanted.top_k > 0 && wanted.top_k < vocab;
  const float least_logit = cuts ? kth_largest(logits, vocab, wanted.top_k, room.keys) : -INFINITY;
  weigh(logits, vocab, best, wanted, least_logit, room.weights);
  float least = 1.0f; /* of weights above 0 */
  const double total = sum_blocks(room.weights, padded, least, room.sums);
  if (wanted.top_p < 1.0) {
    /* The likeliest token has passed every limit so far. */
    least = float_of(find_threshold((const uint32_t *)room.weights, padded, bits_of(least), bits_of(WEIGHT_SCALE),
                                    total * wanted.top_p, THEIR_FLOAT, room.keys));
    sum_blocks(room.weights, padded, least, room.sums);
  }
  return race(room.weights, padded, least, room.sums, wanted.random);
}

/* Floats of room that a thread needs to draw. */
int64_t chiron_draw_room(int64_t vocab) {
  const int64_t padded = padded_to_blocks(vocab);
  return 2 * padded + (int64_t)(sizeof(double) / sizeof(float)) * padded / BLOCK;
}

/* best, tokens [rows]: writes the largest logit, and a token that is drawn, of the rows `indices` [count], or of
   rows 0 .. count - 1 where that is NULL; token 0 where all logits are -inf. temperature (above 0), min_p, top_k
   (0: all), top_p, seeds [count]; positions [rows]. room: for each of `threads` threads, 1 or more, what
   chiron_draw_room says. */
void chiron_draw(const float *logits, int64_t stride, int64_t vocab, const int64_t *positions, const int64_t *indices,
                 int64_t count, const float *temperature, const float *min_p, const int64_t *top_k,
                 const double *top_p, const int64_t *seeds, float *best, int64_t *tokens, float *room,
                 int64_t threads) {
  const int64_t padded = padded_to_blocks(vocab);
#pragma omp parallel for num_threads((int)threads)
  for (int64_t i = 0; i < count; i++) {
    const int64_t row = indices ? indices[i] : i;
    const float *of_row = logits + row * stride;
    tokens[row] = 0;
    best[row] = find_largest(of_row, vocab, tokens + row);
    if (best[row] == -INFINITY) continue;
    float *own = room + omp_get_thread_num() * chiron_draw_room(vocab);
    const Room of_thread = {own, (uint32_t *)(own + padded), (double *)(own + 2 * padded)};
    const uint64_t state = mix((uint64_t)seeds[i] + GOLDEN);
    const uint64_t random = mix(state + ((uint64_t)positions[row] + 1) * GOLDEN);
    const Wanted wanted = {temperature[i], min_p[i], top_k[i], top_p[i], random};
    tokens[row] = draw_token(of_row, vocab, best[row], wanted, of_thread);
  }
}

/* Sets logits of the rows `indices` [count], or of rows 0 .. count - 1 where that is NULL, to -inf where the bit
   of masks [count, words], 16 in each, is 0. */
void chiron_forbid(float *logits, int64_t stride, int64_t vocab, const int64_t *indices, int64_t count,
                   const uint16_t *masks, int64_t words) {
#pragma omp parallel for if (count > 1)
  for (int64_t i = 0; i < count; i++) {
    float *row = logits + (indices ? indices[i] : i) * stride;
    const uint16_t *allowed = masks + i * words;
    for (int64_t at = 0; at < vocab; at += LANES) {
      const __mmask16 forbidden = first_lanes(vocab - at) & (__mmask16)~allowed[at / LANES];
      _mm512_mask_storeu_ps(row + at, forbidden, _mm512_set1_ps(-INFINITY));
    }
  }
}

/* Into values [count + 1], which fall, behind all that are not less; the last is lost. */
INLINE void insert(float value, int64_t place, int64_t count, float *values, int64_t *places) {
  int64_t at = count;
  for (; at > 0 && values[at - 1] < value; at--) {
    values[at] = values[at - 1];
    places[at] = places[at - 1];
  }
  values[at] = value;
  places[at] = place;
}

/* The `count` largest of a row, 1 to size, the largest first, of equal ones the first. NaN counts as -inf. */
static void find_largest_few(const float *row, int64_t size, int64_t count, float *values, int64_t *places) {
  for (int64_t i = 0; i < count; i++) insert(row[i] == row[i] ? row[i] : -INFINITY, i, i, values, places);
  for (int64_t i = count; i < size; i += LANES) {
    const __m512 x = load_logits(row + i, size - i);
    __mmask16 larger = _mm512_cmp_ps_mask(x, _mm512_set1_ps(values[count - 1]), _CMP_GT_OQ);
    for (; larger; larger &= larger - 1) {
      const int64_t place = i + __builtin_ctz(larger);
      if (row[place] > values[count - 1]) insert(row[place], place, count - 1, values, places);
    }
  }
}

/* log(sum(exp(row))), of a row whose largest value, but for NaN, is `best`; NaN where it holds one. */
static float log_of_sum(const float *row, int64_t size, float best) {
  if (isinf(best)) return best;
  const __m512 largest = _mm512_set1_ps(best), lowest = _mm512_set1_ps(-INFINITY);
  double total = 0.0;
  for (int64_t start = 0; start < size; start += BLOCK) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = start; i < smaller(start + BLOCK, size); i += LANES) {
      __m512 x = _mm512_mask_loadu_ps(lowest, first_lanes(size - i), row + i);
      sum = _mm512_add_ps(sum, exponential(_mm512_sub_ps(x, largest)));
    }
    total += (double)_mm512_reduce_add_ps(sum);
  }
  return (float)((double)best + log(total));
}

/* Logarithms of probabilities in the rows `indices` [count]. chosen [count]: of the row's token, tokens [rows].
   ids, likeliest [count, few]: of the likeliest, few from 1 to vocab. */
void chiron_token_logprobs(const float *logits, int64_t stride, int64_t vocab, const int64_t *indices, int64_t count,
                           const int64_t *tokens, int64_t few, float *chosen, int64_t *ids, float *likeliest) {
#pragma omp parallel for if (count > 1)
  for (int64_t i = 0; i < count; i++) {
    const float *row = logits + indices[i] * stride;
    float *top = likeliest + i * few;
    find_largest_few(row, vocab, few, top, ids + i * few);
    const float total = log_of_sum(row, vocab, top[0]);
    chosen[i] = row[tokens[indices[i]]] - total;
    for (int64_t j = 0; j < few; j++) top[j] -= total;
  }
}
