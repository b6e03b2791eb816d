/* Kernels of pi_system.backends.fss, called through ctypes. Words are uint64_t and wrap. */
#ifndef PI_SYSTEM_FSS_H
#define PI_SYSTEM_FSS_H

#include <stddef.h>
#include <stdint.h>

#if defined(__x86_64__)
#define FSS_X86 1
#else
#define FSS_X86 0
#endif

#if defined(_WIN32)
#define FSS_EXPORT __declspec(dllexport)
#else
#define FSS_EXPORT __attribute__((visibility("default")))
#endif

/* FSS_AVX512 stands for F, BW, DQ, VL, VBMI, VPOPCNTDQ and VAES on 512 bits. */
enum { FSS_AVX2 = 1, FSS_AES = 2, FSS_VAES = 4, FSS_AVX512 = 8 };

#define FSS_AVX512_TARGET                                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vpopcntdq,"   \
                          "avx2,aes,vaes,bmi2,prefer-vector-width=512")))

/* What the processor has and fss_select has not taken away. */
unsigned fss_active(void);

void fss_pack(const uint64_t *values, size_t count, int width, uint8_t *out);
void fss_unpack(const uint8_t *data, size_t size, size_t count, int width, uint64_t *out);

#if FSS_X86
/* The round keys of the comparison key's two hashes. */
typedef struct {
    uint8_t tree[11][16], leaf[11][16];
} fss_dpf_keys;

void fss_dpf_expand(const uint8_t *tree_key, const uint8_t *leaf_key, fss_dpf_keys *keys);

/* One party's shares of [alpha <= x], packed bits. corrections are (levels + 1, stride, 2). */
void fss_dpf_bits(const uint64_t *root, const uint64_t *corrections, size_t stride,
                  const uint64_t *x, size_t count, int bits, const fss_dpf_keys *keys,
                  uint8_t *out);
#endif

#endif
