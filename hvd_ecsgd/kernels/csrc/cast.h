// Cast: each element rounded to float16 or bfloat16, halves to the even one; what that leaves stays, and so does all of what has no finite value there.

#if VARIANT_LEVEL == 0
inline uint16_t float16_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint32_t sign = bits >> 16 & 0x8000u;
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
    if (bits >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // from 65520 on
    if (bits < 0x38800000u) {  // a subnormal: the addition rounds its last place to 2⁻²⁴
        const float magic = 0.5f;
        float magnitude;
        std::memcpy(&magnitude, &bits, 4);
        magnitude += magic;
        std::memcpy(&bits, &magnitude, 4);
        return static_cast<uint16_t>(sign | (bits - 0x3f000000u));
    }
    return static_cast<uint16_t>(sign | (bits - 0x38000000u + 0xfffu + (bits >> 13 & 1)) >> 13);
}
inline float of_float16(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
    uint32_t bits = static_cast<uint32_t>(half & 0x7fffu) << 13;
    float value;
    if (bits >= 0x0f800000u) {  // inf and NaN
        bits |= 0x7f800000u;
    } else if (bits < 0x00800000u) {  // a subnormal
        value = static_cast<float>(half & 0x7fffu) * 0x1p-24f;
        std::memcpy(&bits, &value, 4);
    } else {
        bits += 0x38000000u;
    }
    bits |= sign;
    std::memcpy(&value, &bits, 4);
    return value;
}
#endif

// 64 elements
INLINE static void narrow(const float* from, uint16_t* to, bool brain) {
    if (brain) {
        uint32_t bits[64];
        std::memcpy(bits, from, sizeof bits);
        for (int i = 0; i < 64; ++i) {
            const uint32_t nan = 0u - ((bits[i] & 0x7fffffffu) > 0x7f800000u), rounded = (bits[i] + 0x7fffu + (bits[i] >> 16 & 1)) >> 16;
            to[i] = static_cast<uint16_t>((rounded & ~nan) | (0x7fc0u & nan));
        }
        return;
    }
#if VARIANT_LEVEL == 2
    for (int i = 0; i < 64; i += 16) {
        const auto half = _mm512_cvtps_ph(_mm512_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        std::memcpy(to + i, &half, sizeof half);
    }
#elif VARIANT_LEVEL == 1
    for (int i = 0; i < 64; i += 8) {
        const auto half = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        std::memcpy(to + i, &half, sizeof half);
    }
#else
    for (int i = 0; i < 64; ++i) to[i] = float16_of(from[i]);
#endif
}
INLINE static void widen(const uint16_t* from, float* to, bool brain) {
    if (brain) {
        uint32_t bits[64];
        for (int i = 0; i < 64; ++i) bits[i] = static_cast<uint32_t>(from[i]) << 16;
        std::memcpy(to, bits, sizeof bits);
        return;
    }
#if VARIANT_LEVEL == 2
    for (int i = 0; i < 64; i += 16) _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i))));
#elif VARIANT_LEVEL == 1
    for (int i = 0; i < 64; i += 8) _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#else
    for (int i = 0; i < 64; ++i) to[i] = of_float16(from[i]);
#endif
}

// `limit`: magnitudes beyond it are sent as that; infinity for none.
template <class T>
INLINE static void cast_64(T* p, uint16_t* payload, bool brain, T limit) {
    float rounded[64];
    for (int i = 0; i < 64; ++i) {
        const T v = p[i], low = v < -limit ? -limit : v;
        rounded[i] = static_cast<float>(low > limit ? limit : low);
    }
    narrow(rounded, payload, brain);
    widen(payload, rounded, brain);
    for (int i = 0; i < 64; ++i) {
        const T sent = static_cast<T>(rounded[i]);
        p[i] -= std::fabs(sent) <= std::numeric_limits<T>::max() ? sent : T(0);
    }
}

template <class T>
struct CastExtraction {  // of a part of a segment at a time; `p` has the elements [begin, end) of segment s. Likewise of other compressors
    std::vector<int64_t> first;
    uint16_t* payload;
    bool brain;
    T limit;

    int64_t part() const { return 2048; }  // others begin with multiples of it

    INLINE void take(int64_t s, int64_t begin, int64_t end, T* p) const {
        uint16_t* sent = payload + first[s] + begin;
        const int64_t numel = end - begin;
        int64_t i = 0;
        for (; i + 64 <= numel; i += 64) cast_64(p + i, sent + i, brain, limit);
        if (i < numel) {
            T rest[64] = {};
            uint16_t halves[64];
            std::copy(p + i, p + numel, rest);
            cast_64(rest, halves, brain, limit);
            std::copy(rest, rest + (numel - i), p + i);
            std::copy(halves, halves + (numel - i), sent + i);
        }
    }
};

template <class T>
int64_t cast_extract(void* buffer_, const Segment* table, int64_t n, uint16_t* payload, int brain, double limit, int threads) {
    T* buffer = static_cast<T*>(buffer_);
    const CastExtraction<T> extraction{offsets_of(table, n, 1), payload, brain != 0, static_cast<T>(limit)};
    const auto tiles = tiles_of(table, n);
    parallel_for(tiles.size(), useful(threads, elements(table, n)), [&](int64_t t) ISA {
        const Tile& tile = tiles[t];
        extraction.take(tile.segment, tile.begin, tile.end, buffer + table[tile.segment].start + tile.begin);
    });
    return DONE;
}

// The N elements from i on, of n; behind the last there are zeros.
INLINE static Lanes<float>::V widened_halves(const uint16_t* from, int64_t i, int64_t n, bool brain) {
    constexpr int N = Lanes<float>::N;
    uint16_t halves[N];
    if (i + N > n) {
        std::fill(halves, halves + N, uint16_t{0});
        std::copy(from + i, from + n, halves);
        from = halves;
        i = 0;
    }
#if VARIANT_LEVEL == 2
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
    return reinterpret_cast<Lanes<float>::V>(brain ? _mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16) : _mm512_castps_si512(_mm512_cvtph_ps(raw)));
#elif VARIANT_LEVEL == 1
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    return reinterpret_cast<Lanes<float>::V>(brain ? _mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16) : _mm256_castps_si256(_mm256_cvtph_ps(raw)));
#else
    Lanes<float>::V values;
    for (int j = 0; j < N; ++j) {
        const uint32_t bits = static_cast<uint32_t>(from[i + j]) << 16;
        float value;
        std::memcpy(&value, &bits, sizeof bits);
        values[j] = brain ? value : of_float16(from[i + j]);
    }
    return values;
#endif
}

template <class T>
int64_t cast_decode(void* out_, const Segment* table, int64_t n, const uint16_t* payload, int brain, double alpha, int add, int threads) {
    T* out = static_cast<T*>(out_);
    const Into<T> into(table, n, alpha, add);
    const auto first = offsets_of(table, n, 1);
    const auto tiles = tiles_of(table, n);
    parallel_for(tiles.size(), useful(threads, first[n]), [&](int64_t t) ISA {
        const Tile& tile = tiles[t];
        const uint16_t* sent = payload + first[tile.segment] + tile.begin;
        const int64_t numel = tile.end - tile.begin;
        into.put(out + table[tile.segment].start + tile.begin, numel, [&](int64_t i) ISA {
            if constexpr (sizeof(T) == 4) {
                return widened_halves(sent, i, numel, brain);
            } else {  // half a vector of floats
                const auto floats = widened_halves(sent, i, numel, brain);
                typename Lanes<T>::V values;
                for (int j = 0; j < Lanes<T>::N; ++j) values[j] = static_cast<T>(floats[j]);
                return values;
            }
        });
    });
    return DONE;
}
