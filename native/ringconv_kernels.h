/* The kernels of ringconv.c for one instruction set. Included once for each, with
 *
 *   NAME(x)      x with the instruction set's suffix
 *   TARGET       the function attribute that enables it
 *   VB           bytes of a vector: 16, 32 or 64
 *   ROWS         rows of V that the inner kernel takes at once
 *   MADD(c,d,w,x)  c[p][d] += w[p] . *x for all p < PARTS, pairs of int16 into int32
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

/* Recombine the sums of `digits` digits into words and store or add them to m. */
INLINE void NAME(combine)(const SUMS *sum, int digits, int shift, int first, uint64_t *m)
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
    if (shift) {
        low <<= shift;
        top <<= shift;
    }
    WORDS *out = (WORDS *)m;
    if (first) {
        out[0] = low;
        out[1] = top;
    } else {
        out[0] += low;
        out[1] += top;
    }
}

/* One channel pair: `rows` rows of V times 16 output channels. */
INLINE void NAME(step)(int rows, int digits, int ahead, const char *w, const char **x,
                       SUMS sum[][PARTS][4])
{
    SUMS weight[PARTS];
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; p++)
        weight[p] = *(const SUMS *)(w + VB * p);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
#pragma GCC unroll 4
        for (int d = 0; d < digits; d++)
            MADD(sum[r], d, weight, (const digit_pair *)(x[r] + 4 * d));
        x[r] += 16;
    }
    if (ahead)
        __builtin_prefetch(w + ahead, 0, 2);
}

/* One segment: `rows` rows of V times a panel of 16 output channels, into m[row][16]. */
INLINE void NAME(tile)(int rows, int digits, int ahead, const struct segment *s,
                       const struct chunk *chunks, const char *panel, const char *v,
                       const int32_t *row, uint64_t *m, size_t pitch)
{
    SUMS sum[ROWS][PARTS][4];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int p = 0; p < PARTS; p++)
#pragma GCC unroll 4
            for (int d = 0; d < digits; d++)
                sum[r][p][d] = (SUMS){0};
    const char *w = panel + s->panel;
    v += 4 * s->digit;
    for (const struct chunk *c = chunks + s->begin; c < chunks + s->end; c++) {
        const char *x[ROWS];
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
            x[r] = v + row[r] + c->offset;
        int k = c->pairs;
        for (; k >= 4; k -= 4)
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++, w += 64)
                NAME(step)(rows, digits, ahead, w, x, sum);
        for (; k > 0; k--, w += 64)
            NAME(step)(rows, digits, ahead, w, x, sum);
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int p = 0; p < PARTS; p++)
            NAME(combine)(sum[r][p], digits, s->shift, s->first, m + r * pitch + 2 * L * p);
}

INLINE void NAME(all_rows)(int digits, const struct segment *s, const struct chunk *chunks,
                           const char *panel, const char *v, const int32_t *row, int rows,
                           uint64_t *m, size_t pitch)
{
    int r = 0;
    if (rows >= ROWS) {
        NAME(tile)(ROWS, digits, AHEAD, s, chunks, panel, v, row, m, pitch);
        r = ROWS;
    }
    for (; r + ROWS <= rows; r += ROWS)
        NAME(tile)(ROWS, digits, 0, s, chunks, panel, v, row + r, m + r * pitch, pitch);
#if ROWS > 1
    for (; r < rows; r++)
        NAME(tile)(1, digits, AHEAD, s, chunks, panel, v, row + r, m + r * pitch, pitch);
#endif
}

#define DIGITS_CASE(D)                                                                        \
    TARGET static void NAME(rows_##D)(const struct segment *s, const struct chunk *chunks,    \
                                      const char *panel, const char *v, const int32_t *row,   \
                                      int rows, uint64_t *m, size_t pitch)                    \
    {                                                                                         \
        NAME(all_rows)(D, s, chunks, panel, v, row, rows, m, pitch);                          \
    }
DIGITS_CASE(1)
DIGITS_CASE(2)
DIGITS_CASE(3)
DIGITS_CASE(4)
#undef DIGITS_CASE

/* ---- words in and out: image rows against vectors of channels ------------------------------ */

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
#endif

/* to[i] = (x[0][i * step - pad], x[1][...], ...), zero outside the row's `width` words. */
TARGET static void NAME(load_row)(WORDS *to, const uint64_t *const *x, int count, int pad, int step,
                                  int width)
{
    int i = 0, last = width + pad <= 0 ? 0 : (width + pad - 1) / step + 1;
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

/* y[l * plane + i] = from[i * pitch][l] + add[...], l < lanes, i < count. */
TARGET static void NAME(store_row)(const WORDS *from, size_t pitch, int count, int lanes,
                                   uint64_t *y, const uint64_t *add, size_t plane)
{
    int i = 0;
#if VB == 32
    if (lanes == 4)
        for (; i + 4 <= count; i += 4) {
            WORDS t[4];
            for (int l = 0; l < 4; l++)
                t[l] = from[(i + l) * pitch];
            NAME(transpose)(t);
            for (int l = 0; l < 4; l++) {
                if (add)
                    t[l] += (WORDS)_mm256_loadu_si256((const __m256i *)(add + l * plane + i));
                _mm256_storeu_si256((__m256i *)(y + l * plane + i), (__m256i)t[l]);
            }
        }
#endif
    for (; i < count; i++)
        for (int l = 0; l < lanes; l++)
            y[l * plane + i] = from[i * pitch][l] + (add ? add[l * plane + i] : 0);
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

/* `tall` and `wide`: the 1-d algorithms of columns and rows, with p points and m outputs each. */
INLINE void NAME(tiles_in)(int tall, int wide, const struct pi_ringconv *h, const struct block *b)
{
    const int tall_p = POINTS(tall), wide_p = POINTS(wide);
    const int down = STEP(tall), right = STEP(wide);
    WORDS *band = (WORDS *)b->band;
    int columns = (h->columns - 1) * right + wide_p;
    char *v = b->v;
    for (int image = 0; image < b->images; image++) {
        const uint64_t *x = b->x + (size_t)image * h->image_in;
        for (int r = 0; r < b->rows; r++, v += (size_t)h->columns * h->depth * 8)
            for (int c = 0; c < h->depth; c += L) {
                NAME(load_band)(h, b, x, c, (b->row + r) * down - h->pad_h, 1, 1, tall_p, band,
                                columns);
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
                    char *to = v + (size_t)c * 8 + (size_t)j * wide_p * h->v_pitch;
                    for (int t = 0; t < h->columns; t++, to += (size_t)h->depth * 8) {
                        WORDS d[9];
#pragma GCC unroll 9
                        for (int i = 0; i < wide_p; i++)
                            d[i] = band[j * columns + t * right + i];
                        NAME(evaluate)(wide, d);
#pragma GCC unroll 9
                        for (int i = 0; i < wide_p; i++)
                            *(WORDS *)(to + i * h->v_pitch) = NAME(digits)(d[i]);
                    }
                }
            }
    }
}

INLINE void NAME(tiles_out)(int tall, int wide, const struct pi_ringconv *h, const struct block *b)
{
    const int tall_p = POINTS(tall), wide_p = POINTS(wide);
    const int tall_m = OUTPUTS(tall), wide_m = OUTPUTS(wide);
    const int shift = LOST(tall) + LOST(wide);
    const uint64_t odd = INVERSE(tall) * INVERSE(wide);
    WORDS *band = (WORDS *)b->band;
    int columns = h->columns * wide_m;
    const uint64_t *m = b->m;
    for (int image = 0; image < b->images; image++)
        for (int r = 0; r < b->rows; r++, m += (size_t)h->columns * h->panels * 16) {
            int top = (b->row + r) * tall_m;
            int rows = h->out_height - top < tall_m ? h->out_height - top : tall_m;
            for (int o = 0; o < h->out_group; o += L) {
                for (int t = 0; t < h->columns; t++) {
                    const uint64_t *from = m + (size_t)t * h->panels * 16 + o;
                    WORDS half[9][4];
#pragma GCC unroll 9
                    for (int j = 0; j < wide_p; j++) {
                        WORDS d[9];
#pragma GCC unroll 9
                        for (int i = 0; i < tall_p; i++)
                            d[i] = *(const WORDS *)(from + (i * wide_p + j) * h->m_pitch);
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
                int lanes = h->out_group - o < L ? h->out_group - o : L;
                for (int i = 0; i < rows; i++) {
                    size_t at = (size_t)image * h->image_out + (size_t)o * h->plane +
                                (size_t)(top + i) * h->out_width;
                    NAME(store_row)(band + (size_t)i * columns, 1, h->out_width, lanes, b->y + at,
                                    b->add ? b->add + at : NULL, h->plane);
                }
            }
        }
}

TARGET static void NAME(pixels_in)(const struct pi_ringconv *h, const struct block *b)
{
    WORDS *band = (WORDS *)b->band;
    int count = (b->rows - 1) * h->down + (h->kernel_h - 1) * h->dilation_h + 1;
    for (int image = 0; image < b->images; image++)
        for (int r = 0; r < count; r++)
            for (int c = 0; c < h->depth; c += L) {
                int y = (b->row * h->down + r) * h->skip_h - h->pad_h;
                NAME(load_band)(h, b, b->x + (size_t)image * h->image_in, c, y, 0, h->skip_w, 1,
                                band, h->v_columns);
                char *to = b->v + ((size_t)image * h->v_rows + r) * h->v_columns * h->depth * 8 +
                           (size_t)c * 8;
                for (int i = 0; i < h->v_columns; i++, to += (size_t)h->depth * 8)
                    *(WORDS *)to = NAME(digits)(band[i]);
            }
}

TARGET static void NAME(pixels_out)(const struct pi_ringconv *h, const struct block *b)
{
    size_t pitch = (size_t)h->panels * 16;
    const uint64_t *m = b->m;
    for (int image = 0; image < b->images; image++)
        for (int r = 0; r < b->rows; r++, m += pitch * h->out_width)
            for (int o = 0; o < h->out_group; o += L) {
                int lanes = h->out_group - o < L ? h->out_group - o : L;
                size_t at = (size_t)image * h->image_out + (size_t)o * h->plane +
                            (size_t)(b->row + r) * h->out_width;
                NAME(store_row)((const WORDS *)(m + o), pitch / L, h->out_width, lanes, b->y + at,
                                b->add ? b->add + at : NULL, h->plane);
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

TARGET static void NAME(output)(const struct pi_ringconv *h, const struct block *b)
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
    NAME(label), VB, NAME(input), NAME(output),
    {NAME(rows_1), NAME(rows_2), NAME(rows_3), NAME(rows_4)},
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
#undef MADD
#undef LOW
#undef HIGH
#undef PAIR
