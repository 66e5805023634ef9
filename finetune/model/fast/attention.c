/* Causal attention over documents that lie end to end, and its gradients: memory grows with the tokens, not their square.

   A query sees the keys of its own document up to itself, and all keys of the document that its own continues.
   Queries and keys meet in blocks. What is multiplied lies in words of 32 bits along the summed axis: two bfloat16
   or one float. Sums, exponentials and what is kept between blocks are float. A task (a document and a key head; in the
   gradient a document with all that continue it) writes what no other task writes, so results do not depend on threads.

   H query heads, G key heads, D head size; N = keys a document sees, L = its own tokens. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#define VECTORS 4
#else
#define LANES 8
#define VECTORS 2
#endif
#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(__AVX512F__)
#define IN_REGISTER(x) __asm__("" : "+v"(x)) /* or the compiler loads it again for every row */
#else
#define IN_REGISTER(x) (void)(x)
#endif
#define ROWS 4   /* of a tile of a product; its columns are VECTORS vectors */
#define BLOCK 64 /* queries that meet keys at a time; in the gradient as many keys */
#define KEYS 256 /* keys at a time in the forward pass */
#define PAD 16   /* blocks are filled up with zeros to a multiple of it */
#define LOG2_E 1.44269504f
#define INLINE static inline __attribute__((always_inline))

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t bfloats __attribute__((vector_size(2 * LANES)));
typedef uint32_t eight __attribute__((vector_size(32)));
/* Where they lie in memory: at any address, and in memory that is also seen as numbers of another type. */
#define ANYWHERE(type) __attribute__((aligned(sizeof(type)), may_alias))
typedef uint16_t half ANYWHERE(uint16_t);
typedef uint32_t word ANYWHERE(uint32_t);
typedef floats floats_at ANYWHERE(float);
typedef words words_at ANYWHERE(uint32_t);
typedef bfloats bfloats_at ANYWHERE(uint16_t);
typedef eight eight_at ANYWHERE(uint16_t);

typedef struct {
    void *data;
    int64_t token, head; /* strides, in elements */
} Tensor;

typedef struct {
    int64_t start, length, prefix_start, prefix_length;
} Document;

typedef struct {
    Tensor query, key, value, out, grad_out, grad_query, grad_key, grad_value;
    float *lse; /* [H, T], the logarithm to base 2 of every query's sum of exponentials */
    const Document *documents;
    const int64_t *roots; /* in the gradient: where each task's documents begin in `members`, and the end */
    const int64_t *members;
    int64_t tasks, tokens, query_heads, key_heads, head_size;
    float scale;
    int32_t threads;
} Attention;

INLINE int64_t padded(int64_t count) { return (count + PAD - 1) / PAD * PAD; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE floats all(float value) { return value - (floats){0}; }
INLINE floats load(const float *from) { return *(const floats_at *)from; }
INLINE void store(float *to, floats value) { *(floats_at *)to = value; }
INLINE floats choose(ints condition, floats yes, floats no) { return (floats)((condition & (ints)yes) | (~condition & (ints)no)); }

/* 2 to the power of x, to 2e-7 of it; 0 or next to it far below, NaN stays NaN. */
INLINE floats power_of_two(floats x) {
#if defined(__AVX512F__)
    x = (floats)_mm512_max_ps(_mm512_set1_ps(-200), (__m512)x); /* of NaN and a number the second */
    floats whole = (floats)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    x = choose(x < all(-126), all(-126), x);
    floats shifted = x + all(12582912); /* 1.5 * 2^23: the nearest integer stands in the low bits */
    floats whole = shifted - all(12582912);
#endif
    floats rest = x - whole, y = all(1.327647035e-03f);
    y = y * rest + all(9.675541321e-03f);
    y = y * rest + all(5.550713279e-02f);
    y = y * rest + all(2.402211972e-01f);
    y = y * rest + all(6.931469671e-01f);
    y = y * rest + all(1.000000072e+00f);
#if defined(__AVX512F__)
    return (floats)_mm512_scalef_ps((__m512)y, (__m512)whole);
#else
    return y * (floats)(((ints)shifted + 127) << 23);
#endif
}

INLINE floats multiply_add(const int halves, floats sum, uint32_t a, words b) {
#if defined(__AVX512BF16__)
    if (halves) return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
#endif
    if (halves) {
        union { uint32_t bits; float value; } low = {a << 16}, high = {a & 0xffff0000u};
        return sum + all(low.value) * (floats)(b << 16) + all(high.value) * (floats)(b & 0xffff0000u);
    }
    union { uint32_t bits; float value; } single = {a};
    return sum + all(single.value) * (floats)b;
}

INLINE void tile(const int halves, const int vectors, const word *a, int64_t lda, const word *b, int64_t ldb, float *c,
                 int64_t ldc, int64_t depth, int add) {
    floats sums[ROWS][VECTORS];
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < vectors; v++) sums[r][v] = add ? load(c + r * ldc + v * LANES) : all(0);
    for (int64_t k = 0; k < depth; k++) {
        words column[VECTORS];
        for (int v = 0; v < vectors; v++) {
            column[v] = *(const words_at *)(b + k * ldb + v * LANES);
            IN_REGISTER(column[v]);
        }
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < vectors; v++) sums[r][v] = multiply_add(halves, sums[r][v], a[r * lda + k], column[v]);
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < vectors; v++) store(c + r * ldc + v * LANES, sums[r][v]);
}

INLINE void strip(const int halves, const int vectors, int64_t rows, const word *a, int64_t lda, const word *b, int64_t ldb,
                  float *c, int64_t ldc, int64_t depth, int add) {
    for (int64_t row = 0; row < rows; row += ROWS)
        tile(halves, vectors, a + row * lda, lda, b, ldb, c + row * ldc, ldc, depth, add);
}

INLINE void product_of(const int halves, int64_t rows, int64_t columns, int64_t depth, const word *a, int64_t lda,
                       const word *b, int64_t ldb, float *c, int64_t ldc, int add) {
    for (; columns >= VECTORS * LANES; columns -= VECTORS * LANES, b += VECTORS * LANES, c += VECTORS * LANES)
        strip(halves, VECTORS, rows, a, lda, b, ldb, c, ldc, depth, add);
    switch (columns / LANES) {
#if VECTORS > 2
    case 3: strip(halves, 3, rows, a, lda, b, ldb, c, ldc, depth, add); break;
    case 2: strip(halves, 2, rows, a, lda, b, ldb, c, ldc, depth, add); break;
#endif
    case 1: strip(halves, 1, rows, a, lda, b, ldb, c, ldc, depth, add); break;
    }
}

/* C [rows, columns] = or += A [rows, depth] B [depth, columns]; depth in words, columns a multiple of LANES. */
static __attribute__((noinline)) void product_of_halves(int64_t rows, int64_t columns, int64_t depth, const word *a,
        int64_t lda, const word *b, int64_t ldb, float *c, int64_t ldc, int add) {
    product_of(1, rows, columns, depth, a, lda, b, ldb, c, ldc, add);
}
static __attribute__((noinline)) void product_of_floats(int64_t rows, int64_t columns, int64_t depth, const word *a,
        int64_t lda, const word *b, int64_t ldb, float *c, int64_t ldc, int add) {
    product_of(0, rows, columns, depth, a, lda, b, ldb, c, ldc, add);
}
#define product(halves, ...) ((halves) ? product_of_halves(__VA_ARGS__) : product_of_floats(__VA_ARGS__))

INLINE ints lanes(void) {
    ints lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    return lane;
}

/* The nearest bfloat16, ties to even; NaN stays NaN. */
INLINE bfloats rounded(floats x) {
#if defined(__AVX512BF16__)
    return (bfloats)_mm512_cvtneps_pbh((__m512)x);
#endif
    words bits = (words)x;
    floats even = (floats)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
    return __builtin_convertvector((words)choose(x == x, even, (floats)((words){0} + 0x7fc0u)), bfloats);
}

INLINE float highest_of(floats x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)x);
#else
    float high = x[0];
    for (int i = 1; i < LANES; i++) high = high > x[i] ? high : x[i];
    return high;
#endif
}

INLINE float sum_of(floats x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#else
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += x[i];
    return sum;
#endif
}

INLINE floats get(const int halves, const void *row, int64_t column) {
    if (!halves) return load((const float *)row + column);
    return (floats)(__builtin_convertvector(*(const bfloats_at *)((const half *)row + column), words) << 16);
}

/* Turns words; rows and columns are multiples of 8. */
INLINE void transpose(const word *from, int64_t rows, int64_t columns, int64_t ldf, word *to, int64_t ldt) {
    for (int64_t row = 0; row < rows; row += 8)
        for (int64_t column = 0; column < columns; column += 8) {
            eight x[8], y[8];
            for (int i = 0; i < 8; i++) x[i] = *(const eight_at *)(from + (row + i) * ldf + column);
            for (int i = 0; i < 8; i += 2) { /* turns squares of 2, 4, 8 words */
                y[i] = __builtin_shufflevector(x[i], x[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
                y[i + 1] = __builtin_shufflevector(x[i], x[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
            }
            for (int i = 0; i < 8; i += i % 4 == 1 ? 3 : 1) {
                x[i] = __builtin_shufflevector(y[i], y[i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
                x[i + 2] = __builtin_shufflevector(y[i], y[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
            }
            for (int i = 0; i < 4; i++) {
                y[i] = __builtin_shufflevector(x[i], x[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
                y[i + 4] = __builtin_shufflevector(x[i], x[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
            }
            for (int i = 0; i < 8; i++) *(eight_at *)(to + (column + i) * ldt + row) = y[i];
        }
}

/* Rows of one head, each filled up with zeros to `width` words. */
INLINE void gather(const int halves, Tensor t, int64_t head, int64_t start, int64_t rows, int64_t size, word *to,
                   int64_t width) {
    int64_t element = halves ? 2 : 4, bytes = size * element, whole = bytes / 32 * 32;
    const char *from = (const char *)t.data + (start * t.token + head * t.head) * element;
    for (int64_t row = 0; row < rows; row++, from += t.token * element, to += width) {
        for (int64_t at = 0; at < whole; at += 32) *(eight_at *)((char *)to + at) = *(const eight_at *)(from + at);
        if (whole == width * 4) continue;
        memcpy((char *)to + whole, from + whole, bytes - whole);
        memset((char *)to + bytes, 0, width * 4 - bytes);
    }
}

/* The keys or values a document sees: its prefix's, then its own; zeros up to a multiple of PAD. */
INLINE void gather_seen(const int halves, Tensor t, int64_t head, Document d, int64_t size, word *to, int64_t width) {
    int64_t seen = d.prefix_length + d.length;
    gather(halves, t, head, d.prefix_start, d.prefix_length, size, to, width);
    gather(halves, t, head, d.start, d.length, size, to + d.prefix_length * width, width);
    memset(to + seen * width, 0, (padded(seen) - seen) * width * 4);
}

INLINE void gather_block(const int halves, Tensor t, int64_t head, int64_t start, int64_t rows, int64_t size,
                         word *to, int64_t width) {
    gather(halves, t, head, start, rows, size, to, width);
    memset(to + rows * width, 0, (padded(rows) - rows) * width * 4);
}

/* From words along a row to words along a column, of so many columns; strides in words. */
INLINE void interleave(const int halves, const word *from, int64_t rows, int64_t columns, int64_t stride, word *to,
                       int64_t to_stride) {
    for (int64_t row = 0; row < rows; row += halves ? 2 : 1, to += to_stride) {
        if (!halves) {
            memcpy(to, from + row * stride, columns * 4);
            continue;
        }
        const half *even = (const half *)(from + row * stride), *odd = even + 2 * stride;
        for (int64_t column = 0; column < columns; column++) to[column] = even[column] | (uint32_t)odd[column] << 16;
    }
}

/* The products of rows of two blocks, summed. */
INLINE float dot(const int halves, const word *x, const word *y, int64_t columns) {
    floats sum = all(0);
    for (int64_t column = 0; column < columns; column += LANES) sum += get(halves, x, column) * get(halves, y, column);
    return sum_of(sum);
}

/* Writes one vector where numbers lie as the tensors' do: also how a product's words want them along a row. */
INLINE void put(const int halves, void *row, int64_t column, floats x) {
    if (halves) *(bfloats_at *)((half *)row + column) = rounded(x);
    else store((float *)row + column, x);
}

INLINE void scatter(const int halves, const float *from, int64_t ldf, int64_t rows, int64_t size, float factor,
                    Tensor t, int64_t head, int64_t start) {
    int64_t element = halves ? 2 : 4, whole = size / LANES * LANES;
    for (int64_t row = 0; row < rows; row++, from += ldf) {
        char *to = (char *)t.data + ((start + row) * t.token + head * t.head) * element;
        for (int64_t column = 0; column < whole; column += LANES) put(halves, to, column, load(from + column) * all(factor));
        if (whole == size) continue;
        char last[4 * LANES];
        put(halves, last, 0, load(from + whole) * all(factor));
        memcpy(to + whole * element, last, (size - whole) * element);
    }
}

/* Cuts aligned pieces from one allocation. */
INLINE void *take(char **memory, int64_t bytes) {
    char *piece = *memory;
    *memory += (bytes + 63) / 64 * 64;
    return piece;
}

/* -- forward -- */

typedef struct {
    word *rows, *keys, *values, *query, *chances;
    float *scores, *sums, *highest, *before, *total;
} Forward;

static int64_t forward_room(int64_t seen, int64_t width, int64_t columns, char *memory, Forward *f) {
    char *start = memory;
    f->rows = take(&memory, padded(seen) * width * 4);
    f->keys = take(&memory, (padded(seen) + KEYS) * width * 4);
    f->values = take(&memory, padded(seen) * width * 4);
    f->query = take(&memory, BLOCK * width * 4);
    f->chances = take(&memory, BLOCK * KEYS * 4);
    f->scores = take(&memory, BLOCK * KEYS * 4);
    f->sums = take(&memory, BLOCK * columns * 4);
    f->highest = take(&memory, BLOCK * 4);
    f->before = take(&memory, BLOCK * 4);
    f->total = take(&memory, BLOCK * 4);
    return memory - start;
}

/* Scores of some keys become chances, up to a factor a row; what was summed before is scaled to the new highest score.
   Of these keys, `visible` are seen by the first row, one more by each next. */
INLINE void softmax_block(const int halves, Forward *f, int64_t rows, int64_t keys, int64_t visible, float factor,
                          int64_t columns, int first) {
    float highest[BLOCK];
    for (int64_t row = 0; row < rows; row++) {
        float *score = f->scores + row * KEYS;
        int64_t count = most(0, least(keys, visible + row)), whole = count / LANES * LANES;
        floats high = all(f->highest[row]);
        for (int64_t column = 0; column < whole; column += LANES) {
            floats x = load(score + column) * all(factor);
            high = choose(high > x, high, x);
        }
        if (whole < count) {
            floats x = load(score + whole) * all(factor);
            high = choose((lanes() < (int32_t)(count - whole)) & ~(high > x), x, high);
        }
        highest[row] = highest_of(high);
    }
    for (int64_t row = 0; row < rows; row += LANES) {
        store(f->before + row, power_of_two(load(f->highest + row) - load(highest + row)));
        store(f->highest + row, load(highest + row));
    }
    for (int64_t row = 0; row < rows; row++) {
        float *score = f->scores + row * KEYS;
        word *chance = f->chances + row * KEYS;
        int64_t count = most(0, least(keys, visible + row)), whole = count / LANES * LANES;
        floats high = all(highest[row]), total = all(0);
        for (int64_t column = 0; column < whole; column += LANES) {
            floats x = power_of_two(load(score + column) * all(factor) - high);
            total += x;
            put(halves, chance, column, x);
        }
        for (int64_t column = whole; column < keys; column += LANES) {
            floats x = power_of_two(load(score + column) * all(factor) - high);
            x = choose(lanes() < (int32_t)(count - column), x, all(0));
            total += x;
            put(halves, chance, column, x);
        }
        f->total[row] = (first ? 0 : f->total[row] * f->before[row]) + sum_of(total);
    }
    if (first) return;
    for (int64_t row = 0; row < rows; row++)
        for (int64_t column = 0; column < columns; column += LANES) {
            float *sum = f->sums + row * columns + column;
            store(sum, load(sum) * all(f->before[row]));
        }
}

INLINE int forward_task(const int halves, const Attention *a, Document d, int64_t group) {
    int64_t size = a->head_size, columns = padded(size), width = halves ? columns / 2 : columns;
    int64_t seen = d.prefix_length + d.length, per_group = a->query_heads / a->key_heads;
    Forward f;
    char *memory = aligned_alloc(64, forward_room(seen, width, columns, 0, &f));
    if (!memory) return 1;
    forward_room(seen, width, columns, memory, &f);
    gather_seen(halves, a->key, group, d, size, f.rows, width);
    for (int64_t key = 0; key < seen; key += KEYS)
        transpose(f.rows + key * width, padded(least(KEYS, seen - key)), width, width, f.keys + key * width, KEYS);
    gather_seen(halves, a->value, group, d, size, f.rows, width);
    interleave(halves, f.rows, padded(seen), columns, width, f.values, columns);
    for (int64_t head = group * per_group; head < (group + 1) * per_group; head++)
        for (int64_t query = 0; query < d.length; query += BLOCK) {
            int64_t queries = least(BLOCK, d.length - query), rows = padded(queries), start = d.start + query;
            int64_t seen_by_first = d.prefix_length + query + 1, seen_by_last = d.prefix_length + query + queries;
            gather_block(halves, a->query, head, start, queries, size, f.query, width);
            for (int64_t row = 0; row < rows; row++) f.highest[row] = -INFINITY;
            for (int64_t key = 0; key < seen_by_last; key += KEYS) {
                int64_t keys = padded(least(KEYS, seen_by_last - key));
                product(halves, rows, keys, width, f.query, width, f.keys + key * width, KEYS, f.scores, KEYS, 0);
                softmax_block(halves, &f, rows, keys, seen_by_first - key, a->scale * LOG2_E, columns, key == 0);
                product(halves, rows, columns, halves ? keys / 2 : keys, f.chances, KEYS, f.values + key * width, columns,
                        f.sums, columns, key > 0);
            }
            for (int64_t row = 0; row < queries; row++) {
                scatter(halves, f.sums + row * columns, columns, 1, size, 1 / f.total[row], a->out, head, start + row);
                a->lse[head * a->tokens + start + row] = f.highest[row] + log2f(f.total[row]);
            }
        }
    free(memory);
    return 0;
}

/* -- gradients -- */

typedef struct {
    word *keys, *values, *key_pairs, *query, *out, *grad, *query_columns, *grad_columns, *query_pairs, *grad_pairs;
    word *chances, *slopes, *slope_pairs, *slopes_turned;
    float *scores, *grad_chances, *grad_query, *grad_keys, *grad_values, *grad_root_keys, *grad_root_values, *lse, *delta;
} Backward;

static int64_t backward_room(int64_t seen, int64_t root, int64_t width, int64_t columns, char *memory, Backward *b) {
    char *start = memory;
    word **of_seen[] = {&b->keys, &b->values, &b->key_pairs};
    word **of_block[] = {&b->query, &b->out, &b->grad, &b->query_columns, &b->grad_columns, &b->query_pairs, &b->grad_pairs};
    word **squares[] = {&b->chances, &b->slopes, &b->slope_pairs, &b->slopes_turned};
    for (int i = 0; i < 3; i++) *of_seen[i] = take(&memory, padded(seen) * width * 4);
    for (int i = 0; i < 7; i++) *of_block[i] = take(&memory, BLOCK * width * 4);
    for (int i = 0; i < 4; i++) *squares[i] = take(&memory, BLOCK * BLOCK * 4);
    b->scores = take(&memory, BLOCK * BLOCK * 4);
    b->grad_chances = take(&memory, BLOCK * BLOCK * 4);
    b->grad_query = take(&memory, BLOCK * columns * 4);
    b->grad_keys = take(&memory, padded(seen) * columns * 4);
    b->grad_values = take(&memory, padded(seen) * columns * 4);
    b->grad_root_keys = take(&memory, root * columns * 4);
    b->grad_root_values = take(&memory, root * columns * 4);
    b->lse = take(&memory, BLOCK * 4);
    b->delta = take(&memory, BLOCK * 4);
    return memory - start;
}

/* Chances and their slopes of one block of keys (rows) for one block of queries (columns). */
INLINE void softmax_gradient_block(const int halves, Backward *b, int64_t keys, int64_t queries, int64_t first_key,
                                   int64_t last_seen, float factor) {
    for (int64_t row = 0; row < keys; row++) {
        int64_t first_query = first_key + row - last_seen; /* that sees this key */
        float *scores = b->scores + row * BLOCK, *grads = b->grad_chances + row * BLOCK;
        for (int64_t column = 0; column < queries; column += LANES) {
            floats chance = power_of_two(load(scores + column) * all(factor) - load(b->lse + column));
            floats slope = chance * (load(grads + column) - load(b->delta + column));
            if (column < first_query) {
                ints sees = lanes() >= (int32_t)(first_query - column);
                chance = choose(sees, chance, all(0));
                slope = choose(sees, slope, all(0));
            }
            put(halves, b->chances + row * BLOCK, column, chance);
            put(halves, b->slopes + row * BLOCK, column, slope);
        }
    }
    interleave(halves, b->slopes, keys, queries, BLOCK, b->slope_pairs, BLOCK);
    transpose(b->slope_pairs, halves ? keys / 2 : keys, queries, BLOCK, b->slopes_turned, BLOCK);
}

INLINE void backward_document(const int halves, const Attention *a, Backward *b, Document d, int64_t head) {
    int64_t size = a->head_size, columns = padded(size), width = halves ? columns / 2 : columns;
    int64_t seen = d.prefix_length + d.length;
    for (int64_t query = 0; query < d.length; query += BLOCK) {
        int64_t queries = least(BLOCK, d.length - query), filled = padded(queries), start = d.start + query;
        int64_t depth = halves ? filled / 2 : filled, last_seen = d.prefix_length + query;
        gather_block(halves, a->query, head, start, queries, size, b->query, width);
        gather_block(halves, a->grad_out, head, start, queries, size, b->grad, width);
        gather_block(halves, a->out, head, start, queries, size, b->out, width);
        transpose(b->query, filled, width, width, b->query_columns, BLOCK);
        transpose(b->grad, filled, width, width, b->grad_columns, BLOCK);
        interleave(halves, b->query, filled, columns, width, b->query_pairs, columns);
        interleave(halves, b->grad, filled, columns, width, b->grad_pairs, columns);
        for (int64_t row = 0; row < filled; row++) {
            b->lse[row] = row < queries ? a->lse[head * a->tokens + start + row] : INFINITY;
            b->delta[row] = dot(halves, b->grad + row * width, b->out + row * width, columns);
        }
        for (int64_t key = 0; key < last_seen + queries; key += BLOCK) {
            int64_t keys = padded(least(BLOCK, seen - key));
            product(halves, keys, filled, width, b->keys + key * width, width, b->query_columns, BLOCK, b->scores, BLOCK, 0);
            product(halves, keys, filled, width, b->values + key * width, width, b->grad_columns, BLOCK, b->grad_chances,
                    BLOCK, 0);
            softmax_gradient_block(halves, b, keys, filled, key, last_seen, a->scale * LOG2_E);
            product(halves, keys, columns, depth, b->chances, BLOCK, b->grad_pairs, columns, b->grad_values + key * columns,
                    columns, 1);
            product(halves, keys, columns, depth, b->slopes, BLOCK, b->query_pairs, columns, b->grad_keys + key * columns,
                    columns, 1);
            product(halves, filled, columns, halves ? keys / 2 : keys, b->slopes_turned, BLOCK, b->key_pairs + key * width,
                    columns, b->grad_query, columns, key > 0);
        }
        scatter(halves, b->grad_query, columns, queries, size, a->scale, a->grad_query, head, start);
    }
}

/* A document and all that continue it: what these add to the gradients of its keys and values is summed in one place. */
INLINE int backward_task(const int halves, const Attention *a, const int64_t *members, int64_t count, int64_t group) {
    int64_t size = a->head_size, columns = padded(size), width = halves ? columns / 2 : columns;
    int64_t per_group = a->query_heads / a->key_heads, longest = 0;
    Document root = a->documents[members[0]];
    for (int64_t i = 0; i < count; i++) {
        Document d = a->documents[members[i]];
        longest = most(longest, d.prefix_length + d.length);
    }
    Backward b;
    char *memory = aligned_alloc(64, backward_room(longest, root.length, width, columns, 0, &b));
    if (!memory) return 1;
    backward_room(longest, root.length, width, columns, memory, &b);
    memset(b.grad_root_keys, 0, root.length * columns * 4);
    memset(b.grad_root_values, 0, root.length * columns * 4);
    for (int64_t i = 0; i < count; i++) {
        Document d = a->documents[members[i]];
        int64_t seen = d.prefix_length + d.length, shared = i ? d.prefix_length : root.length;
        gather_seen(halves, a->key, group, d, size, b.keys, width);
        gather_seen(halves, a->value, group, d, size, b.values, width);
        interleave(halves, b.keys, padded(seen), columns, width, b.key_pairs, columns);
        memset(b.grad_keys, 0, padded(seen) * columns * 4);
        memset(b.grad_values, 0, padded(seen) * columns * 4);
        for (int64_t head = group * per_group; head < (group + 1) * per_group; head++)
            backward_document(halves, a, &b, d, head);
        for (int64_t at = 0; at < shared * columns; at++) b.grad_root_keys[at] += b.grad_keys[at];
        for (int64_t at = 0; at < shared * columns; at++) b.grad_root_values[at] += b.grad_values[at];
        if (!i) continue;
        scatter(halves, b.grad_keys + shared * columns, columns, d.length, size, a->scale, a->grad_key, group, d.start);
        scatter(halves, b.grad_values + shared * columns, columns, d.length, size, 1, a->grad_value, group, d.start);
    }
    scatter(halves, b.grad_root_keys, columns, root.length, size, a->scale, a->grad_key, group, root.start);
    scatter(halves, b.grad_root_values, columns, root.length, size, 1, a->grad_value, group, root.start);
    free(memory);
    return 0;
}

/* Both return how many tasks found no memory. */
int64_t attention_forward(const Attention *a, int32_t halves) {
    int64_t failed = 0, tasks = a->tasks * a->key_heads;
#pragma omp parallel for schedule(dynamic) num_threads(a->threads) reduction(+ : failed)
    for (int64_t task = 0; task < tasks; task++) {
        Document d = a->documents[task / a->key_heads];
        int64_t group = task % a->key_heads;
        failed += halves ? forward_task(1, a, d, group) : forward_task(0, a, d, group);
    }
    return failed;
}

int64_t attention_backward(const Attention *a, int32_t halves) {
    int64_t failed = 0, tasks = a->tasks * a->key_heads;
#pragma omp parallel for schedule(dynamic) num_threads(a->threads) reduction(+ : failed)
    for (int64_t task = 0; task < tasks; task++) {
        int64_t first = a->roots[task / a->key_heads], count = a->roots[task / a->key_heads + 1] - first;
        int64_t group = task % a->key_heads;
        failed += halves ? backward_task(1, a, a->members + first, count, group)
                         : backward_task(0, a, a->members + first, count, group);
    }
    return failed;
}
