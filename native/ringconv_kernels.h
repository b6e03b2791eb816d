/* The kernels of ringconv.c for one instruction set. Included once for each, with
 *
 *   NAME(x)      x with the instruction set's suffix
 *   TARGET       the function attribute that enables it
 *   VB           bytes of a vector: 16, 32 or 64
 *   ROWS         rows of V that the inner kernel takes at once
 *   MADD(c,d,w,x)  c[p][d] += w[p] . *x for all p < PARTS, pairs of int16 into int32
 *   DIGIT_NS     time of a channel pair of a row times a panel, for one digit; WORD_NS, of words
 *   TRANSFORM_NS time of the transforms, relative
 *   LOW, HIGH    interleave the low or high halves of 128-bit blocks of int32
 *   PAIR(v)      interleave the int16 of the two 64-bit halves of each 128-bit block
 *
 * A vector of words holds L = VB / 8 channels, a vector of sums 2L output channels.
 */

#define L (VB / 8)
#define PARTS (64 / VB) /* vectors of sums in a panel of 16 output channels */
#ifndef AHEAD
#define AHEAD 12288
#endif
#define INLINE static inline __attribute__((always_inline)) TARGET

typedef uint64_t NAME(words) __attribute__((vector_size(VB), may_alias));
typedef uint32_t NAME(sums) __attribute__((vector_size(VB), may_alias));
typedef int32_t NAME(signs) __attribute__((vector_size(VB), may_alias));
#define WORDS NAME(words)
#define SUMS NAME(sums)
#define SIGNS NAME(signs)

/* ---- products ----------------------------------------------------------------------------- */

/* Bring what exceeds 16 bits of the lowest sums to the next ones, which makes room. */
INLINE void NAME(carry)(SUMS *sum, int digits)
{
    if (digits > 3) {
        sum[2] += (SUMS)((SIGNS)sum[1] >> 16);
        sum[1] &= 0xffff;
    }
    if (digits > 2) {
        sum[1] += (SUMS)((SIGNS)sum[0] >> 16);
        sum[0] &= 0xffff;
    }
}

/* Recombine the sums of `digits` digits into words. */
INLINE void NAME(combine)(const SUMS *sum, int digits, uint64_t *m)
{
    SUMS high = (SUMS)((SIGNS)sum[0] >> 31);
    if (digits > 2)
        high += sum[2];
    if (digits > 3)
        high += sum[3] << 16;
    WORDS low = (WORDS)LOW(sum[0], high), top = (WORDS)HIGH(sum[0], high);
    if (digits > 1) {
        SUMS a = sum[1] << 16, b = (SUMS)((SIGNS)sum[1] >> 16);
        low += (WORDS)LOW(a, b);
        top += (WORDS)HIGH(a, b);
    }
    WORDS *out = (WORDS *)m;
    out[0] = low;
    out[1] = top;
}

/* One channel pair: `rows` rows of V times 16 output channels. */
INLINE void NAME(step)(int rows, int digits, const char *w, const char *const *x, int pair,
                       SUMS sum[][PARTS][4])
{
    SUMS weight[PARTS];
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; p++)
        weight[p] = *(const SUMS *)(w + VB * p);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int d = 0; d < digits; d++)
            MADD(sum[r], d, weight, (const digit_pair *)(x[r] + 16 * pair + 4 * d));
}

/* `rows` rows of V times a panel of 16 output channels, into m[row][16]. */
INLINE void NAME(tile)(int rows, int digits, size_t ahead, const struct chunk *c,
                       const struct chunk *end, const char *w, const char *v, const int32_t *row,
                       uint64_t *m, size_t pitch)
{
    SUMS sum[ROWS][PARTS][4];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int p = 0; p < PARTS; p++)
#pragma GCC unroll 4
            for (int d = 0; d < digits; d++)
                sum[r][p][d] = (SUMS){0};
    for (; c < end; c++) {
        const char *x[ROWS];
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
            x[r] = v + row[r] + c->offset;
        int k = 0;
        for (; k + 4 <= c->pairs; k += 4, w += 256)
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                NAME(step)(rows, digits, w + 64 * i, x, k + i, sum);
                __builtin_prefetch(w + 64 * i + ahead, 0, 2);
            }
        for (; k < c->pairs; k++, w += 64) {
            NAME(step)(rows, digits, w, x, k, sum);
            __builtin_prefetch(w + ahead, 0, 2);
        }
        if (c->carry)
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
                for (int p = 0; p < PARTS; p++)
                    NAME(carry)(sum[r][p], digits);
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int p = 0; p < PARTS; p++)
            NAME(combine)(sum[r][p], digits, m + r * pitch + 2 * L * p);
}

/* The same for weights and rows in words. */
INLINE void NAME(word_tile)(int rows, size_t ahead, const struct chunk *c, const struct chunk *end,
                            const char *w, const char *v, const int32_t *row, uint64_t *m,
                            size_t pitch)
{
    WORDS sum[ROWS][2 * PARTS];
#if VB == 32
    WORDS cross[ROWS][2 * PARTS]; /* counts from bit 32 on */
#endif
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int p = 0; p < 2 * PARTS; p++) {
            sum[r][p] = (WORDS){0};
#if VB == 32
            cross[r][p] = (WORDS){0};
#endif
        }
    for (; c < end; c++) {
        const char *x[ROWS];
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
            x[r] = v + row[r] + c->offset;
        for (int k = 0; k < 2 * c->pairs; k++, w += 128) {
            __builtin_prefetch(w + ahead, 0, 2);
            __builtin_prefetch(w + 64 + ahead, 0, 2);
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) {
                WORDS b = (WORDS){0} + *(const uint64_t *)(x[r] + 8 * k);
#pragma GCC unroll 8
                for (int p = 0; p < 2 * PARTS; p++) {
                    WORDS weight = *(const WORDS *)(w + VB * p);
#if VB == 32
                    __m256i g = (__m256i)weight, y = (__m256i)b;
                    sum[r][p] += (WORDS)_mm256_mul_epu32(g, y);
                    cross[r][p] += (WORDS)_mm256_mul_epu32(_mm256_srli_epi64(g, 32), y) +
                                   (WORDS)_mm256_mul_epu32(g, _mm256_srli_epi64(y, 32));
#else
                    sum[r][p] += weight * b;
#endif
                }
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int p = 0; p < 2 * PARTS; p++) {
#if VB == 32
            sum[r][p] += cross[r][p] << 32;
#endif
            *(WORDS *)(m + r * pitch + L * p) = sum[r][p];
        }
}

#define ROWS_KERNEL(D, TILE)                                                                  \
    TARGET static void NAME(rows_##D)(const struct chunk *c, const struct chunk *end,         \
                                      const char *w, const char *v, const int32_t *row,       \
                                      int rows, uint64_t *m, size_t pitch)                    \
    {                                                                                         \
        size_t ahead = AHEAD;                                                                 \
        int r = 0;                                                                            \
        for (; r + ROWS <= rows; r += ROWS, ahead = 0)                                        \
            TILE(ROWS, ahead, c, end, w, v, row + r, m + r * pitch, pitch);                   \
        if (ROWS > 2)                                                                         \
            for (; r + 2 <= rows; r += 2, ahead = 0)                                          \
                TILE((ROWS > 2 ? 2 : 1), ahead, c, end, w, v, row + r, m + r * pitch, pitch); \
        if (ROWS > 1 && r < rows)                                                             \
            TILE(1, ahead, c, end, w, v, row + r, m + r * pitch, pitch);                      \
    }
#define DIGITS_1(rows, ...) NAME(tile)(rows, 1, __VA_ARGS__)
#define DIGITS_2(rows, ...) NAME(tile)(rows, 2, __VA_ARGS__)
#define DIGITS_3(rows, ...) NAME(tile)(rows, 3, __VA_ARGS__)
#define DIGITS_4(rows, ...) NAME(tile)(rows, 4, __VA_ARGS__)
ROWS_KERNEL(0, NAME(word_tile))
ROWS_KERNEL(1, DIGITS_1)
ROWS_KERNEL(2, DIGITS_2)
ROWS_KERNEL(3, DIGITS_3)
ROWS_KERNEL(4, DIGITS_4)
#undef ROWS_KERNEL
#undef DIGITS_1
#undef DIGITS_2
#undef DIGITS_3
#undef DIGITS_4

/* ---- words in and out: image rows against vectors of channels ------------------------------ */

#if VB == 64
/* The lanes l with 0 <= first + l < count. */
INLINE __mmask8 NAME(within)(int first, int count)
{
    int before = first < 0 ? -first : 0, after = count - first;
    if (before > 7 || after <= 0)
        return 0;
    return (__mmask8)((0xffu << before) & (after > 7 ? 0xffu : (1u << after) - 1));
}
#endif

#if VB == 32
/* The transpose of four vectors of four words. */
INLINE void NAME(transpose)(WORDS *t)
{
    __m256i a = (__m256i)t[0], b = (__m256i)t[1], c = (__m256i)t[2], d = (__m256i)t[3];
    __m256i e = _mm256_unpacklo_epi64(a, b), f = _mm256_unpackhi_epi64(a, b);
    __m256i g = _mm256_unpacklo_epi64(c, d), h = _mm256_unpackhi_epi64(c, d);
    t[0] = (WORDS)_mm256_permute2x128_si256(e, g, 0x20);
    t[1] = (WORDS)_mm256_permute2x128_si256(f, h, 0x20);
    t[2] = (WORDS)_mm256_permute2x128_si256(e, g, 0x31);
    t[3] = (WORDS)_mm256_permute2x128_si256(f, h, 0x31);
}
#elif VB == 64
/* The transpose of eight vectors of eight words. */
INLINE void NAME(transpose)(WORDS *t)
{
    __m512i a[8], b[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm512_unpacklo_epi64((__m512i)t[i], (__m512i)t[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi64((__m512i)t[i], (__m512i)t[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) { /* words j, j + 4 and j + 2, j + 6 of four vectors */
            b[i + j] = _mm512_shuffle_i64x2(a[i + j], a[i + j + 2], 0x88);
            b[i + j + 2] = _mm512_shuffle_i64x2(a[i + j], a[i + j + 2], 0xdd);
        }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        t[j] = (WORDS)_mm512_shuffle_i64x2(b[j], b[j + 4], 0x88);
        t[j + 4] = (WORDS)_mm512_shuffle_i64x2(b[j], b[j + 4], 0xdd);
    }
}
#endif

/* to[i] = (x[0][i * step - pad], x[1][...], ...), zero outside the row's `width` words. May write
 * up to L - 1 vectors more than `count`. */
TARGET static void NAME(load_row)(WORDS *to, const uint64_t *const *x, int count, int pad, int step,
                                  int width)
{
    int i = 0;
#if VB == 64
    if (step <= 2) {
        const __m512i even = _mm512_set_epi64(14, 12, 10, 8, 6, 4, 2, 0);
        for (; i < count; i += L) {
            __mmask8 low = NAME(within)(i * step - pad, width);
            __mmask8 high = step == 1 ? 0 : NAME(within)(i * step - pad + L, width);
            ptrdiff_t at = (ptrdiff_t)i * step - pad;
            WORDS t[L];
#pragma GCC unroll 8
            for (int l = 0; l < L; l++) {
                __m512i v = _mm512_maskz_loadu_epi64(low, x[l] + at);
                if (step == 2)
                    v = _mm512_permutex2var_epi64(
                        v, even, _mm512_maskz_loadu_epi64(high, x[l] + at + L));
                t[l] = (WORDS)v;
            }
            NAME(transpose)(t);
#pragma GCC unroll 8
            for (int l = 0; l < L; l++)
                to[i + l] = t[l];
        }
        return;
    }
#endif
    int last = width + pad <= 0 ? 0 : (width + pad - 1) / step + 1;
    if (last > count)
        last = count;
    for (; i < last && i * step < pad; i++)
        to[i] = (WORDS){0};
#if VB == 32
    if (step == 1)
        for (; i + 4 <= last; i += 4) {
            WORDS t[4];
            for (int l = 0; l < 4; l++)
                t[l] = (WORDS)_mm256_loadu_si256((const __m256i *)(x[l] + i - pad));
            NAME(transpose)(t);
            for (int l = 0; l < 4; l++)
                to[i + l] = t[l];
        }
#endif
    for (; i < last; i++) {
        WORDS t;
        for (int l = 0; l < L; l++)
            t[l] = x[l][i * step - pad];
        to[i] = t;
    }
    for (; i < count; i++)
        to[i] = (WORDS){0};
}

/* y[l * plane + i] = finished(from[i * pitch][l] + add[...]), l < lanes, i < count. */
TARGET static void NAME(store_row)(const WORDS *from, size_t pitch, int count, int lanes,
                                   uint64_t *y, const uint64_t *add, size_t plane,
                                   struct finish *end)
{
    int i = 0;
#if VB == 64
    const __m512i start = _mm512_set1_epi64((int64_t)(end->start << end->spare));
    const __m512i span = _mm512_set1_epi64((int64_t)end->span);
    const __m128i spare = _mm_cvtsi32_si128(end->spare);
    const __m128i shift = _mm_cvtsi32_si128(end->spare + end->f);
    __mmask8 found = 0;
    for (; i < count; i += L) {
        __mmask8 mask = NAME(within)(i, count);
        WORDS t[L];
#pragma GCC unroll 8
        for (int l = 0; l < L; l++)
            t[l] = from[(size_t)(i + l < count ? i + l : i) * pitch];
        NAME(transpose)(t);
#pragma GCC unroll 8
        for (int l = 0; l < L; l++) {
            if (l >= lanes)
                break;
            if (add)
                t[l] += (WORDS)_mm512_maskz_loadu_epi64(mask, add + l * plane + i);
            if (end->on) {
                __m512i v = _mm512_sll_epi64((__m512i)t[l], spare);
                found |= _mm512_mask_cmplt_epu64_mask(mask, _mm512_sub_epi64(v, start), span);
                t[l] = (WORDS)_mm512_sra_epi64(v, shift);
            }
            _mm512_mask_storeu_epi64(y + l * plane + i, mask, (__m512i)t[l]);
        }
    }
    end->near[0] |= found;
#elif VB == 32
    WORDS *near = (WORDS *)end->near;
    if (lanes == 4)
        for (; i + 4 <= count; i += 4) {
            WORDS t[4];
            for (int l = 0; l < 4; l++)
                t[l] = from[(i + l) * pitch];
            NAME(transpose)(t);
            for (int l = 0; l < 4; l++) {
                if (add)
                    t[l] += (WORDS)_mm256_loadu_si256((const __m256i *)(add + l * plane + i));
                if (end->on) {
                    *near |= (WORDS)(((t[l] - end->start) << end->spare) < end->span);
                    t[l] = (((t[l] << end->spare) >> (end->spare + end->f)) ^ end->sign) -
                           end->sign;
                }
                _mm256_storeu_si256((__m256i *)(y + l * plane + i), (__m256i)t[l]);
            }
        }
#endif
#if VB < 64
    for (; i < count; i++)
        for (int l = 0; l < lanes; l++) {
            uint64_t v = from[i * pitch][l] + (add ? add[l * plane + i] : 0);
            if (end->on)
                v = finish_word(v, end);
            y[l * plane + i] = v;
        }
#endif
}

/* Words to digits, channels in pairs. */
INLINE WORDS NAME(digits)(WORDS v)
{
    const WORDS half = (WORDS){0} + 0x8000800080008000u;
    return PAIR((v + half) ^ half);
}

/* ---- one-dimensional transforms (derived in ringconv.c) ------------------------------------ */

INLINE void NAME(evaluate)(int line, WORDS *d)
{
    switch (line) {
    case F2: {
        WORDS a = d[0] - d[2], b = d[1] + d[2], c = d[2] - d[1], e = d[3] - d[1];
        d[0] = a, d[1] = b, d[2] = c, d[3] = e;
        break;
    }
    case F4: {
        WORDS e = d[1] - d[3], f = d[2] - d[4], s = d[2] - d[3];
        WORDS u = d[1] + d[4], v = d[2] + d[3], g = e + f, z = v - u;
        WORDS a = d[0] - d[4], b = d[5] - d[1];
        d[0] = (a + a) - ((e << 2) + e);
        d[1] = v + z + z;
        d[2] = ((s << 3) + s) - (g + g);
        d[3] = e - (f + f);
        d[4] = (e + e) - f;
        d[5] = (b + b) + ((f << 2) + f);
        break;
    }
    case S2: {
        WORDS a = d[0] - d[2], b = d[2], c = d[4] - d[2], e = d[1], f = d[3];
        d[0] = a, d[1] = b, d[2] = c, d[3] = e, d[4] = f;
        break;
    }
    case S4: {
        WORDS a = d[2] - d[6], b = d[2] + d[2], c = d[4] + d[4], e = d[4] - d[6];
        WORDS p0 = d[0] + d[0] - c - a, p1 = b + e, p2 = c - b + e;
        WORDS p4 = b - d[4] - (d[6] + d[6]) + d[8];
        WORDS o0 = d[1], o1 = d[3], o2 = d[5], o3 = d[7];
        d[0] = p0, d[1] = p1, d[2] = p2, d[3] = (WORDS){0} - a, d[4] = p4;
        d[5] = o0, d[6] = o1, d[7] = o2, d[8] = o3;
        break;
    }
    }
}

INLINE void NAME(interpolate)(int line, const WORDS *m, WORDS *y)
{
    switch (line) {
    case F2:
        y[0] = m[0] + m[0] + (m[1] + m[2]);
        y[1] = m[3] + m[3] + (m[1] - m[2]);
        break;
    case F4: {
        WORDS a = (m[1] << 3) + m[1], p = a + m[2], q = a - m[2];
        WORDS r = m[3] + m[3], s = m[4] + m[4], rs = r + s;
        y[0] = ((m[0] << 3) + m[0]) + p + (m[3] + (s << 2));
        y[1] = q + (rs + s);
        y[2] = p + (rs + r);
        y[3] = ((m[5] << 3) + m[5]) + q + (m[4] + (r << 2));
        break;
    }
    case S2:
        y[0] = m[0] + m[1] + m[3];
        y[1] = m[1] + m[2] + m[4];
        break;
    case S4: {
        WORDS a = (m[1] + m[1]) + m[1], p = a + m[2], q = a - m[2], r = m[3] + m[3];
        WORDS z0 = m[5] + m[5], z1 = m[6] + m[6], z2 = m[7] + m[7], z3 = m[8] + m[4];
        z3 += z3;
        y[0] = p + m[3] + (m[0] + m[0] + m[0]) + (z0 + z0 + z0);
        y[1] = q + r + (z1 + z1 + z1);
        y[2] = p + (r + r) + (z2 + z2 + z2);
        y[3] = q + (r << 2) + (z3 + z3 + z3);
        break;
    }
    }
}

/* ---- tiles --------------------------------------------------------------------------------- */

/* Fill `band` with `count` rows of the image, the first of them `top`, for channels c, c+1, ... */
INLINE void NAME(load_band)(const struct pi_ringconv *h, const struct block *b, const uint64_t *x,
                            int c, int top, int down, int step, int count, WORDS *band, int columns)
{
    for (int i = 0; i < count; i++) {
        int y = top + i * down;
        const uint64_t *row[L];
        for (int l = 0; l < L; l++)
            row[l] = y < 0 || y >= h->height || c + l >= h->in_group
                         ? b->zeros
                         : x + ((size_t)(c + l) * h->height + y) * h->width;
        NAME(load_row)(band + (size_t)i * columns, row, columns, h->pad_w, step, h->width);
    }
}

/* One word of V per channel: digits, or the words themselves. */
INLINE void NAME(put)(char *to, WORDS v, bool words)
{
    *(WORDS *)to = words ? v : NAME(digits)(v);
}

/* `tall` and `wide`: the 1-d algorithms of columns and rows, with p points and m outputs each. */
INLINE void NAME(tiles_in)(int tall, int wide, const struct pi_ringconv *h, const struct block *b)
{
    const int tall_p = POINTS(tall), wide_p = POINTS(wide);
    const int down = STEP(tall), right = STEP(wide);
    WORDS *band = (WORDS *)b->band;
    int columns = (h->columns - 1) * right + wide_p, vectors = h->depth / L;
    struct slice s = slice_of(b, b->images * b->rows * vectors);
    for (int task = s.begin; task < s.end; task++) {
        int c = task % vectors * L, r = task / vectors % b->rows;
        const uint64_t *x = b->x + (size_t)(task / vectors / b->rows) * h->image_in;
        char *v = b->v + ((size_t)(task / vectors) * h->columns * h->depth + c) * 8;
        NAME(load_band)(h, b, x, c, (b->row + r) * down - h->pad_h, 1, 1, tall_p, band, columns);
        for (int i = 0; i < columns; i++) {
            WORDS d[9];
#pragma GCC unroll 9
            for (int j = 0; j < tall_p; j++)
                d[j] = band[j * columns + i];
            NAME(evaluate)(tall, d);
#pragma GCC unroll 9
            for (int j = 0; j < tall_p; j++)
                band[j * columns + i] = d[j];
        }
        for (int j = 0; j < tall_p; j++) {
            char *to = v + (size_t)j * wide_p * h->v_pitch;
            for (int t = 0; t < h->columns; t++, to += (size_t)h->depth * 8) {
                WORDS d[9];
#pragma GCC unroll 9
                for (int i = 0; i < wide_p; i++)
                    d[i] = band[j * columns + t * right + i];
                NAME(evaluate)(wide, d);
                if (h->digits)
#pragma GCC unroll 9
                    for (int i = 0; i < wide_p; i++)
                        NAME(put)(to + i * h->v_pitch, d[i], false);
                else
#pragma GCC unroll 9
                    for (int i = 0; i < wide_p; i++)
                        NAME(put)(to + i * h->v_pitch, d[i], true);
            }
        }
    }
}

INLINE void NAME(tiles_out)(int tall, int wide, const struct pi_ringconv *h, struct block *b)
{
    const int tall_p = POINTS(tall), wide_p = POINTS(wide);
    const int tall_m = OUTPUTS(tall), wide_m = OUTPUTS(wide);
    const int shift = LOST(tall) + LOST(wide);
    const uint64_t odd = INVERSE(tall) * INVERSE(wide);
    WORDS *band = (WORDS *)b->band;
    int columns = h->columns * wide_m, vectors = (h->out_group + L - 1) / L;
    struct slice s = slice_of(b, b->images * b->rows * vectors);
    for (int task = s.begin; task < s.end; task++) {
        int o = task % vectors * L, r = task / vectors % b->rows;
        int image = task / vectors / b->rows, top = (b->row + r) * tall_m;
        int rows = h->out_height - top < tall_m ? h->out_height - top : tall_m;
        const uint64_t *m = b->m + (size_t)(task / vectors) * h->columns * h->panels * PANEL + o;
        int lanes = h->out_group - o < L ? h->out_group - o : L;
        size_t at = (size_t)image * h->image_out + (size_t)o * h->plane +
                    (size_t)top * h->out_width;
        for (int t = 0; t < h->columns; t++, m += h->panels * PANEL) {
            WORDS half[9][4];
            if (b->add && t * wide_m % 8 == 0)
                for (int l = 0; l < lanes; l++)
                    for (int i = 0; i < rows; i++)
                        __builtin_prefetch(b->add + at + l * h->plane +
                                               (size_t)i * h->out_width + t * wide_m, 1, 3);
#pragma GCC unroll 9
            for (int j = 0; j < wide_p; j++) {
                WORDS d[9];
#pragma GCC unroll 9
                for (int i = 0; i < tall_p; i++)
                    d[i] = *(const WORDS *)(m + (i * wide_p + j) * h->m_pitch);
                NAME(interpolate)(tall, d, half[j]);
            }
#pragma GCC unroll 4
            for (int i = 0; i < tall_m; i++) {
                WORDS d[9], y[4];
#pragma GCC unroll 9
                for (int j = 0; j < wide_p; j++)
                    d[j] = half[j][i];
                NAME(interpolate)(wide, d, y);
#pragma GCC unroll 4
                for (int j = 0; j < wide_m; j++)
                    band[i * columns + t * wide_m + j] = (y[j] * odd) >> shift;
            }
        }
        for (int i = 0; i < rows; i++, at += (size_t)h->out_width) {
            NAME(store_row)(band + (size_t)i * columns, 1, h->out_width, lanes, b->y + at,
                            b->add ? b->add + at : NULL, h->plane, &b->end);
        }
    }
}

TARGET static void NAME(pixels_in)(const struct pi_ringconv *h, const struct block *b)
{
    WORDS *band = (WORDS *)b->band;
    int count = (b->rows - 1) * h->down + (h->kernel_h - 1) * h->dilation_h + 1;
    int vectors = h->depth / L;
    struct slice s = slice_of(b, b->images * count * vectors);
    for (int task = s.begin; task < s.end; task++) {
        int c = task % vectors * L, r = task / vectors % count, image = task / vectors / count;
        int y = (b->row * h->down + r) * h->skip_h - h->pad_h;
        NAME(load_band)(h, b, b->x + (size_t)image * h->image_in, c, y, 0, h->skip_w, 1, band,
                        h->v_columns);
        char *to = b->v + ((size_t)image * h->v_rows + r) * h->v_columns * h->depth * 8 +
                   (size_t)c * 8;
        for (int i = 0; i < h->v_columns; i++, to += (size_t)h->depth * 8)
            NAME(put)(to, band[i], !h->digits);
    }
}

TARGET static void NAME(pixels_out)(const struct pi_ringconv *h, struct block *b)
{
    size_t pitch = (size_t)h->panels * PANEL;
    int vectors = (h->out_group + L - 1) / L;
    struct slice s = slice_of(b, b->images * b->rows * vectors);
    for (int task = s.begin; task < s.end; task++) {
        int o = task % vectors * L, r = task / vectors % b->rows;
        int image = task / vectors / b->rows, lanes = h->out_group - o < L ? h->out_group - o : L;
        const uint64_t *m = b->m + (size_t)(task / vectors) * pitch * h->out_width + o;
        size_t at = (size_t)image * h->image_out + (size_t)o * h->plane +
                    (size_t)(b->row + r) * h->out_width;
        NAME(store_row)((const WORDS *)m, pitch / L, h->out_width, lanes, b->y + at,
                        b->add ? b->add + at : NULL, h->plane, &b->end);
    }
}

TARGET static void NAME(input)(const struct pi_ringconv *h, const struct block *b)
{
    switch (h->scheme) {
    case F2F2: NAME(tiles_in)(F2, F2, h, b); break;
    case F4F2: NAME(tiles_in)(F4, F2, h, b); break;
    case F4F4: NAME(tiles_in)(F4, F4, h, b); break;
    case S2S2: NAME(tiles_in)(S2, S2, h, b); break;
    case S4S2: NAME(tiles_in)(S4, S2, h, b); break;
    case S4S4: NAME(tiles_in)(S4, S4, h, b); break;
    default: NAME(pixels_in)(h, b);
    }
}

TARGET static void NAME(output)(const struct pi_ringconv *h, struct block *b)
{
    switch (h->scheme) {
    case F2F2: NAME(tiles_out)(F2, F2, h, b); break;
    case F4F2: NAME(tiles_out)(F4, F2, h, b); break;
    case F4F4: NAME(tiles_out)(F4, F4, h, b); break;
    case S2S2: NAME(tiles_out)(S2, S2, h, b); break;
    case S4S2: NAME(tiles_out)(S4, S2, h, b); break;
    case S4S4: NAME(tiles_out)(S4, S4, h, b); break;
    default: NAME(pixels_out)(h, b);
    }
}

static const struct isa NAME(isa) = {
    NAME(label), VB, DIGIT_NS, WORD_NS, TRANSFORM_NS, NAME(input), NAME(output),
    {NAME(rows_0), NAME(rows_1), NAME(rows_2), NAME(rows_3), NAME(rows_4)},
};

#undef L
#undef PARTS
#undef INLINE
#undef WORDS
#undef SUMS
#undef SIGNS
#undef NAME
#undef TARGET
#undef VB
#undef ROWS
#undef DIGIT_NS
#undef WORD_NS
#undef TRANSFORM_NS
#undef MADD
#undef LOW
#undef HIGH
#undef PAIR
