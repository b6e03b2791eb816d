/* Exact convolutions modulo 2^n, n <= 64, with fixed integer weights: y = conv(x, W) + add.
 *
 * Digits. A word is z = d0 + 2^16 d1 + 2^32 d2 + 2^48 d3 mod 2^64 with signed 16-bit digits, the
 * int16 of (z + C) xor C, C = 0x8000800080008000. A product with int16 weights is then a product
 * per digit, of which the processor does sixteen in one instruction: pairs of channels into int32
 * sums. In memory a pair of channels of a pixel is 16 bytes: d0 of both, d1 of both, ...
 *
 * Bound. |digit| <= 2^15, so the sum of a digit is exact in int32 while the weights of an output
 * channel add up to sum |W| <= 2^16 - 1. Accumulation is cut into segments that keep this, and
 * each adds its recombined words to memory. Sums that count from bit 32 of the result on need no
 * bound: they are wanted mod 2^32 only, and int32 arithmetic wraps.
 *
 * Wide weights. Where a weight needs more than 16 bits it is cut into digits itself (`terms`):
 * w = sum_j 2^16j w_j, and the products w_j d_i with i + j < 2, which do count below bit 32, with
 * w_j cut once more into bytes, so that segments stay long. Any 64-bit weight works so.
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
 * digits of a block of the input: pixels (direct) or, for each product of the scheme, tiles. `M`
 * holds the words of the products, [product][tile or pixel][output channel]. Weights are packed
 * in the order of use: group, point, panel of 16 output channels, term, channel pair.
 *
 * No branch and no address depends on x or add. The segments depend on the weights.
 */

#define _GNU_SOURCE
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
enum { PANEL = 16, SEGMENT_PAIRS = 192, MAX_SUM = 0xffff, MAX_TERMS = 8, MAX_POINTS = 9 };

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

/* Consecutive channel pairs at `offset` bytes from a row of V. */
struct chunk {
    int32_t offset, pairs;
};

/* Part of a panel's sum: digits [digit, digit + digits) times weights at `panel`, times 2^shift. */
struct segment {
    size_t panel;
    uint32_t begin, end;
    uint8_t digit, digits, shift, first;
};

struct block {
    const uint64_t *x, *add;
    uint64_t *y;
    const uint64_t *zeros;
    int images, row, rows;
    char *v, *band;
    uint64_t *m;
};

struct pi_ringconv;
typedef void rows_kernel(const struct segment *, const struct chunk *, const char *panel,
                         const char *v, const int32_t *row, int rows, uint64_t *m, size_t pitch);

struct isa {
    const char *name;
    int vector;
    void (*input)(const struct pi_ringconv *, const struct block *);
    void (*output)(const struct pi_ringconv *, const struct block *);
    rows_kernel *rows[4];
};

struct pi_ringconv {
    const struct isa *isa;
    int scheme, n;
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
    size_t *start;                    /* first segment of (group, set, panel) */
    struct segment *segments;
    struct chunk *chunks;
    size_t segment_count, chunk_count;
    char *weights;
    size_t weight_bytes;
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
#define ROWS 6
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
#define ROWS 6
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
        struct workspace *other = atomic_exchange(&spare, w);
        w = other;
        expected = NULL;
    }
}

static size_t workspace_bytes(const struct pi_ringconv *h)
{
    return h->v_bytes + h->m_bytes + h->band_bytes + h->zero_bytes;
}

/* ---- weights ------------------------------------------------------------------------------- */

/* Part of all weights of a set: 2^shift * piece(w) times the digits [digit, digit + digits). */
struct term {
    uint8_t piece, digit, digits, shift;
    bool exact;
};

enum { WHOLE, LOW8, HIGH8, WORD0, WORD1, WORD2, WORD3, BYTE0, BYTE1, BYTE2, BYTE3 };

static int16_t digit_of(uint64_t w, int i)
{
    return (int16_t)(((w + 0x8000800080008000u) ^ 0x8000800080008000u) >> (16 * i));
}

/* w = LOW8 + 2^8 HIGH8 for small w; w = sum_j 2^16j WORD_j; WORD0 = BYTE0 + 2^8 BYTE1, ... */
static int16_t piece_of(uint64_t w, int piece)
{
    switch (piece) {
    case WHOLE: return (int16_t)w;
    case LOW8: return (int8_t)w;
    case HIGH8: return (int16_t)((int64_t)(w - (uint64_t)(int64_t)(int8_t)w) >> 8);
    case WORD0: case WORD1: case WORD2: case WORD3: return digit_of(w, piece - WORD0);
    default: {
        int16_t d = digit_of(w, (piece - BYTE0) / 2);
        return (piece - BYTE0) % 2 ? (int16_t)((d - (int8_t)d) >> 8) : (int8_t)d;
    }
    }
}

/* The terms for weights of at most `largest` in absolute value (as signed words) mod 2^bits. */
static int make_terms(struct term *terms, uint64_t largest, int bits)
{
    static const struct term whole[] = {{WHOLE, 0, 4, 0, true}};
    static const struct term halves[] = {{LOW8, 0, 4, 0, true}, {HIGH8, 0, 4, 8, true}};
    static const struct term wide[] = {
        {BYTE0, 0, 2, 0, true},   {BYTE1, 0, 2, 8, true},   {BYTE2, 0, 1, 16, true},
        {BYTE3, 0, 1, 24, true},  {WORD0, 2, 2, 32, false}, {WORD1, 1, 2, 32, false},
        {WORD2, 0, 2, 32, false}, {WORD3, 0, 1, 48, false},
    };
    const struct term *from = largest <= 0x7fff ? whole : largest < 0x7fff00 ? halves : wide;
    int count = from == whole ? 1 : from == halves ? 2 : 8, kept = 0;
    for (int i = 0; i < count; i++) {
        int digits = (bits - from[i].shift + 15) / 16;
        if (digits <= 0)
            continue;
        terms[kept] = from[i];
        if (digits < terms[kept].digits)
            terms[kept].digits = (uint8_t)digits;
        if (bits - from[i].shift <= 32)
            terms[kept].exact = false;
        kept++;
    }
    return kept;
}

/* The weight of (set, output, input) of a fast scheme: G w G^T at the set's point. */
static uint64_t at_point(const struct algorithm *a, int set, const uint64_t *w)
{
    const int8_t *g = a->tall->g[set / a->wide->rows], *f = a->wide->g[set % a->wide->rows];
    uint64_t sum = 0;
    for (int i = 0; i < 3; i++)
        for (int j = 0; j < 3; j++)
            sum += (uint64_t)(int64_t)(g[i] * f[j]) * w[3 * i + j];
    return sum;
}

static uint64_t magnitude(uint64_t w)
{
    return (int64_t)w < 0 ? -w : w;
}

/* Output channel of lane `lane` of a vector of sums, after LOW and HIGH. */
static int channel_of_lane(const struct isa *isa, int lane)
{
    int words = isa->vector / 8, part = lane / (2 * words), l = lane % (2 * words);
    int block = l / 4, rest = l % 4;
    return part * 2 * words + (rest < 2 ? 2 * block + rest : words + 2 * block + rest - 2);
}

/* A growing array. */
static void *grow(void *array, size_t count, size_t *room, size_t size)
{
    if (count < *room)
        return array;
    *room = *room ? 2 * *room : 64;
    void *bigger = realloc(array, *room * size);
    if (!bigger)
        free(array);
    return bigger;
}

/* The runs of channel pairs that one row of the product reads from V, in the order of weights. */
static int make_runs(const struct pi_ringconv *h, struct chunk *runs)
{
    if (h->scheme != DIRECT) {
        runs[0] = (struct chunk){0, h->pairs};
        return 1;
    }
    int count = 0;
    bool merge = h->dilation_w == 1 && h->depth == 2 * h->pairs;
    for (int i = 0; i < h->kernel_h; i++)
        for (int j = 0; j < (merge ? 1 : h->kernel_w); j++) {
            size_t at = (size_t)(i * h->dilation_h * h->v_columns + j * h->dilation_w) * h->depth;
            runs[count++] =
                (struct chunk){(int32_t)(at * 8), merge ? h->kernel_w * h->pairs : h->pairs};
        }
    return count;
}

/* The weights of one set and 16 output channels as [pair of the runs][2][16] words. */
static void gather_panel(const struct pi_ringconv *h, const uint64_t *w, int group, int set,
                         int panel, uint64_t *to)
{
    const struct algorithm *a = &algorithms[h->scheme];
    int taps = h->kernel_h * h->kernel_w, blocks = h->scheme == DIRECT ? taps : 1;
    memset(to, 0, (size_t)blocks * h->pairs * 32 * sizeof *to);
    for (int o = 0; o < PANEL && panel * PANEL + o < h->out_group; o++) {
        const uint64_t *from =
            w + (size_t)(group * h->out_group + panel * PANEL + o) * h->in_group * taps;
        for (int c = 0; c < h->in_group; c++, from += taps)
            for (int b = 0; b < blocks; b++)
                to[((size_t)(b * h->pairs + c / 2) * 2 + c % 2) * PANEL + o] =
                    h->scheme == DIRECT ? from[b] : at_point(a, set, from);
    }
}

/* Pack all weights and cut the sums into segments. */
static int pack(struct pi_ringconv *h, const uint64_t *w)
{
    int taps = h->scheme == DIRECT ? h->kernel_h * h->kernel_w : 1;
    size_t total = (size_t)taps * h->pairs, room_w = 0, used = 0;
    size_t room_s = 0, room_c = 0, index = 0;
    int bits = h->n + lost_bits(h->scheme), ok = 0;
    struct chunk *runs = malloc(sizeof *runs * (size_t)(h->kernel_h * h->kernel_w));
    uint64_t *panel = malloc(total * 32 * sizeof *panel);
    char *packed = NULL;
    h->start = malloc(sizeof *h->start * ((size_t)h->groups * h->sets * h->panels + 1));
    if (!runs || !panel || !h->start)
        goto done;
    int run_count = make_runs(h, runs);
    for (int group = 0; group < h->groups; group++)
        for (int set = 0; set < h->sets; set++)
            for (int p = 0; p < h->panels; p++) {
                gather_panel(h, w, group, set, p, panel);
                uint64_t largest = 0;
                for (size_t i = 0; i < total * 32; i++)
                    largest = magnitude(panel[i]) > largest ? magnitude(panel[i]) : largest;
                struct term terms[MAX_TERMS];
                int count = make_terms(terms, largest, bits);
                h->start[index++] = h->segment_count;
                for (int t = 0; t < count; t++) {
                    while (used + total * 64 > room_w) {
                        room_w = room_w ? 2 * room_w : 1 << 16;
                        char *bigger = realloc(packed, room_w);
                        if (!bigger)
                            goto done;
                        packed = bigger;
                    }
                    size_t k = 0;
                    struct segment *s = NULL;
                    uint32_t sums[PANEL];
                    int length = 0;
                    for (int r = 0; r < run_count; r++)
                        for (int i = 0; i < runs[r].pairs; i++, k++) {
                            int16_t *to = (int16_t *)(packed + used + k * 64);
                            uint32_t add[PANEL] = {0}, most = 0;
                            for (int lane = 0; lane < PANEL; lane++)
                                for (int e = 0; e < 2; e++) {
                                    int o = channel_of_lane(h->isa, lane);
                                    int16_t v = piece_of(panel[(k * 2 + e) * PANEL + o],
                                                         terms[t].piece);
                                    to[2 * lane + e] = v;
                                    add[o] += (uint32_t)(v < 0 ? -v : v);
                                }
                            for (int o = 0; s && o < PANEL; o++)
                                most = sums[o] + add[o] > most ? sums[o] + add[o] : most;
                            if (!s || length == SEGMENT_PAIRS ||
                                (terms[t].exact && most > MAX_SUM)) {
                                h->segments = grow(h->segments, h->segment_count, &room_s,
                                                   sizeof *h->segments);
                                if (!h->segments)
                                    goto done;
                                s = &h->segments[h->segment_count++];
                                *s = (struct segment){
                                    used + k * 64, (uint32_t)h->chunk_count,
                                    (uint32_t)h->chunk_count, terms[t].digit, terms[t].digits,
                                    terms[t].shift, t == 0 && k == 0};
                                memset(sums, 0, sizeof sums);
                                length = 0;
                            }
                            if (i == 0 || s->begin == s->end) {
                                h->chunks = grow(h->chunks, h->chunk_count, &room_c,
                                                 sizeof *h->chunks);
                                if (!h->chunks)
                                    goto done;
                                h->chunks[h->chunk_count++] =
                                    (struct chunk){runs[r].offset + 16 * i, 0};
                                s->end = (uint32_t)h->chunk_count;
                            }
                            h->chunks[s->end - 1].pairs++;
                            length++;
                            for (int o = 0; o < PANEL; o++)
                                sums[o] += add[o];
                        }
                    used += total * 64;
                }
            }
    h->start[index] = h->segment_count;
    h->weight_bytes = used;
    h->weights = allocate(used);
    if (!h->weights)
        goto done;
    memcpy(h->weights, packed, used);
    ok = 1;
done:
    free(runs);
    free(panel);
    free(packed);
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

/* Estimated ns for one image, the weights' size taken from the largest one at each point. */
static double estimate(const struct pi_ringconv *h, int scheme, const uint64_t *w)
{
    const struct algorithm *a = &algorithms[scheme];
    size_t pixels = (size_t)h->out_height * h->out_width;
    size_t count = (size_t)h->out * h->in_group;
    int taps = h->kernel_h * h->kernel_w;
    double speed = 32.0 / h->isa->vector;
    if (scheme == PLAIN)
        return 0.6 * (double)pixels * (double)count * taps + 20.0 * (double)h->out * taps;
    double products = 0, bytes = 0, rows = (double)pixels;
    if (scheme != DIRECT)
        rows = (double)tiles(h->out_height, a->tall) * tiles(h->out_width, a->wide);
    int sets = scheme == DIRECT ? 1 : a->tall->rows * a->wide->rows;
    for (int set = 0; set < sets; set++) {
        uint64_t largest = 0;
        for (size_t i = 0; i < count * (scheme == DIRECT ? taps : 1); i++) {
            uint64_t v = magnitude(scheme == DIRECT ? w[i] : at_point(a, set, w + 9 * i));
            largest = v > largest ? v : largest;
        }
        struct term terms[MAX_TERMS];
        int n = make_terms(terms, largest, h->n + lost_bits(scheme)), uses = 1;
        if (scheme != DIRECT) {
            uses = 0;
            for (int p = 0; p < a->tall->points * a->wide->points; p++)
                uses += set_of(a, p) == set;
        }
        double pairs = (double)h->pairs * (scheme == DIRECT ? taps : 1);
        for (int t = 0; t < n; t++) {
            products += uses * (pairs * terms[t].digits * 0.4 + 5);
            bytes += pairs * 64;
        }
    }
    double panels = (double)h->panels * h->groups;
    double multiply = products * panels * rows * speed, stream = bytes * panels / 40;
    double in = (scheme == DIRECT ? 2.0 * h->stride_h * h->stride_w : a->in) *
                ((h->in_group + 3) / 4) * h->groups;
    double out = (scheme == DIRECT ? 3.0 : a->out) * ((h->out_group + 3) / 4) * h->groups;
    return (multiply > stream ? multiply : stream) + 0.15 * stream + rows * (in + out) * speed;
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
    h->band_bytes = round_up((band > back ? band : back) * h->isa->vector, 64);
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
    free(h->segments);
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
 */
EXPORT struct pi_ringconv *pi_ringconv_prepare(const uint64_t *weight, const int32_t *geometry,
                                               int n, int scheme, const char *isa)
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
    h->words = malloc(count * sizeof *h->words);
    if (!h->words)
        goto fail;
    for (size_t i = 0; i < count; i++)
        h->words[i] = (uint64_t)((int64_t)(weight[i] << (64 - n)) >> (64 - n));
    if (scheme >= 0) {
        if (scheme >= SCHEMES || !applicable(h, scheme))
            goto fail;
        h->scheme = scheme;
    } else {
        double best = 0;
        for (int s = 0; s < SCHEMES; s++) {
            if (!applicable(h, s) || (scheme == -2 && s != DIRECT && s != PLAIN))
                continue;
            double cost = estimate(h, s, h->words);
            if (s == 0 || cost < best) {
                best = cost;
                h->scheme = s;
            }
        }
    }
    if (h->scheme == PLAIN)
        return h;
    choose_blocks(h);
    if (!pack(h, h->words))
        goto fail;
    free(h->words);
    h->words = NULL;
    choose_blocks(h); /* now that the size of the weights is known */
    if (!make_rows(h))
        goto fail;
    give_workspace(take_workspace(workspace_bytes(h)));
    return h;
fail:
    pi_ringconv_free(h);
    return NULL;
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
static void run_plain(const struct pi_ringconv *h, const uint64_t *x, const uint64_t *add,
                      uint64_t *y, int batch)
{
    for (int image = 0; image < batch; image++)
        for (int o = 0; o < h->out; o++) {
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
        }
}

/* All products of a block: M = W V. */
static void multiply(const struct pi_ringconv *h, const struct block *b, int group)
{
    int rows = b->images * b->rows * h->columns;
    size_t index = (size_t)group * h->sets * h->panels, pitch = (size_t)h->panels * PANEL;
    for (int set = 0; set < h->sets; set++)
        for (int p = 0; p < h->panels; p++, index++)
            for (size_t i = h->start[index]; i < h->start[index + 1]; i++) {
                const struct segment *s = &h->segments[i];
                rows_kernel *kernel = h->isa->rows[s->digits - 1];
                for (int k = h->first_product[set]; k < h->first_product[set + 1]; k++)
                    kernel(s, h->chunks, h->weights, b->v + h->product[k] * h->v_pitch, h->row,
                           rows, b->m + h->product[k] * h->m_pitch + p * PANEL, pitch);
            }
}

/* y = conv(x, W) + add mod 2^n, for `batch` images; the bits of y from n on are unspecified.
 * add may be NULL or y. A handle is read only: any number of threads may call with one.
 * Returns 0, or -1 if there was no memory.
 */
EXPORT int pi_ringconv_run(const struct pi_ringconv *h, const uint64_t *x, const uint64_t *add,
                           uint64_t *y, int batch)
{
    if (h->scheme == PLAIN) {
        run_plain(h, x, add, y, batch);
        return 0;
    }
    struct workspace *space = take_workspace(workspace_bytes(h));
    if (!space)
        return -1;
    struct block b = {.v = space->memory};
    b.m = (uint64_t *)(b.v + h->v_bytes);
    b.band = (char *)b.m + h->m_bytes;
    b.zeros = (uint64_t *)(b.band + h->band_bytes);
    memset(b.band + h->band_bytes, 0, h->zero_bytes);
    for (int group = 0; group < h->groups; group++)
        for (int image = 0; image < batch; image += h->block_images)
            for (b.row = 0; b.row < h->tile_rows; b.row += h->block_rows) {
                size_t in = (size_t)image * h->image_in +
                            (size_t)group * h->in_group * h->height * h->width;
                size_t out = (size_t)image * h->image_out +
                             (size_t)group * h->out_group * h->plane;
                b.x = x + in;
                b.y = y + out;
                b.add = add ? add + out : NULL;
                b.images = batch - image < h->block_images ? batch - image : h->block_images;
                b.rows = h->tile_rows - b.row < h->block_rows ? h->tile_rows - b.row
                                                              : h->block_rows;
                h->isa->input(h, &b);
                multiply(h, &b, group);
                h->isa->output(h, &b);
            }
    give_workspace(space);
    return 0;
}
