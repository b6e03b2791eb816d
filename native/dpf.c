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

/* 256-bit: two blocks per vector. */
#define NAME(name) name##_vaes
#define TARGET VAES_TARGET
#define LANES 2
#define V __m256i
#define LOAD(p) _mm256_loadu_si256((const __m256i *)(p))
#define STORE(p, v) _mm256_storeu_si256((__m256i *)(p), v)
#define XOR _mm256_xor_si256
#define AND _mm256_and_si256
#define ANDNOT _mm256_andnot_si256
#define NEGATE(v) _mm256_sub_epi64(_mm256_setzero_si256(), v)
#define SHUFFLE _mm256_shuffle_epi32
#define SHIFT_LEFT _mm256_slli_epi64
#define IS_NEGATIVE(v) _mm256_cmpgt_epi64(_mm256_setzero_si256(), v)
#define SET1 _mm256_set1_epi64x
#define LOW_WORD _mm256_set_epi64x(0, -1, 0, -1)
#define KEY(k) _mm256_broadcastsi128_si256(k)
#define ROUND _mm256_aesenc_epi128
#define LAST_ROUND _mm256_aesenclast_epi128
#define PER_BLOCK(x) _mm256_set_epi64x((long long)(x)[1], (long long)(x)[1], (long long)(x)[0], (long long)(x)[0])
#include "dpf_walk.h"

/* 128-bit. */
#define NAME(name) name##_aes
#define TARGET AES_TARGET
#define LANES 1
#define V __m128i
#define LOAD(p) _mm_loadu_si128((const __m128i *)(p))
#define STORE(p, v) _mm_storeu_si128((__m128i *)(p), v)
#define XOR _mm_xor_si128
#define AND _mm_and_si128
#define ANDNOT _mm_andnot_si128
#define NEGATE(v) _mm_sub_epi64(_mm_setzero_si128(), v)
#define SHUFFLE _mm_shuffle_epi32
#define SHIFT_LEFT _mm_slli_epi64
#define IS_NEGATIVE(v) _mm_cmpgt_epi64(_mm_setzero_si128(), v)
#define SET1 _mm_set1_epi64x
#define LOW_WORD _mm_set_epi64x(0, -1)
#define KEY(k) (k)
#define ROUND _mm_aesenc_si128
#define LAST_ROUND _mm_aesenclast_si128
#define PER_BLOCK(x) _mm_set1_epi64x((long long)(x)[0])
#include "dpf_walk.h"

/* One party's share of [alpha <= x]; corrections are (levels + 1, stride, 2). */
FSS_EXPORT void fss_dpf_evaluate(const uint64_t *root, const uint64_t *corrections, size_t stride,
                                 const uint64_t *x, size_t count, int bits,
                                 const uint8_t *tree_key, const uint8_t *leaf_key,
                                 uint64_t *out) {
    if (fss_active() & FSS_VAES)
        evaluate_vaes(root, corrections, stride, x, count, bits, tree_key, leaf_key, out);
    else
        evaluate_aes(root, corrections, stride, x, count, bits, tree_key, leaf_key, out);
}

/* Corrections of both keys; delta's lowest bits are set already. */
FSS_EXPORT void fss_dpf_generate(const uint64_t *alpha, size_t count, int bits,
                                 const uint64_t *root, const uint64_t *delta,
                                 const uint8_t *tree_key, const uint8_t *leaf_key,
                                 uint64_t *corrections) {
    if (fss_active() & FSS_VAES)
        generate_vaes(alpha, count, bits, root, delta, tree_key, leaf_key, corrections);
    else
        generate_aes(alpha, count, bits, root, delta, tree_key, leaf_key, corrections);
}
#endif
