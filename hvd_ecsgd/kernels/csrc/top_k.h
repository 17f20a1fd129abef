// TopK: the k entries of largest magnitude, ties to the lowest index, NaN as infinity. One pass, but for values that a sample misjudges.

// Bits of the elements of up to 64 whose magnitude is at least `least` as a key.
template <class T>
struct AtLeast {
    typename Lanes<T>::M below;
    INLINE explicit AtLeast(typename Bits<T>::U least) : below(Lanes<T>::all_bits(static_cast<typename Bits<T>::I>(least) - 1)) {}
    INLINE auto operator()(typename Lanes<T>::V v) const { return Lanes<T>::magnitude_bits(v) > below; }
};

// Entries of a part of a segment that may be among its k largest, in ascending position.
template <class T>
struct Candidates {
    using U = typename Bits<T>::U;
    static constexpr int64_t BUCKETS = 2048, AT_ONCE = 4096;
    std::unique_ptr<U[]> keys;
    std::unique_ptr<uint32_t[]> positions;
    int64_t capacity = -1, found = 0;
    // For finding the k-th largest of several parts together.
    U least, most;
    std::vector<int64_t> histogram;
    std::vector<U> few;  // keys in the bucket of the k-th largest
    int64_t larger, ties;  // entries with a larger key than it; how many that equal it are taken

    void make_room(int64_t wanted) {  // not cleared
        found = 0;
        if (wanted <= capacity) return;
        keys.reset(new U[wanted + AT_ONCE + 64]);
        positions.reset(new uint32_t[wanted + AT_ONCE + 64]);
        capacity = wanted;
    }

    // All of [begin, end) with a key of at least `least`, but when they are many more than k, of which only those stay that are among the k largest so far.
    ISA void collect(const T* p, int64_t begin, int64_t end, U least, int64_t k) {
        const int64_t most_of_all = std::min<int64_t>(end - begin, 2 * k + TILE);
        make_room(most_of_all);
        for (int64_t i = begin; i < end && least <= Bits<T>::INFINITE; i += AT_ONCE) {
            uint64_t words[AT_ONCE / 64];
            const int64_t n = std::min(AT_ONCE, end - i);
            mark(p + i, n, AtLeast<T>(least), words);  // first all of it, since what cannot be foretold would hold up reading
            uint32_t* place = positions.get() + found;
            const int64_t more = places_of(words, (n + 63) / 64, static_cast<uint32_t>(i), place);
            for (int64_t j = 0; j < more; ++j) keys[found + j] = key_of(p[place[j]]);
            found += more;
            if (found > most_of_all) least = keep_largest(k);
        }
    }

    // Only the k largest stay; returns the key that a later entry needs to be among them, one more than that of the smallest.
    ISA U keep_largest(int64_t k) {
        few.assign(keys.get(), keys.get() + found);
        const U smallest = kth_largest(few.data(), found, k);
        larger = 0;
        for (int64_t i = 0; i < found; ++i) larger += keys[i] > smallest;
        ties = k - larger;
        keep(smallest);
        return smallest + 1;
    }

    // Only those stay that reach `least`.
    ISA void keep_at_least(U least) {
        int64_t left = 0;
        for (int64_t i = 0; i < found; i += AT_ONCE) {
            uint64_t words[AT_ONCE / 64];
            uint32_t places[AT_ONCE + 64];
            const int64_t n = std::min(AT_ONCE, found - i);
            mark(reinterpret_cast<const T*>(keys.get() + i), n, AtLeast<T>(least), words);  // a key is its own magnitude
            const int64_t more = places_of(words, (n + 63) / 64, 0, places);
            for (int64_t j = 0; j < more; ++j) {
                keys[left + j] = keys[i + places[j]];
                positions[left + j] = positions[i + places[j]];
            }
            left += more;
        }
        found = left;
    }

    // Only those stay that are larger, and `ties` equal ones.
    ISA void keep(U smallest) {
        int64_t left = 0, equal = ties;
        for (int64_t i = 0; i < found; ++i) {  // without branches, which nobody could foretell
            const bool tie = keys[i] == smallest && equal > 0, chosen = tie | (keys[i] > smallest);
            keys[left] = keys[i];
            positions[left] = positions[i];
            equal -= tie;
            left += chosen;
        }
        found = left;
    }
};

// The k largest of what n parts of a segment have found stay there. Returns the smallest key of them. run(f): calls f(i) for each part, in any order.
template <class T, class Run>
typename Bits<T>::U keep_largest_of(Candidates<T>* parts, int64_t n, int64_t k, Run run) {
    using U = typename Bits<T>::U;
    using C = Candidates<T>;
    run([&](int64_t i) ISA {
        C& part = parts[i];
        U least = std::numeric_limits<U>::max(), most = 0;
        for (int64_t j = 0; j < part.found; ++j) least = std::min(least, part.keys[j]), most = std::max(most, part.keys[j]);
        part.least = least;
        part.most = most;
    });
    U least = std::numeric_limits<U>::max(), most = 0;
    for (int64_t i = 0; i < n; ++i) least = std::min(least, parts[i].least), most = std::max(most, parts[i].most);
    int shift = 0;
    while (((most - least) >> shift) >= C::BUCKETS) ++shift;
    run([&](int64_t i) ISA {
        C& part = parts[i];
        part.histogram.assign(C::BUCKETS, 0);
        for (int64_t j = 0; j < part.found; ++j) ++part.histogram[(part.keys[j] - least) >> shift];
    });
    int64_t bucket = C::BUCKETS, rank = k;
    for (int64_t here = 0; rank > here;) {
        rank -= here;
        --bucket;
        here = 0;
        for (int64_t i = 0; i < n; ++i) here += parts[i].histogram[bucket];
    }
    run([&](int64_t i) ISA {
        C& part = parts[i];
        part.keep_at_least(least + (static_cast<U>(bucket) << shift));
        part.larger = part.found - part.histogram[bucket];
        part.few.resize(part.histogram[bucket] + 1);
        int64_t left = 0;
        for (int64_t j = 0; j < part.found && left < part.histogram[bucket]; ++j) {
            part.few[left] = part.keys[j];
            left += static_cast<int64_t>((part.keys[j] - least) >> shift) == bucket;
        }
        part.few.pop_back();
    });
    std::vector<U> few;
    for (int64_t i = 0; i < n; ++i) few.insert(few.end(), parts[i].few.begin(), parts[i].few.end());
    const U smallest = kth_largest(few.data(), few.size(), rank);
    int64_t left = k;
    for (int64_t i = 0; i < n; ++i) {
        for (const U key : parts[i].few) parts[i].larger += key > smallest;
        left -= parts[i].larger;
    }
    for (int64_t i = 0; i < n; ++i) {  // the lowest positions first
        parts[i].ties = std::min<int64_t>(left, std::count(parts[i].few.begin(), parts[i].few.end(), smallest));
        left -= parts[i].ties;
    }
    run([&](int64_t i) ISA { parts[i].keep(smallest); });
    return smallest;
}

// A key that about k of n elements reach, rather more than fewer, by a sample with one element of each of as many stretches.
template <class T>
typename Bits<T>::U sampled_threshold(const T* p, int64_t n, int64_t k) {
    constexpr int64_t SAMPLE = 1 << 14;
    if (n < 4 * SAMPLE) return 0;
    const int64_t stretch = n / SAMPLE;
    std::vector<typename Bits<T>::U> keys(SAMPLE);
    uint32_t word = 1;
    for (int64_t begin = 0; begin < SAMPLE; begin += AHEAD) {
        int64_t places[AHEAD];
        for (int64_t i = 0; i < AHEAD; ++i) {
            word = word * 1664525u + 1013904223u;
            places[i] = (begin + i) * stretch + static_cast<int64_t>(static_cast<uint64_t>(word) * stretch >> 32);
            __builtin_prefetch(p + places[i]);
        }
        for (int64_t i = 0; i < AHEAD; ++i) keys[begin + i] = key_of(p[places[i]]);
    }
    const double expected = static_cast<double>(SAMPLE) * k / n;
    const auto rank = static_cast<int64_t>(expected + 4 * std::sqrt(expected) + 8);
    return rank >= SAMPLE ? 0 : kth_largest(keys.data(), SAMPLE, rank);
}

// What is remembered of a segment from step to step: where its k-th largest key is expected in the next one. It only tells where to look first: what is
// chosen does not depend on it. All in keys, of which 2^(digits of T - 1) are an octave, whatever the magnitude.
struct Expected {
    int64_t key;     // that at least k entries are expected to reach, 0 where nobody knows
    int64_t last;    // the k-th largest key of the last step
    int64_t middle;  // what was expected of this step, without a margin
    int64_t spread;  // by how much less it has come lately

    // After a step whose k-th largest key was `smallest`.
    template <class T>
    void update(typename Bits<T>::U smallest, int64_t k) {
        const auto octave = static_cast<double>(int64_t{1} << (std::numeric_limits<T>::digits - 1));
        const auto now = static_cast<int64_t>(smallest);
        if (smallest >= Bits<T>::INFINITE) {
            *this = {};
            return;
        }
        // Residuals grow, in the first steps by much, and ever less. What has fallen is not expected to rise.
        const int64_t rise = last ? std::max<int64_t>(0, now - last) : 0;
        spread = last ? std::max(middle - now, spread - spread / 16) : 0;
        last = now;
        middle = now + rise / 2;
        key = std::max<int64_t>(0, middle - spread - static_cast<int64_t>(octave * (1. / 64 + 0.5 / std::sqrt(static_cast<double>(k)))));
    }
};

// positions ← those of the counts[s] largest of each segment, values ← the entries, which become 0.
template <class T>
int64_t top_k(void* buffer_, const Segment* table, int64_t n, const int64_t* counts, uint32_t* positions, void* values_, void* expected_,
              int threads) {
    using U = typename Bits<T>::U;
    T* buffer = static_cast<T*>(buffer_);
    uint8_t* values = static_cast<uint8_t*>(values_);
    auto* expected = static_cast<Expected*>(expected_);  // of each segment
    threads = useful(threads, elements(table, n));
    const auto offsets = offsets_of(counts, n);
    std::vector<Candidates<T>> found;
    std::vector<Tile> parts;
    std::vector<U> least(n, 0);
    std::vector<int64_t> totals(n);
    // Some segments at once, or one large one, of which a cache holds still what is chosen when it is taken.
    constexpr int64_t AT_ONCE = 1 << 19;
    for (int64_t first = 0, last = 0; first < n; first = last) {
        for (int64_t numel = 0; last < n && numel < AT_ONCE; ++last) numel += table[last].numel;
        // One part of a small segment, as many as threads of a large one.
        parts.clear();
        for (int64_t s = first; s < last; ++s) {
            if (counts[s] == 0) continue;
            const int64_t size = table[s].numel < WORTH_THREADS * 4 ? table[s].numel : (table[s].numel + threads - 1) / threads;
            for (int64_t begin = 0; begin < table[s].numel; begin += size) parts.push_back({s, begin, std::min(begin + size, table[s].numel)});
        }
        const int64_t n_parts = parts.size();
        if (found.size() < parts.size()) found.resize(parts.size());
        parallel_for(last - first, threads, [&](int64_t i) {
            const int64_t s = first + i;
            if (counts[s] && counts[s] < table[s].numel)
                least[s] = expected[s].key ? static_cast<U>(expected[s].key) : sampled_threshold(buffer + table[s].start, table[s].numel, counts[s]);
        });
        std::vector<bool> wanted(n_parts, true);
        for (bool again = true; again;) {
            parallel_for(n_parts, threads, [&](int64_t i) {
                const Tile& part = parts[i];
                if (wanted[i]) found[i].collect(buffer + table[part.segment].start, part.begin, part.end, least[part.segment], counts[part.segment]);
            });
            std::fill(totals.begin() + first, totals.begin() + last, 0);
            for (int64_t i = 0; i < n_parts; ++i) totals[parts[i].segment] += found[i].found;
            again = false;
            for (int64_t i = 0; i < n_parts; ++i) {
                const int64_t s = parts[i].segment;
                wanted[i] = totals[s] < counts[s];
                if (!wanted[i]) continue;
                again = true;
                if (parts[i].begin) continue;
                // What was expected was misleading, or the sample: then take any.
                least[s] = expected[s].key ? sampled_threshold(buffer + table[s].start, table[s].numel, counts[s]) : 0;
                expected[s].key = 0;
            }
        }
        const auto write = [&](int64_t i, int64_t at) ISA {  // what is left of a part
            std::copy(found[i].positions.get(), found[i].positions.get() + found[i].found, positions + at);
            take_at(buffer + table[parts[i].segment].start, positions + at, found[i].found, values + at * sizeof(T));
        };
        int64_t several = 0;
        for (int64_t i = 0; i < n_parts; ++i) several += parts[i].begin > 0;
        if (several == 0) {
            parallel_for(n_parts, threads, [&](int64_t i) {
                const int64_t s = parts[i].segment;
                const auto alone = [](auto f) { f(0); };
                const bool few = found[i].found <= 2 * Candidates<T>::BUCKETS;
                const U smallest = few ? found[i].keep_largest(counts[s]) - 1 : keep_largest_of(&found[i], 1, counts[s], alone);
                expected[s].template update<T>(smallest, counts[s]);
                write(i, offsets[s]);
            });
            continue;
        }
        for (int64_t begin = 0, end = 0; begin < n_parts; begin = end) {
            const int64_t s = parts[begin].segment;
            for (end = begin; end < n_parts && parts[end].segment == s; ++end) {}
            const auto run = [&](auto f) { parallel_for(end - begin, threads, f); };
            expected[s].template update<T>(keep_largest_of(&found[begin], end - begin, counts[s], run), counts[s]);
            std::vector<int64_t> left(end - begin);
            for (int64_t i = begin; i < end; ++i) left[i - begin] = found[i].found;
            const auto at = offsets_of(left.data(), end - begin);
            run([&](int64_t i) ISA { write(begin + i, offsets[s] + at[i]); });
        }
    }
    return DONE;
}
