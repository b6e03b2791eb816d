/* The comparison key's tree, walked many keys at a time; see dpf.py for the construction.
 * Needs AES instructions; without them Python uses a cryptographic library instead. Work and
 * memory accesses depend on sizes only. */
#include <string.h>

#include "aes.h"
#include "fss.h"

#if FSS_X86

#define LEAF_BITS 7

#define AES_TARGET __attribute__((target("avx2,aes")))
#define VAES_TARGET __attribute__((target("avx2,aes,vaes")))

AES_TARGET static void expand_to(const uint8_t *key, uint8_t to[11][16]) {
    __m128i round_keys[11];
    expand(key, round_keys);
    memcpy(to, round_keys, sizeof round_keys);
}

void fss_dpf_expand(const uint8_t *tree_key, const uint8_t *leaf_key, fss_dpf_keys *keys) {
    expand_to(tree_key, keys->tree);
    expand_to(leaf_key, keys->leaf);
}

/* 512-bit: four blocks per vector. CHOICE says of each block whether to do something. */
#define NAME(name) name##_avx512
#define TARGET FSS_AVX512_TARGET
#define LANES 4
#define V __m512i
#define CHOICE __mmask8
#define LOAD(p) _mm512_loadu_si512(p)
#define STORE(p, v) _mm512_storeu_si512(p, v)
#define ZERO _mm512_setzero_si512()
#define XOR _mm512_xor_si512
#define MIXED(s) _mm512_mask_xor_epi64(SHUFFLE(s), 0x55, SHUFFLE(s), s)
#define SHUFFLE(v) _mm512_shuffle_epi32(v, 0x4e)
#define LOWEST(v) _mm512_test_epi64_mask(_mm512_shuffle_epi32(v, 0x44), _mm512_set1_epi64(1))
#define SET1 _mm512_set1_epi64
#define HAS(v, bit) _mm512_test_epi64_mask(v, bit)
#define XOR_IF(a, choice, b) _mm512_mask_xor_epi64(a, choice, a, b)
#define KEY(k) _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(k)))
#define ROUND _mm512_aesenc_epi128
#define LAST_ROUND _mm512_aesenclast_epi128
#define PER_BLOCK(x)                                                        \
    _mm512_permutexvar_epi64(_mm512_set_epi64(3, 3, 2, 2, 1, 1, 0, 0),      \
                             _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)(x))))
#include "dpf_walk.h"

/* 256-bit: two blocks per vector. */
#define NAME(name) name##_vaes
#define TARGET VAES_TARGET
#define LANES 2
#define V __m256i
#define CHOICE __m256i
#define LOAD(p) _mm256_loadu_si256((const __m256i *)(p))
#define STORE(p, v) _mm256_storeu_si256((__m256i *)(p), v)
#define ZERO _mm256_setzero_si256()
#define XOR _mm256_xor_si256
#define MIXED(s) XOR(_mm256_shuffle_epi32(s, 0x4e), \
                     _mm256_and_si256(s, _mm256_set_epi64x(0, -1, 0, -1)))
#define LOWEST(v)                                                                            \
    _mm256_shuffle_epi32(                                                                    \
        _mm256_sub_epi64(ZERO, _mm256_and_si256(v, _mm256_set1_epi64x(1))), 0x44)
#define SET1 _mm256_set1_epi64x
#define HAS(v, bit) _mm256_cmpeq_epi64(_mm256_and_si256(v, bit), bit)
#define XOR_IF(a, choice, b) XOR(a, _mm256_and_si256(choice, b))
#define KEY(k) _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(k)))
#define ROUND _mm256_aesenc_epi128
#define LAST_ROUND _mm256_aesenclast_epi128
#define PER_BLOCK(x) _mm256_set_epi64x((long long)(x)[1], (long long)(x)[1], (long long)(x)[0], (long long)(x)[0])
#include "dpf_walk.h"

/* 128-bit. */
#define NAME(name) name##_aes
#define TARGET AES_TARGET
#define LANES 1
#define V __m128i
#define CHOICE __m128i
#define LOAD(p) _mm_loadu_si128((const __m128i *)(p))
#define STORE(p, v) _mm_storeu_si128((__m128i *)(p), v)
#define ZERO _mm_setzero_si128()
#define XOR _mm_xor_si128
#define MIXED(s) XOR(_mm_shuffle_epi32(s, 0x4e), _mm_and_si128(s, _mm_set_epi64x(0, -1)))
#define LOWEST(v) \
    _mm_shuffle_epi32(_mm_sub_epi64(ZERO, _mm_and_si128(v, _mm_set1_epi64x(1))), 0x44)
#define SET1 _mm_set1_epi64x
#define HAS(v, bit) _mm_cmpeq_epi64(_mm_and_si128(v, bit), bit)
#define XOR_IF(a, choice, b) XOR(a, _mm_and_si128(choice, b))
#define KEY(k) _mm_loadu_si128((const __m128i *)(k))
#define ROUND _mm_aesenc_si128
#define LAST_ROUND _mm_aesenclast_si128
#define PER_BLOCK(x) _mm_set1_epi64x((long long)(x)[0])
#include "dpf_walk.h"

void fss_dpf_bits(const uint64_t *root, const uint64_t *corrections, size_t stride,
                  const uint64_t *x, size_t count, int bits, const fss_dpf_keys *keys,
                  uint8_t *out) {
    const unsigned active = fss_active();
    if (active & FSS_AVX512)
        evaluate_avx512(root, corrections, stride, x, count, bits, keys, out);
    else if (active & FSS_VAES)
        evaluate_vaes(root, corrections, stride, x, count, bits, keys, out);
    else
        evaluate_aes(root, corrections, stride, x, count, bits, keys, out);
}

/* One party's share of [alpha <= x] as packed bits; corrections are (levels + 1, count, 2). */
FSS_EXPORT void fss_dpf_evaluate(const uint64_t *root, const uint64_t *corrections,
                                 const uint64_t *x, size_t count, int bits,
                                 const uint8_t *tree_key, const uint8_t *leaf_key, uint8_t *out) {
    fss_dpf_keys keys;
    fss_dpf_expand(tree_key, leaf_key, &keys);
    fss_dpf_bits(root, corrections, count, x, count, bits, &keys, out);
}

/* Corrections of both keys; delta's lowest bits are set already. */
FSS_EXPORT void fss_dpf_generate(const uint64_t *alpha, size_t count, int bits,
                                 const uint64_t *root, const uint64_t *delta,
                                 const uint8_t *tree_key, const uint8_t *leaf_key,
                                 uint64_t *corrections) {
    fss_dpf_keys keys;
    fss_dpf_expand(tree_key, leaf_key, &keys);
    const unsigned active = fss_active();
    if (active & FSS_AVX512)
        generate_avx512(alpha, count, bits, root, delta, &keys, corrections);
    else if (active & FSS_VAES)
        generate_vaes(alpha, count, bits, root, delta, &keys, corrections);
    else
        generate_aes(alpha, count, bits, root, delta, &keys, corrections);
}
#endif
