// Threshold: all entries but zeros that reach a quantile of a sample of the magnitudes.

// The threshold's key: that of the rank-th largest of `sampled` magnitudes drawn with replacement, or of all of them. A NaN among them counts as infinity.
template <class T>
typename Bits<T>::U sampled_quantile(const T* p, int64_t numel, uint64_t philox_key, int64_t sampled, int64_t rank) {
    if (rank >= sampled) return 0;
    std::vector<typename Bits<T>::U> keys(sampled);
    bool nan = false;
    Philox words(philox_key);
    constexpr int64_t AHEAD = 64;  // so many places are on their way from memory at once
    for (int64_t begin = 0; begin < sampled; begin += AHEAD) {
        const int64_t count = std::min(AHEAD, sampled - begin);
        int64_t places[AHEAD];
        for (int64_t i = 0; i < count; ++i) {
            places[i] = sampled == numel ? begin + i : static_cast<int64_t>(words.below(numel));
            __builtin_prefetch(p + places[i]);
        }
        for (int64_t i = 0; i < count; ++i) {
            const T value = p[places[i]];
            nan |= value != value;
            keys[begin + i] = key_of(value);
        }
    }
    return nan ? Bits<T>::INFINITE : kth_largest(keys.data(), sampled, rank);
}

// counts ← how many entries of each segment are chosen, positions ← where, as long as there is room for `capacity` of all. Returns how many there are.
template <class T>
int64_t threshold_positions(const void* buffer_, const Segment* table, int64_t n, const uint64_t* philox_keys, const int64_t* sampled, const int64_t* ranks,
                            int64_t* counts, uint32_t* positions, int64_t capacity, int threads) {
    const T* buffer = static_cast<const T*>(buffer_);
    threads = useful(threads, elements(table, n));
    std::vector<typename Bits<T>::U> least(n);
    parallel_for(n, threads, [&](int64_t s) {
        if (table[s].numel) least[s] = sampled_quantile(buffer + table[s].start, table[s].numel, philox_keys[s], sampled[s], ranks[s]);
    });
    const auto tiles = tiles_of(table, n);
    std::vector<std::vector<uint32_t>> found(tiles.size());
    parallel_for(tiles.size(), threads, [&](int64_t t) ISA {
        const Tile& tile = tiles[t];
        const T* p = buffer + table[tile.segment].start + tile.begin;
        const AtLeast<T> test(std::max<typename Bits<T>::U>(1, least[tile.segment]));
        uint32_t places[TILE + 128];
        const int64_t numel = tile.end - tile.begin;
        int64_t count = 0, i = 0;
        for (; i + 64 <= numel; i += 64) count += append_64<T>(p + i, test, static_cast<uint32_t>(tile.begin + i), nullptr, places + count);
        if (i < numel) {
            T rest[64] = {};  // a zero is never chosen
            std::copy(p + i, p + numel, rest);
            count += append_64<T>(rest, test, static_cast<uint32_t>(tile.begin + i), nullptr, places + count);
        }
        found[t].assign(places, places + count);
    });
    std::fill(counts, counts + n, 0);
    int64_t total = 0;
    for (size_t t = 0; t < tiles.size(); ++t) {
        const int64_t s = tiles[t].segment;
        // Where the threshold is not finite one entry tells everybody; the step is undone anyway.
        const int64_t size = found[t].size(), taken = least[s] < Bits<T>::INFINITE ? size : std::min<int64_t>(size, 1 - counts[s]);
        if (total + taken <= capacity) std::copy(found[t].begin(), found[t].begin() + taken, positions + total);
        counts[s] += taken;
        total += taken;
    }
    return total;
}
