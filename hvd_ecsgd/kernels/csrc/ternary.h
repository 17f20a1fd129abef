// Ternary: 2 bits for each element (1 positive, 2 negative, 0 zero) and a scale for each segment.
// Payload: the scales of all segments, then their codes, each segment's beginning with a byte of its own.

// The bits of a word of 32, each followed by a zero.
inline uint64_t spread(uint64_t x) {
#if VARIANT_LEVEL == 2  // (Of processors with AVX2, old ones take many cycles for it.)
    return _pdep_u64(x, 0x5555555555555555u);
#else
    x = (x | x << 16) & 0x0000ffff0000ffffu;
    x = (x | x << 8) & 0x00ff00ff00ff00ffu;
    x = (x | x << 4) & 0x0f0f0f0f0f0f0f0fu;
    x = (x | x << 2) & 0x3333333333333333u;
    return (x | x << 1) & 0x5555555555555555u;
#endif
}

// What p leaves when it is sent as ±scale by its sign, and as nothing where it is zero or NaN.
template <class T>
INLINE static typename Lanes<T>::V left_of_ternary(typename Lanes<T>::V v, T scale) {
    using L = Lanes<T>;
    const auto sign = reinterpret_cast<typename L::M>(v) & L::all_bits(static_cast<typename L::I>(Bits<T>::SIGN));
    const auto sent = reinterpret_cast<typename L::V>(sign | reinterpret_cast<typename L::M>(L::all(scale)));
    return v - L::select(below(L::all(0), L::magnitude(v)), sent, L::all(0));
}

// 64 elements' codes; p ← what they leave, unless the scale is zero.
template <class T>
INLINE static void ternary_64(T* p, uint64_t* words, T scale) {
    using L = Lanes<T>;
    uint64_t sent = 0, signs = 0;
#pragma GCC unroll 32
    for (int j = 0; j < 64; j += L::N) {
        const auto v = L::load(p + j);
        sent |= bits_of(below(L::all(0), L::magnitude(v))) << j;
        signs |= bits_of(reinterpret_cast<typename L::M>(v)) << j;
        if (scale != 0) L::store(p + j, left_of_ternary(v, scale));
    }
    const uint64_t positive = sent & ~signs, negative = sent & signs;
    words[0] = spread(positive & 0xffffffffu) | spread(negative & 0xffffffffu) << 1;
    words[1] = spread(positive >> 32) | spread(negative >> 32) << 1;
}

template <class T>
INLINE static void pack_ternary(T* p, int64_t n, uint8_t* bytes, T scale) {
    uint64_t words[2];
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) {
        ternary_64(p + i, words, scale);
        std::memcpy(bytes + i / 4, words, sizeof words);
    }
    if (i == n) return;
    T rest[64] = {};
    std::copy(p + i, p + n, rest);
    ternary_64(rest, words, scale);
    std::copy(rest, rest + (n - i), p + i);
    std::memcpy(bytes + i / 4, words, (n - i + 3) / 4);
}

// `known_sums` and `known_nonzero`: of each segment, where they are known; then one pass is made.
template <class T>
int64_t ternary_extract(void* buffer_, const Segment* table, int64_t n, uint8_t* payload, int l2, const double* known_sums, const int64_t* known_nonzero,
                        int threads) {
    constexpr int64_t AT_ONCE = 4096;  // it stays in the first cache
    T* buffer = static_cast<T*>(buffer_);
    threads = useful(threads, elements(table, n));
    const auto tiles = tiles_of(table, n);
    const auto bytes = offsets_of(table, n, 4);
    const auto first = first_tiles(tiles, n);
    std::vector<T> scales(n, T(0));
    const auto scale_of = [&](int64_t s, double sum, int64_t nonzero) { scales[s] = sign_scale<T>(sum, std::max<int64_t>(1, nonzero), l2); };
    const auto subtracted = [&](int64_t s) { return std::isfinite(scales[s]) ? scales[s] : T(0); };
    if (known_sums) {
        for (int64_t s = 0; s < n; ++s)
            if (table[s].numel) scale_of(s, known_sums[s], known_nonzero[s]);
        parallel_for(tiles.size(), threads, [&](int64_t t) ISA {
            const Tile& tile = tiles[t];
            pack_ternary(buffer + table[tile.segment].start + tile.begin, tile.end - tile.begin,
                         payload + n * sizeof(T) + bytes[tile.segment] + tile.begin / 4, subtracted(tile.segment));
        });
        std::memcpy(payload, scales.data(), scales.size() * sizeof(T));
        return DONE;
    }
    std::vector<double> sums(tiles.size());
    std::vector<int64_t> counts(tiles.size());
    in_two_passes(
        tiles, threads,
        [&](int64_t t) ISA {
            const Tile& tile = tiles[t];
            T* p = buffer + table[tile.segment].start;
            uint8_t* codes = payload + n * sizeof(T) + bytes[tile.segment];
            Sum<T> sum;
            for (int64_t i = tile.begin; i < tile.end; i += AT_ONCE) {
                const int64_t count = std::min(AT_ONCE, tile.end - i);
                counts[t] += count_nonzero(p + i, count);
                pack_ternary(p + i, count, codes + i / 4, T(0));
                sum.add_norm(p + i, count, l2);
            }
            sums[t] = sum.total();
        },
        [&](int64_t s) {
            double total = 0;
            int64_t nonzero = 0;
            for (int64_t t = first[s]; t < first[s] + (table[s].numel + TILE - 1) / TILE; ++t) total += sums[t], nonzero += counts[t];
            scale_of(s, total, nonzero);
        },
        [&](int64_t t) ISA {
            const Tile& tile = tiles[t];
            const T scale = subtracted(tile.segment);
            if (scale == 0) return;
            replace_each(buffer + table[tile.segment].start + tile.begin, tile.end - tile.begin,
                         [&](auto v, int64_t) ISA { return left_of_ternary(v, scale); });
        });
    std::memcpy(payload, scales.data(), scales.size() * sizeof(T));
    return DONE;
}

// What a vector's codes stand for: sign times scale; 3, which nobody writes, is zero.
template <class T>
struct Signed {
    using L = Lanes<T>;
    typename L::V plus, minus, zero;

    INLINE explicit Signed(T scale) : plus(L::all(scale)), minus(L::all(-scale)), zero(L::all(0 * scale)) {}

    INLINE typename L::V of(uint32_t word) const {
        const auto positive = mask_of<T, 2>(word), negative = mask_of<T, 2>(word >> 1);
        return L::select(positive & ~negative, plus, L::select(negative & ~positive, minus, zero));
    }
};

// The same looked up: the lowest bits of a lane are its place in a vector of values, in which those of two bits are repeated.
#if VARIANT_LEVEL > 0
template <>
struct Signed<float> {
    using L = Lanes<float>;
    L::V values;
    L::M places;

    INLINE explicit Signed(float scale) {
        const float by_code[4] = {0 * scale, scale, -scale, 0 * scale};
        for (int j = 0; j < L::N; ++j) values[j] = by_code[j % 4], places[j] = 2 * j;
    }

    INLINE L::V of(uint32_t word) const {
        const auto codes = (L::M{} + static_cast<int32_t>(word)) >> places;
#if VARIANT_LEVEL == 2
        return reinterpret_cast<L::V>(_mm512_permutexvar_ps(reinterpret_cast<__m512i>(codes), reinterpret_cast<__m512>(values)));
#else
        return reinterpret_cast<L::V>(_mm256_permutevar8x32_ps(reinterpret_cast<__m256>(values), reinterpret_cast<__m256i>(codes)));
#endif
    }
};
#endif

template <class T>
int64_t ternary_decode(void* out, const Segment* table, int64_t n, const Payloads& payloads, const Asked& asked, int threads) {
    const auto bytes = offsets_of(table, n, 4);
    return decode_all<T>(out, table, n, payloads, asked, threads, [&](const uint8_t* payload, int64_t s, int64_t begin, int64_t count, T*) ISA {
        T scale;
        std::memcpy(&scale, payload + s * sizeof(T), sizeof(T));
        const Signed<T> values(scale);
        const uint8_t* codes = payload + n * sizeof(T) + bytes[s] + begin / 4;
        const int64_t available = (count + 3) / 4;
        return [=](int64_t i) ISA {
            return values.of(word_at(codes, i / 4, available) >> i % 4 * 2);
        };
    });
}
