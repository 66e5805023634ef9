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
