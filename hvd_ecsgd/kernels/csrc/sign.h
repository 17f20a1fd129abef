// Sign: one bit for each element (set: negative) and a scale for each row, a segment or a block of it.
// Payload: the scales of all segments, then their bits, each segment's beginning with a byte of its own.

// Rows of all segments as segments of their own, and where their bits begin.
struct SignRows {
    std::vector<Segment> rows;
    std::vector<int64_t> bytes;
};

inline SignRows sign_rows(const Segment* table, int64_t n, int64_t block, int64_t scale_bytes) {
    SignRows result;
    for (int64_t s = 0; s < n; ++s) {
        const int64_t width = block ? block : std::max<int64_t>(table[s].numel, 1);
        int64_t begin = 0;
        do {  // an empty segment has one scale
            result.rows.push_back({table[s].start + begin, std::min(width, table[s].numel - begin)});
            begin += width;
        } while (begin < table[s].numel);
    }
    int64_t at = static_cast<int64_t>(result.rows.size()) * scale_bytes;
    for (int64_t s = 0; s < n; ++s) {
        const int64_t width = block ? block : std::max<int64_t>(table[s].numel, 1);
        int64_t begin = 0;
        do {
            result.bytes.push_back(at + begin / 8);
            begin += width;
        } while (begin < table[s].numel);
        at += (table[s].numel + 7) / 8;
    }
    return result;
}

// How many scales come before those of each segment, of which an empty one has one.
inline std::vector<int64_t> sign_row_offsets(const Segment* table, int64_t n, int64_t block) {
    std::vector<int64_t> before(n + 1, 0);
    for (int64_t s = 0; s < n; ++s) before[s + 1] = before[s] + (block ? std::max<int64_t>(1, (table[s].numel + block - 1) / block) : 1);
    return before;
}

template <class T>
INLINE static void pack_negative(const T* p, int64_t n, uint8_t* bytes) {
    each_64(p, n, [](auto v) ISA { return below(v, Lanes<T>::all(0)); }, [&](int64_t i, uint64_t bits, int count) ISA { std::memcpy(bytes + i / 8, &bits, (count + 7) / 8); });
}

// The same, and Σ|p| or Σp² of up to a tile, as `sum_of` adds.
template <class T>
INLINE static double pack_and_sum(const T* p, int64_t n, uint8_t* bytes, bool squares) {
    constexpr int64_t AT_ONCE = 4096;  // it stays in the first cache
    Sum<T> sum;
    for (int64_t i = 0; i < n; i += AT_ONCE) {
        const int64_t count = std::min(AT_ONCE, n - i);
        pack_negative(p + i, count, bytes + i / 8);
        sum.add_norm(p + i, count, squares);
    }
    return sum.total();
}

// p −= ±scale by the signs of p
template <class T>
INLINE static void subtract_sign(T* p, int64_t n, T scale) {
    if (!std::isfinite(scale) || scale == 0) return;
    using L = Lanes<T>;
    const auto plus = L::all(scale), minus = L::all(-scale);
    replace_each(p, n, [&](auto v, int64_t) ISA { return v - L::select(below(v, L::all(0)), minus, plus); });
}

template <class T>
static T sign_scale(double sum, int64_t numel, bool l2) {
    const T norm = norm_of<T>(sum, l2);
    return static_cast<T>(norm / (l2 ? std::sqrt(static_cast<double>(numel)) : static_cast<double>(numel)));
}

// `block` is 0 for one scale a segment; else it is at most a tile, or a multiple of 8. `sums`: of each segment, where they are known and `block` is 0.
template <class T>
int64_t sign_extract(void* buffer_, const Segment* table, int64_t n, uint8_t* payload, int l2, int64_t block, const double* sums_of_segments, int threads) {
    T* buffer = static_cast<T*>(buffer_);
    threads = useful(threads, elements(table, n));
    const SignRows all = sign_rows(table, n, block, sizeof(T));
    const int64_t n_rows = all.rows.size();
    std::vector<T> scales(n_rows, T(0));
    if (sums_of_segments) {  // one pass
        for (int64_t s = 0; s < n; ++s)
            if (table[s].numel) scales[s] = sign_scale<T>(sums_of_segments[s], table[s].numel, l2);
        const auto tiles = tiles_of(table, n);
        parallel_for(tiles.size(), threads, [&](int64_t t) ISA {
            constexpr int64_t AT_ONCE = 4096;  // it stays in the first cache
            const Tile& tile = tiles[t];
            T* p = buffer + table[tile.segment].start;
            uint8_t* bytes = payload + all.bytes[tile.segment];
            for (int64_t i = tile.begin; i < tile.end; i += AT_ONCE) {
                const int64_t count = std::min(AT_ONCE, tile.end - i);
                pack_negative(p + i, count, bytes + i / 8);
                subtract_sign(p + i, count, scales[tile.segment]);
            }
        });
    } else if (block && block % 8) {  // rows share bytes, and fit into the cache: each segment's bits first, then row by row
        const auto bytes = offsets_of(table, n, 8);
        const int64_t first = n_rows * static_cast<int64_t>(sizeof(T));
        // Tiles that end where rows and bytes do.
        const auto tiles = tiles_of(table, n, block * 8 * std::max<int64_t>(1, TILE / (block * 8)));
        const auto rows = sign_row_offsets(table, n, block);
        parallel_for(tiles.size(), threads, [&](int64_t t) ISA {
            const Tile& tile = tiles[t];
            T* p = buffer + table[tile.segment].start;
            pack_negative(p + tile.begin, tile.end - tile.begin, payload + first + bytes[tile.segment] + tile.begin / 8);
            for (int64_t begin = tile.begin; begin < tile.end; begin += block) {
                const int64_t width = std::min(block, tile.end - begin);
                const T scale = sign_scale<T>(sum_of(p + begin, width, l2), width, l2);
                scales[rows[tile.segment] + begin / block] = scale;
                subtract_sign(p + begin, width, scale);
            }
        });
    } else {
        const auto tiles = tiles_of(all.rows.data(), n_rows);
        std::vector<double> sums(tiles.size());
        const auto first = first_tiles(tiles, n_rows);
        in_two_passes(
            tiles, threads,
            [&](int64_t t) ISA {
                const Tile& tile = tiles[t];
                sums[t] = pack_and_sum(buffer + all.rows[tile.segment].start + tile.begin, tile.end - tile.begin,
                                       payload + all.bytes[tile.segment] + tile.begin / 8, l2);
            },
            [&](int64_t r) {
                const double total = std::accumulate(&sums[first[r]], &sums[first[r]] + (all.rows[r].numel + TILE - 1) / TILE, 0.0);
                scales[r] = sign_scale<T>(total, all.rows[r].numel, l2);
            },
            [&](int64_t t) ISA {
                const Tile& tile = tiles[t];
                subtract_sign(buffer + all.rows[tile.segment].start + tile.begin, tile.end - tile.begin, scales[tile.segment]);
            });
    }
    std::memcpy(payload, scales.data(), scales.size() * sizeof(T));
    return DONE;
}

template <class T>
int64_t sign_decode(void* out, const Segment* table, int64_t n, const Payloads& payloads, const Asked& asked, int64_t block, int threads) {
    using L = Lanes<T>;
    const auto bytes = offsets_of(table, n, 8);
    // ±scale, by the signs of a vector's elements.
    const auto signed_scale = [](const uint8_t* signs, int64_t at, int64_t available, auto plus, auto minus) ISA {
        return L::select(mask_of<T>(word_at(signs, at / 8, available) >> at % 8), minus, plus);
    };
    const auto rows = sign_row_offsets(table, n, block);
    if (block % DECODED_AT_ONCE == 0)  // a chunk has one scale
        return decode_all<T>(out, table, n, payloads, asked, threads, [&](const uint8_t* payload, int64_t s, int64_t begin, int64_t count, T*) ISA {
            T scale;
            std::memcpy(&scale, payload + (rows[s] + (block ? begin / block : 0)) * sizeof(T), sizeof(T));
            const auto plus = L::all(scale), minus = L::all(-scale);
            const uint8_t* signs = payload + rows[n] * sizeof(T) + bytes[s] + begin / 8;
            return [=](int64_t i) ISA { return signed_scale(signs, i, (count + 7) / 8, plus, minus); };
        });
    return decode_all<T>(out, table, n, payloads, asked, threads, [&](const uint8_t* payload, int64_t s, int64_t begin, int64_t count, T* values) ISA {
        const uint8_t* signs = payload + rows[n] * sizeof(T) + bytes[s];
        each_row(begin, begin + count, block, [&](int64_t row, int64_t from, int64_t to) ISA {
            T scale;
            std::memcpy(&scale, payload + (rows[s] + row) * sizeof(T), sizeof(T));
            const auto plus = L::all(scale), minus = L::all(-scale);
            for (int64_t i = from; i < to; i += L::N) L::store(values + (i - begin), signed_scale(signs, i, bytes[s + 1] - bytes[s], plus, minus));  // also behind the row
        });
        return [values](int64_t i) ISA { return L::load(values + i); };
    });
}
