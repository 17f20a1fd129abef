// RandomK: k distinct positions of each segment, the first different ones of a stream of Philox words.

// Sets k different bits of n, by the first different ones of the stream.
inline void draw_bits(Philox& words, uint64_t n, int64_t k, std::vector<uint64_t>& bits) {
    for (int64_t missing = k; missing;) {
        const uint64_t place = words.below(n), bit = uint64_t{1} << (place % 64);
        missing -= !(bits[place / 64] & bit);
        bits[place / 64] |= bit;
    }
}

// k < n/2, much smaller than n, where a bit for each element would cost more.
inline void draw_sorted(Philox& words, uint64_t n, int64_t k, uint32_t* positions) {
    for (int64_t found = 0; found < k;) {
        for (int64_t i = found; i < k; ++i) positions[i] = static_cast<uint32_t>(words.below(n));
        std::sort(positions, positions + k);
        found = std::unique(positions, positions + k) - positions;
    }
}

inline int64_t random_k_positions(const Segment* table, int64_t n, const uint64_t* philox_keys, const int64_t* counts, uint32_t* positions, int threads) {
    const auto offsets = offsets_of(counts, n);
    parallel_for(n, useful(threads, 8 * offsets[n]), [&](int64_t s) {
        const int64_t numel = table[s].numel, k = counts[s];
        uint32_t* place = positions + offsets[s];
        Philox words(philox_keys[s]);
        if (k * 1024 < numel) return draw_sorted(words, numel, k, place);
        const bool absent = 2 * k > numel;  // then those that stay away are drawn
        std::vector<uint64_t> bits((numel + 63) / 64, 0);
        draw_bits(words, numel, absent ? numel - k : k, bits);
        for (int64_t w = 0; w < static_cast<int64_t>(bits.size()); ++w) {
            uint64_t word = absent ? ~bits[w] : bits[w];
            if (numel - w * 64 < 64) word &= (uint64_t{1} << (numel - w * 64)) - 1;
            for (; word; word &= word - 1) *place++ = static_cast<uint32_t>(w * 64 + __builtin_ctzll(word));
        }
    });
    return DONE;
}
