/* Included by dpf.c once per vector width. GROUP keys go down the tree side by side, so that their
 * AES rounds overlap. */

#define REGS 8
#define GROUP (REGS * LANES)

/* h[i] = AES(sigma(s[i])) ^ sigma(s[i]), sigma(a, b) = (a ^ b, a) */
TARGET static inline __attribute__((always_inline)) void NAME(hash)(const V s[REGS], V h[REGS],
                                                                     const uint8_t keys[11][16]) {
    for (int i = 0; i < REGS; i++) h[i] = XOR(MIXED(s[i]), KEY(keys[0]));
    for (int round = 1; round < 10; round++)
        for (int i = 0; i < REGS; i++) h[i] = ROUND(h[i], KEY(keys[round]));
    for (int i = 0; i < REGS; i++) h[i] = XOR(LAST_ROUND(h[i], KEY(keys[10])), MIXED(s[i]));
}

/* One bit per key: the parity of the leaf's bits up to x mod 128, plus the share's lowest bit. */
TARGET static inline __attribute__((always_inline)) void NAME(parities)(
    const V leaf[REGS], const V share[REGS], const uint64_t *x, int bits, uint8_t *out) {
    const uint64_t low_mask = bits >= LEAF_BITS ? 127 : (1ull << bits) - 1;
#if LANES == 4
    const V one = _mm512_set1_epi64(1), ones = _mm512_set1_epi64(-1);
    const V reach = _mm512_set_epi64(127, 63, 127, 63, 127, 63, 127, 63);
    const V firsts = _mm512_set_epi64(14, 12, 10, 8, 6, 4, 2, 0);
    V odd[2];
    for (int i = 0; i < REGS; i++) {
        const V low = _mm512_and_si512(PER_BLOCK(x + LANES * i), _mm512_set1_epi64((long long)low_mask));
        const V beyond = _mm512_max_epi64(_mm512_sub_epi64(reach, low), ZERO);
        V within = _mm512_and_si512(_mm512_srlv_epi64(ones, beyond), leaf[i]);
        within = _mm512_mask_xor_epi64(within, 0x55, within, _mm512_and_si512(share[i], one));
        odd[i & 1] = _mm512_popcnt_epi64(XOR(within, SHUFFLE(within)));
        if (i & 1)
            out[i / 2] = _mm512_test_epi64_mask(
                _mm512_permutex2var_epi64(odd[0], firsts, odd[1]), one);
    }
#else
    uint64_t leaves[2 * GROUP], shares[2 * GROUP];
    for (int i = 0; i < REGS; i++) {
        STORE(leaves + 2 * LANES * i, leaf[i]);
        STORE(shares + 2 * LANES * i, share[i]);
    }
    for (int byte = 0; byte < GROUP / 8; byte++) {
        unsigned packed = 0;
        for (int i = 8 * byte; i < 8 * byte + 8; i++) {
            const uint64_t low = x[i] & low_mask;
            const uint64_t upper = 0 - (low >> 6);
            const uint64_t prefix = (2ull << (low & 63)) - 1;
            const uint64_t within = ((prefix | upper) & leaves[2 * i]) ^
                                    (prefix & upper & leaves[2 * i + 1]) ^ (shares[2 * i] & 1);
            packed |= (unsigned)__builtin_parityll(within) << (i & 7);
        }
        out[byte] = (uint8_t)packed;
    }
#endif
}

TARGET static inline __attribute__((always_inline)) void NAME(evaluate_group)(
    const uint64_t *root, const uint64_t *corrections, size_t stride, const uint64_t *x, int bits,
    const fss_dpf_keys *keys, uint8_t *out) {
    const int depth = bits > LEAF_BITS ? bits - LEAF_BITS : 0;
    V s[REGS], h[REGS], turns[REGS], share[REGS];
    for (int i = 0; i < REGS; i++) {
        s[i] = LOAD(root + 2 * LANES * i);
        turns[i] = PER_BLOCK(x + LANES * i);
        share[i] = ZERO;
    }
    for (int level = 0; level < depth; level++) {
        const uint64_t *correction = corrections + 2 * stride * (size_t)level;
        const V bit = SET1(1ll << (bits - 1 - level));
        NAME(hash)(s, h, keys->tree);
        for (int i = 0; i < REGS; i++) {
            const CHOICE right = HAS(turns[i], bit);
            const V left = XOR_IF(h[i], LOWEST(s[i]), LOAD(correction + 2 * LANES * i));
            share[i] = XOR_IF(share[i], right, left);
            s[i] = XOR_IF(left, right, s[i]);
        }
    }
    const uint64_t *correction = corrections + 2 * stride * (size_t)depth;
    NAME(hash)(s, h, keys->leaf);
    for (int i = 0; i < REGS; i++)
        h[i] = XOR_IF(h[i], LOWEST(s[i]), LOAD(correction + 2 * LANES * i));
    NAME(parities)(h, share, x, bits, out);
}

TARGET static void NAME(evaluate)(const uint64_t *root, const uint64_t *corrections,
                                   size_t stride, const uint64_t *x, size_t count, int bits,
                                   const fss_dpf_keys *keys, uint8_t *out) {
    size_t i = 0;
    for (; i + GROUP <= count; i += GROUP)
        NAME(evaluate_group)(root + 2 * i, corrections + 2 * i, stride, x + i, bits, keys,
                             out + i / 8);
    if (i < count) {
        const size_t rest = count - i;
        const size_t levels = (size_t)(bits > LEAF_BITS ? bits - LEAF_BITS : 0) + 1;
        uint64_t roots[2 * GROUP] = {0}, xs[GROUP] = {0}, held[2 * GROUP * 64];
        uint8_t outs[GROUP / 8];
        memcpy(roots, root + 2 * i, 16 * rest);
        memcpy(xs, x + i, 8 * rest);
        memset(held, 0, 16 * GROUP * levels);
        for (size_t level = 0; level < levels; level++)
            memcpy(held + 2 * GROUP * level, corrections + 2 * (level * stride + i), 16 * rest);
        NAME(evaluate_group)(roots, held, GROUP, xs, bits, keys, outs);
        if (rest % 8) outs[rest / 8] &= (uint8_t)((1u << (rest % 8)) - 1);
        memcpy(out + i / 8, outs, (rest + 7) / 8);
    }
}

TARGET static inline __attribute__((always_inline)) void NAME(generate_group)(
    const uint64_t *alpha, int bits, const uint64_t *root, const uint64_t *delta, size_t stride,
    const fss_dpf_keys *keys, uint64_t *corrections) {
    /* the first half of the registers is one party's keys, the second half the other's */
    enum { HALF = REGS / 2 };
    const int depth = bits > LEAF_BITS ? bits - LEAF_BITS : 0;
    V s[REGS], h[REGS], turns[HALF], d[HALF];
    for (int i = 0; i < HALF; i++) {
        s[i] = LOAD(root + 2 * LANES * i);
        d[i] = LOAD(delta + 2 * LANES * i);
        turns[i] = PER_BLOCK(alpha + LANES * i);
    }
    for (int level = 0; level < depth; level++) {
        uint64_t *out = corrections + 2 * stride * (size_t)level;
        const V bit = SET1(1ll << (bits - 1 - level));
        for (int i = 0; i < HALF; i++) s[HALF + i] = XOR(s[i], d[i]);
        NAME(hash)(s, h, keys->tree);
        for (int i = 0; i < HALF; i++) {
            const CHOICE right = HAS(turns[i], bit);
            /* the two hashes' sum, plus delta on the left path */
            const V correction = XOR_IF(XOR(XOR(h[i], h[HALF + i]), d[i]), right, d[i]);
            STORE(out + 2 * LANES * i, correction);
            s[i] = XOR_IF(XOR_IF(h[i], right, s[i]), LOWEST(s[i]), correction);
        }
    }
    uint64_t *out = corrections + 2 * stride * (size_t)depth;
    for (int i = 0; i < HALF; i++) s[HALF + i] = XOR(s[i], d[i]);
    NAME(hash)(s, h, keys->leaf);
    for (int i = 0; i < HALF; i++) {
        uint64_t unit[2 * LANES];
        for (int lane = 0; lane < LANES; lane++) {
            const uint64_t low = alpha[LANES * i + lane] & 127;
            const uint64_t bit = 1ull << (low & 63), upper = 0 - (low >> 6);
            unit[2 * lane] = bit & ~upper;
            unit[2 * lane + 1] = bit & upper;
        }
        STORE(out + 2 * LANES * i, XOR(XOR(h[i], h[HALF + i]), LOAD(unit)));
    }
}

TARGET static void NAME(generate)(const uint64_t *alpha, size_t count, int bits,
                                   const uint64_t *root, const uint64_t *delta,
                                   const fss_dpf_keys *keys, uint64_t *corrections) {
    enum { SIZE = GROUP / 2 };
    size_t i = 0;
    for (; i + SIZE <= count; i += SIZE)
        NAME(generate_group)(alpha + i, bits, root + 2 * i, delta + 2 * i, count, keys,
                             corrections + 2 * i);
    if (i < count) {
        const size_t rest = count - i;
        const size_t levels = (size_t)(bits > LEAF_BITS ? bits - LEAF_BITS : 0) + 1;
        uint64_t roots[2 * SIZE] = {0}, deltas[2 * SIZE] = {0}, alphas[SIZE] = {0};
        uint64_t made[2 * SIZE * 64];
        memcpy(roots, root + 2 * i, 16 * rest);
        memcpy(deltas, delta + 2 * i, 16 * rest);
        memcpy(alphas, alpha + i, 8 * rest);
        NAME(generate_group)(alphas, bits, roots, deltas, SIZE, keys, made);
        for (size_t level = 0; level < levels; level++)
            memcpy(corrections + 2 * (level * count + i), made + 2 * SIZE * level, 16 * rest);
    }
}

#undef REGS
#undef GROUP
#undef NAME
#undef TARGET
#undef LANES
#undef V
#undef CHOICE
#undef LOAD
#undef STORE
#undef ZERO
#undef XOR
#undef MIXED
#undef SHUFFLE
#undef LOWEST
#undef SET1
#undef HAS
#undef XOR_IF
#undef KEY
#undef ROUND
#undef LAST_ROUND
#undef PER_BLOCK
