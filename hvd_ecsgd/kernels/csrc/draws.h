// Random numbers of a segment, CHUNK at a time: Philox4x32-10 (Salmon et al. 2011), whose i-th block of four words is a function of i and the key, so
// any part of a stream can be computed by itself: by any thread, and on a GPU too. Of 32 bits for a float, of 64 for a double, low word first.

typedef uint64_t Words64 __attribute__((vector_size(WIDTH)));

// Of the low 32 bits of each lane.
INLINE static Words64 times(Words64 a, uint32_t factor) {
#if VARIANT_LEVEL == 2
    return reinterpret_cast<Words64>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), _mm512_set1_epi64(factor)));
#elif VARIANT_LEVEL == 1
    return reinterpret_cast<Words64>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), _mm256_set1_epi64x(factor)));
#elif defined(__x86_64__)
    return reinterpret_cast<Words64>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), _mm_set1_epi64x(factor)));
#else
    return (a & 0xffffffffu) * factor;
#endif
}

template <class T>
struct Draws {
    using U = typename Bits<T>::U;
    // What a chunk needs stays in the first cache.
    static constexpr int PER_BLOCK = 16 / static_cast<int>(sizeof(T)), BLOCKS = 256, CHUNK = BLOCKS * PER_BLOCK;

    explicit Draws(uint64_t key) : key(key) {}

    // raw[i] ← the draw of element begin + i, for a chunk; `begin` is a multiple of 4.
    INLINE void from(int64_t begin) {
        // A block's state in one lane of four vectors, of which the low halves count; several blocks at once, as each waits for its own product.
        constexpr int PER = WIDTH / 8, AT_ONCE = VARIANT_LEVEL == 2 ? 4 : 2;
        Words64 place, low_half, high_half;  // of counters, so that two vectors, woven, are blocks in their order
        for (int j = 0; j < PER; ++j) {
            place[j] = j % 2 * (PER / 2) + j / 2;
            low_half[j] = j % 2 * PER + j / 2 * 2;
            high_half[j] = low_half[j] + 1;
        }
        U* to = raw;
        for (uint64_t block = begin / PER_BLOCK, end = block + BLOCKS; block < end; block += PER * AT_ONCE) {
            Words64 c0[AT_ONCE], c1[AT_ONCE], c2[AT_ONCE], c3[AT_ONCE];
#pragma GCC unroll 4
            for (int i = 0; i < AT_ONCE; ++i) {
                c0[i] = place + (block + i * PER);
                c1[i] = c0[i] >> 32;
                c2[i] = c3[i] = Words64{};
            }
            uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#pragma GCC unroll 10
            for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 4
                for (int i = 0; i < AT_ONCE; ++i) {
                    const Words64 p0 = times(c0[i], 0xD2511F53u), p1 = times(c2[i], 0xCD9E8D57u);
                    c0[i] = (p1 >> 32) ^ c1[i] ^ k0;
                    c2[i] = (p0 >> 32) ^ c3[i] ^ k1;
                    c1[i] = p1;
                    c3[i] = p0;
                }
                k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
            }
#pragma GCC unroll 4
            for (int i = 0; i < AT_ONCE; ++i, to += 2 * PER * 8 / sizeof(T)) {
                const Words64 first = (c0[i] & 0xffffffffu) | c1[i] << 32, second = (c2[i] & 0xffffffffu) | c3[i] << 32;
                const Words64 woven[2] = {__builtin_shuffle(first, second, low_half), __builtin_shuffle(first, second, high_half)};
                std::memcpy(to, woven, sizeof woven);
            }
        }
    }

    const uint64_t key;
    alignas(WIDTH) U raw[CHUNK + 64];  // what is behind a chunk may be read, and means nothing
};

// Uniform in [0, 1), multiples of 2⁻²⁴ or 2⁻⁵³, of a vector's draws.
INLINE static Lanes<float>::V uniform(const uint32_t* raw) {
    Codes<float>::Whole bits;
    std::memcpy(&bits, raw, sizeof bits);
    return of_whole(bits & 0xffffff) * 0x1p-24f;
}
INLINE static Lanes<double>::V uniform(const uint64_t* raw) {
    Lanes<double>::V values;
    for (int j = 0; j < Lanes<double>::N; ++j) values[j] = static_cast<double>(static_cast<int64_t>(raw[j] & ((uint64_t{1} << 53) - 1))) * 0x1p-53;
    return values;
}
