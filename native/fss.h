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

enum { FSS_AVX2 = 1, FSS_AES = 2, FSS_VAES = 4 };

/* What the processor has and fss_select has not taken away. */
unsigned fss_active(void);

void fss_pack(const uint64_t *values, size_t count, int width, uint8_t *out);
void fss_unpack(const uint8_t *data, size_t size, size_t count, int width, uint64_t *out);
void fss_dpf_evaluate(const uint64_t *root, const uint64_t *corrections, size_t stride,
                      const uint64_t *x, size_t count, int bits, const uint8_t *tree_key,
                      const uint8_t *leaf_key, uint64_t *out);

#endif
