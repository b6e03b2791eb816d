/* Which instructions may be used. */
#include "fss.h"

#if FSS_X86
#include <cpuid.h>

static unsigned detect(void) {
    unsigned a, b, c, d, features = 0;
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2")) return 0; /* also asks the system about the registers */
    features |= FSS_AVX2;
    if (__get_cpuid(1, &a, &b, &c, &d) && (c & bit_AES)) features |= FSS_AES;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) && (c & (1u << 9)) && (features & FSS_AES))
        features |= FSS_VAES;
    if ((features & FSS_VAES) && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi") &&
        __builtin_cpu_supports("avx512vpopcntdq"))
        features |= FSS_AVX512;
    return features;
}
#else
static unsigned detect(void) { return 0; }
#endif

static unsigned allowed = ~0u;

unsigned fss_active(void) {
    static unsigned found = ~0u;
    if (found == ~0u) found = detect();
    return found & allowed;
}

/* Keep only these features; returns what is then active. */
FSS_EXPORT unsigned fss_select(unsigned mask) {
    allowed = mask;
    return fss_active();
}
