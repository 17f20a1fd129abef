// BlockTopK: the k entries of largest magnitude of each block, ties to the lowest index, NaN as infinity; values first, then positions within the block.

// The k-th largest of N integers that are not negative: the least of those that fewer than k are larger than. All are compared with all.
template <class T, int N>
INLINE static typename Bits<T>::U kth_of_few(const typename Bits<T>::U* keys, int64_t k) {
    using L = Lanes<T>;
    using I = typename L::I;
    constexpr int VECTORS = N / L::N;
    typename L::M v[VECTORS], larger[VECTORS] = {};
    std::memcpy(v, keys, sizeof v);
    for (int i = 0; i < N; ++i) {
        const auto other = L::all_bits(static_cast<I>(keys[i]));
#pragma GCC unroll 32
        for (int j = 0; j < VECTORS; ++j) larger[j] -= other > v[j];
    }
    const auto limit = L::all_bits(static_cast<I>(k)), none = L::all_bits(std::numeric_limits<I>::max());
    auto least = none;
#pragma GCC unroll 32
    for (int j = 0; j < VECTORS; ++j) {
        const auto among = larger[j] < limit;
        const auto candidate = (v[j] & among) | (none & ~among), smaller = candidate < least;
        least = (candidate & smaller) | (least & ~smaller);
    }
    I result = least[0];
    for (int j = 1; j < L::N; ++j) result = std::min<I>(result, least[j]);
    return static_cast<typename Bits<T>::U>(result);
}

// A key that at least k of n elements reach, and few more: the k-th largest of the largest of some groups. 0 where that tells nothing.
template <class T, int GROUPS>
INLINE static typename Bits<T>::U reached_by(const T* p, int64_t n, int64_t k) {
    using L = Lanes<T>;
    constexpr int VECTORS = GROUPS / L::N;
    typename L::M largest[VECTORS] = {};
    for (int64_t i = 0; i + GROUPS <= n; i += GROUPS)
#pragma GCC unroll 32
        for (int j = 0; j < VECTORS; ++j) {
            const auto bits = L::magnitude_bits(L::load(p + i + j * L::N));
            const auto larger = bits > largest[j];
            largest[j] = (bits & larger) | (largest[j] & ~larger);
        }
    typename Bits<T>::U keys[GROUPS];
    std::memcpy(keys, largest, sizeof keys);
    return std::min(kth_of_few<T, GROUPS>(keys, k), Bits<T>::INFINITE);
}
template <class T>
INLINE static typename Bits<T>::U reached_by(const T* p, int64_t n, int64_t k) {
    if (n < 256 || k > 16) return 0;
    return k > 8 ? reached_by<T, 64>(p, n, k) : reached_by<T, 16>(p, n, k);
}

// One block: writes k positions, ascending, and gives and clears their values. `keys`, `sorted` and `places` have room for the block and 128 more.
template <class T>
INLINE static void take_largest(T* p, int64_t n, int64_t k, uint8_t* values, uint8_t* positions, typename Bits<T>::U* keys, typename Bits<T>::U* sorted,
                                uint32_t* places) {
    using U = typename Bits<T>::U;
    constexpr int FEW = 16;
    const U least = reached_by(p, n, k);
    const AtLeast<T> test(least);
    constexpr int64_t AT_ONCE = 512;
    int64_t found = 0;
    for (int64_t i = 0; i < n; i += AT_ONCE) {
        uint64_t words[AT_ONCE / 64];
        const int64_t here = std::min(AT_ONCE, n - i);
        mark(p + i, here, test, words);
        found += places_of(words, (here + 63) / 64, static_cast<uint32_t>(i), places + found);
    }
    for (int64_t j = 0; j < found; ++j) keys[j] = key_of(p[places[j]]);
    U smallest;
    if (found <= FEW) {
        std::fill(keys + found, keys + FEW, U{0});
        smallest = kth_of_few<T, FEW>(keys, k);
    } else {
        std::copy(keys, keys + found, sorted);
        smallest = kth_largest(sorted, found, k);
    }
    int64_t equal = k;
    for (int64_t j = 0; j < found; ++j) equal -= keys[j] > smallest;
    for (int64_t j = 0, taken = 0; taken < k; ++j) {
        const bool tie = keys[j] == smallest && equal > 0, chosen = tie || keys[j] > smallest;
        equal -= tie;
        T& value = p[places[j]];
        std::memcpy(values + taken * sizeof(T), &value, sizeof(T));
        const auto place = static_cast<uint16_t>(places[j]);
        std::memcpy(positions + taken * 2, &place, 2);
        value = chosen ? T(0) : value;
        taken += chosen;
    }
}

// k of full blocks is `k_full`; k_last[s] that of the last block of segment s when it is shorter.
template <class T>
int64_t block_top_k_extract(void* buffer_, const Segment* table, int64_t n, uint8_t* payload, int64_t block, int64_t k_full, const int64_t* k_last,
                            int threads) {
    T* buffer = static_cast<T*>(buffer_);
    std::vector<int64_t> before(n + 1, 0);
    for (int64_t s = 0; s < n; ++s) before[s + 1] = before[s] + table[s].numel / block * k_full + k_last[s];
    uint8_t* positions = payload + before[n] * sizeof(T);
    const auto tiles = tiles_of(table, n, block * std::max<int64_t>(1, TILE / block));
    parallel_for(tiles.size(), useful(threads, elements(table, n)), [&](int64_t t) ISA {
        const Tile& tile = tiles[t];
        std::vector<typename Bits<T>::U> keys(block + 128), sorted(block);
        std::vector<uint32_t> places(block + 128);
        for (int64_t begin = tile.begin; begin < tile.end; begin += block) {
            const int64_t width = std::min(block, tile.end - begin), at = before[tile.segment] + begin / block * k_full;
            take_largest(buffer + table[tile.segment].start + begin, width, width == block ? k_full : k_last[tile.segment], payload + at * sizeof(T),
                         positions + at * 2, keys.data(), sorted.data(), places.data());
        }
    });
    return DONE;
}

// Zeros, or what is there, and at the chosen entries values·alpha more. Positions of each block must ascend below its length.
template <class T>
int64_t block_top_k_decode(void* out_, const Segment* table, int64_t n, const uint8_t* payload, int64_t block, int64_t k_full, const int64_t* k_last,
                           double alpha, int add, int threads) {
    T* out = static_cast<T*>(out_);
    const Into<T> into(table, n, alpha, add);
    std::vector<int64_t> before(n + 1, 0);
    for (int64_t s = 0; s < n; ++s) before[s + 1] = before[s] + table[s].numel / block * k_full + k_last[s];
    const uint8_t* positions = payload + before[n] * sizeof(T);
    const auto tiles = tiles_of(table, n, block * std::max<int64_t>(1, TILE / block));
    std::vector<uint8_t> wrong(tiles.size(), 0);
    const auto place_of = [&](int64_t i) {
        uint16_t place;
        std::memcpy(&place, positions + i * 2, 2);
        return static_cast<int64_t>(place);
    };
    const auto each_block = [&](int64_t t, auto f) ISA {  // f(begin, width, first entry, entries)
        const Tile& tile = tiles[t];
        for (int64_t begin = tile.begin; begin < tile.end; begin += block) {
            const int64_t width = std::min(block, tile.end - begin);
            f(begin, width, before[tile.segment] + begin / block * k_full, width == block ? k_full : k_last[tile.segment]);
        }
    };
    parallel_for(tiles.size(), useful(threads, before[n]), [&](int64_t t) ISA {
        each_block(t, [&](int64_t, int64_t width, int64_t at, int64_t k) ISA {
            int64_t previous = -1;
            for (int64_t i = at; i < at + k; previous = place_of(i), ++i) wrong[t] |= place_of(i) <= previous || place_of(i) >= width;
        });
    });
    for (size_t t = 0; t < tiles.size(); ++t)
        if (wrong[t]) return -1 - tiles[t].segment;
    const auto add_values = [&](T* p, int64_t at, int64_t k) ISA {
        for (int64_t i = at; i < at + k; ++i) {
            T value;
            std::memcpy(&value, payload + i * sizeof(T), sizeof(T));
            p[place_of(i)] += value * into.alpha;
        }
    };
    if (add) {
        parallel_for(tiles.size(), useful(threads, before[n]), [&](int64_t t) ISA {
            each_block(t, [&](int64_t begin, int64_t, int64_t at, int64_t k) ISA { add_values(out + table[tiles[t].segment].start + begin, at, k); });
        });
        return DONE;
    }
    parallel_for(tiles.size(), useful(threads, elements(table, n)), [&](int64_t t) ISA {
        const int64_t at_once = std::max<int64_t>(1, 4096 / block) * block;  // some blocks, which are copied together
        std::vector<T> made(at_once, T(0));
        const Tile& tile = tiles[t];
        T* p = out + table[tile.segment].start;
        each_block(t, [&](int64_t begin, int64_t width, int64_t at, int64_t k) ISA {
            const int64_t first = tile.begin + (begin - tile.begin) / at_once * at_once, end = begin + width;
            add_values(made.data() + (begin - first), at, k);
            if (end != tile.end && end - first < at_once) return;
            into.copy(p + first, made.data(), end - first);
            std::fill(made.begin(), made.end(), T(0));
        });
    });
    return DONE;
}
