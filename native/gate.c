/* The arithmetic around a batch of ReLU gates and after a linear layer. */
#include "fss.h"

/* Shares of relu(x); see relu.result_share. values is (5, stride). */
static inline __attribute__((always_inline)) void combine(
    const uint64_t *restrict x, const uint64_t *restrict signs, const uint64_t *restrict values,
    size_t stride, size_t count, int k, int lift_on, int server, uint64_t *restrict out) {
    const uint64_t *r = values, *rho = values + stride, *rho_r = values + 2 * stride;
    const uint64_t *msb = values + 3 * stride, *rho_msb = values + 4 * stride;
    const uint64_t on = lift_on ? ~0ull : 0;
    const uint64_t mine = server ? ~0ull : 0;
    for (size_t i = 0; i < count; i++) {
        const uint64_t top = x[i] >> (k - 1);
        const uint64_t d = 0 - ((signs[i] ^ top) & 1); /* D as a mask */
        const uint64_t lift = (top - 1) & on;          /* all ones where msb(X) = 0 */
        const uint64_t big_r = r[i] - (lift & (msb[i] << k));
        const uint64_t big_rho_r = rho_r[i] - (lift & (rho_msb[i] << k));
        const uint64_t inner = x[i] * rho[i] - big_rho_r;
        out[i] = ((inner ^ d) - d) + (d & ((mine & x[i]) - big_r));
    }
}

static void combine_plain(const uint64_t *x, const uint64_t *signs, const uint64_t *values,
                          size_t stride, size_t count, int k, int lift_on, int server,
                          uint64_t *out) {
    combine(x, signs, values, stride, count, k, lift_on, server, out);
}

static inline __attribute__((always_inline)) int finish(uint64_t *v, size_t count, int n, int f,
                                                        uint64_t bound) {
    const int spare = 64 - n;
    const uint64_t start = (1ull << (n - 1)) - bound;
    const uint64_t span = (2 * bound) << spare;
    const uint64_t sign = 1ull << (63 - spare - f);
    uint64_t near_edge = 0;
    for (size_t i = 0; i < count; i++) {
        const uint64_t word = v[i];
        near_edge |= ((word - start) << spare) < span;
        v[i] = (((word << spare) >> (spare + f)) ^ sign) - sign;
    }
    return (int)near_edge;
}

static int finish_plain(uint64_t *v, size_t count, int n, int f, uint64_t bound) {
    return finish(v, count, n, f, bound);
}

#if FSS_X86
__attribute__((target("avx2"))) static void combine_avx2(const uint64_t *x, const uint64_t *signs,
                                                         const uint64_t *values, size_t stride,
                                                         size_t count, int k, int lift_on,
                                                         int server, uint64_t *out) {
    combine(x, signs, values, stride, count, k, lift_on, server, out);
}

__attribute__((target("avx2"))) static int finish_avx2(uint64_t *v, size_t count, int n,
                                                       int f, uint64_t bound) {
    return finish(v, count, n, f, bound);
}
#endif

static void results(const uint64_t *x, const uint64_t *signs, const uint64_t *values,
                    size_t stride, size_t count, int k, int lift_on, int server, uint64_t *out) {
#if FSS_X86
    if (fss_active() & FSS_AVX2) {
        combine_avx2(x, signs, values, stride, count, k, lift_on, server, out);
        return;
    }
#endif
    combine_plain(x, signs, values, stride, count, k, lift_on, server, out);
}

FSS_EXPORT void fss_relu_combine(const uint64_t *x, const uint64_t *signs, const uint64_t *values,
                                 size_t count, int k, int lift_on, int server, uint64_t *out) {
    results(x, signs, values, count, count, k, lift_on, server, out);
}

/* v = signed shift by f of v in Z/2^n, in place; whether any v lay within bound of +-2^(n-1).
 * 1 <= n <= 64, 0 <= f < n, bound < 2^(n-1). */
FSS_EXPORT int fss_finish(uint64_t *v, size_t count, int n, int f, uint64_t bound) {
#if FSS_X86
    if (fss_active() & FSS_AVX2) return finish_avx2(v, count, n, f, bound);
#endif
    return finish_plain(v, count, n, f, bound);
}

#if FSS_X86
/* One party's material of a batch of gates, as relu.Share holds it. */
typedef struct {
    const uint64_t *root, *corrections, *sign, *values;
    const uint8_t *tree_key, *leaf_key;
    uint64_t count;
    int32_t k, n;
} share;

/* Gates at a time; a multiple of 8, so that every packed piece begins at a byte. */
enum { PIECE = 512 };

static void sign_bits(const share *m, const uint64_t *x, size_t at, size_t count, uint64_t *out) {
    fss_dpf_evaluate(m->root + 2 * at, m->corrections + 2 * at, m->count, x, count, m->k - 1,
                     m->tree_key, m->leaf_key, out);
    for (size_t i = 0; i < count; i++) out[i] ^= m->sign[at + i];
}

static size_t packed(size_t count, int width) { return (count * (size_t)width + 7) / 8; }

/* The client's part; see relu.answer. Needs AES instructions. */
FSS_EXPORT void fss_gate_answer(const share *m, const uint8_t *message, const uint64_t *mask,
                                uint8_t *reply) {
    const uint8_t *bits_in = message + packed(m->count, m->k);
    uint8_t *masked_out = reply + packed(m->count, 1);
    uint64_t x[PIECE], theirs[PIECE], mine[PIECE], out[PIECE];
    for (size_t at = 0; at < m->count; at += PIECE) {
        const size_t left = m->count - at, count = left < PIECE ? left : PIECE;
        fss_unpack(message + packed(at, m->k), packed(count, m->k), count, m->k, x);
        fss_unpack(bits_in + at / 8, packed(count, 1), count, 1, theirs);
        sign_bits(m, x, at, count, mine);
        fss_pack(mine, count, 1, reply + at / 8);
        for (size_t i = 0; i < count; i++) theirs[i] ^= mine[i];
        results(x, theirs, m->values + at, m->count, count, m->k, m->n > m->k, 0, out);
        for (size_t i = 0; i < count; i++) out[i] -= mask[at + i];
        fss_pack(out, count, m->n, masked_out + packed(at, m->n));
    }
}

/* The server's first half; see relu.opening. index: positions of the gates in s, or NULL. */
FSS_EXPORT void fss_gate_open(const share *m, const uint64_t *s, const int64_t *index,
                              const uint64_t *delta, uint64_t *x, uint64_t *signs,
                              uint8_t *message) {
    const uint64_t low = (1ull << m->k) - 1;
    uint8_t *bits_out = message + packed(m->count, m->k);
    for (size_t at = 0; at < m->count; at += PIECE) {
        const size_t left = m->count - at, count = left < PIECE ? left : PIECE;
        for (size_t i = at; i < at + count; i++)
            x[i] = (s[index ? (size_t)index[i] : i] + delta[i]) & low;
        fss_pack(x + at, count, m->k, message + packed(at, m->k));
        sign_bits(m, x + at, at, count, signs + at);
        fss_pack(signs + at, count, 1, bits_out + at / 8);
    }
}

/* The server's second half; see relu.closing. Writes the results to their places in s. */
FSS_EXPORT void fss_gate_close(const share *m, const uint64_t *x, const uint64_t *signs,
                               const uint8_t *reply, const int64_t *index, uint64_t *s) {
    const uint8_t *masked_in = reply + packed(m->count, 1);
    uint64_t theirs[PIECE], masked[PIECE], out[PIECE];
    for (size_t at = 0; at < m->count; at += PIECE) {
        const size_t left = m->count - at, count = left < PIECE ? left : PIECE;
        fss_unpack(reply + at / 8, packed(count, 1), count, 1, theirs);
        fss_unpack(masked_in + packed(at, m->n), packed(count, m->n), count, m->n, masked);
        for (size_t i = 0; i < count; i++) theirs[i] ^= signs[at + i];
        results(x + at, theirs, m->values + at, m->count, count, m->k, m->n > m->k, 1, out);
        for (size_t i = 0; i < count; i++)
            s[index ? (size_t)index[at + i] : at + i] = out[i] + masked[i];
    }
}
#endif
