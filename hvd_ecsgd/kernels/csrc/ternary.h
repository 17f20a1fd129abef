// Ternary: 2 bits for each element (1 positive, 2 negative, 0 zero) and a scale for each segment.
// Payload: the scales of all segments, then their codes, each segment's beginning with a byte of its own.

// The bits of a word of 32, each followed by a zero.
inline uint64_t spread(uint64_t x) {
    x = (x | x << 16) & 0x0000ffff0000ffffu;
    x = (x | x << 8) & 0x00ff00ff00ff00ffu;
    x = (x | x << 4) & 0x0f0f0f0f0f0f0f0fu;
    x = (x | x << 2) & 0x3333333333333333u;
    return (x | x << 1) & 0x5555555555555555u;
}

template <class T>
INLINE static void pack_ternary(const T* p, int64_t n, uint8_t* bytes) {
    each_64(p, n, [](auto v) ISA { return v < 0; }, [&](int64_t i, uint64_t negative, int count) ISA {
        T rest[64] = {};
        const T* q = p + i;
        if (count < 64) {
            std::copy(q, q + count, rest);
            q = rest;
        }
        const uint64_t positive = test_64(q, [](auto v) ISA { return v > 0; });
        const uint64_t words[2] = {spread(positive & 0xffffffffu) | spread(negative & 0xffffffffu) << 1, spread(positive >> 32) | spread(negative >> 32) << 1};
        std::memcpy(bytes + i / 4, words, (count + 3) / 4);
    });
}

// p −= ±scale by the signs of p, but where p is zero
template <class T>
INLINE static void subtract_ternary(T* p, int64_t n, T scale) {
    if (!std::isfinite(scale) || scale == 0) return;
    using L = Lanes<T>;
    const auto plus = L::all(scale), minus = L::all(-scale), zero = L::all(0);
    replace_each(p, n, [&](auto v, int64_t) ISA { return v - L::select(v < 0, minus, L::select(v > 0, plus, zero)); });
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
    if (known_sums) {
        for (int64_t s = 0; s < n; ++s)
            if (table[s].numel) scale_of(s, known_sums[s], known_nonzero[s]);
        parallel_for(tiles.size(), threads, [&](int64_t t) ISA {
            const Tile& tile = tiles[t];
            T* p = buffer + table[tile.segment].start;
            uint8_t* codes = payload + n * sizeof(T) + bytes[tile.segment];
            for (int64_t i = tile.begin; i < tile.end; i += AT_ONCE) {
                const int64_t count = std::min(AT_ONCE, tile.end - i);
                pack_ternary(p + i, count, codes + i / 4);
                subtract_ternary(p + i, count, scales[tile.segment]);
            }
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
            const T* p = buffer + table[tile.segment].start;
            uint8_t* codes = payload + n * sizeof(T) + bytes[tile.segment];
            Sum<T> sum;
            for (int64_t i = tile.begin; i < tile.end; i += AT_ONCE) {
                const int64_t count = std::min(AT_ONCE, tile.end - i);
                counts[t] += count_nonzero(p + i, count);
                pack_ternary(p + i, count, codes + i / 4);
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
            subtract_ternary(buffer + table[tile.segment].start + tile.begin, tile.end - tile.begin, scales[tile.segment]);
        });
    std::memcpy(payload, scales.data(), scales.size() * sizeof(T));
    return DONE;
}

template <class T>
int64_t ternary_decode(void* out, const Segment* table, int64_t n, const Payloads& payloads, const Asked& asked, int threads) {
    using L = Lanes<T>;
    const auto bytes = offsets_of(table, n, 4);
    return decode_all<T>(out, table, n, payloads, asked, threads, [&](const uint8_t* payload, int64_t s, int64_t begin, int64_t count, T*) ISA {
        T scale;
        std::memcpy(&scale, payload + s * sizeof(T), sizeof(T));
        const auto plus = L::all(scale), minus = L::all(-scale), zero = L::all(0 * scale);
        const uint8_t* codes = payload + n * sizeof(T) + bytes[s] + begin / 4;
        const int64_t available = (count + 3) / 4;
        return [=](int64_t i) ISA {
            const uint32_t word = word_at(codes, i / 4, available) >> i % 4 * 2;
            const auto positive = mask_of<T, 2>(word), negative = mask_of<T, 2>(word >> 1);
            // As sign times scale: 3, which nobody writes, is zero.
            return L::select(positive & ~negative, plus, L::select(negative & ~positive, minus, zero));
        };
    });
}
