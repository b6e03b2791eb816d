/* Exact bit packing, least significant bit first; widths 1 to 64. */
#include <string.h>

#include "fss.h"

/* out holds (count * width + 7) / 8 bytes. */
FSS_EXPORT void fss_pack(const uint64_t *values, size_t count, int width, uint8_t *out) {
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

FSS_EXPORT void fss_unpack(const uint8_t *data, size_t size, size_t count, int width,
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
