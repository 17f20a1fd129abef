// Chosen entries: what top-k, threshold and random-k send. `positions` are ascending within each of the segments, one after the other.

// -1 - s for the first segment s whose positions do not ascend below its number of elements; else DONE.
inline int64_t check_positions(const Segment* table, int64_t n, const int64_t* counts, const uint32_t* positions, int64_t given) {
    int64_t at = 0;
    for (int64_t s = 0; s < n; ++s) {
        if (counts[s] < 0 || counts[s] > given - at || counts[s] > table[s].numel) return -1 - s;
        const uint32_t* p = positions + at;
        uint32_t descents = counts[s] && p[counts[s] - 1] >= static_cast<uint64_t>(table[s].numel);
        for (int64_t i = 1; i < counts[s]; ++i) descents |= p[i - 1] >= p[i];
        if (descents) return -1 - s;
        at += counts[s];
    }
    return DONE;
}

// So many chosen entries are on their way from memory at once.
constexpr int64_t AHEAD = 32;

// values ← the entries of p at n positions, which become 0.
template <class T>
INLINE static void take_at(T* p, const uint32_t* positions, int64_t n, uint8_t* values) {
    for (int64_t i = 0; i < n; ++i) {
        if (i + AHEAD < n) __builtin_prefetch(p + positions[i + AHEAD], 1);
        std::memcpy(values + i * sizeof(T), p + positions[i], sizeof(T));
        p[positions[i]] = 0;
    }
}

// values ← the chosen entries, which become 0.
template <class T>
int64_t positions_take(void* buffer_, const Segment* table, int64_t n, const int64_t* counts, const uint32_t* positions, void* values_, int threads) {
    T* buffer = static_cast<T*>(buffer_);
    uint8_t* values = static_cast<uint8_t*>(values_);
    const auto offsets = offsets_of(counts, n);
    if (const int64_t wrong = check_positions(table, n, counts, positions, offsets[n])) return wrong;
    std::vector<Segment> chosen(n);
    for (int64_t s = 0; s < n; ++s) chosen[s] = {offsets[s], counts[s]};
    const auto tiles = tiles_of(chosen.data(), n);
    parallel_for(tiles.size(), useful(threads, offsets[n]), [&](int64_t t) ISA {
        const Tile& tile = tiles[t];
        const int64_t begin = offsets[tile.segment] + tile.begin;
        take_at(buffer + table[tile.segment].start, positions + begin, tile.end - tile.begin, values + begin * sizeof(T));
    });
    return DONE;
}

// Zeros, or what is there, and at the chosen entries alpha·values more, with two roundings, as torch's index_add_ has.
template <class T>
int64_t positions_decode(void* out_, const Segment* table, int64_t n, const int64_t* counts, const uint32_t* positions, const void* values_, double alpha,
                         int add, int64_t given, int threads) {
    using L = Lanes<T>;
    T* out = static_cast<T*>(out_);
    const uint8_t* values = static_cast<const uint8_t*>(values_);
    const Into<T> into(table, n, alpha, add);
    if (const int64_t wrong = check_positions(table, n, counts, positions, given)) return wrong;
    const auto offsets = offsets_of(counts, n);
    const auto add_one = [&](T* p, int64_t first, int64_t i) ISA {
        T value;
        std::memcpy(&value, values + i * sizeof(T), sizeof(T));
        p[positions[i] - first] += into.alpha * value;
    };
    const auto factor = L::all(into.alpha);
    // p, which has the element at `first`, += the entries from i on whose position is below `stop`, of `end` at most. Returns the next entry. Positions
    // that follow each other are a vector.
    const auto each = [&](T* p, int64_t first, int64_t i, int64_t end, int64_t stop) ISA {
        for (; i + L::N <= end && positions[i + L::N - 1] < stop; i += L::N) {
            if (positions[i + L::N - 1] - positions[i] == L::N - 1) {
                T* at = p + (positions[i] - first);
                typename L::V value;
                std::memcpy(&value, values + i * sizeof(T), sizeof value);
                L::store(at, L::load(at) + factor * value);
                continue;
            }
            for (int64_t j = i; j < i + L::N; ++j) add_one(p, first, j);
        }
        for (; i < end && positions[i] < stop; ++i) add_one(p, first, i);
        return i;
    };
    if (add) {
        std::vector<Segment> chosen(n);
        for (int64_t s = 0; s < n; ++s) chosen[s] = {offsets[s], counts[s]};
        const auto tiles = tiles_of(chosen.data(), n);
        parallel_for(tiles.size(), useful(threads, offsets[n]), [&](int64_t t) ISA {
            const Tile& tile = tiles[t];
            each(out + table[tile.segment].start, 0, offsets[tile.segment] + tile.begin, offsets[tile.segment] + tile.end, table[tile.segment].numel);
        });
        return DONE;
    }
    const auto tiles = tiles_of(table, n);
    parallel_for(tiles.size(), useful(threads, elements(table, n)), [&](int64_t t) ISA {
        constexpr int64_t CHUNK = 4096;
        alignas(WIDTH) T made[CHUNK];
        const Tile& tile = tiles[t];
        const int64_t last = offsets[tile.segment + 1];
        int64_t at = std::lower_bound(positions + offsets[tile.segment], positions + last, tile.begin) - positions;
        for (int64_t begin = tile.begin; begin < tile.end; begin += CHUNK) {
            const int64_t count = std::min(CHUNK, tile.end - begin);
            T* to = out + table[tile.segment].start + begin;
            if (count % L::N == 0 && at + count <= last && positions[at] == begin && positions[at + count - 1] == begin + count - 1) {
                // All of the chunk, as positions ascend.
                into.write(to, count, [&](int64_t i) ISA {
                    typename L::V value;
                    std::memcpy(&value, values + (at + i) * sizeof(T), sizeof value);
                    return typename L::V{} + factor * value;
                });
                at += count;
                continue;
            }
            std::fill(made, made + count, T(0));
            at = each(made, begin, at, last, begin + count);
            into.copy(to, made, count);
        }
    });
    return DONE;
}
