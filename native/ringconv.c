/* Exact convolutions modulo 2^n, n <= 64, with fixed integer weights: y = conv(x, W) + add.
 *
 * Digits. A word is z = d0 + 2^16 d1 + 2^32 d2 + 2^48 d3 mod 2^64 with signed 16-bit digits, the
 * int16 of (z + C) xor C, C = 0x8000800080008000. A product with int16 weights is then a product
 * per digit, of which the processor does sixteen in one instruction: pairs of channels into int32
 * sums. In memory a pair of channels of a pixel is 16 bytes: d0 of both, d1 of both, ...
 *
 * Bound. |digit| <= 2^15, so the sum of a digit is exact in int32 while the weights of an output
 * channel add up to sum |W| <= 2^16. After every stretch of channels that keeps this, what exceeds
 * 16 bits of a sum is carried to the next digit's. Sums that count from bit 32 of the result on
 * need no bound: they are wanted mod 2^32 only, and int32 arithmetic wraps.
 *
 * Wide weights. Where a weight (at some point of the scheme) needs more than 16 bits, weights and
 * inputs stay whole words, and the products are those of words mod 2^64.
 *
 * Fast convolutions. An algorithm for m outputs of a 1-d convolution is y = A [(G w) * (B x)]; in
 * two dimensions it is applied to rows and columns. Over a ring, the divisions of the textbook
 * forms are the difficulty. Here G and B are integer and A yields c y with c = 2^s odd: the odd
 * part goes by multiplication with its inverse mod 2^64, 2^s costs s bits per dimension: y is
 * right mod 2^(64 - 2s). With x_i - x_j even for points of equal parity, s depends on the points:
 *
 *   F2  3 taps, 2 outputs, points 0 1 -1 inf          2 y   s = 1   4 products for 6
 *   F4  3 taps, 4 outputs, points 0 1 -1 2 1/2 inf   18 y   s = 1   6 for 12
 *   S2  3 taps, stride 2, 2 outputs: even samples with the taps w0 w2 at 0 1 inf, odd ones with
 *       w1 directly                                     y   s = 0   5 for 6
 *   S4  the same, 4 outputs, points 0 1 -1 2 inf       6 y   s = 1   9 for 12
 *
 * Six points of the projective line meet each of its three residue classes mod 2 twice, and with
 * 0 2, 1 -1, 1/2 inf no two of a class agree mod 4: hence s = 1 for F4, where the usual points
 * 0 1 -1 2 -2 inf have s = 3. B's row for a point p is the numerator of its Lagrange polynomial,
 * e.g. for 0: -(x^2 - 1)(x - 2)(2x - 1) = 2 - 5x + 5x^3 - 2x^4; G's is (1, p, p^2) or, for p =
 * a/b, (b^2, ab, a^2).
 *
 * Layout. Inside, channels are the fastest index, padded to the vector length. `V` holds the
 * digits or words of a block of the input: pixels (direct) or, for each product of the scheme, tiles. `M`
 * holds the words of the products, [product][tile or pixel][output channel]. Weights are packed
 * in the order of use: group, point, panel of 16 output channels, channel pair.
 *
 * Threads. The three steps of a block (input, products, output) are each cut into parts that
 * write to places of their own; all that is computed is the same in whichever thread.
 *
 * No branch and no address depends on x or add. The stretches depend on the weights.
 */

#define _GNU_SOURCE
#include "ringconv_pool.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__x86_64__) && defined(__GNUC__)
#define X86 1
#include <immintrin.h>
#else
#define X86 0
#endif

#define EXPORT __attribute__((visibility("default")))
enum { PANEL = 16, MAX_POINTS = 9, MAX_SETS = 36 };

/* What a carry leaves in a sum is less than 2^17, a stretch adds at most 2^15 MAX_SUM; and two
 * weights of at most MAX_NARROW never exceed MAX_SUM. */
enum { MAX_SUM = 0xfffb, MAX_NARROW = MAX_SUM / 2 };

/* Algorithms in one dimension. Products that share a row of G share weights. */
enum line { F2, F4, S2, S4 };

static const struct line_algorithm {
    int stride, points, outputs, lost, rows;
    int row_of[MAX_POINTS];
    int8_t g[6][3];
} lines[] = {
    [F2] = {1, 4, 2, 1, 4, {0, 1, 2, 3}, {{1, 0, 0}, {1, 1, 1}, {1, -1, 1}, {0, 0, 1}}},
    [F4] = {1, 6, 4, 1, 6, {0, 1, 2, 3, 4, 5},
            {{1, 0, 0}, {1, 1, 1}, {1, -1, 1}, {1, 2, 4}, {4, 2, 1}, {0, 0, 1}}},
    [S2] = {2, 5, 2, 0, 4, {0, 1, 2, 3, 3}, {{1, 0, 0}, {1, 0, 1}, {0, 0, 1}, {0, 1, 0}}},
    [S4] = {2, 9, 4, 1, 6, {0, 1, 2, 3, 4, 5, 5, 5, 5},
            {{1, 0, 0}, {1, 0, 1}, {1, 0, -1}, {1, 0, 2}, {0, 0, 1}, {0, 1, 0}}},
};

/* The same for the kernels, where they must be constants. */
#define POINTS(line) ((line) == F2 ? 4 : (line) == F4 ? 6 : (line) == S2 ? 5 : 9)
#define OUTPUTS(line) ((line) == F2 || (line) == S2 ? 2 : 4)
#define STEP(line) ((line) == F2 ? 2 : (line) == S4 ? 8 : 4)
#define LOST(line) ((line) == S2 ? 0 : 1)
#define INVERSE(line) /* of 9 and 3 */                                                        \
    ((line) == F4 ? 0x8e38e38e38e38e39u : (line) == S4 ? 0xaaaaaaaaaaaaaaabu : 1u)

/* In two: one for columns, one for rows. */
enum scheme { DIRECT, F2F2, F4F2, F4F4, S2S2, S4S2, S4S4, PLAIN, SCHEMES };

static const struct algorithm {
    const char *name;
    const struct line_algorithm *tall, *wide; /* NULL: none */
    double in, out;                           /* ns per tile and 4 channels */
} algorithms[SCHEMES] = {
    [DIRECT] = {"direct", NULL, NULL, 0, 0},
    [F2F2] = {"winograd-f2", &lines[F2], &lines[F2], 14, 14},
    [F4F2] = {"winograd-f4f2", &lines[F4], &lines[F2], 26, 26},
    [F4F4] = {"winograd-f4", &lines[F4], &lines[F4], 45, 50},
    [S2S2] = {"winograd-s2", &lines[S2], &lines[S2], 25, 15},
    [S4S2] = {"winograd-s4s2", &lines[S4], &lines[S2], 40, 30},
    [S4S4] = {"winograd-s4", &lines[S4], &lines[S4], 70, 60},
    [PLAIN] = {"plain", NULL, NULL, 0, 0},
};

static int lost_bits(int scheme)
{
    const struct algorithm *a = &algorithms[scheme];
    return a->tall ? a->tall->lost + a->wide->lost : 0;
}

/* Consecutive channel pairs at `offset` bytes from a row of V; then perhaps a carry. */
struct chunk {
    int32_t offset, pairs, carry;
};

/* Truncation to the words above the f lowest bits, and the zone check; see ring.py. */
struct finish {
    bool on;
    int f, spare;
    uint64_t start, span, sign;
    uint64_t near[8] __attribute__((aligned(64)));
};

struct block {
    const uint64_t *x, *add;
    uint64_t *y;
    const uint64_t *zeros;
    int images, row, rows, group;
    char *v, *band;
    uint64_t *m;
    int part, parts; /* of the block's work */
    struct finish end;
};

struct slice {
    int begin, end;
};

static inline struct slice slice_of(const struct block *b, int tasks)
{
    return (struct slice){(int)((int64_t)tasks * b->part / b->parts),
                          (int)((int64_t)tasks * (b->part + 1) / b->parts)};
}

static inline uint64_t finish_word(uint64_t v, struct finish *end)
{
    end->near[0] |= ((v - end->start) << end->spare) < end->span;
    return (((v << end->spare) >> (end->spare + end->f)) ^ end->sign) - end->sign;
}

struct pi_ringconv;
typedef void rows_kernel(const struct chunk *, const struct chunk *end, const char *weights,
                         const char *v, const int32_t *row, int rows, uint64_t *m, size_t pitch);

struct isa {
    const char *name;
    int vector;
    double digit_ns, word_ns, transform; /* see ringconv_kernels.h */
    void (*input)(const struct pi_ringconv *, const struct block *);
    void (*output)(const struct pi_ringconv *, struct block *);
    rows_kernel *rows[5]; /* for words, 1, ... 4 digits */
};

struct pi_ringconv {
    const struct isa *isa;
    int scheme, n, digits;            /* 0: words */
    int in, height, width, out, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
    int dilation_h, dilation_w, groups, out_height, out_width;
    int in_group, out_group, panels, pairs, depth; /* depth: padded channels of a group in V */
    size_t plane, image_in, image_out;
    /* Direct: V's rows and columns for an output row and column, and the input's for one of V's. */
    int down, right, skip_h, skip_w, v_rows, v_columns;
    int columns, tile_rows;           /* tiles, or output pixels, per row; rows per image */
    int block_images, block_rows;     /* of a block */
    int products, sets;               /* products of the scheme, and distinct weights for them */
    uint8_t product[MAX_POINTS * MAX_POINTS], first_product[MAX_POINTS * MAX_POINTS + 1];
    size_t v_pitch, m_pitch;          /* from product to product: bytes of V, words of M */
    size_t v_bytes, m_bytes, band_bytes, zero_bytes;
    int32_t *row;                     /* V's offset of every row of a block */
    uint32_t *start;                  /* first chunk of (group, set, panel) */
    struct chunk *chunks;
    size_t chunk_count;
    char *weights;
    size_t weight_bytes, panel_bytes;
    uint64_t *words;                  /* the weights as given (plain) */
};

typedef uint32_t __attribute__((may_alias)) digit_pair;

/* ---- the instruction sets ------------------------------------------------------------------ */

typedef uint32_t four_sums __attribute__((vector_size(16)));
typedef int32_t four_signs __attribute__((vector_size(16)));
typedef uint64_t two_words __attribute__((vector_size(16)));

static inline four_sums low_base(four_sums a, four_sums b)
{
    return (four_sums){a[0], b[0], a[1], b[1]};
}

static inline four_sums high_base(four_sums a, four_sums b)
{
    return (four_sums){a[2], b[2], a[3], b[3]};
}

static inline four_sums madd_base(four_sums c, four_sums w, four_sums x)
{
#if X86
    return c + (four_sums)_mm_madd_epi16((__m128i)w, (__m128i)x);
#else
    four_sums low = (four_sums)((four_signs)(w << 16) >> 16) *
                    (four_sums)((four_signs)(x << 16) >> 16);
    return c + low + (four_sums)((four_signs)w >> 16) * (four_sums)((four_signs)x >> 16);
#endif
}

static inline two_words pair_base(two_words v)
{
    four_sums d = (four_sums)v; /* a0a1 a2a3 b0b1 b2b3 */
    four_sums even = {d[0], d[0] >> 16, d[1], d[1] >> 16};
    four_sums odd = {d[2], d[2] >> 16, d[3], d[3] >> 16};
    return (two_words)((even & 0xffff) | (odd << 16));
}

static const char label_base[] = "portable";
#define NAME(x) x##_base
#define TARGET
#define VB 16
#define ROWS 1
#define DIGIT_NS 3.2
#define WORD_NS 12
#define TRANSFORM_NS 2.5
#define MADD(c, d, w, x)                                                                      \
    for (int p = 0; p < 4; p++)                                                               \
    (c)[p][d] = madd_base((c)[p][d], (w)[p], (four_sums){0} + *(x))
#define LOW low_base
#define HIGH high_base
#define PAIR pair_base
#include "ringconv_kernels.h"

#if X86
#define PAIR_MASK 15, 14, 7, 6, 13, 12, 5, 4, 11, 10, 3, 2, 9, 8, 1, 0

static const char label_avx2[] = "avx2";
#define NAME(x) x##_avx2
#define TARGET __attribute__((target("avx2")))
#define VB 32
#define ROWS 1
#define DIGIT_NS 0.4
#define WORD_NS 4.8
#define TRANSFORM_NS 1
/* In assembly: compilers reorder the sums until they spill. */
#define MADD(c, d, w, x)                                                                      \
    do {                                                                                      \
        sums_avx2 both, other;                                                                \
        __asm__("vpbroadcastd %4, %2\n\tvpmaddwd %2, %5, %3\n\tvpmaddwd %2, %6, %2\n\t"         \
                "vpaddd %3, %0, %0\n\tvpaddd %2, %1, %1"                                       \
                : "+x"((c)[0][d]), "+x"((c)[1][d]), "=&x"(both), "=&x"(other)                 \
                : "m"(*(x)), "x"((w)[0]), "x"((w)[1]));                                       \
    } while (0)
#define LOW(a, b) (sums_avx2) _mm256_unpacklo_epi32((__m256i)(a), (__m256i)(b))
#define HIGH(a, b) (sums_avx2) _mm256_unpackhi_epi32((__m256i)(a), (__m256i)(b))
#define PAIR(v)                                                                               \
    (words_avx2) _mm256_shuffle_epi8((__m256i)(v), _mm256_set_epi8(PAIR_MASK, PAIR_MASK))
#include "ringconv_kernels.h"

#define MASK_512                                                                              \
    _mm512_broadcast_i32x4(_mm_set_epi8(PAIR_MASK))
static const char label_avx512[] = "avx512";
#define NAME(x) x##_avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#define VB 64
#define ROWS 4
#define DIGIT_NS 0.4
#define WORD_NS 1.6
#define TRANSFORM_NS 0.5
#define MADD(c, d, w, x)                                                                      \
    do {                                                                                      \
        __m512i other;                                                                        \
        __asm__("vpbroadcastd %2, %1\n\tvpmaddwd %1, %3, %1\n\tvpaddd %1, %0, %0"              \
                : "+v"((c)[0][d]), "=&v"(other)                                               \
                : "m"(*(x)), "v"((w)[0]));                                                    \
    } while (0)
#define LOW(a, b) (sums_avx512) _mm512_unpacklo_epi32((__m512i)(a), (__m512i)(b))
#define HIGH(a, b) (sums_avx512) _mm512_unpackhi_epi32((__m512i)(a), (__m512i)(b))
#define PAIR(v) (words_avx512) _mm512_shuffle_epi8((__m512i)(v), MASK_512)
#include "ringconv_kernels.h"

static const char label_vnni[] = "avx512-vnni";
#define NAME(x) x##_vnni
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))
#define VB 64
#define ROWS 4
#define DIGIT_NS 0.29
#define WORD_NS 1.6
#define TRANSFORM_NS 0.5
#define MADD(c, d, w, x)                                                                      \
    __asm__("vpdpwssd %1%{1to16%}, %2, %0" : "+v"((c)[0][d]) : "m"(*(x)), "v"((w)[0]))
#define LOW(a, b) (sums_vnni) _mm512_unpacklo_epi32((__m512i)(a), (__m512i)(b))
#define HIGH(a, b) (sums_vnni) _mm512_unpackhi_epi32((__m512i)(a), (__m512i)(b))
#define PAIR(v) (words_vnni) _mm512_shuffle_epi8((__m512i)(v), MASK_512)
#include "ringconv_kernels.h"
#endif

/* The instruction set called `name`, or the best one; NULL if this processor has it not. */
static const struct isa *find_isa(const char *name)
{
    const struct isa *found[4];
    int count = 0;
#if X86
    __builtin_cpu_init();
    bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (wide && __builtin_cpu_supports("avx512vnni"))
        found[count++] = &isa_vnni;
    if (wide)
        found[count++] = &isa_avx512;
    if (__builtin_cpu_supports("avx2"))
        found[count++] = &isa_avx2;
#endif
    found[count++] = &isa_base;
    for (int i = 0; i < count; i++)
        if (!name || !*name || !strcmp(name, found[i]->name))
            return found[i];
    return NULL;
}

/* ---- memory -------------------------------------------------------------------------------- */

static size_t round_up(size_t size, size_t to)
{
    return (size + to - 1) / to * to;
}

/* Zeroed (and so touched) memory; in huge pages where it is large. */
static void *allocate(size_t size)
{
    size_t align = size >= ((size_t)1 << 20) ? (size_t)1 << 21 : 64;
    void *p = NULL;
    size = round_up(size ? size : 1, align == 64 ? 64 : 4096);
    if (posix_memalign(&p, align, size))
        return NULL;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (align > 64)
        madvise(p, size, MADV_HUGEPAGE);
#endif
    return memset(p, 0, size);
}

/* Layers run one after another in one workspace, which stays in the cache; a second thread finds
 * none and makes its own, of which one survives. */
struct workspace {
    size_t size;
    char *memory;
};

static _Atomic(struct workspace *) spare;

static void free_workspace(struct workspace *w)
{
    if (w) {
        free(w->memory);
        free(w);
    }
}

static struct workspace *take_workspace(size_t size)
{
    struct workspace *w = atomic_exchange(&spare, NULL);
    if (w && w->size >= size)
        return w;
    free_workspace(w);
    w = malloc(sizeof *w);
    if (!w)
        return NULL;
    w->size = size;
    w->memory = allocate(size);
    if (!w->memory) {
        free(w);
        return NULL;
    }
    return w;
}

static void give_workspace(struct workspace *w)
{
    struct workspace *expected = NULL;
    while (w && !atomic_compare_exchange_strong(&spare, &expected, w)) {
        if (expected && expected->size >= w->size) {
            free_workspace(w);
            return;
        }
        w = atomic_exchange(&spare, w);
        expected = NULL;
    }
}

static size_t workspace_bytes(const struct pi_ringconv *h, int threads)
{
    return h->v_bytes + h->m_bytes + h->band_bytes * (size_t)threads + h->zero_bytes;
}

/* ---- weights ------------------------------------------------------------------------------- */

static uint64_t extended(uint64_t w, int n)
{
    return (uint64_t)((int64_t)(w << (64 - n)) >> (64 - n));
}

/* The words [input][tap][16] of a panel's output channels; zero where there are none. */
static void gather_panel(const struct pi_ringconv *h, const uint64_t *w, int group, int panel,
                         uint64_t *to)
{
    int taps = h->kernel_h * h->kernel_w;
    size_t count = (size_t)h->in_group * taps;
    for (int o = 0; o < PANEL; o++) {
        bool real = panel * PANEL + o < h->out_group;
        const uint64_t *from = w + (size_t)(group * h->out_group + panel * PANEL + o) * count;
        for (size_t i = 0; i < count; i++)
            to[i * PANEL + o] = real ? extended(from[i], h->n) : 0;
    }
}

/* to += g from, 16 words each. */
static inline void add_multiple(uint64_t *to, int g, const uint64_t *from)
{
    int shift = g == 4 || g == -4 ? 2 : g == 2 || g == -2;
    if (g > 0)
        for (int o = 0; o < PANEL; o++)
            to[o] += from[o] << shift;
    else if (g < 0)
        for (int o = 0; o < PANEL; o++)
            to[o] -= from[o] << shift;
}

/* G w G^T at all points of a fast scheme: [set][16] from [9][16]. */
static void at_points(const struct algorithm *a, const uint64_t *w, uint64_t *to)
{
    for (int i = 0; i < a->tall->rows; i++) {
        uint64_t row[3][PANEL] = {0};
        for (int k = 0; k < 9; k++)
            add_multiple(row[k % 3], a->tall->g[i][k / 3], w + k * PANEL);
        for (int j = 0; j < a->wide->rows; j++, to += PANEL) {
            memset(to, 0, PANEL * sizeof *to);
            for (int k = 0; k < 3; k++)
                add_multiple(to, a->wide->g[j][k], row[k]);
        }
    }
}

static uint64_t magnitude(uint64_t w)
{
    return (int64_t)w < 0 ? -w : w;
}

/* Whether all weights (at all points) fit digits. */
static bool is_narrow(const struct pi_ringconv *h, int scheme, const uint64_t *weight)
{
    const struct algorithm *a = &algorithms[scheme];
    size_t count = (size_t)h->in_group * h->kernel_h * h->kernel_w;
    uint64_t largest = 0;
    for (size_t i = 0; i < count * h->out; i++) {
        uint64_t v = magnitude(extended(weight[i], h->n));
        largest = v > largest ? v : largest;
    }
    if (scheme == DIRECT || largest > MAX_NARROW)
        return largest <= MAX_NARROW;
    int gain_tall = 0, gain_wide = 0;
    for (int i = 0; i < 6; i++) {
        const int8_t *g = a->tall->g[i], *f = a->wide->g[i];
        int tall = abs(g[0]) + abs(g[1]) + abs(g[2]), wide = abs(f[0]) + abs(f[1]) + abs(f[2]);
        gain_tall = tall > gain_tall ? tall : gain_tall;
        gain_wide = wide > gain_wide ? wide : gain_wide;
    }
    if (largest * (uint64_t)(gain_tall * gain_wide) <= MAX_NARROW)
        return true;
    for (size_t at = 0; at < (size_t)h->out * h->in_group; at += PANEL) {
        uint64_t w[9 * PANEL] = {0}, points[MAX_SETS * PANEL], most = 0;
        for (size_t o = 0; o < PANEL && at + o < (size_t)h->out * h->in_group; o++)
            for (int k = 0; k < 9; k++)
                w[k * PANEL + o] = extended(weight[9 * (at + o) + k], h->n);
        at_points(a, w, points);
        for (int i = 0; i < a->tall->rows * a->wide->rows * PANEL; i++)
            most = magnitude(points[i]) > most ? magnitude(points[i]) : most;
        if (most > MAX_NARROW)
            return false;
    }
    return true;
}

/* Output channel of lane `lane` of a vector of sums, after LOW and HIGH. */
static int channel_of_lane(const struct isa *isa, int lane)
{
    int words = isa->vector / 8, part = lane / (2 * words), l = lane % (2 * words);
    int block = l / 4, rest = l % 4;
    return part * 2 * words + (rest < 2 ? 2 * block + rest : words + 2 * block + rest - 2);
}

/* The runs of channel pairs that one row of the product reads from V, in the order of weights. */
static int make_runs(const struct pi_ringconv *h, struct chunk *runs)
{
    if (h->scheme != DIRECT) {
        runs[0] = (struct chunk){0, h->pairs, 0};
        return 1;
    }
    int count = 0;
    bool merge = h->dilation_w == 1 && h->depth == 2 * h->pairs;
    for (int i = 0; i < h->kernel_h; i++)
        for (int j = 0; j < (merge ? 1 : h->kernel_w); j++) {
            size_t at = (size_t)(i * h->dilation_h * h->v_columns + j * h->dilation_w) * h->depth;
            runs[count++] = (struct chunk){(int32_t)(at * 8),
                                           merge ? h->kernel_w * h->pairs : h->pairs, 0};
        }
    return count;
}

/* One more chunk; 0 without memory. */
static int add_chunk(struct pi_ringconv *h, size_t *room, struct chunk chunk)
{
    if (h->chunk_count == *room) {
        size_t more = *room ? 2 * *room : 256;
        struct chunk *bigger = realloc(h->chunks, more * sizeof *bigger);
        if (!bigger)
            return 0;
        h->chunks = bigger;
        *room = more;
    }
    h->chunks[h->chunk_count++] = chunk;
    return 1;
}

/* Cut the runs of a panel where its sums must carry. */
static int cut(struct pi_ringconv *h, size_t *room, const struct chunk *runs, int count,
               const int16_t *w)
{
    int32_t sums[PANEL] = {0};
    for (int r = 0; r < count; r++) {
        int begin = 0;
        for (int i = 0; h->digits > 2 && i < runs[r].pairs; i++, w += 2 * PANEL) {
            int32_t most = 0, add[PANEL];
            for (int o = 0; o < PANEL; o++) {
                add[o] = abs(w[2 * o]) + abs(w[2 * o + 1]);
                sums[o] += add[o];
                most = sums[o] > most ? sums[o] : most;
            }
            if (most <= MAX_SUM)
                continue;
            memcpy(sums, add, sizeof sums);
            if (i > begin) {
                if (!add_chunk(h, room, (struct chunk){runs[r].offset + 16 * begin, i - begin, 1}))
                    return 0;
                begin = i;
            } else {
                h->chunks[h->chunk_count - 1].carry = 1;
            }
        }
        if (!add_chunk(h, room,
                       (struct chunk){runs[r].offset + 16 * begin, runs[r].pairs - begin, 0}))
            return 0;
    }
    return 1;
}

/* Pack all weights. */
static int pack(struct pi_ringconv *h, const uint64_t *weight)
{
    const struct algorithm *a = &algorithms[h->scheme];
    bool direct = h->scheme == DIRECT, words = !h->digits;
    int taps = h->kernel_h * h->kernel_w, values = direct ? taps : h->sets;
    size_t pair = words ? 256 : 64, value = (size_t)h->pairs * pair, room = 0, index = 0;
    int lanes[PANEL], ok = 0;
    for (int lane = 0; lane < PANEL; lane++)
        lanes[lane] = channel_of_lane(h->isa, lane);
    h->weights = allocate(h->weight_bytes);
    h->start = malloc(sizeof *h->start * ((size_t)h->groups * h->sets * h->panels + 1));
    struct chunk *runs = malloc(sizeof *runs * (size_t)taps);
    uint64_t *given = malloc(sizeof *given * PANEL * (size_t)h->in_group * taps);
    if (!h->weights || !h->start || !runs || !given)
        goto done;
    for (int group = 0; group < h->groups; group++)
        for (int p = 0; p < h->panels; p++) {
            size_t first = (size_t)group * h->sets * h->panels + p;
            gather_panel(h, weight, group, p, given);
            for (int c = 0; c < h->in_group; c++) {
                uint64_t points[MAX_SETS * PANEL], *from = given + (size_t)c * taps * PANEL;
                if (!direct) {
                    at_points(a, from, points);
                    from = points;
                }
                for (int i = 0; i < values; i++, from += PANEL) {
                    char *to = h->weights + (size_t)(c / 2) * pair +
                               (direct ? first * h->panel_bytes + i * value
                                       : (first + (size_t)i * h->panels) * h->panel_bytes);
                    if (words)
                        memcpy(to + c % 2 * 128, from, 128);
                    else
                        for (int lane = 0; lane < PANEL; lane++)
                            ((int16_t *)to)[2 * lane + c % 2] = (int16_t)from[lanes[lane]];
                }
            }
        }
    int count = make_runs(h, runs);
    for (; index < (size_t)h->groups * h->sets * h->panels; index++) {
        h->start[index] = (uint32_t)h->chunk_count;
        if (!cut(h, &room, runs, count, (int16_t *)(h->weights + index * h->panel_bytes)))
            goto done;
    }
    h->start[index] = (uint32_t)h->chunk_count;
    ok = 1;
done:
    free(runs);
    free(given);
    return ok;
}

/* ---- the choice of algorithm ---------------------------------------------------------------- */

static int tiles(int size, const struct line_algorithm *line)
{
    return line ? (size + line->outputs - 1) / line->outputs : size;
}

static int set_of(const struct algorithm *a, int product)
{
    return a->tall->row_of[product / a->wide->points] * a->wide->rows +
           a->wide->row_of[product % a->wide->points];
}

static bool applicable(const struct pi_ringconv *h, int scheme)
{
    const struct algorithm *a = &algorithms[scheme];
    if (scheme == DIRECT || scheme == PLAIN)
        return true;
    return h->kernel_h == 3 && h->kernel_w == 3 && h->dilation_h == 1 && h->dilation_w == 1 &&
           h->stride_h == a->tall->stride && h->stride_w == a->wide->stride &&
           h->n + lost_bits(scheme) <= 64;
}

static int digits_for(const struct pi_ringconv *h, int scheme, const uint64_t *weight)
{
    if (scheme == PLAIN || !is_narrow(h, scheme, weight))
        return 0;
    return (h->n + lost_bits(scheme) + 15) / 16;
}

/* Estimated ns for a batch. */
static double estimate(const struct pi_ringconv *h, int scheme, int digits, int batch)
{
    const struct algorithm *a = &algorithms[scheme];
    double pixels = (double)h->out_height * h->out_width * batch;
    double count = (double)h->out * h->in_group;
    int taps = h->kernel_h * h->kernel_w;
    if (scheme == PLAIN)
        return (0.6 * pixels * count + 20.0 * h->out) * taps;
    bool direct = scheme == DIRECT;
    double rows = pixels, panels = (double)h->panels * h->groups;
    if (!direct)
        rows = (double)tiles(h->out_height, a->tall) * tiles(h->out_width, a->wide) * batch;
    double pairs = (double)h->pairs * (direct ? taps : 1);
    double pair = digits ? digits * h->isa->digit_ns * 1.1 : h->isa->word_ns;
    double multiply = rows * panels * (pairs * pair + 3);
    double stream = pairs * panels * (digits ? 64 : 256) / 25, products = 0;
    for (int set = 0; set < (direct ? 1 : a->tall->rows * a->wide->rows); set++) {
        int uses = direct;
        for (int p = 0; !direct && p < a->tall->points * a->wide->points; p++)
            uses += set_of(a, p) == set;
        products += 0.15 * stream + (multiply * uses > stream ? multiply * uses : stream);
    }
    double in = (direct ? 2.0 * h->stride_h * h->stride_w : a->in) * ((h->in_group + 3) / 4);
    double out = (direct ? 3.0 : a->out) * ((h->out_group + 3) / 4);
    return products + rows * (in + out) * h->groups * h->isa->transform;
}

static void choose_blocks(struct pi_ringconv *h)
{
    const struct algorithm *a = &algorithms[h->scheme];
    bool direct = h->scheme == DIRECT;
    h->columns = tiles(h->out_width, a->wide);
    h->tile_rows = tiles(h->out_height, a->tall);
    h->products = direct ? 1 : a->tall->points * a->wide->points;
    h->sets = direct ? 1 : a->tall->rows * a->wide->rows;
    for (int set = 0, k = 0; set < h->sets; set++) {
        h->first_product[set] = (uint8_t)k;
        for (int p = 0; p < h->products; p++)
            if (direct || set_of(a, p) == set)
                h->product[k++] = (uint8_t)p;
        h->first_product[set + 1] = (uint8_t)k;
    }
    h->panel_bytes = (size_t)h->pairs * (h->digits ? 64 : 256);
    if (direct)
        h->panel_bytes *= (size_t)h->kernel_h * h->kernel_w;
    h->weight_bytes = h->panel_bytes * h->groups * h->sets * h->panels;
    h->down = h->kernel_h == 1 ? 1 : h->stride_h;
    h->right = h->kernel_w == 1 ? 1 : h->stride_w;
    h->skip_h = h->kernel_h == 1 ? h->stride_h : 1;
    h->skip_w = h->kernel_w == 1 ? h->stride_w : 1;
    h->v_columns = (h->out_width - 1) * h->right + (h->kernel_w - 1) * h->dilation_w + 1;
    /* Words of V and M for one row of tiles; blocks of about the weights' size, so that neither
     * the block nor the weights travel much more often than the other. */
    size_t v_row = direct ? (size_t)h->v_columns * h->down * h->depth
                          : (size_t)h->columns * h->products * h->depth;
    size_t m_row = (size_t)h->columns * h->products * h->panels * PANEL;
    size_t budget = h->weight_bytes / (size_t)h->groups;
    budget = budget < (size_t)384 << 10 ? (size_t)384 << 10 : budget;
    budget = budget > (size_t)4 << 20 ? (size_t)4 << 20 : budget;
    size_t rows = budget / (8 * (v_row + m_row));
    rows = rows ? rows : 1;
    if (rows >= (size_t)h->tile_rows) {
        h->block_rows = h->tile_rows;
        h->block_images = (int)(rows / (size_t)h->tile_rows);
    } else {
        size_t blocks = ((size_t)h->tile_rows + rows - 1) / rows;
        h->block_rows = (int)(((size_t)h->tile_rows + blocks - 1) / blocks);
        h->block_images = 1;
    }
    size_t count = (size_t)h->block_images * h->block_rows * h->columns;
    h->v_rows = (h->block_rows - 1) * h->down + (h->kernel_h - 1) * h->dilation_h + 1;
    /* An odd number of lines between products keeps them out of each other's cache sets. */
    h->m_pitch = (round_up(count * h->panels * PANEL, 8) | 8);
    h->v_pitch = (round_up(count * h->depth * 8, 64) | 64);
    h->v_bytes = direct ? (size_t)h->block_images * h->v_rows * h->v_columns * h->depth * 8
                        : h->v_pitch * h->products;
    h->v_bytes = round_up(h->v_bytes, 64);
    h->m_bytes = round_up(h->m_pitch * h->products * 8, 64);
    size_t band = direct ? (size_t)h->v_columns
                         : (size_t)a->tall->points *
                               ((h->columns - 1) * a->wide->outputs * a->wide->stride +
                                a->wide->points);
    size_t back = direct ? 0 : (size_t)a->tall->outputs * h->columns * a->wide->outputs;
    /* Vectors may read and write a little more than there is; see load_row. */
    h->band_bytes = round_up(((band > back ? band : back) + 8) * h->isa->vector, 64);
    h->zero_bytes = round_up((size_t)h->width * 8, 64);
}

static int make_rows(struct pi_ringconv *h)
{
    size_t count = (size_t)h->block_images * h->block_rows * h->columns, t = 0;
    h->row = malloc(count * sizeof *h->row);
    if (!h->row || h->v_bytes > INT32_MAX)
        return 0;
    for (int image = 0; image < h->block_images; image++)
        for (int y = 0; y < h->block_rows; y++)
            for (int x = 0; x < h->columns; x++, t++) {
                size_t at = t;
                if (h->scheme == DIRECT)
                    at = ((size_t)image * h->v_rows + y * h->down) * h->v_columns +
                         (size_t)x * h->right;
                h->row[t] = (int32_t)(at * h->depth * 8);
            }
    return 1;
}

/* ---- interface ------------------------------------------------------------------------------ */

EXPORT void pi_ringconv_free(struct pi_ringconv *h)
{
    if (!h)
        return;
    free(h->chunks);
    free(h->start);
    free(h->weights);
    free(h->row);
    free(h->words);
    free(h);
}

/* A prepared convolution, or NULL (no memory, or `scheme` or `isa` cannot be had).
 *
 * geometry: in, height, width, out, kernel h w, stride h w, padding h w, dilation h w, groups.
 * weight:   (out, in / groups, kernel h, kernel w) words; small ones are fastest.
 * scheme:   -1 the best for n, -2 the better of direct and plain, else one of `enum scheme`.
 * isa:      a name, or NULL for the best.
 * batch:    the usual number of images, for the choice.
 */
EXPORT struct pi_ringconv *pi_ringconv_prepare(const uint64_t *weight, const int32_t *geometry,
                                               int n, int scheme, const char *isa, int batch)
{
    struct pi_ringconv *h = calloc(1, sizeof *h);
    if (!h)
        return NULL;
    const int32_t *g = geometry;
    h->isa = find_isa(isa);
    h->n = n;
    h->in = g[0], h->height = g[1], h->width = g[2], h->out = g[3];
    h->kernel_h = g[4], h->kernel_w = g[5], h->stride_h = g[6], h->stride_w = g[7];
    h->pad_h = g[8], h->pad_w = g[9], h->dilation_h = g[10], h->dilation_w = g[11];
    h->groups = g[12];
    h->out_height = (h->height + 2 * h->pad_h - h->dilation_h * (h->kernel_h - 1) - 1) /
                        h->stride_h + 1;
    h->out_width = (h->width + 2 * h->pad_w - h->dilation_w * (h->kernel_w - 1) - 1) /
                       h->stride_w + 1;
    if (!h->isa || n < 1 || n > 64)
        goto fail;
    h->in_group = h->in / h->groups;
    h->out_group = h->out / h->groups;
    h->panels = (h->out_group + PANEL - 1) / PANEL;
    h->pairs = (h->in_group + 1) / 2;
    h->depth = (int)round_up((size_t)h->in_group, (size_t)(h->isa->vector / 8));
    h->plane = (size_t)h->out_height * h->out_width;
    h->image_in = (size_t)h->in * h->height * h->width;
    h->image_out = (size_t)h->out * h->plane;
    size_t count = (size_t)h->out * h->in_group * h->kernel_h * h->kernel_w;
    if (scheme >= 0) {
        if (scheme >= SCHEMES || !applicable(h, scheme))
            goto fail;
        h->scheme = scheme;
        h->digits = digits_for(h, scheme, weight);
    } else {
        double best = 0;
        for (int s = 0; s < SCHEMES; s++) {
            if (!applicable(h, s) || (scheme == -2 && s != DIRECT && s != PLAIN))
                continue;
            int digits = digits_for(h, s, weight);
            double cost = estimate(h, s, digits, batch);
            if (s == 0 || cost < best) {
                best = cost;
                h->scheme = s;
                h->digits = digits;
            }
        }
    }
    if (h->scheme == PLAIN) {
        h->words = malloc(count * sizeof *h->words);
        if (!h->words)
            goto fail;
        for (size_t i = 0; i < count; i++)
            h->words[i] = extended(weight[i], n);
        return h;
    }
    choose_blocks(h);
    if (!pack(h, weight) || !make_rows(h))
        goto fail;
    give_workspace(take_workspace(workspace_bytes(h, 1)));
    return h;
fail:
    pi_ringconv_free(h);
    return NULL;
}

/* Bytes of a prepared convolution. */
EXPORT uint64_t pi_ringconv_bytes(const struct pi_ringconv *h)
{
    size_t rows = (size_t)h->block_images * h->block_rows * h->columns;
    if (h->scheme == PLAIN)
        return sizeof *h->words * (size_t)h->out * h->in_group * h->kernel_h * h->kernel_w;
    return h->weight_bytes + h->chunk_count * sizeof *h->chunks + rows * sizeof *h->row;
}

/* What was chosen: its name, or the instruction set. */
EXPORT const char *pi_ringconv_algorithm(const struct pi_ringconv *h)
{
    return algorithms[h->scheme].name;
}

EXPORT const char *pi_ringconv_features(void)
{
    return find_isa(NULL)->name;
}

/* Multiplications of words, nothing else: for shapes that fill no vector (depthwise). */
static void run_plain(const struct pi_ringconv *h, struct block *b)
{
    const uint64_t *x = b->x, *add = b->add;
    uint64_t *y = b->y;
    struct slice s = slice_of(b, b->images * h->out);
    for (int task = s.begin; task < s.end; task++) {
        int image = task / h->out, o = task % h->out;
        uint64_t *to = y + (size_t)image * h->image_out + (size_t)o * h->plane;
        if (!add)
            memset(to, 0, h->plane * sizeof *to);
        else if (add != y)
            memcpy(to, add + (to - y), h->plane * sizeof *to);
        const uint64_t *w =
            h->words + (size_t)o * h->in_group * h->kernel_h * h->kernel_w;
        const uint64_t *from = x + (size_t)image * h->image_in +
                               (size_t)(o / h->out_group) * h->in_group * h->height * h->width;
        for (int c = 0; c < h->in_group; c++, from += (size_t)h->height * h->width)
            for (int i = 0; i < h->kernel_h; i++)
                for (int j = 0; j < h->kernel_w; j++, w++) {
                    int left = h->pad_w - j * h->dilation_w, first = 0, last = h->out_width;
                    if (left > 0)
                        first = (left + h->stride_w - 1) / h->stride_w;
                    while (last > first && (last - 1) * h->stride_w - left >= h->width)
                        last--;
                    for (int r = 0; r < h->out_height; r++) {
                        int at = r * h->stride_h + i * h->dilation_h - h->pad_h;
                        if (at < 0 || at >= h->height)
                            continue;
                        const uint64_t *line = from + (size_t)at * h->width;
                        uint64_t *out = to + (size_t)r * h->out_width;
                        if (h->stride_w == 1)
                            for (int q = first; q < last; q++)
                                out[q] += *w * line[q - left];
                        else
                            for (int q = first; q < last; q++)
                                out[q] += *w * line[q * h->stride_w - left];
                    }
                }
        if (b->end.on)
            for (size_t i = 0; i < h->plane; i++)
                to[i] = finish_word(to[i], &b->end);
        }
}

/* All products of a block: M = W V. */
static void multiply(const struct pi_ringconv *h, const struct block *b)
{
    int rows = b->images * b->rows * h->columns, task = 0;
    size_t pitch = (size_t)h->panels * PANEL;
    struct slice s = slice_of(b, h->products * h->panels);
    rows_kernel *kernel = h->isa->rows[h->digits];
    for (int set = 0; set < h->sets; set++)
        for (int p = 0; p < h->panels; p++) {
            size_t index = ((size_t)b->group * h->sets + set) * h->panels + p;
            for (int k = h->first_product[set]; k < h->first_product[set + 1]; k++, task++)
                if (task >= s.begin && task < s.end)
                    kernel(h->chunks + h->start[index], h->chunks + h->start[index + 1],
                           h->weights + index * h->panel_bytes,
                           b->v + h->product[k] * h->v_pitch, h->row, rows,
                           b->m + h->product[k] * h->m_pitch + p * PANEL, pitch);
        }
}

enum step { INPUT, MULTIPLY, OUTPUT, ALL };

struct run {
    const struct pi_ringconv *h;
    struct block block;
    enum step step;
    atomic_uint near;
};

static void run_part(void *context, int part, int parts)
{
    struct run *run = context;
    const struct pi_ringconv *h = run->h;
    struct block b = run->block;
    b.part = part;
    b.parts = parts;
    b.band += (size_t)part * h->band_bytes;
    switch (run->step) {
    case INPUT: h->isa->input(h, &b); return;
    case MULTIPLY: multiply(h, &b); return;
    case OUTPUT: h->isa->output(h, &b); break;
    case ALL: run_plain(h, &b);
    }
    uint64_t near = 0;
    for (int i = 0; i < 8; i++)
        near |= b.end.near[i];
    atomic_fetch_or(&run->near, near != 0);
}

/* y = conv(x, W) + add mod 2^n, for `batch` images; the bits of y from n on are unspecified.
 * add may be NULL or y. A handle is read only: any number of threads may call with one.
 * threads: how many may work on it.
 * f:       >= 0: y is shifted right by f bits, as a signed number of n bits (0 <= f < n).
 * bound:   < 2^(n-1): with f >= 0, whether any word before the shift was within it of +-2^(n-1).
 * Returns that (0 or 1), or -1 if there was no memory.
 */
EXPORT int pi_ringconv_run(const struct pi_ringconv *h, const uint64_t *x, const uint64_t *add,
                           uint64_t *y, int batch, int threads, int f, uint64_t bound)
{
    struct run run = {.h = h};
    struct block *b = &run.block;
    if (f >= 0) {
        struct finish *end = &b->end;
        end->on = true;
        end->f = f;
        end->spare = 64 - h->n;
        end->start = ((uint64_t)1 << (h->n - 1)) - bound;
        end->span = (2 * bound) << end->spare;
        end->sign = (uint64_t)1 << (63 - end->spare - f);
    }
    threads = pool_take(threads);
    if (h->scheme == PLAIN) {
        b->x = x, b->add = add, b->y = y, b->images = batch;
        run.step = ALL;
        pool_run(threads, run_part, &run);
        pool_give(threads);
        return (int)run.near;
    }
    struct workspace *space = take_workspace(workspace_bytes(h, threads));
    if (!space) {
        pool_give(threads);
        return -1;
    }
    b->v = space->memory;
    b->m = (uint64_t *)(b->v + h->v_bytes);
    b->band = (char *)b->m + h->m_bytes;
    b->zeros = (uint64_t *)(b->band + h->band_bytes * (size_t)threads);
    memset(b->band + h->band_bytes * (size_t)threads, 0, h->zero_bytes);
    for (b->group = 0; b->group < h->groups; b->group++)
        for (int image = 0; image < batch; image += h->block_images)
            for (b->row = 0; b->row < h->tile_rows; b->row += h->block_rows) {
                size_t in = (size_t)image * h->image_in +
                            (size_t)b->group * h->in_group * h->height * h->width;
                size_t out = (size_t)image * h->image_out +
                             (size_t)b->group * h->out_group * h->plane;
                b->x = x + in;
                b->y = y + out;
                b->add = add ? add + out : NULL;
                b->images = batch - image < h->block_images ? batch - image : h->block_images;
                b->rows = h->tile_rows - b->row < h->block_rows ? h->tile_rows - b->row
                                                                : h->block_rows;
                for (run.step = INPUT; run.step <= OUTPUT; run.step++)
                    pool_run(threads, run_part, &run);
            }
    give_workspace(space);
    pool_give(threads);
    return (int)run.near;
}
