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

// What is noted of a tile's choice until it is known where entries of this tile go in the payload. Python gives room for it: WORDS words for every 64
// elements begun, of which only those are touched that are needed.
template <class T>
struct Noted {
    static constexpr int64_t WORDS = 4;
    uint64_t* at;

    static std::vector<int64_t> offsets(const Segment* table, int64_t n) {
        auto words = offsets_of(table, n, 64);
        for (auto& before : words) before *= WORDS;
        return words;
    }
    Noted(uint64_t* notes, const std::vector<int64_t>& before, const Tile& tile) : at(notes + before[tile.segment] + tile.begin / 64 * WORDS) {}

    uint64_t& count() const { return at[0]; }
    // Whether entries were taken while they were in a cache: `values` and `places` of `count` then, else `marks`.
    uint64_t& taken() const { return at[1]; }
    uint64_t* marks() const { return at + 2; }
    uint8_t* values() const { return reinterpret_cast<uint8_t*>(at + 2); }
    uint16_t* places(int64_t count) const { return reinterpret_cast<uint16_t*>(values() + count * sizeof(T)); }
    static int64_t room(int64_t numel) { return ((numel + 63) / 64 * WORDS - 2) * 8 / static_cast<int64_t>(sizeof(T) + 2); }

    // Notes what `test` chooses of n elements; `take`: entries become 0 if there is room for them.
    template <class Test>
    INLINE void choose(T* p, int64_t n, Test test, bool take) const {
        uint64_t words[TILE / 64];
        const int64_t found = mark(p, n, test, words), of = (n + 63) / 64;
        count() = found;
        taken() = take && found <= room(n);
        if (!taken()) {
            std::copy(words, words + of, marks());
            return;
        }
        uint32_t where[ROOM + 64];
        places_of(words, of, 0, where);
        uint8_t* value = values();
        uint16_t* place = places(found);
        for (int64_t i = 0; i < found; ++i) {
            std::memcpy(value + i * sizeof(T), p + where[i], sizeof(T));
            place[i] = static_cast<uint16_t>(where[i]);
            p[where[i]] = 0;
        }
    }
    static constexpr int64_t ROOM = TILE / 64 * WORDS * 8 / (sizeof(T) + 2);
    static_assert(TILE <= 1 << 16, "a place in a tile has 16 bits");
};

// notes ← what is chosen, and how many of each segment to `counts`. `take`: some of the chosen entries are only there and 0 in the buffer already, until
// `threshold_take` writes all of them.
template <class T>
int64_t threshold_choose(void* buffer_, const Segment* table, int64_t n, const uint64_t* philox_keys, const int64_t* sampled, const int64_t* ranks,
                         int64_t* counts, uint64_t* notes, int take, int threads) {
    T* buffer = static_cast<T*>(buffer_);
    threads = useful(threads, elements(table, n));
    std::vector<typename Bits<T>::U> least(n);
    parallel_for(n, threads, [&](int64_t s) {
        if (table[s].numel) least[s] = sampled_quantile(buffer + table[s].start, table[s].numel, philox_keys[s], sampled[s], ranks[s]);
    });
    const auto tiles = tiles_of(table, n);
    const auto before = Noted<T>::offsets(table, n);
    parallel_for(tiles.size(), threads, [&](int64_t t) ISA {
        const Tile& tile = tiles[t];
        const auto key = std::max<typename Bits<T>::U>(1, least[tile.segment]);
        const bool finite = key < Bits<T>::INFINITE;
        Noted<T>(notes, before, tile)
            .choose(buffer + table[tile.segment].start + tile.begin, tile.end - tile.begin, AtLeast<T>(key), take && finite);
    });
    std::fill(counts, counts + n, 0);
    for (const Tile& tile : tiles) {
        const Noted<T> noted(notes, before, tile);
        if (least[tile.segment] >= Bits<T>::INFINITE && noted.count()) {
            // Where the threshold is not finite one entry tells everybody; the step is undone anyway.
            uint64_t left = counts[tile.segment] ? 0 : 1;
            noted.count() = left;
            for (uint64_t* word = noted.marks(); word != noted.marks() + (tile.end - tile.begin + 63) / 64; ++word) {
                *word &= left ? ~*word + 1 : 0;
                left -= left && *word;
            }
        }
        counts[tile.segment] += noted.count();
    }
    return DONE;
}

// The entries of a tile that begins at `place` of its segment: positions ← those of the n elements that are marked. Unless `values` is null it becomes
// what is there, and there are zeros then.
template <class T>
INLINE static void take_marked(T* p, int64_t n, const uint64_t* marks, uint32_t place, uint32_t* positions, uint8_t* values) {
    for (int64_t i = 0; i < n; i += 64) {
        uint64_t bits = marks[i / 64];
        const int64_t chosen = __builtin_popcountll(bits);
        const uint32_t first = place + static_cast<uint32_t>(i);
        if (chosen == 64) {
            for (int j = 0; j < 64; ++j) positions[j] = first + j;
            if (values) {
                std::memcpy(values, p + i, 64 * sizeof(T));
                std::fill(p + i, p + i + 64, T(0));
            }
#if VARIANT_LEVEL == 2
        } else if (chosen > 8 && i + 64 <= n) {
            const __m512i index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
            uint32_t* to = positions;
            for (int j = 0; j < 64; j += 16) {
                const auto of = static_cast<__mmask16>(bits >> j);
                const int found = __builtin_popcount(of);
                const __m512i at = _mm512_add_epi32(index, _mm512_set1_epi32(static_cast<int>(first) + j));
                _mm512_mask_storeu_epi32(to, static_cast<__mmask16>((1u << found) - 1), _mm512_maskz_compress_epi32(of, at));
                to += found;
            }
            using L = Lanes<T>;
            uint8_t* value = values;
            for (int j = 0; values && j < 64; j += L::N) {
                const uint64_t of = bits >> j & ((uint64_t{1} << L::N) - 1);
                const int found = __builtin_popcountll(of);
                const auto v = L::load(p + i + j);
                if (sizeof(T) == 4)
                    _mm512_mask_storeu_epi32(value, static_cast<__mmask16>((1u << found) - 1),
                                             _mm512_maskz_compress_epi32(static_cast<__mmask16>(of), reinterpret_cast<__m512i>(v)));
                else
                    _mm512_mask_storeu_epi64(value, static_cast<__mmask8>((1u << found) - 1),
                                             _mm512_maskz_compress_epi64(static_cast<__mmask8>(of), reinterpret_cast<__m512i>(v)));
                value += found * sizeof(T);
                L::store(p + i + j, L::select(mask_of<T>(of), L::all(0), v));
            }
#endif
        } else {
            for (int64_t k = 0; bits; bits &= bits - 1, ++k) {
                const int at = __builtin_ctzll(bits);
                positions[k] = first + at;
                if (!values) continue;
                std::memcpy(values + k * sizeof(T), p + i + at, sizeof(T));
                p[i + at] = 0;
            }
        }
        positions += chosen;
        if (values) values += chosen * sizeof(T);
    }
}

// positions ← those of the chosen entries of all segments; values, which is null if `threshold_choose` was not to take any, ← the entries, which are 0 then.
template <class T>
int64_t threshold_take(void* buffer_, const Segment* table, int64_t n, uint64_t* notes, uint32_t* positions, void* values_, int threads) {
    T* buffer = static_cast<T*>(buffer_);
    uint8_t* values = static_cast<uint8_t*>(values_);
    const auto tiles = tiles_of(table, n);
    const auto before = Noted<T>::offsets(table, n);
    std::vector<int64_t> counts(tiles.size());
    for (size_t t = 0; t < tiles.size(); ++t) counts[t] = Noted<T>(notes, before, tiles[t]).count();
    const auto offsets = offsets_of(counts.data(), tiles.size());
    parallel_for(tiles.size(), useful(threads, elements(table, n)), [&](int64_t t) ISA {
        const Tile& tile = tiles[t];
        const Noted<T> noted(notes, before, tile);
        const int64_t count = counts[t];
        const auto begin = static_cast<uint32_t>(tile.begin);
        uint32_t* to = positions + offsets[t];
        if (count == 0) return;
        if (noted.taken()) {
            const uint16_t* places = noted.places(count);
            for (int64_t i = 0; i < count; ++i) to[i] = begin + places[i];
            std::memcpy(values + offsets[t] * sizeof(T), noted.values(), count * sizeof(T));
        } else {
            take_marked(buffer + table[tile.segment].start + tile.begin, tile.end - tile.begin, noted.marks(), begin, to,
                        values ? values + offsets[t] * sizeof(T) : nullptr);
        }
    });
    return DONE;
}
