/* Exact convolutions modulo 2^64 whose weights fill their words: y = conv(x, b) + add.
 *
 * Nothing is prepared and nothing kept. The weights of a panel of 16 output channels are either
 * given, [group][panel][in][kernel h][kernel w][16], or are words of an AES-128-CTR key stream in
 * that order, expanded into a buffer that stays in the cache: a party that holds the key needs no
 * memory for its weights. Channels past a group's last one are drawn and not used.
 *
 * Output channels are the lanes: a step multiplies 16 weights by one word of each pixel of a tile.
 * No branch and no address depends on the words. */
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "aes.h"
#include "fss.h"

#if FSS_X86
#include <immintrin.h>
#endif

enum { LANES = 16, TILE = 8 };

struct tile {
    const uint64_t *pixel[TILE]; /* of the padded input, channel 0, first tap */
    uint64_t sums[TILE][LANES];
};

typedef void tile_kernel(struct tile *, const uint64_t *weight, const int32_t *offset, size_t taps);
typedef void key_stream(const uint8_t *key, uint64_t block, size_t blocks, uint64_t *out);

/* `rows` pixels and `vectors` vectors of output channels at a time, as many as registers hold. */
#define KERNEL(name, target, vector, vectors, rows)                                              \
    target static void name(struct tile *t, const uint64_t *weight, const int32_t *offset,       \
                            size_t taps) {                                                       \
        enum { WIDE = vectors * sizeof(vector) / 8 };                                            \
        for (int first = 0; first < TILE; first += rows)                                         \
            for (int lane = 0; lane < LANES; lane += WIDE) {                                     \
                vector sum[rows][vectors];                                                       \
                const uint64_t *pixel[rows];                                                     \
                UNROLL for (int p = 0; p < rows; p++) {                                          \
                    pixel[p] = t->pixel[first + p];                                              \
                    UNROLL for (int v = 0; v < vectors; v++) sum[p][v] = SPREAD(0);              \
                }                                                                                \
                for (size_t k = 0; k < taps; k++) {                                              \
                    vector w[vectors];                                                           \
                    UNROLL for (int v = 0; v < vectors; v++)                                     \
                        w[v] = LOAD((const vector *)(weight + LANES * k + lane) + v);            \
                    UNROLL for (int p = 0; p < rows; p++) {                                      \
                        vector x = SPREAD(pixel[p][offset[k]]);                                  \
                        UNROLL for (int v = 0; v < vectors; v++)                                 \
                            sum[p][v] = ADD(sum[p][v], MULTIPLY(w[v], x));                       \
                    }                                                                            \
                }                                                                                \
                UNROLL for (int p = 0; p < rows; p++)                                            \
                    UNROLL for (int v = 0; v < vectors; v++)                                     \
                        STORE((vector *)(t->sums[first + p] + lane) + v, sum[p][v]);             \
            }                                                                                    \
    }

#define UNROLL _Pragma("GCC unroll 8")
#define LOAD(p) (*(p))
#define STORE(p, v) (*(p) = (v))
#define SPREAD(x) (x)
#define ADD(a, b) ((a) + (b))
#define MULTIPLY(a, b) ((a) * (b))
KERNEL(multiply_base, , uint64_t, 4, 2)
#undef LOAD
#undef STORE
#undef SPREAD
#undef ADD
#undef MULTIPLY

#if FSS_X86
#define LOAD _mm256_loadu_si256
#define STORE _mm256_storeu_si256
#define SPREAD(x) _mm256_set1_epi64x((long long)(x))
#define ADD _mm256_add_epi64
#define MULTIPLY multiply_words
__attribute__((target("avx2"))) static inline __m256i multiply_words(__m256i a, __m256i b) {
    __m256i cross = _mm256_add_epi64(_mm256_mul_epu32(_mm256_srli_epi64(a, 32), b),
                                     _mm256_mul_epu32(a, _mm256_srli_epi64(b, 32)));
    return _mm256_add_epi64(_mm256_mul_epu32(a, b), _mm256_slli_epi64(cross, 32));
}
KERNEL(multiply_avx2, __attribute__((target("avx2"))), __m256i, 2, 2)
#undef LOAD
#undef STORE
#undef SPREAD
#undef ADD
#undef MULTIPLY

#define LOAD _mm512_loadu_si512
#define STORE _mm512_storeu_si512
#define SPREAD(x) _mm512_set1_epi64((long long)(x))
#define ADD _mm512_add_epi64
#define MULTIPLY _mm512_mullo_epi64
KERNEL(multiply_avx512, __attribute__((target("avx512f,avx512dq"))), __m512i, 2, 8)

/* The counter is the block's number, big-endian; blocks is a multiple of 8. */
__attribute__((target("aes,sse2"))) static void stream_aes(const uint8_t *key, uint64_t block,
                                                           size_t blocks, uint64_t *out) {
    __m128i keys[11];
    expand(key, keys);
    for (size_t i = 0; i < blocks; i += 8) {
        __m128i v[8];
        for (int j = 0; j < 8; j++) {
            uint64_t counter = __builtin_bswap64(block + i + j);
            v[j] = _mm_xor_si128(_mm_set_epi64x((long long)counter, 0), keys[0]);
        }
        for (int r = 1; r < 10; r++)
            for (int j = 0; j < 8; j++)
                v[j] = _mm_aesenc_si128(v[j], keys[r]);
        for (int j = 0; j < 8; j++)
            _mm_storeu_si128((__m128i *)(out + 2 * (i + j)), _mm_aesenclast_si128(v[j], keys[10]));
    }
}

__attribute__((target("aes,vaes,avx512f,avx512bw"))) static void
stream_vaes(const uint8_t *key, uint64_t block, size_t blocks, uint64_t *out) {
    __m128i keys[11];
    __m512i wide[11];
    expand(key, keys);
    for (int r = 0; r < 11; r++)
        wide[r] = _mm512_broadcast_i32x4(keys[r]);
    const __m512i swap = _mm512_broadcast_i32x4(
        _mm_set_epi8(8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    long long c = (long long)block;
    __m512i counter = _mm512_set_epi64(c + 3, 0, c + 2, 0, c + 1, 0, c, 0);
    const __m512i four = _mm512_set_epi64(4, 0, 4, 0, 4, 0, 4, 0);
    size_t i = 0;
    for (; i + 32 <= blocks; i += 32) {
        __m512i v[8];
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) {
            v[j] = _mm512_xor_si512(_mm512_shuffle_epi8(counter, swap), wide[0]);
            counter = _mm512_add_epi64(counter, four);
        }
        for (int r = 1; r < 10; r++)
#pragma GCC unroll 8
            for (int j = 0; j < 8; j++)
                v[j] = _mm512_aesenc_epi128(v[j], wide[r]);
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++)
            _mm512_storeu_si512(out + 2 * i + 8 * j, _mm512_aesenclast_epi128(v[j], wide[10]));
    }
    if (i < blocks)
        stream_aes(key, block + i, blocks - i, out + 2 * i);
}
#endif

struct isa {
    tile_kernel *multiply;
    key_stream *stream; /* NULL: none */
};

/* The instruction set called `name`, or the best one. */
static struct isa find(const char *name) {
    struct isa found = {multiply_base, NULL};
    if (name && !strcmp(name, "portable"))
        return found;
#if FSS_X86
    __builtin_cpu_init();
    bool best = !name || !*name;
    if (__builtin_cpu_supports("avx2"))
        found.multiply = multiply_avx2;
    if (__builtin_cpu_supports("aes"))
        found.stream = stream_aes;
    if (best && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")) {
        found.multiply = multiply_avx512;
        if (__builtin_cpu_supports("vaes") && __builtin_cpu_supports("avx512bw"))
            found.stream = stream_vaes;
    }
#endif
    return found;
}

struct shape {
    int32_t in, height, width, out, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
    int32_t dilation_h, dilation_w, groups, out_height, out_width;
};

/* Whether pi_wide_run can expand a key with these instructions. */
FSS_EXPORT int pi_wide_expands(const char *isa) { return find(isa).stream != NULL; }

/* For `batch` images (in, height, width). Either weight or key is given. add may be NULL or y.
 * Returns 0, or -1 if there was no memory or no way to expand a key. */
FSS_EXPORT int pi_wide_run(const struct shape *s, const char *isa, const uint64_t *weight,
                           const uint8_t *key, const uint64_t *x, const uint64_t *add, uint64_t *y,
                           int batch) {
    struct isa use = find(isa);
    size_t in = (size_t)s->in / s->groups, out = (size_t)s->out / s->groups;
    size_t rows = (size_t)s->height + 2 * s->pad_h, columns = (size_t)s->width + 2 * s->pad_w;
    size_t plane = (size_t)s->out_height * s->out_width, pixels = plane * batch;
    size_t taps = in * s->kernel_h * s->kernel_w, panels = (out + LANES - 1) / LANES;
    size_t image = (size_t)s->in * rows * columns;
    if (!weight && !use.stream)
        return -1;
    bool padded = s->pad_h || s->pad_w;
    uint64_t *copy = padded ? calloc(image * batch, sizeof *copy) : NULL;
    int32_t *offset = malloc(taps * sizeof *offset);
    uint64_t *panel = NULL;
    if (!weight && posix_memalign((void **)&panel, 64, taps * LANES * sizeof *panel))
        panel = NULL;
    int result = -1;
    if ((padded && !copy) || !offset || (!weight && !panel))
        goto end;
    if (padded)
        for (size_t plane_in = 0; plane_in < (size_t)s->in * batch; plane_in++)
            for (int row = 0; row < s->height; row++)
                memcpy(copy + (plane_in * rows + row + s->pad_h) * columns + s->pad_w,
                       x + (plane_in * s->height + row) * s->width, s->width * sizeof *x);
    const uint64_t *from = padded ? copy : x;
    size_t k = 0;
    for (size_t channel = 0; channel < in; channel++)
        for (int i = 0; i < s->kernel_h; i++)
            for (int j = 0; j < s->kernel_w; j++)
                offset[k++] = (int32_t)((channel * rows + (size_t)i * s->dilation_h) * columns +
                                        (size_t)j * s->dilation_w);
    for (int group = 0; group < s->groups; group++)
        for (size_t p = 0; p < panels; p++) {
            size_t index = group * panels + p;
            const uint64_t *w = weight ? weight + index * taps * LANES : panel;
            if (!weight)
                use.stream(key, index * taps * (LANES / 2), taps * (LANES / 2), panel);
            size_t lanes = out - p * LANES < LANES ? out - p * LANES : LANES;
            for (size_t first = 0; first < pixels; first += TILE) {
                struct tile t;
                size_t count = pixels - first < TILE ? pixels - first : TILE;
                size_t to[TILE];
                for (size_t q = 0; q < TILE; q++) {
                    size_t at = first + (q < count ? q : 0);
                    size_t n = at / plane, inside = at % plane;
                    size_t row = inside / s->out_width * s->stride_h;
                    size_t column = inside % s->out_width * s->stride_w;
                    t.pixel[q] = from + n * image + group * in * rows * columns + row * columns +
                                 column;
                    to[q] = (n * s->out + group * out + p * LANES) * plane + inside;
                }
                use.multiply(&t, w, offset, taps);
                for (size_t lane = 0; lane < lanes; lane++)
                    for (size_t q = 0; q < count; q++) {
                        size_t at = to[q] + lane * plane;
                        y[at] = t.sums[q][lane] + (add ? add[at] : 0);
                    }
            }
        }
    result = 0;
end:
    free(copy);
    free(offset);
    free(panel);
    return result;
}
