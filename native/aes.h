/* The key schedule of AES-128 (FIPS 197, section 5.2). */
#ifndef PI_SYSTEM_AES_H
#define PI_SYSTEM_AES_H

#include "fss.h"

#if FSS_X86
#include <immintrin.h>

#define EXPAND(i, constant)                                                              \
    do {                                                                                 \
        __m128i word = _mm_shuffle_epi32(_mm_aeskeygenassist_si128(k, constant), 0xff);  \
        k = _mm_xor_si128(k, _mm_slli_si128(k, 4));                                      \
        k = _mm_xor_si128(k, _mm_slli_si128(k, 8));                                      \
        k = _mm_xor_si128(k, word);                                                      \
        round_keys[i] = k;                                                               \
    } while (0)

__attribute__((target("aes,sse2"))) static void expand(const uint8_t *key,
                                                       __m128i round_keys[11]) {
    __m128i k = _mm_loadu_si128((const __m128i *)key);
    round_keys[0] = k;
    EXPAND(1, 0x01);
    EXPAND(2, 0x02);
    EXPAND(3, 0x04);
    EXPAND(4, 0x08);
    EXPAND(5, 0x10);
    EXPAND(6, 0x20);
    EXPAND(7, 0x40);
    EXPAND(8, 0x80);
    EXPAND(9, 0x1b);
    EXPAND(10, 0x36);
}
#undef EXPAND
#endif

#endif
