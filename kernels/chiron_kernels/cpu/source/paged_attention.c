/* Attention over paged KV, read in place: nothing is gathered.

   A run is up to chiron_max_run rows of one request, neighbours in the batch and in the sequence: a decode is
   a run of one. The queries of a run that share a key head go through the keys together, 64 keys at a
   time, with an online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867). Key tiles begin at
   multiples of 64 of the position, and a key a row may not see weighs exactly 0, so that, as long as the
   values of the request are finite, the result of a row does not depend on the rows beside it nor on how
   its prompt was cut into chunks. What a block holds past the request's end is not read. */

#include <math.h>
#include <omp.h>

#include "vectors.h"

#define KEYS 64
#define MAX_QUERIES 24
#define MAX_HEAD 256 /* LARGEST_HEAD of paged_attention.py */
#define TILE_QUERIES 6
#define SUMMED 32 /* elements of a head that are summed one after another; such sums are then added up */
#define MAX_STATE (64 * MAX_HEAD)

typedef enum { FLOAT32 = 0, BFLOAT16 = 1 } Storage;

/* One layer's part of the pool, [blocks, block_size, 2, kv_heads, head], keys first. `data` is where
   its first block begins; blocks lie block_stride elements apart. */
typedef struct {
  char *data;
  int64_t block_stride, block_size, kv_heads, head;
  Storage storage;
} Pool;

/* rows `row` .. row + count - 1 have positions `position` ..; table holds the blocks of their request. */
typedef struct {
  int64_t row, count, position;
  const int64_t *table;
} Run;

_Static_assert(sizeof(Run) == 4 * sizeof(int64_t), "runs come as rows of four 64-bit numbers");

typedef struct {
  float scale, softcap; /* softcap 0: none */
  int64_t window;       /* keys a row sees, itself included; 0: all */
  const float *sinks;   /* [query heads] or NULL */
} Options;

INLINE int64_t token_offset(const Pool *pool, int64_t block, int64_t offset, int64_t value, int64_t kv_head) {
  return block * pool->block_stride + ((offset * 2 + value) * pool->kv_heads + kv_head) * pool->head;
}

INLINE int64_t element_bytes(const Pool *pool) { return pool->storage == BFLOAT16 ? 2 : 4; }

/* Where the tokens [first, first + count) of a request begin in the pool. */
static void find_tokens(const Pool *pool, const int64_t *table, int64_t first, int64_t count, const char **tokens) {
  const int64_t bytes = 2 * pool->kv_heads * pool->head * element_bytes(pool);
  int64_t block = first / pool->block_size, offset = first % pool->block_size;
  const char *at = pool->data + table[block] * pool->block_stride * element_bytes(pool) + offset * bytes;
  for (int64_t i = 0; i < count; i++, at += bytes, offset++) {
    if (offset == pool->block_size) {
      offset = 0;
      at = pool->data + table[++block] * pool->block_stride * element_bytes(pool);
    }
    tokens[i] = at;
  }
}

/* To bfloat16, to nearest, ties to even; NaN stays NaN. */
INLINE __m256i to_bfloat16(__m512 x) {
  __m512i bits = _mm512_castps_si512(x);
  __m512i even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(even, _mm512_set1_epi32(0x7fff)));
  __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

static void store_heads(const Pool *pool, int64_t block, int64_t offset, int64_t value, const float *x) {
  const int64_t size = pool->kv_heads * pool->head, at = token_offset(pool, block, offset, value, 0);
  for (int64_t i = 0; i < size; i += LANES) {
    __mmask16 lanes = first_lanes(size - i);
    __m512 part = _mm512_maskz_loadu_ps(lanes, x + i);
    if (pool->storage == BFLOAT16)
      _mm256_mask_storeu_epi16((uint16_t *)pool->data + at + i, lanes, to_bfloat16(part));
    else
      _mm512_mask_storeu_ps((float *)pool->data + at + i, lanes, part);
  }
}

/* How many elements there are in 32 bits. */
INLINE int64_t per_word(Storage storage) { return storage == BFLOAT16 ? 2 : 1; }

/* Words `word` .. word + 15 of one head's keys of 16 tokens, which begin `at` bytes into each, to a row of 16
   keys for each word; 0 past `count` tokens and past the head's `words`. */
INLINE void load_words(const char *const *tokens, int64_t at, int64_t count, int64_t word, int64_t words,
                       __m512i part[LANES]) {
  const __mmask16 lanes = first_lanes(words - word);
  if (count >= LANES && lanes == 0xffff) {
    for (int i = 0; i < LANES; i++) part[i] = _mm512_loadu_si512(tokens[i] + at + word * 4);
  } else {
    for (int i = 0; i < LANES; i++)
      part[i] = i < count ? _mm512_maskz_loadu_epi32(lanes, tokens[i] + at + word * 4) : _mm512_setzero_si512();
  }
  transpose_16x16(part);
}

/* The first and the second element of words of bfloat16. */
INLINE __m512 first_of(__m512i words) { return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)); }
INLINE __m512 second_of(__m512i words) {
  return _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32((int)0xffff0000)));
}

/* Keys of 16 tokens, `at` bytes into each, to columns of out [head, KEYS]; those past `count` become 0. */
INLINE void load_keys_16(const char *const *tokens, int64_t at, int64_t count, int64_t head, Storage storage,
                         float *out) {
  const int64_t words = head / per_word(storage);
  for (int64_t word = 0; word < words; word += LANES) {
    __m512i part[LANES];
    load_words(tokens, at, count, word, words, part);
    /* Words past the head are 0, and land in rows of `out` that nothing reads. */
    for (int i = 0; i < LANES; i++) {
      float *to = out + (word + i) * per_word(storage) * KEYS;
      if (storage == BFLOAT16) {
        _mm512_store_ps(to, first_of(part[i]));
        _mm512_store_ps(to + KEYS, second_of(part[i]));
      } else {
        _mm512_store_si512(to, part[i]);
      }
    }
  }
}

/* 16 elements as floats; 0 where `lanes` is. */
INLINE __m512 load_floats(const char *from, __mmask16 lanes, Storage storage) {
  if (storage == FLOAT32) return _mm512_maskz_loadu_ps(lanes, from);
  return first_of(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, from)));
}

/* One value to floats, its end filled with 0 up to a multiple of 16. */
INLINE void load_value(const char *from, int64_t head, Storage storage, float *out) {
  for (int64_t i = 0; i < head; i += LANES)
    _mm512_store_ps(out + i, load_floats(from + i * 4 / per_word(storage), first_lanes(head - i), storage));
}

/* One key head's keys or values of `count` tokens: `size` elements, `at` bytes into each. */
typedef struct {
  const char *const *tokens;
  int64_t count, at, size;
} Heads;

INLINE void load_tile(Storage storage, Heads keys, Heads values, float *key_columns, float *value_rows) {
  for (int64_t i = 0; i < keys.count; i += LANES)
    load_keys_16(keys.tokens + i, keys.at, keys.count - i, keys.size, storage, key_columns + i);
  const char *const *tokens = values.tokens;
  if (values.size == 64) { /* unrolled: most heads are of 64 or 128 */
    for (int64_t i = 0; i < values.count; i++) load_value(tokens[i] + values.at, 64, storage, value_rows + i * 64);
  } else if (values.size == 128) {
    for (int64_t i = 0; i < values.count; i++) load_value(tokens[i] + values.at, 128, storage, value_rows + i * 128);
  } else {
    const int64_t padded = (values.size + LANES - 1) / LANES * LANES;
    for (int64_t i = 0; i < values.count; i++)
      load_value(tokens[i] + values.at, values.size, storage, value_rows + i * padded);
  }
}

/* Tokens to fetch while others are worked on, line by line in the order they lie in, `bytes` of each: the
   hardware reads ahead in that order, which it does not for one head's part of every token. */
typedef struct {
  const char *tokens[KEYS];
  int64_t token, count, bytes;
  const char *at, *end; /* what is left of the token before `token` */
} Ahead;

static void fetch_next_token(Ahead *ahead) {
  if (ahead->token == ahead->count) { /* the last line again, at no cost */
    ahead->at -= LINE;
    return;
  }
  ahead->at = ahead->tokens[ahead->token++];
  ahead->end = ahead->at + ahead->bytes;
}

/* Kept in a variable of its own over a loop, `at` need not go through memory. */
INLINE const char *fetch_line(Ahead *ahead, const char *at) {
  _mm_prefetch(at, _MM_HINT_T1);
  at += LINE;
  if (at < ahead->end) return at;
  ahead->at = at;
  fetch_next_token(ahead);
  return ahead->at;
}

/* function(queries, ...), compiled for each number of queries up to TILE_QUERIES. */
#define BY_QUERIES(function, ...)               \
  switch (queries) {                            \
  case 1: function(1, __VA_ARGS__); break;      \
  case 2: function(2, __VA_ARGS__); break;      \
  case 3: function(3, __VA_ARGS__); break;      \
  case 4: function(4, __VA_ARGS__); break;      \
  case 5: function(5, __VA_ARGS__); break;      \
  default: function(TILE_QUERIES, __VA_ARGS__); \
  }

INLINE void add_to(float *out, __m512 x) { _mm512_storeu_ps(out, _mm512_add_ps(_mm512_loadu_ps(out), x)); }

/* out [queries, 16 vectors] += a [queries, inner] b [inner, 16 vectors]. */
INLINE void accumulate_tile(int queries, int vectors, const float *a, int64_t a_stride, const float *b,
                            int64_t b_stride, float *out, int64_t out_stride, int64_t inner, Ahead *ahead) {
  __m512 sum[TILE_QUERIES][4];
  for (int q = 0; q < queries; q++)
    for (int v = 0; v < vectors; v++) sum[q][v] = _mm512_setzero_ps();
  const char *line = ahead->at;
  for (int64_t i = 0; i < inner; i++) {
    line = fetch_line(ahead, fetch_line(ahead, line));
    __m512 right[4];
    for (int v = 0; v < vectors; v++) right[v] = _mm512_load_ps(b + i * b_stride + v * LANES);
    for (int q = 0; q < queries; q++) {
      __m512 left = _mm512_set1_ps(a[q * a_stride + i]);
      for (int v = 0; v < vectors; v++) sum[q][v] = _mm512_fmadd_ps(left, right[v], sum[q][v]);
    }
  }
  ahead->at = line;
  for (int q = 0; q < queries; q++)
    for (int v = 0; v < vectors; v++) add_to(out + q * out_stride + v * LANES, sum[q][v]);
}

INLINE void accumulate_queries(int vectors, int64_t queries, const float *a, int64_t a_stride, const float *b,
                               int64_t b_stride, float *out, int64_t out_stride, int64_t inner, Ahead *ahead) {
  for (; queries >= TILE_QUERIES; queries -= TILE_QUERIES) {
    accumulate_tile(TILE_QUERIES, vectors, a, a_stride, b, b_stride, out, out_stride, inner, ahead);
    a += TILE_QUERIES * a_stride;
    out += TILE_QUERIES * out_stride;
  }
  if (queries) BY_QUERIES(accumulate_tile, vectors, a, a_stride, b, b_stride, out, out_stride, inner, ahead)
}

/* out [queries, columns] += a [queries, inner] b [inner, columns]; columns is a multiple of 16. */
static void accumulate(int64_t queries, int64_t columns, const float *a, int64_t a_stride, const float *b,
                       int64_t b_stride, float *out, int64_t out_stride, int64_t inner, Ahead *ahead) {
  int64_t column = 0;
  for (; column + 4 * LANES <= columns; column += 4 * LANES)
    accumulate_queries(4, queries, a, a_stride, b + column, b_stride, out + column, out_stride, inner, ahead);
  for (; column < columns; column += LANES)
    accumulate_queries(1, queries, a, a_stride, b + column, b_stride, out + column, out_stride, inner, ahead);
}

/* sum[query] += q[query][element] * keys. */
INLINE void add_element(int queries, const float *const *q, int64_t element, __m512 keys, __m512 *sum) {
  for (int i = 0; i < queries; i++) sum[i] = _mm512_fmadd_ps(_mm512_set1_ps(q[i][element]), keys, sum[i]);
}

/* sum[query] += the product of `count` words of a query and of 16 keys. */
INLINE void add_words(int queries, Storage storage, int64_t count, const float *const *q, const __m512i *part,
                      __m512 *sum, Ahead *ahead) {
  const char *line = ahead->at;
#pragma GCC unroll 16
  for (int64_t i = 0; i < count; i++) {
    line = fetch_line(ahead, line);
    if (storage == BFLOAT16) {
      add_element(queries, q, 2 * i, first_of(part[i]), sum);
      add_element(queries, q, 2 * i + 1, second_of(part[i]), sum);
    } else {
      add_element(queries, q, i, _mm512_castsi512_ps(part[i]), sum);
    }
  }
  ahead->at = line;
}

/* scores [queries, KEYS] = q [queries, size] times keys, which stay in registers. */
INLINE void score_tile(int queries, Storage storage, Heads keys, const float *q, int64_t q_stride, float *scores,
                       Ahead *ahead) {
  const int64_t words = keys.size / per_word(storage);
  for (int64_t key = 0; key < keys.count; key += LANES) {
    __m512 total[TILE_QUERIES], sum[TILE_QUERIES];
    for (int i = 0; i < queries; i++) total[i] = sum[i] = _mm512_setzero_ps();
    for (int64_t word = 0; word < words; word += LANES) {
      __m512i part[LANES];
      load_words(keys.tokens + key, keys.at, keys.count - key, word, words, part);
      const float *from[TILE_QUERIES];
      for (int i = 0; i < queries; i++) from[i] = q + i * q_stride + word * per_word(storage);
      if (words - word >= LANES)
        add_words(queries, storage, LANES, from, part, sum, ahead);
      else
        add_words(queries, storage, words - word, from, part, sum, ahead);
      if ((word + LANES) * per_word(storage) % SUMMED && word + LANES < words) continue;
      for (int i = 0; i < queries; i++) {
        total[i] = _mm512_add_ps(total[i], sum[i]);
        sum[i] = _mm512_setzero_ps();
      }
    }
    for (int i = 0; i < queries; i++) _mm512_store_ps(scores + i * KEYS + key, total[i]);
  }
}

/* Columns `column` .. of sums [queries, size] += weights [queries, KEYS] times values. */
INLINE void weigh_columns(int queries, int vectors, Storage storage, Heads values, int64_t column, const float *weights,
                          float *sums, int64_t stride, Ahead *ahead) {
  const __mmask16 lanes = vectors == 1 ? first_lanes(values.size - column) : (__mmask16)0xffff;
  const int64_t bytes = 4 / per_word(storage), at = values.at + column * bytes;
  __m512 sum[TILE_QUERIES][4];
  for (int i = 0; i < queries; i++)
    for (int v = 0; v < vectors; v++) sum[i][v] = _mm512_setzero_ps();
  const char *line = ahead->at;
  for (int64_t key = 0; key < values.count; key++) {
    line = fetch_line(ahead, fetch_line(ahead, line));
    __m512 value[4];
    for (int v = 0; v < vectors; v++)
      value[v] = load_floats(values.tokens[key] + at + v * LANES * bytes, lanes, storage);
    for (int i = 0; i < queries; i++) {
      __m512 weight = _mm512_set1_ps(weights[i * KEYS + key]);
      for (int v = 0; v < vectors; v++) sum[i][v] = _mm512_fmadd_ps(weight, value[v], sum[i][v]);
    }
  }
  ahead->at = line;
  for (int i = 0; i < queries; i++)
    for (int v = 0; v < vectors; v++) add_to(sums + i * stride + column + v * LANES, sum[i][v]);
}

INLINE void weigh_values(int queries, Storage storage, Heads values, const float *weights, float *sums, int64_t stride,
                         Ahead *ahead) {
  int64_t column = 0;
  for (; column + 4 * LANES <= values.size; column += 4 * LANES)
    weigh_columns(queries, 4, storage, values, column, weights, sums, stride, ahead);
  for (; column < values.size; column += LANES)
    weigh_columns(queries, 1, storage, values, column, weights, sums, stride, ahead);
}

static void score_direct(int64_t queries, Storage storage, Heads keys, const float *q, int64_t q_stride,
                         float *scores, Ahead *ahead) {
  if (storage == BFLOAT16)
    BY_QUERIES(score_tile, BFLOAT16, keys, q, q_stride, scores, ahead)
  else
    BY_QUERIES(score_tile, FLOAT32, keys, q, q_stride, scores, ahead)
}

static void weigh_direct(int64_t queries, Storage storage, Heads values, const float *weights, float *sums,
                         int64_t stride, Ahead *ahead) {
  if (storage == BFLOAT16)
    BY_QUERIES(weigh_values, BFLOAT16, values, weights, sums, stride, ahead)
  else
    BY_QUERIES(weigh_values, FLOAT32, values, weights, sums, stride, ahead)
}

/* What one thread needs for the queries of one task. */
typedef struct {
  _Alignas(64) float keys[(MAX_HEAD + 2 * LANES) * KEYS];
  _Alignas(64) float values[KEYS * MAX_HEAD];
  _Alignas(64) float queries[MAX_STATE];
  _Alignas(64) float scores[MAX_QUERIES * KEYS];
  _Alignas(64) float sums[MAX_STATE];
  float largest[MAX_STATE / LANES], total[MAX_STATE / LANES];
} Scratch;

/* Turns a query's raw scores of the keys [first, first + count) into weights, those outside [low, high)
   into 0, and rescales what was summed before where a larger score is found. */
static void weigh(Scratch *s, float *scores, int64_t query, int64_t first, int64_t count, int64_t low, int64_t high,
                  const Options *options, int64_t padded) {
  const __m512 hidden = _mm512_set1_ps(-INFINITY);
  __m512 part[KEYS / LANES], largest = hidden;
  const int vectors = (int)((count + LANES - 1) / LANES);
  for (int v = 0; v < vectors; v++) {
    __m512 x = _mm512_load_ps(scores + v * LANES);
    if (options->softcap > 0) {
      /* tanh(y) = 1 - 2 / (exp(2 y) + 1); beyond 20 it is 1 to float precision. */
      __m512 y = _mm512_div_ps(x, _mm512_set1_ps(options->softcap));
      /* In this order the bounds let NaN through. */
      y = _mm512_min_ps(_mm512_set1_ps(20.0f), _mm512_max_ps(_mm512_set1_ps(-20.0f), y));
      __m512 e = _mm512_add_ps(exponential(_mm512_add_ps(y, y)), _mm512_set1_ps(1.0f));
      __m512 tanh = _mm512_sub_ps(_mm512_set1_ps(1.0f), _mm512_div_ps(_mm512_set1_ps(2.0f), e));
      x = _mm512_mul_ps(tanh, _mm512_set1_ps(options->softcap));
    }
    const int64_t at = first + v * LANES;
    __mmask16 seen = first_lanes(high > at ? high - at : 0) & (__mmask16)~first_lanes(low > at ? low - at : 0);
    part[v] = _mm512_mask_mov_ps(hidden, seen, x);
    largest = _mm512_max_ps(largest, part[v]);
  }
  const float before = s->largest[query], top = fmaxf(before, _mm512_reduce_max_ps(largest));
  if (top == -INFINITY) {
    for (int v = 0; v < vectors; v++) { /* no score, or none but NaN */
      __mmask16 some = _mm512_cmp_ps_mask(part[v], hidden, _CMP_NEQ_UQ);
      _mm512_store_ps(scores + v * LANES, _mm512_maskz_mov_ps(some, part[v]));
    }
    return;
  }
  __m512 total = _mm512_setzero_ps();
  for (int v = 0; v < vectors; v++) {
    __m512 weight = exponential(_mm512_sub_ps(part[v], _mm512_set1_ps(top)));
    total = _mm512_add_ps(total, weight);
    _mm512_store_ps(scores + v * LANES, weight);
  }
  if (top > before) {
    const float shrink = expf(before - top);
    s->total[query] *= shrink;
    for (int64_t i = 0; i < padded; i += LANES) {
      float *at = s->sums + query * padded + i;
      _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), _mm512_set1_ps(shrink)));
    }
    s->largest[query] = top;
  }
  s->total[query] += _mm512_reduce_add_ps(total);
}

/* scores [queries, KEYS] = q [queries, size] times the keys of a tile. */
static void score_loaded(Scratch *s, int64_t queries, const float *q, int64_t q_stride, int64_t size, int64_t count,
                         Ahead *ahead) {
  __builtin_memset(s->scores, 0, (size_t)(queries * KEYS) * sizeof(float));
  const int64_t columns = (count + LANES - 1) / LANES * LANES;
  for (int64_t from = 0; from < size; from += SUMMED)
    accumulate(queries, columns, q + from, q_stride, s->keys + from * KEYS, KEYS, s->scores, KEYS,
               smaller(SUMMED, size - from), ahead);
}

/* The key heads [kv_head, kv_head + kv_heads) of a run, and of each the query heads [head, head + heads)
   of those that share it. A query's number is (key head * rows + row) * heads + head, from the first. */
typedef struct {
  const Run *run;
  int64_t kv_head, kv_heads, head, heads, group;
} Task;

static void begin(Scratch *s, const Task *task, const Options *options, int64_t size, int64_t padded, const float *q,
                  int64_t q_stride) {
  int64_t query = 0;
  for (int64_t kv = 0; kv < task->kv_heads; kv++)
    for (int64_t row = 0; row < task->run->count; row++)
      for (int64_t h = 0; h < task->heads; h++, query++) {
        const int64_t head = (task->kv_head + kv) * task->group + task->head + h;
        const float *from = q + (task->run->row + row) * q_stride + head * size;
        for (int64_t i = 0; i < padded; i += LANES) {
          __m512 part = _mm512_maskz_loadu_ps(first_lanes(size - i), from + i);
          _mm512_store_ps(s->queries + query * padded + i, _mm512_mul_ps(part, _mm512_set1_ps(options->scale)));
          _mm512_store_ps(s->sums + query * padded + i, _mm512_setzero_ps());
        }
        s->largest[query] = options->sinks ? options->sinks[head] : -INFINITY;
        s->total[query] = options->sinks ? 1.0f : 0.0f;
      }
}

static void finish(const Scratch *s, const Task *task, int64_t size, int64_t padded, float *out, int64_t out_stride) {
  int64_t query = 0;
  for (int64_t kv = 0; kv < task->kv_heads; kv++)
    for (int64_t row = 0; row < task->run->count; row++)
      for (int64_t h = 0; h < task->heads; h++, query++) {
        const int64_t head = (task->kv_head + kv) * task->group + task->head + h;
        float *to = out + (task->run->row + row) * out_stride + head * size;
        __m512 total = _mm512_set1_ps(s->total[query]);
        for (int64_t i = 0; i < size; i += LANES)
          _mm512_mask_storeu_ps(to + i, first_lanes(size - i),
                                _mm512_div_ps(_mm512_load_ps(s->sums + query * padded + i), total));
      }
}

/* The first position of the key tile that the first row of a run begins with. */
static int64_t first_tile(const Run *run, const Options *options) {
  const int64_t seen = options->window ? run->position + 1 - options->window : 0;
  return seen > 0 ? seen / KEYS * KEYS : 0;
}

/* The tile of a run that begins at `first`. */
static void look_ahead(Ahead *ahead, const Pool *pool, const Task *task, int64_t first) {
  const int64_t end = task->run->position + task->run->count;
  ahead->token = 0;
  ahead->count = smaller(end - first, KEYS);
  find_tokens(pool, task->run->table, first, ahead->count, ahead->tokens);
  fetch_next_token(ahead);
}

/* `next` is the task that this thread may take up after this one, or NULL. */
static void attend(Scratch *s, const Pool *pool, const Task *task, const Task *next, const Options *options,
                   const float *q, int64_t q_stride, float *out, int64_t out_stride, Ahead *ahead) {
  const Run *run = task->run;
  const int64_t size = pool->head, padded = (size + LANES - 1) / LANES * LANES;
  const int64_t queries = run->count * task->heads, end = run->position + run->count;
  const int direct = queries <= TILE_QUERIES; /* loading a tile does not pay for so few */
  begin(s, task, options, size, padded, q, q_stride);
  const char *tokens[KEYS];
  for (int64_t first = first_tile(run, options); first < end; first += KEYS) {
    const int64_t count = smaller(end - first, KEYS);
    find_tokens(pool, run->table, first, count, tokens);
    if (first + KEYS < end)
      look_ahead(ahead, pool, task, first + KEYS);
    else if (next)
      look_ahead(ahead, pool, next, first_tile(next->run, options));
    for (int64_t kv = 0; kv < task->kv_heads; kv++) {
      const int64_t from = kv * queries;
      const float *in = s->queries + from * padded;
      float *sums = s->sums + from * padded;
      const int64_t bytes = size * element_bytes(pool), head = task->kv_head + kv;
      const Heads keys = {tokens, count, head * bytes, size};
      const Heads values = {tokens, count, (pool->kv_heads + head) * bytes, size};
      if (direct) {
        score_direct(queries, pool->storage, keys, in, padded, s->scores, ahead);
      } else {
        if (pool->storage == BFLOAT16)
          load_tile(BFLOAT16, keys, values, s->keys, s->values);
        else
          load_tile(FLOAT32, keys, values, s->keys, s->values);
        score_loaded(s, queries, in, padded, size, count, ahead);
      }
      for (int64_t query = 0; query < queries; query++) {
        const int64_t high = run->position + query / task->heads + 1;
        const int64_t low = options->window ? high - options->window : 0;
        weigh(s, s->scores + query * KEYS, from + query, first, count, low, high, options, padded);
      }
      if (direct)
        weigh_direct(queries, pool->storage, values, s->scores, sums, padded, ahead);
      else
        accumulate(queries, padded, s->scores, KEYS, s->values, padded, sums, padded, count, ahead);
    }
  }
  finish(s, task, size, padded, out, out_stride);
}

/* How the runs are cut into tasks: by key head, and its query heads in `parts`. A run of one row is one
   task where `whole`. */
typedef struct {
  const Run *runs;
  int64_t run_count, kv_heads, group, parts;
  int whole;
} Split;

/* The task of this number; 0 where it is part of another. */
static int task_of(const Split *split, int64_t number, Task *task) {
  const int64_t per_run = split->kv_heads * split->parts, part = number % per_run;
  const int64_t heads = (split->group + split->parts - 1) / split->parts, from = part % split->parts * heads;
  const Run *run = &split->runs[number / per_run];
  *task = (Task){run, part / split->parts, 1, from, smaller(split->group - from, heads), split->group};
  if (!split->whole || run->count > 1) return 1;
  task->kv_heads = split->kv_heads;
  return part == 0;
}

/* The first task from `number` on; its number, or -1 where there is none left. */
static int64_t find_task(const Split *split, int64_t number, Task *task) {
  const int64_t tasks = split->run_count * split->kv_heads * split->parts;
  for (; number < tasks; number++)
    if (task_of(split, number, task)) return number;
  return -1;
}

/* Takes the next task off the common counter; 0 where there is none left. */
static int take(const Split *split, int64_t *counter, Task *task) {
  const int64_t tasks = split->run_count * split->kv_heads * split->parts;
  for (;;) {
    const int64_t number = __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED);
    if (number >= tasks) return 0;
    if (task_of(split, number, task)) return 1;
  }
}

/* Stores k and v [rows, kv_heads, head] at write_blocks and write_offsets [rows]; then out [rows,
   query_heads, head] = attention of q. Rows lie q_stride, k_stride, v_stride floats apart. Every row
   belongs to one of the `run_count` runs, of at most chiron_max_run(query_heads / kv_heads) rows. */
void chiron_paged_attention(const float *q, int64_t q_stride, const float *k, int64_t k_stride, const float *v,
                            int64_t v_stride, char *pool_data, int64_t block_stride, int64_t block_size,
                            int64_t kv_heads, int64_t head, int64_t storage, int64_t query_heads, const int64_t *write_blocks,
                            const int64_t *write_offsets, int64_t rows, const Run *runs, int64_t run_count,
                            float scale, float softcap, int64_t window, const float *sinks, float *out) {
  const Pool pool = {pool_data, block_stride, block_size, kv_heads, head, (Storage)storage};
  const Options options = {scale, softcap, window, sinks};
  const int64_t group = query_heads / kv_heads;
  Split split = {runs, run_count, kv_heads, group, (group + MAX_QUERIES - 1) / MAX_QUERIES, 0};
  int64_t counter = 0;
#pragma omp parallel
  {
    Scratch scratch;
    Ahead ahead = {.bytes = 2 * kv_heads * head * element_bytes(&pool), .at = pool_data, .end = pool_data};
#pragma omp single
    /* With enough rows for all threads, one task reads all of a token: see Ahead. */
    split.whole = split.parts == 1 && run_count >= 4 * omp_get_num_threads() &&
                  query_heads * (head + LANES) <= MAX_STATE;
#pragma omp for
    for (int64_t row = 0; row < rows; row++) {
      store_heads(&pool, write_blocks[row], write_offsets[row], 0, k + row * k_stride);
      store_heads(&pool, write_blocks[row], write_offsets[row], 1, v + row * v_stride);
    }
    Task task, guess;
    while (take(&split, &counter, &task)) {
      /* Another thread may take that one first: what is fetched ahead is then fetched for nothing. */
      const int64_t next = find_task(&split, __atomic_load_n(&counter, __ATOMIC_RELAXED), &guess);
      attend(&scratch, &pool, &task, next < 0 ? 0 : &guess, &options, q, q_stride, out, query_heads * head, &ahead);
    }
  }
}

/* The longest run for `group` query heads per key head. */
int64_t chiron_max_run(int64_t group) { return group >= MAX_QUERIES ? 1 : MAX_QUERIES / group; }
