/* The arithmetic around a batch of ReLU gates. */
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

#if FSS_X86
#define AVX2_TARGET __attribute__((target("avx2")))

AVX2_TARGET static void combine_avx2(const uint64_t *x, const uint64_t *signs,
                                     const uint64_t *values, size_t stride, size_t count, int k,
                                     int lift_on, int server, uint64_t *out) {
    combine(x, signs, values, stride, count, k, lift_on, server, out);
}

FSS_AVX512_TARGET static void combine_avx512(const uint64_t *x, const uint64_t *signs,
                                             const uint64_t *values, size_t stride, size_t count,
                                             int k, int lift_on, int server, uint64_t *out) {
    combine(x, signs, values, stride, count, k, lift_on, server, out);
}

#endif

static void results(const uint64_t *x, const uint64_t *signs, const uint64_t *values,
                    size_t stride, size_t count, int k, int lift_on, int server, uint64_t *out) {
#if FSS_X86
    const unsigned active = fss_active();
    if (active & FSS_AVX512) {
        combine_avx512(x, signs, values, stride, count, k, lift_on, server, out);
        return;
    }
    if (active & FSS_AVX2) {
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

#if FSS_X86
/* One party's material of a batch of gates, as relu.Share holds it. The functions below work on
 * the gates [at, at + count), at a multiple of 8; their other arguments begin at gate `at`, but
 * for `s`, a whole tensor, and `delta` and `mask`, of a whole batch. */
typedef struct {
    const uint64_t *root, *corrections, *sign, *values;
    const uint8_t *tree_key, *leaf_key;
    uint64_t count;
    int32_t k, n;
} share;

/* Gates at a time, so that what passes between two steps stays in the nearest cache; a multiple
 * of 8, so that every packed piece begins at a byte. */
enum { PIECE = 512 };

static size_t piece(size_t left) { return left < PIECE ? left : PIECE; }

static size_t packed(size_t count, int width) { return (count * (size_t)width + 7) / 8; }

/* The server's X, packed; see relu.opening. index: positions of all gates in s, or NULL. */
FSS_EXPORT void fss_gate_open(const share *m, size_t at, size_t count, const uint64_t *s,
                              const int64_t *index, const uint64_t *delta, uint8_t *opened) {
    uint64_t x[PIECE];
    for (size_t i = 0; i < count; i += PIECE) {
        const size_t size = piece(count - i);
        const uint64_t *d = delta + at + i;
        if (index)
            for (size_t j = 0; j < size; j++) x[j] = s[index[at + i + j]] + d[j];
        else
            for (size_t j = 0; j < size; j++) x[j] = s[at + i + j] + d[j];
        fss_pack(x, size, m->k, opened + packed(i, m->k));
    }
}

/* Either party's bits, packed; see relu.sign_bits. Needs AES instructions. */
FSS_EXPORT void fss_gate_sign(const share *m, size_t at, size_t count, const uint8_t *opened,
                              uint8_t *bits) {
    fss_dpf_keys keys;
    uint64_t x[PIECE];
    uint8_t sign[PIECE / 8];
    fss_dpf_expand(m->tree_key, m->leaf_key, &keys);
    for (size_t i = 0; i < count; i += PIECE) {
        const size_t size = piece(count - i);
        fss_unpack(opened + packed(i, m->k), packed(size, m->k), size, m->k, x);
        fss_dpf_bits(m->root + 2 * (at + i), m->corrections + 2 * (at + i), m->count, x, size,
                     m->k - 1, &keys, bits + i / 8);
        fss_pack(m->sign + at + i, size, 1, sign);
        for (size_t j = 0; j < packed(size, 1); j++) bits[i / 8 + j] ^= sign[j];
    }
}

/* This party's shares of relu(x) at up to PIECE gates from `at`. */
static void shares(const share *m, size_t at, size_t count, const uint8_t *opened,
                   const uint8_t *mine, const uint8_t *theirs, int server, uint64_t *out) {
    uint64_t x[PIECE], signs[PIECE];
    uint8_t bits[PIECE / 8];
    for (size_t i = 0; i < packed(count, 1); i++) bits[i] = mine[i] ^ theirs[i];
    fss_unpack(opened, packed(count, m->k), count, m->k, x);
    fss_unpack(bits, packed(count, 1), count, 1, signs);
    results(x, signs, m->values + at, m->count, count, m->k, m->n > m->k, server, out);
}

/* The client's masked results, packed; see relu.answer. */
FSS_EXPORT void fss_gate_answer(const share *m, size_t at, size_t count, const uint8_t *opened,
                                const uint8_t *mine, const uint8_t *theirs, const uint64_t *mask,
                                uint8_t *masked) {
    uint64_t out[PIECE];
    for (size_t i = 0; i < count; i += PIECE) {
        const size_t size = piece(count - i);
        shares(m, at + i, size, opened + packed(i, m->k), mine + i / 8, theirs + i / 8, 0, out);
        for (size_t j = 0; j < size; j++) out[j] -= mask[at + i + j];
        fss_pack(out, size, m->n, masked + packed(i, m->n));
    }
}

/* The server's results, to their places in s; see relu.closing. */
FSS_EXPORT void fss_gate_close(const share *m, size_t at, size_t count, const uint8_t *opened,
                               const uint8_t *mine, const uint8_t *theirs, const uint8_t *masked,
                               const int64_t *index, uint64_t *s) {
    uint64_t out[PIECE], received[PIECE];
    for (size_t i = 0; i < count; i += PIECE) {
        const size_t size = piece(count - i);
        shares(m, at + i, size, opened + packed(i, m->k), mine + i / 8, theirs + i / 8, 1, out);
        fss_unpack(masked + packed(i, m->n), packed(size, m->n), size, m->n, received);
        if (index)
            for (size_t j = 0; j < size; j++) s[index[at + i + j]] = out[j] + received[j];
        else
            for (size_t j = 0; j < size; j++) s[at + i + j] = out[j] + received[j];
    }
}
#endif
