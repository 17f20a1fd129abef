// The C interface that Python calls, and the choice of a variant when it runs: AVX-512, AVX2, or what every processor has.
#include "common.h"

#include <exception>

#define EXPORT extern "C" __attribute__((visibility("default")))
#define INLINE inline __attribute__((always_inline))

// HVD_ECSGD_ONLY: the level of a single variant to compile, for a quick build under sanitizers.
#ifndef HVD_ECSGD_ONLY
#define COMPILED(level) 1
#else
#define COMPILED(level) (HVD_ECSGD_ONLY == level)
#endif

#if COMPILED(0)
#define VARIANT_LEVEL 0
#define WIDTH 16
#define ISA
namespace portable {
#include "variant.h"
}
#undef VARIANT_LEVEL
#undef WIDTH
#undef ISA
#define IN_PORTABLE(call) case 0: return portable::call;
#else
#define IN_PORTABLE(call)
#endif

#if defined(__x86_64__) && COMPILED(1)
#define VARIANT_LEVEL 1
#define WIDTH 32
#define ISA __attribute__((target("avx2,fma,f16c,bmi,bmi2,popcnt,lzcnt")))
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,popcnt,lzcnt")
namespace avx2 {
#include "variant.h"
}
#pragma GCC pop_options
#undef VARIANT_LEVEL
#undef WIDTH
#undef ISA
#define IN_AVX2(call) case 1: return avx2::call;
#else
#define IN_AVX2(call)
#endif

#if defined(__x86_64__) && COMPILED(2)
#define VARIANT_LEVEL 2
#define WIDTH 64
#define ISA __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,popcnt,lzcnt")))
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,popcnt,lzcnt")
namespace avx512 {
#include "variant.h"
}
#pragma GCC pop_options
#undef VARIANT_LEVEL
#undef WIDTH
#undef ISA
#define IN_AVX512(call) case 2: return avx512::call;
#else
#define IN_AVX512(call)
#endif

namespace {

int best_variant() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                      __builtin_cpu_supports("popcnt");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return 2;
    return avx2 ? 1 : 0;
#else
    return 0;
#endif
}

int variant = best_variant();

}  // namespace

// 0 portable, 1 AVX2, 2 AVX-512.
EXPORT int hvd_ecsgd_variant() { return variant; }

// For tests: as if the processor had no more than this. Returns the variant that is used then.
EXPORT int hvd_ecsgd_limit_variant(int most) { return variant = std::min(most, best_variant()); }

// Which sources this was built from; setup.py says it.
#ifndef HVD_ECSGD_SOURCES
#define HVD_ECSGD_SOURCES ""
#endif
EXPORT const char* hvd_ecsgd_sources() { return HVD_ECSGD_SOURCES; }

#define IN_VARIANT(call)                                      \
    {                                                         \
        try {                                                 \
            switch (variant) {                                \
                IN_AVX512(call) IN_AVX2(call) IN_PORTABLE(call) \
            }                                                 \
        } catch (const std::exception&) {                     \
        }                                                     \
        return OUT_OF_MEMORY;                                 \
    }

// A kernel for buffers of float and of double; `type` says which.
#define KERNEL(name, parameters, arguments)              \
    EXPORT int64_t hvd_ecsgd_##name parameters {         \
        if (type == FLOAT64) IN_VARIANT(name<double> arguments) \
        IN_VARIANT(name<float> arguments)                \
    }
#define TABLE const Segment *table, int64_t n
// Payloads that are decoded together, how, and what is asked of the result.
#define PAYLOADS const uint8_t *const *payloads, int64_t n_payloads, double alpha, int add
#define ASKED int squares, int counts, double *sums, int64_t *nonzero
#define GIVEN {payloads, n_payloads, alpha, add}, {squares, counts, sums, nonzero}

KERNEL(sign_extract, (int type, void* buffer, TABLE, uint8_t* payload, int l2, int64_t block, const double* sums, int threads),
       (buffer, table, n, payload, l2, block, sums, threads))
KERNEL(sign_decode, (int type, void* out, TABLE, PAYLOADS, ASKED, int64_t block, int threads), (out, table, n, GIVEN, block, threads))
KERNEL(ternary_extract, (int type, void* buffer, TABLE, uint8_t* payload, int l2, const double* sums, const int64_t* nonzero, int threads),
       (buffer, table, n, payload, l2, sums, nonzero, threads))
KERNEL(ternary_decode, (int type, void* out, TABLE, PAYLOADS, ASKED, int threads), (out, table, n, GIVEN, threads))
KERNEL(positions_take, (int type, void* buffer, TABLE, const int64_t* counts, const uint32_t* positions, void* values, int threads),
       (buffer, table, n, counts, positions, values, threads))
KERNEL(positions_decode,
       (int type, void* out, TABLE, const int64_t* counts, const uint32_t* positions, const void* values, double alpha, int add, int64_t given, int threads),
       (out, table, n, counts, positions, values, alpha, add, given, threads))
KERNEL(positions_move,
       (int type, void* update, TABLE, const int64_t* counts, const uint32_t* positions, void* const* targets, int threads),
       (update, table, n, counts, positions, targets, threads))
KERNEL(top_k, (int type, void* buffer, TABLE, const int64_t* counts, uint32_t* positions, void* values, void* expected, int threads),
       (buffer, table, n, counts, positions, values, expected, threads))
KERNEL(block_top_k_extract,
       (int type, void* buffer, TABLE, uint8_t* payload, int64_t block, int64_t k_full, const int64_t* k_last, int threads),
       (buffer, table, n, payload, block, k_full, k_last, threads))
KERNEL(block_top_k_decode,
       (int type, void* out, TABLE, const uint8_t* payload, int64_t block, int64_t k_full, const int64_t* k_last, double alpha, int add, int threads),
       (out, table, n, payload, block, k_full, k_last, alpha, add, threads))
KERNEL(threshold_choose,
       (int type, void* buffer, TABLE, const uint64_t* keys, const int64_t* sampled, const int64_t* ranks, int64_t* counts, uint64_t* notes, int take,
        int threads),
       (buffer, table, n, keys, sampled, ranks, counts, notes, take, threads))
KERNEL(threshold_take, (int type, void* buffer, TABLE, uint64_t* notes, uint32_t* positions, void* values, int threads),
       (buffer, table, n, notes, positions, values, threads))
KERNEL(qsgd_extract,
       (int type, void* buffer, TABLE, uint8_t* payload, const uint64_t* keys, int64_t levels, int64_t bucket, int bits, int largest, int threads),
       (buffer, table, n, payload, keys, levels, bucket, bits, largest, threads))
KERNEL(qsgd_decode, (int type, void* out, TABLE, PAYLOADS, ASKED, int64_t levels, int64_t bucket, int bits, int threads),
       (out, table, n, GIVEN, levels, bucket, bits, threads))
KERNEL(natural_extract, (int type, void* buffer, TABLE, uint8_t* payload, const uint64_t* keys, int threads),
       (buffer, table, n, payload, keys, threads))
KERNEL(natural_decode, (int type, void* out, TABLE, PAYLOADS, ASKED, int threads), (out, table, n, GIVEN, threads))
KERNEL(cast_extract, (int type, void* buffer, TABLE, uint16_t* payload, int brain, double limit, int threads),
       (buffer, table, n, payload, brain, limit, threads))
KERNEL(cast_decode, (int type, void* out, TABLE, const uint16_t* payload, int brain, double alpha, int add, int threads),
       (out, table, n, payload, brain, alpha, add, threads))
KERNEL(accumulate,
       (int type, void* residual, TABLE, void* momentum, void* displacement, int gradient_type, const void* const* gradients, int point_type,
        const void* const* points, const double* factors, const Segment* ranges, int64_t n_ranges, ASKED, int threads),
       (residual, table, n, momentum, displacement, gradient_type, gradients, point_type, points, factors, ranges, n_ranges, {squares, counts, sums, nonzero},
        threads))
KERNEL(cast_extract_from,
       (int type, TABLE, int gradient_type, const void* const* gradients, uint16_t* payload, int brain, double limit, int threads),
       (table, n, gradient_type, gradients, payload, brain, limit, threads))
KERNEL(qsgd_extract_from,
       (int type, TABLE, int gradient_type, const void* const* gradients, uint8_t* payload, const uint64_t* keys, int64_t levels, int64_t bucket, int bits,
        int largest, int threads),
       (table, n, gradient_type, gradients, payload, keys, levels, bucket, bits, largest, threads))
KERNEL(shift,
       (int type, const void* x, TABLE, const void* t, double factor, void* const* parameters, int64_t* sums, const int64_t* places, int threads),
       (x, table, n, t, factor, parameters, sums, places, threads))
KERNEL(low_rank_p, (int type, const void* buffer, TABLE, const int64_t* rows, int64_t a, const void* q, void* p, int threads),
       (buffer, table, n, rows, a, q, p, threads))
KERNEL(low_rank_q, (int type, const void* buffer, TABLE, const int64_t* rows, int64_t a, const void* p, void* q, int threads),
       (buffer, table, n, rows, a, p, q, threads))
KERNEL(low_rank_decode,
       (int type, void* buffer, TABLE, const int64_t* rows, int64_t a, const void* p, const void* q, const void* kept, void* const* out, int threads),
       (buffer, table, n, rows, a, p, q, kept, out, threads))

EXPORT int64_t hvd_ecsgd_random_k_positions(TABLE, const uint64_t* keys, const int64_t* counts, uint32_t* positions, int threads) {
    IN_VARIANT(random_k_positions(table, n, keys, counts, positions, threads))
}
EXPORT int64_t hvd_ecsgd_all_finite(int type, const void* data, int64_t n, int threads) { IN_VARIANT(all_finite(type, data, n, threads)) }
EXPORT int64_t hvd_ecsgd_fingerprint(const void* data, int64_t n, int width, int64_t* result, int threads) {
    IN_VARIANT(fingerprint(data, n, width, result, threads))
}
