/* Included by dpf.c once per vector width. GROUP keys go down the tree side by side, so that their
 * AES rounds overlap. */

#define REGS 8
#define GROUP (REGS * LANES)

/* h[i] = AES(sigma(s[i])) ^ sigma(s[i]), sigma(a, b) = (a ^ b, a) */
TARGET static inline __attribute__((always_inline)) void NAME(hash)(const V s[REGS], V h[REGS],
                                                                     const __m128i keys[11]) {
    const V low = LOW_WORD;
    V mixed[REGS];
    for (int i = 0; i < REGS; i++) mixed[i] = XOR(SHUFFLE(s[i], 0x4e), AND(s[i], low));
    for (int i = 0; i < REGS; i++) h[i] = XOR(mixed[i], KEY(keys[0]));
    for (int round = 1; round < 10; round++)
        for (int i = 0; i < REGS; i++) h[i] = ROUND(h[i], KEY(keys[round]));
    for (int i = 0; i < REGS; i++) h[i] = XOR(LAST_ROUND(h[i], KEY(keys[10])), mixed[i]);
}

/* All ones over each block whose lowest bit is set. */
TARGET static inline __attribute__((always_inline)) V NAME(control)(V s) {
    return SHUFFLE(NEGATE(AND(s, SET1(1))), 0x44);
}

TARGET static inline __attribute__((always_inline)) void NAME(evaluate_group)(
    const uint64_t *root, const uint64_t *corrections, size_t stride, const uint64_t *x, int bits,
    const __m128i tree[11], const __m128i leaf[11], uint64_t *out) {
    const int depth = bits > LEAF_BITS ? bits - LEAF_BITS : 0;
    V s[REGS], h[REGS], path[REGS], share[REGS];
    for (int i = 0; i < REGS; i++) {
        s[i] = LOAD(root + 2 * LANES * i);
        path[i] = SHIFT_LEFT(PER_BLOCK(x + LANES * i), 64 - bits);
        share[i] = SET1(0);
    }
    for (int level = 0; level < depth; level++) {
        const uint64_t *correction = corrections + 2 * stride * (size_t)level;
        NAME(hash)(s, h, tree);
        for (int i = 0; i < REGS; i++) {
            const V right = IS_NEGATIVE(path[i]);
            const V left = XOR(h[i], AND(NAME(control)(s[i]), LOAD(correction + 2 * LANES * i)));
            share[i] = XOR(share[i], AND(right, left));
            s[i] = XOR(left, AND(right, s[i]));
            path[i] = SHIFT_LEFT(path[i], 1);
        }
    }
    const uint64_t *correction = corrections + 2 * stride * (size_t)depth;
    const uint64_t low_mask = bits >= LEAF_BITS ? 127 : (1ull << bits) - 1;
    uint64_t leaves[2 * GROUP], shares[2 * GROUP];
    NAME(hash)(s, h, leaf);
    for (int i = 0; i < REGS; i++) {
        h[i] = XOR(h[i], AND(NAME(control)(s[i]), LOAD(correction + 2 * LANES * i)));
        STORE(leaves + 2 * LANES * i, h[i]);
        STORE(shares + 2 * LANES * i, share[i]);
    }
    for (int i = 0; i < GROUP; i++) {
        const uint64_t low = x[i] & low_mask;
        const uint64_t upper = 0 - (low >> 6);
        const uint64_t prefix = (2ull << (low & 63)) - 1;
        const uint64_t within = ((prefix | upper) & leaves[2 * i]) ^
                                (prefix & upper & leaves[2 * i + 1]) ^ (shares[2 * i] & 1);
        out[i] = (uint64_t)__builtin_parityll(within);
    }
}

TARGET static void NAME(evaluate)(const uint64_t *root, const uint64_t *corrections,
                                   size_t stride, const uint64_t *x, size_t count, int bits,
                                   const uint8_t *tree_key, const uint8_t *leaf_key,
                                   uint64_t *out) {
    __m128i tree[11], leaf[11];
    expand(tree_key, tree);
    expand(leaf_key, leaf);
    size_t i = 0;
    for (; i + GROUP <= count; i += GROUP)
        NAME(evaluate_group)(root + 2 * i, corrections + 2 * i, stride, x + i, bits, tree, leaf,
                             out + i);
    if (i < count) {
        const size_t rest = count - i;
        const size_t levels = (size_t)(bits > LEAF_BITS ? bits - LEAF_BITS : 0) + 1;
        uint64_t roots[2 * GROUP] = {0}, xs[GROUP] = {0}, outs[GROUP];
        uint64_t held[2 * GROUP * 64] = {0};
        memcpy(roots, root + 2 * i, 16 * rest);
        memcpy(xs, x + i, 8 * rest);
        for (size_t level = 0; level < levels; level++)
            memcpy(held + 2 * GROUP * level, corrections + 2 * (level * stride + i), 16 * rest);
        NAME(evaluate_group)(roots, held, GROUP, xs, bits, tree, leaf, outs);
        memcpy(out + i, outs, 8 * rest);
    }
}

TARGET static inline __attribute__((always_inline)) void NAME(generate_group)(
    const uint64_t *alpha, int bits, const uint64_t *root, const uint64_t *delta, size_t stride,
    const __m128i tree[11], const __m128i leaf[11], uint64_t *corrections) {
    /* the first half of the registers is one party's keys, the second half the other's */
    enum { HALF = REGS / 2 };
    const int depth = bits > LEAF_BITS ? bits - LEAF_BITS : 0;
    V s[REGS], h[REGS], path[HALF], d[HALF];
    for (int i = 0; i < HALF; i++) {
        s[i] = LOAD(root + 2 * LANES * i);
        d[i] = LOAD(delta + 2 * LANES * i);
        path[i] = SHIFT_LEFT(PER_BLOCK(alpha + LANES * i), 64 - bits);
    }
    for (int level = 0; level < depth; level++) {
        uint64_t *out = corrections + 2 * stride * (size_t)level;
        for (int i = 0; i < HALF; i++) s[HALF + i] = XOR(s[i], d[i]);
        NAME(hash)(s, h, tree);
        for (int i = 0; i < HALF; i++) {
            const V right = IS_NEGATIVE(path[i]);
            const V correction = XOR(XOR(h[i], h[HALF + i]), ANDNOT(right, d[i]));
            STORE(out + 2 * LANES * i, correction);
            s[i] = XOR(XOR(h[i], AND(right, s[i])), AND(NAME(control)(s[i]), correction));
            path[i] = SHIFT_LEFT(path[i], 1);
        }
    }
    uint64_t *out = corrections + 2 * stride * (size_t)depth;
    for (int i = 0; i < HALF; i++) s[HALF + i] = XOR(s[i], d[i]);
    NAME(hash)(s, h, leaf);
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
                                   const uint8_t *tree_key, const uint8_t *leaf_key,
                                   uint64_t *corrections) {
    enum { SIZE = GROUP / 2 };
    __m128i tree[11], leaf[11];
    expand(tree_key, tree);
    expand(leaf_key, leaf);
    size_t i = 0;
    for (; i + SIZE <= count; i += SIZE)
        NAME(generate_group)(alpha + i, bits, root + 2 * i, delta + 2 * i, count, tree, leaf,
                             corrections + 2 * i);
    if (i < count) {
        const size_t rest = count - i;
        const size_t levels = (size_t)(bits > LEAF_BITS ? bits - LEAF_BITS : 0) + 1;
        uint64_t roots[2 * SIZE] = {0}, deltas[2 * SIZE] = {0}, alphas[SIZE] = {0};
        uint64_t made[2 * SIZE * 64];
        memcpy(roots, root + 2 * i, 16 * rest);
        memcpy(deltas, delta + 2 * i, 16 * rest);
        memcpy(alphas, alpha + i, 8 * rest);
        NAME(generate_group)(alphas, bits, roots, deltas, SIZE, tree, leaf, made);
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
#undef LOAD
#undef STORE
#undef XOR
#undef AND
#undef ANDNOT
#undef NEGATE
#undef SHUFFLE
#undef SHIFT_LEFT
#undef IS_NEGATIVE
#undef SET1
#undef LOW_WORD
#undef KEY
#undef ROUND
#undef LAST_ROUND
#undef PER_BLOCK
