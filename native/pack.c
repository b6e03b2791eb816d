/* Exact bit packing, least significant bit first; widths 1 to 64. */
#include <string.h>

#include "fss.h"

static void pack_plain(const uint64_t *values, size_t count, int width, uint8_t *out) {
    const uint64_t mask = width == 64 ? ~0ull : (1ull << width) - 1;
    uint64_t held = 0;
    int fill = 0;
    for (size_t i = 0; i < count; i++) {
        const uint64_t value = values[i] & mask;
        held |= value << fill;
        fill += width;
        if (fill >= 64) {
            memcpy(out, &held, 8);
            out += 8;
            fill -= 64;
            held = fill ? value >> (width - fill) : 0;
        }
    }
    memcpy(out, &held, (size_t)(fill + 7) / 8);
}

static void unpack_plain(const uint8_t *data, size_t size, size_t count, int width,
                         uint64_t *out) {
    const uint64_t mask = width == 64 ? ~0ull : (1ull << width) - 1;
    for (size_t i = 0; i < count; i++) {
        const size_t at = i * (size_t)width;
        const size_t byte = at >> 3;
        const int offset = (int)(at & 7);
        uint64_t value = 0;
        const size_t left = size - byte;
        memcpy(&value, data + byte, left < 8 ? left : 8);
        value >>= offset;
        if (offset + width > 64 && left > 8) value |= (uint64_t)data[byte + 8] << (64 - offset);
        out[i] = value & mask;
    }
}

#if FSS_X86
#include <immintrin.h>

/* Eight values fill exactly `width` bytes, so that one byte permutation and one vector of shifts
 * serve every eight. Value i begins in byte start[i] at bit shift[i]; its ninth byte, where it has
 * one, is handled apart. */
typedef struct {
    uint64_t shift[8], rest[8]; /* rest = 64 - shift */
    uint8_t start[8];
} layout;

static layout layout_of(int width) {
    layout all;
    for (int i = 0; i < 8; i++) {
        all.start[i] = (uint8_t)(i * width / 8);
        all.shift[i] = (uint64_t)(i * width % 8);
        all.rest[i] = 64 - all.shift[i];
    }
    return all;
}

enum { WHOLE = 57 }; /* the largest width whose values never have a ninth byte */

FSS_AVX512_TARGET static void pack_bits(const uint64_t *values, size_t eights, uint8_t *out) {
    const __m512i one = _mm512_set1_epi64(1);
    for (size_t g = 0; g < eights; g++)
        out[g] = _mm512_test_epi64_mask(_mm512_loadu_si512(values + 8 * g), one);
}

/* width 8 to 64: a byte of the output then holds bits of at most one even and one odd value. */
FSS_AVX512_TARGET static void pack_wide(const uint64_t *values, size_t eights, int width,
                                        uint8_t *out) {
    const layout all = layout_of(width);
    uint8_t from[2][64] = {{0}}, from_ninth[2][64] = {{0}};
    uint64_t here[2] = {0}, here_ninth[2] = {0};
    for (int i = 0; i < 8; i++)
        for (int b = 0; b < ((int)all.shift[i] + width + 7) / 8; b++) {
            const int at = all.start[i] + b;
            if (b < 8) {
                from[i & 1][at] = (uint8_t)(8 * i + b);
                here[i & 1] |= 1ull << at;
            } else {
                from_ninth[i & 1][at] = (uint8_t)(8 * i);
                here_ninth[i & 1] |= 1ull << at;
            }
        }
    const __m512i mask = _mm512_set1_epi64(width == 64 ? -1 : (long long)((1ull << width) - 1));
    const __m512i shift = _mm512_loadu_si512(all.shift), rest = _mm512_loadu_si512(all.rest);
    const __m512i even = _mm512_loadu_si512(from[0]), odd = _mm512_loadu_si512(from[1]);
    const __m512i even9 = _mm512_loadu_si512(from_ninth[0]);
    const __m512i odd9 = _mm512_loadu_si512(from_ninth[1]);
    const __mmask64 own = width == 64 ? ~0ull : (1ull << width) - 1;
    for (size_t g = 0; g < eights; g++) {
        const __m512i v = _mm512_and_si512(_mm512_loadu_si512(values + 8 * g), mask);
        const __m512i moved = _mm512_sllv_epi64(v, shift);
        __m512i packed = _mm512_or_si512(_mm512_maskz_permutexvar_epi8(here[0], even, moved),
                                         _mm512_maskz_permutexvar_epi8(here[1], odd, moved));
        if (width > WHOLE) {
            const __m512i ninth = _mm512_srlv_epi64(v, rest);
            packed = _mm512_ternarylogic_epi64(
                packed, _mm512_maskz_permutexvar_epi8(here_ninth[0], even9, ninth),
                _mm512_maskz_permutexvar_epi8(here_ninth[1], odd9, ninth), 0xfe);
        }
        /* What is written beyond `width` bytes is overwritten by the next eight. */
        uint8_t *to = out + g * (size_t)width;
        if ((eights - g) * (size_t)width >= 64)
            _mm512_storeu_si512(to, packed);
        else
            _mm512_mask_storeu_epi8(to, own, packed);
    }
}

FSS_AVX512_TARGET static void unpack_wide(const uint8_t *data, size_t size, size_t eights,
                                          int width, uint64_t *out) {
    const layout all = layout_of(width);
    uint8_t from[64], from_ninth[64] = {0};
    for (int i = 0; i < 8; i++) {
        for (int b = 0; b < 8; b++) from[8 * i + b] = (uint8_t)(all.start[i] + b);
        from_ninth[8 * i] = (uint8_t)((all.start[i] + 8) & 63);
    }
    const __m512i mask = _mm512_set1_epi64(width == 64 ? -1 : (long long)((1ull << width) - 1));
    const __m512i shift = _mm512_loadu_si512(all.shift), rest = _mm512_loadu_si512(all.rest);
    const __m512i bytes = _mm512_loadu_si512(from), ninths = _mm512_loadu_si512(from_ninth);
    for (size_t g = 0; g < eights; g++) {
        const size_t at = g * (size_t)width, left = size - at;
        const __m512i raw =
            left >= 64 ? _mm512_loadu_si512(data + at)
                       : _mm512_maskz_loadu_epi8((1ull << left) - 1, data + at);
        __m512i v = _mm512_srlv_epi64(_mm512_permutexvar_epi8(bytes, raw), shift);
        if (width > WHOLE) {
            const __m512i ninth =
                _mm512_maskz_permutexvar_epi8(0x0101010101010101ull, ninths, raw);
            v = _mm512_or_si512(v, _mm512_sllv_epi64(ninth, rest));
        }
        _mm512_storeu_si512(out + 8 * g, _mm512_and_si512(v, mask));
    }
}
#endif

/* out holds (count * width + 7) / 8 bytes. */
FSS_EXPORT void fss_pack(const uint64_t *values, size_t count, int width, uint8_t *out) {
#if FSS_X86
    if ((fss_active() & FSS_AVX512) && (width == 1 || width >= 8)) {
        const size_t eights = count / 8;
        if (width == 1)
            pack_bits(values, eights, out);
        else
            pack_wide(values, eights, width, out);
        values += 8 * eights;
        out += eights * (size_t)width;
        count -= 8 * eights;
    }
#endif
    pack_plain(values, count, width, out);
}

/* data has (count * width + 7) / 8 = size bytes. */
FSS_EXPORT void fss_unpack(const uint8_t *data, size_t size, size_t count, int width,
                           uint64_t *out) {
#if FSS_X86
    if (fss_active() & FSS_AVX512) {
        const size_t eights = count / 8, bytes = eights * (size_t)width;
        unpack_wide(data, size, eights, width, out);
        data += bytes;
        size -= bytes;
        out += 8 * eights;
        count -= 8 * eights;
    }
#endif
    unpack_plain(data, size, count, width, out);
}
