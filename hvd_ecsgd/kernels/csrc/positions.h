// Chosen entries: what top-k, threshold and random-k send. `positions` are ascending within each of the segments, one after the other.

// -1 - s for the first segment s whose positions do not ascend below its number of elements; else DONE.
inline int64_t check_positions(const Segment* table, int64_t n, const int64_t* counts, const uint32_t* positions, int64_t given) {
    int64_t at = 0;
    for (int64_t s = 0; s < n; ++s) {
        if (counts[s] < 0 || counts[s] > given - at || counts[s] > table[s].numel) return -1 - s;
        const uint32_t* p = positions + at;
        bool ascending = counts[s] == 0 || p[counts[s] - 1] < static_cast<uint64_t>(table[s].numel);
        for (int64_t i = 1; i < counts[s]; ++i) ascending &= p[i - 1] < p[i];
        if (!ascending) return -1 - s;
        at += counts[s];
    }
    return DONE;
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
        T* p = buffer + table[tile.segment].start;
        for (int64_t i = offsets[tile.segment] + tile.begin; i < offsets[tile.segment] + tile.end; ++i) {
            std::memcpy(values + i * sizeof(T), p + positions[i], sizeof(T));
            p[positions[i]] = 0;
        }
    });
    return DONE;
}

// The chosen entries += alpha·values, with two roundings, as torch's index_add_ has.
template <class T>
int64_t positions_add(void* out_, const Segment* table, int64_t n, const int64_t* counts, const uint32_t* positions, const void* values_, double alpha_,
                      int64_t given, int threads) {
    T* out = static_cast<T*>(out_);
    const uint8_t* values = static_cast<const uint8_t*>(values_);
    const T alpha = static_cast<T>(alpha_);
    if (const int64_t wrong = check_positions(table, n, counts, positions, given)) return wrong;
    const auto offsets = offsets_of(counts, n);
    std::vector<Segment> chosen(n);
    for (int64_t s = 0; s < n; ++s) chosen[s] = {offsets[s], counts[s]};
    const auto tiles = tiles_of(chosen.data(), n);
    parallel_for(tiles.size(), useful(threads, offsets[n]), [&](int64_t t) ISA {
        const Tile& tile = tiles[t];
        T* p = out + table[tile.segment].start;
        for (int64_t i = offsets[tile.segment] + tile.begin; i < offsets[tile.segment] + tile.end; ++i) {
            T value;
            std::memcpy(&value, values + i * sizeof(T), sizeof(T));
            p[positions[i]] += alpha * value;
        }
    });
    return DONE;
}
