/* Elementwise and row-wise pieces of a transformer layer, for a CPU.

   Numbers are stored as bfloat16 or float32 (`bf16` says which) and computed as float32. Rows are shared among threads
   and no sum crosses rows, so that a result does not depend on the number of threads. NaN and infinity come out where
   the formula has them: compile without -ffast-math. Every pointer is to plain, row-major memory; sizes are elements.
*/
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define SIMD _Pragma("omp simd")
#define MIN_SHARED 16384 /* elements; below, waking the other threads costs more than they save */

typedef int64_t size;

INLINE uint32_t bits_of(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
INLINE float of_bits(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }

INLINE float get(const void *p, size i, const int bf16) {
    return bf16 ? of_bits((uint32_t)((const uint16_t *)p)[i] << 16) : ((const float *)p)[i];
}

/* To the nearest bfloat16, ties to even, as torch rounds; NaN stays NaN. */
INLINE void put(void *p, size i, float x, const int bf16) {
    if (!bf16) { ((float *)p)[i] = x; return; }
    uint32_t u = bits_of(x);
    uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    ((uint16_t *)p)[i] = (uint16_t)((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

INLINE void *at(void *p, size i, const int bf16) { return (char *)p + i * (bf16 ? 2 : 4); }
INLINE const void *in(const void *p, size i, const int bf16) { return (const char *)p + i * (bf16 ? 2 : 4); }

/* exp to 4 ulp, 0 below -87.7 and infinite above 88.4; the polynomial is the Taylor series on -0.35 .. 0.35. */
INLINE float exp_(float x) {
    float c = -88.0f > x ? -88.0f : x; /* NaN stays */
    c = 89.0f < c ? 89.0f : c;
    float shifted = __builtin_fmaf(c, 1.44269504f, 12582912.0f); /* the integer sits in the low bits */
    float n = shifted - 12582912.0f;
    float r = __builtin_fmaf(n, -0.693147181f, c); /* 2e-9 n off, at most 2 ulp where x is -87 or 88 */
    float p = __builtin_fmaf(1.38888889e-3f, r, 8.33333333e-3f);
    p = __builtin_fmaf(p, r, 4.16666667e-2f);
    p = __builtin_fmaf(p, r, 1.66666667e-1f);
    p = __builtin_fmaf(p, r, 0.5f);
    p = __builtin_fmaf(p, r, 1.0f);
    p = __builtin_fmaf(p, r, 1.0f);
    return p * of_bits((bits_of(shifted) << 23) + 0x3f800000u); /* times 2^n; the ends of n give 0 and infinity */
}

/* A kernel's body is written once; the caller's `bf16` becomes a constant in each of the two copies. */
#define FOR_ROWS(rows) _Pragma("omp parallel for schedule(static) num_threads(threads) if (total >= MIN_SHARED)") \
    for (size row = 0; row < (rows); row++)
#define BOTH(body, ...) do { if (bf16) body(__VA_ARGS__, 1); else body(__VA_ARGS__, 0); } while (0)

/* y = x / rms(x) * w; scale[row] = 1 / rms(x), kept for the gradient. */
INLINE void rms_norm_row(const void *x, const float *w, void *y, float *scale, size width, float eps, const int bf16) {
    float squares = 0;
    _Pragma("omp simd reduction(+ : squares)")
    for (size i = 0; i < width; i++) { float v = get(x, i, bf16); squares += v * v; }
    float s = 1.0f / __builtin_sqrtf(squares / (float)width + eps);
    *scale = s;
    SIMD for (size i = 0; i < width; i++) put(y, i, get(x, i, bf16) * s * w[i], bf16);
}

void rms_norm(const void *x, const float *w, void *y, float *scale, size rows, size width, float eps, int bf16, int threads) {
    size total = rows * width;
    FOR_ROWS(rows)
        BOTH(rms_norm_row, in(x, row * width, bf16), w, at(y, row * width, bf16), scale + row, width, eps);
}

/* dx = s (g w - x s^2 mean(g w x)), g the gradient of y. */
INLINE void rms_norm_gradient_row(
    const void *g, const void *x, const float *w, float s, void *dx, size width, const int bf16) {
    float dot = 0;
    _Pragma("omp simd reduction(+ : dot)")
    for (size i = 0; i < width; i++) dot += get(g, i, bf16) * w[i] * get(x, i, bf16);
    float c = dot / (float)width * s * s;
    SIMD for (size i = 0; i < width; i++) put(dx, i, s * (get(g, i, bf16) * w[i] - get(x, i, bf16) * c), bf16);
}

void rms_norm_gradient(const void *g, const void *x, const float *w, const float *scale, void *dx,
                       size rows, size width, int bf16, int threads) {
    size total = rows * width;
    FOR_ROWS(rows)
        BOTH(rms_norm_gradient_row, in(g, row * width, bf16), in(x, row * width, bf16), w, scale[row],
             at(dx, row * width, bf16), width);
}

/* Rotary embedding of one head: halves (a, b) become (a c - b s, b c + a s); `back` is the transpose, its gradient. */
INLINE void rotate_head(const void *x, const void *c, const void *s, void *y, size half, int back, const int bf16) {
    SIMD for (size i = 0; i < half; i++) {
        float a = get(x, i, bf16), b = get(x, i + half, bf16);
        float s_low = get(s, i, bf16), s_high = get(s, i + half, bf16);
        float to_low = back ? s_high : -s_low, to_high = back ? -s_low : s_high;
        put(y, i, a * get(c, i, bf16) + b * to_low, bf16);
        put(y, i + half, b * get(c, i + half, bf16) + a * to_high, bf16);
    }
}

/* x by strides, [tokens, heads, 2 half]; y contiguous; cosines and sines [positions, 2 half], repeated over the tokens. */
void rotate(const void *x, size token_stride, size head_stride, const void *c, const void *s, size positions, void *y,
            size tokens, size heads, size half, int back, int bf16, int threads) {
    size total = tokens * heads * half * 2;
    FOR_ROWS(tokens) for (size head = 0; head < heads; head++) {
        size angle = row % positions * half * 2;
        BOTH(rotate_head, in(x, row * token_stride + head * head_stride, bf16), in(c, angle, bf16), in(s, angle, bf16),
             at(y, (row * heads + head) * half * 2, bf16), half, back);
    }
}

/* Gates: x sigmoid(u(x)); u is x (SiLU) or 2 sqrt(2/pi) (x + 0.044715 x^3) (GELU by tanh). `slope` is du/dx. */
INLINE float gate_sigmoid(float x, int gelu, float *slope) {
    const float k = 1.59576912f, cubic = 0.044715f;
    float u = gelu ? k * (x + cubic * x * x * x) : x;
    *slope = gelu ? k * (1.0f + 3.0f * cubic * x * x) : 1.0f;
    return 1.0f / (1.0f + exp_(-u));
}

INLINE void gated_piece(const void *gate, const void *up, void *y, size count, int gelu, const int bf16) {
    SIMD for (size i = 0; i < count; i++) {
        float slope, x = get(gate, i, bf16), s = gate_sigmoid(x, gelu, &slope);
        put(y, i, x * s * get(up, i, bf16), bf16);
    }
}

/* dgate = g up s (1 + x (1 - s) slope), dup = g x s. */
INLINE void gated_gradient_piece(
    const void *g, const void *gate, const void *up, void *dgate, void *dup, size count, int gelu, const int bf16) {
    SIMD for (size i = 0; i < count; i++) {
        float slope, x = get(gate, i, bf16), s = gate_sigmoid(x, gelu, &slope), d = get(g, i, bf16);
        put(dgate, i, d * get(up, i, bf16) * s * (1.0f + x * (1.0f - s) * slope), bf16);
        put(dup, i, d * x * s, bf16);
    }
}

#define PIECE 2048

void gated(const void *gate, const void *up, void *y, size total, int gelu, int bf16, int threads) {
    FOR_ROWS((total + PIECE - 1) / PIECE) {
        size first = row * PIECE, count = total - first < PIECE ? total - first : PIECE;
        const void *a = in(gate, first, bf16), *b = in(up, first, bf16);
        if (gelu) BOTH(gated_piece, a, b, at(y, first, bf16), count, 1);
        else BOTH(gated_piece, a, b, at(y, first, bf16), count, 0);
    }
}

void gated_gradient(const void *g, const void *gate, const void *up, void *dgate, void *dup,
                    size total, int gelu, int bf16, int threads) {
    FOR_ROWS((total + PIECE - 1) / PIECE) {
        size first = row * PIECE, count = total - first < PIECE ? total - first : PIECE;
        const void *d = in(g, first, bf16), *a = in(gate, first, bf16), *b = in(up, first, bf16);
        void *da = at(dgate, first, bf16), *db = at(dup, first, bf16);
        if (gelu) BOTH(gated_gradient_piece, d, a, b, da, db, count, 1);
        else BOTH(gated_gradient_piece, d, a, b, da, db, count, 0);
    }
}

/* A logit of a product: scale x, and with a cap, cap tanh(scale x / cap). `slope` is its derivative. */
INLINE float logit(float x, float scale, float cap, float *slope, const int capped) {
    if (!capped) { *slope = scale; return scale * x; }
    float t = 1.0f - 2.0f / (1.0f + exp_(2.0f / cap * scale * x));
    *slope = scale * (1.0f - t * t);
    return cap * t;
}

/* A row's cross entropy; where a weight is given, the row becomes weight times the loss's gradient by the products. */
INLINE void cross_entropy_row(void *x, size target, const float *weight, float *loss, size width, float scale, float cap,
                              const int capped, const int bf16) {
    float slope, most = -__builtin_inff(), sum = 0;
    _Pragma("omp simd reduction(max : most) private(slope)")
    for (size i = 0; i < width; i++) {
        float v = logit(get(x, i, bf16), scale, cap, &slope, capped);
        most = v > most ? v : most;
    }
    _Pragma("omp simd reduction(+ : sum) private(slope)")
    for (size i = 0; i < width; i++) sum += exp_(logit(get(x, i, bf16), scale, cap, &slope, capped) - most);
    float norm = most + __builtin_logf(sum);
    int known = target >= 0 && target < width;
    float chosen = known ? logit(get(x, target, bf16), scale, cap, &slope, capped) : __builtin_nanf("");
    float chosen_slope = slope;
    *loss = norm - chosen;
    if (!weight) return;
    float w = *weight;
    _Pragma("omp simd private(slope)")
    for (size i = 0; i < width; i++) {
        float v = logit(get(x, i, bf16), scale, cap, &slope, capped);
        put(x, i, w * slope * exp_(v - norm), bf16);
    }
    if (known) put(x, target, w * chosen_slope * (exp_(chosen - norm) - 1.0f), bf16);
}

void cross_entropy(void *x, const size *targets, const float *weights, float *losses, size rows, size width,
                   float scale, float cap, int bf16, int threads) {
    size total = rows * width;
    FOR_ROWS(rows) {
        void *y = at(x, row * width, bf16);
        const float *weight = weights ? weights + row : 0;
        if (cap != 0) BOTH(cross_entropy_row, y, targets[row], weight, losses + row, width, scale, cap, 1);
        else BOTH(cross_entropy_row, y, targets[row], weight, losses + row, width, scale, cap, 0);
    }
}

/* A row in 8 bits: q = 128 + x / s rounded, s = max |x| / 127. Of a row with NaN or infinity s is NaN, and with it every
   product of the row; numbers that 8 bits do not tell from 0 beside 1e-30 are 0. */
INLINE void eight_bit_row(const void *x, uint8_t *q, float *scale, size width, const int bf16) {
    uint32_t most = 0; /* of the numbers' bits without sign, which are in the numbers' order, NaN above infinity */
    _Pragma("omp simd reduction(max : most)")
    for (size i = 0; i < width; i++) {
        uint32_t u = bits_of(get(x, i, bf16)) & 0x7fffffffu;
        most = u > most ? u : most;
    }
    float largest = of_bits(most), up = most < 0x7f800000u && largest > 1e-30f ? 127.0f / largest : 0.0f;
    *scale = most < 0x7f800000u ? (up > 0 ? largest / 127.0f : 0.0f) : of_bits(0x7fc00000u);
    if (up == 0) { memset(q, 128, width); return; }
    SIMD for (size i = 0; i < width; i++) q[i] = (uint8_t)bits_of(get(x, i, bf16) * up + 12583040.0f); /* 3 * 2^22 + 128 */
}

void eight_bits(const void *x, uint8_t *q, float *scale, size rows, size width, int bf16, int threads) {
    size total = rows * width;
    FOR_ROWS(rows) BOTH(eight_bit_row, in(x, row * width, bf16), q + row * width, scale + row, width);
}

INLINE void times_row(void *y, float by, size width, const int bf16) {
    SIMD for (size i = 0; i < width; i++) put(y, i, get(y, i, bf16) * by, bf16);
}

/* y[row] *= by[row] */
void times_rows(void *y, const float *by, size rows, size width, int bf16, int threads) {
    size total = rows * width;
    FOR_ROWS(rows) BOTH(times_row, at(y, row * width, bf16), by[row], width);
}

/* Thin products, for a LoRA: x [rows, width] bfloat16 by m [width, rank] float32 of any strides, times `scale` and
   rounded to bfloat16; sums are float32. The narrow tensor t is [rows, rank]; while it is worked on, the rank is filled
   up with zeros to `deep`. Two neighbours along the summed axis lie in a word of 32 bits, as the instruction takes them. */
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
const int thin_products = 1;

typedef struct { const float *m; size along_width, along_rank, width, rank; float scale; } Thin;
#define SUM(sum, a, b) sum = _mm512_dpbf16_ps(sum, (__m512bh)(a), (__m512bh)(b))
#define EACH(i, count) _Pragma("GCC unroll 16") for (int i = 0; i < (count); i++)
#define LINES 8  /* rows of x at a time */
#define BAND 16  /* rows summed at a time in the gradient */
#define CHUNK 128 /* columns of the gradient at a time: their sums stay near */
#define DEEPEST 256

INLINE size filled(size rank) { return (rank + 15) / 16 * 16; }
INLINE uint32_t thin_at(Thin m, size column, size rank) {
    uint16_t half = 0;
    if (rank < m.rank) put(&half, 0, m.m[column * m.along_width + rank * m.along_rank] * m.scale, 1);
    return half;
}
INLINE __m512 widened(const uint16_t *from) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)from)), 16));
}
INLINE __m512i word_of(const uint16_t *from) { int32_t w; memcpy(&w, from, 4); return _mm512_set1_epi32(w); }

/* t = x m */
void thin_product(const uint16_t *x, Thin m, uint32_t *pairs, uint16_t *t, size rows, int threads) {
    size deep = filled(m.rank);
    for (size k = 0; k < m.width; k += 2)
        for (size r = 0; r < deep; r++) pairs[k / 2 * deep + r] = thin_at(m, k, r) | thin_at(m, k + 1, r) << 16;
    size total = rows * m.width;
    FOR_ROWS((rows + LINES - 1) / LINES) for (size rank = 0; rank < deep; rank += 16) {
        const uint16_t *line[LINES];
        __m512 even[LINES], odd[LINES];
        __mmask16 some = m.rank - rank < 16 ? (1u << (m.rank - rank)) - 1 : 0xffffu;
        EACH(i, LINES) {
            line[i] = x + (row * LINES + i < rows ? row * LINES + i : rows - 1) * m.width;
            even[i] = odd[i] = _mm512_setzero_ps();
        }
        for (size k = 0; k < m.width; k += 4) {
            __m512i first = _mm512_loadu_si512(pairs + k / 2 * deep + rank);
            __m512i second = _mm512_loadu_si512(pairs + (k / 2 + 1) * deep + rank);
            EACH(i, LINES) SUM(even[i], word_of(line[i] + k), first);
            EACH(i, LINES) SUM(odd[i], word_of(line[i] + k + 2), second);
        }
        for (int i = 0; i < LINES && row * LINES + i < rows; i++)
            _mm256_mask_storeu_epi16(t + (row * LINES + i) * m.rank + rank, some,
                                     (__m256i)_mm512_cvtneps_pbh(_mm512_add_ps(even[i], odd[i])));
    }
}

/* y += t m^T */
void thin_addition(uint16_t *y, Thin m, uint32_t *pairs, const uint16_t *t, size rows, int threads) {
    size deep = filled(m.rank);
    for (size r = 0; r < deep; r += 2)
        for (size c = 0; c < m.width; c++) pairs[r / 2 * m.width + c] = thin_at(m, c, r) | thin_at(m, c, r + 1) << 16;
    size total = rows * m.width;
    FOR_ROWS((rows + LINES - 1) / LINES) {
        size lines = rows - row * LINES < LINES ? rows - row * LINES : LINES;
        uint16_t narrow[LINES * DEEPEST] = {0}, *line[LINES];
        EACH(i, LINES) line[i] = y + (row * LINES + (i < lines ? i : lines - 1)) * m.width; /* the last again */
        for (int i = 0; i < LINES; i++)
            memcpy(narrow + i * deep, t + (row * LINES + (i < lines ? i : lines - 1)) * m.rank, m.rank * 2);
        for (size column = 0; column < m.width; column += 32) {
            __m512 low[LINES], high[LINES];
            EACH(i, LINES) {
                low[i] = widened(line[i] + column);
                high[i] = widened(line[i] + column + 16);
            }
            for (size r = 0; r < deep; r += 2) {
                __m512i first = _mm512_loadu_si512(pairs + r / 2 * m.width + column);
                __m512i second = _mm512_loadu_si512(pairs + r / 2 * m.width + column + 16);
                EACH(i, LINES) {
                    __m512i both = word_of(narrow + i * deep + r);
                    SUM(low[i], both, first);
                    SUM(high[i], both, second);
                }
            }
            EACH(i, LINES) _mm512_storeu_si512(line[i] + column, (__m512i)_mm512_cvtne2ps_pbh(high[i], low[i]));
        }
    }
}

/* m = scale d^T t, where m is written; t's words come in `pairs`. */
void thin_gradient(const uint16_t *d, Thin m, uint32_t *pairs, const uint16_t *t, size rows, int threads) {
    size bands = (rows + BAND - 1) / BAND, total = rows * m.width;
    for (size k = 0; k < bands * BAND; k += 2)
        for (size r = 0; r < m.rank; r++)
            pairs[k / 2 * m.rank + r] =
                (k < rows ? t[k * m.rank + r] : 0u) | (k + 1 < rows ? (uint32_t)t[(k + 1) * m.rank + r] : 0u) << 16;
    FOR_ROWS((m.width + CHUNK - 1) / CHUNK) {
        size begin = row * CHUNK, columns = m.width - begin < CHUNK ? m.width - begin : CHUNK;
        float sums[DEEPEST * CHUNK] __attribute__((aligned(64)));
        memset(sums, 0, m.rank * CHUNK * sizeof(float));
        for (size band = 0; band < bands; band++) for (size column = 0; column < columns; column += 32) {
            __m512i low[BAND / 2], high[BAND / 2]; /* columns 0-3, 8-11, 16-19, 24-27 of both rows; and the others */
            EACH(i, BAND / 2) {
                size k = band * BAND + 2 * i;
                const uint16_t *pair = d + k * m.width + begin + column;
                __m512i one = k < rows ? _mm512_loadu_si512(pair) : _mm512_setzero_si512();
                __m512i two = k + 1 < rows ? _mm512_loadu_si512(pair + m.width) : _mm512_setzero_si512();
                low[i] = _mm512_unpacklo_epi16(one, two);
                high[i] = _mm512_unpackhi_epi16(one, two);
            }
            for (size r = 0; r < m.rank; r++) {
                float *sum = sums + r * CHUNK + column;
                const uint32_t *word = pairs + band * BAND / 2 * m.rank + r;
                __m512 lows = _mm512_load_ps(sum), highs = _mm512_load_ps(sum + 16);
                EACH(i, BAND / 2) {
                    __m512i both = _mm512_set1_epi32((int)word[i * m.rank]);
                    SUM(lows, low[i], both);
                    SUM(highs, high[i], both);
                }
                _mm512_store_ps(sum, lows);
                _mm512_store_ps(sum + 16, highs);
            }
        }
        for (size r = 0; r < m.rank; r++) for (size c = 0; c < columns; c++) {
            size place = c / 32 * 32 + (c & 4) * 4 + c % 32 / 8 * 4 + c % 4;
            ((float *)m.m)[(begin + c) * m.along_width + r * m.along_rank] = m.scale * sums[r * CHUNK + place];
        }
    }
}
#else
const int thin_products = 0;
#endif
