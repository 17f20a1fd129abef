// TopK: the k entries of largest magnitude, ties to the lowest index, NaN as infinity. One pass, but for values that a sample misjudges.

// Bits of the elements of up to 64 whose magnitude is at least `least` as a key.
template <class T>
struct AtLeast {
    typename Lanes<T>::M below;
    INLINE explicit AtLeast(typename Bits<T>::U least) : below(Lanes<T>::all_bits(static_cast<typename Bits<T>::I>(least) - 1)) {}
    INLINE auto operator()(typename Lanes<T>::V v) const { return Lanes<T>::magnitude_bits(v) > below; }
};

// Entries of [begin, end) that may be among the k largest of the segment, in ascending position.
template <class T>
struct Candidates {
    using U = typename Bits<T>::U;
    std::unique_ptr<U[]> keys;
    std::unique_ptr<uint32_t[]> positions;
    int64_t found = 0;

    void make_room(int64_t capacity) {  // not cleared; and what `append_64` needs beyond
        keys.reset(new U[capacity + 128]);
        positions.reset(new uint32_t[capacity + 128]);
        found = 0;
    }

    // All with a key of at least `least`, but when they are many more than k, of which only those stay that are among the k largest so far.
    ISA void collect(const T* p, int64_t begin, int64_t end, U least, int64_t k) {
        const int64_t capacity = std::min<int64_t>(end - begin, 2 * k + TILE);
        make_room(capacity);
        int64_t i = begin;
        for (; i + 64 <= end && least <= Bits<T>::INFINITE;) {
            const AtLeast<T> test(least);
            for (; i + 64 <= end && found <= capacity; i += 64)
                found += append_64(p + i, test, static_cast<uint32_t>(i), keys.get() + found, positions.get() + found);
            if (found > capacity) least = keep_largest(k);
        }
        for (; i < end && least <= Bits<T>::INFINITE; ++i) {  // fewer than 64
            keys[found] = key_of(p[i]);
            positions[found] = static_cast<uint32_t>(i);
            found += keys[found] >= least;
        }
    }

    void append(const Candidates& other) {
        std::copy(other.keys.get(), other.keys.get() + other.found, keys.get() + found);
        std::copy(other.positions.get(), other.positions.get() + other.found, positions.get() + found);
        found += other.found;
    }

    // Only the k largest stay; returns the key that a later entry needs to be among them, one more than that of the smallest.
    U keep_largest(int64_t k) {
        std::vector<U> copy(keys.get(), keys.get() + found);
        const U smallest = kth_largest(copy.data(), found, k);
        int64_t equal = k;  // how many of those that equal the smallest
        for (int64_t i = 0; i < found; ++i) equal -= keys[i] > smallest;
        int64_t left = 0;
        for (int64_t i = 0; i < found; ++i) {  // without branches, which nobody could foretell
            const bool tie = keys[i] == smallest && equal > 0, larger = keys[i] > smallest;
            keys[left] = keys[i];
            positions[left] = positions[i];
            equal -= tie;
            left += tie | larger;
        }
        found = left;
        return smallest + 1;
    }
};

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

// What the k-th largest key of this step lets expect of the next: that, less a sixteenth of an octave, and more where k is small and it varies more.
// 0, which is none, of the least.
template <class T>
typename Bits<T>::U expected_next(typename Bits<T>::U smallest, int64_t k) {
    using U = typename Bits<T>::U;
    const auto margin = static_cast<U>(static_cast<double>(U{1} << (std::numeric_limits<T>::digits - 1)) * (0.0625 + 0.5 / std::sqrt(static_cast<double>(k))));
    return smallest < Bits<T>::INFINITE && smallest > margin ? smallest - margin : 0;
}

// positions ← those of the counts[s] largest of each segment. hints[s]: the key that they are expected to reach, 0 where nobody knows; that of the next
// step is left there. It only tells where to look first: what is chosen does not depend on it.
template <class T>
int64_t top_k(const void* buffer_, const Segment* table, int64_t n, const int64_t* counts, uint32_t* positions, uint64_t* hints, int threads) {
    const T* buffer = static_cast<const T*>(buffer_);
    threads = useful(threads, elements(table, n));
    const auto offsets = offsets_of(counts, n);
    // One part of a small segment, as many as threads of a large one.
    std::vector<Tile> parts;
    for (int64_t s = 0; s < n; ++s) {
        if (counts[s] == 0 || counts[s] == table[s].numel) continue;
        const int64_t size = table[s].numel < WORTH_THREADS * 4 ? table[s].numel : (table[s].numel + threads - 1) / threads;
        for (int64_t begin = 0; begin < table[s].numel; begin += size) parts.push_back({s, begin, std::min(begin + size, table[s].numel)});
    }
    std::vector<typename Bits<T>::U> least(n, 0);
    parallel_for(n, threads, [&](int64_t s) {
        if (counts[s] == table[s].numel)
            std::iota(positions + offsets[s], positions + offsets[s + 1], 0u);
        else if (counts[s])
            least[s] = hints[s] ? static_cast<typename Bits<T>::U>(hints[s]) : sampled_threshold(buffer + table[s].start, table[s].numel, counts[s]);
    });
    std::vector<Candidates<T>> found(parts.size());
    for (bool again = true; again;) {
        parallel_for(parts.size(), threads, [&](int64_t i) {
            const Tile& part = parts[i];
            if (!found[i].found) found[i].collect(buffer + table[part.segment].start, part.begin, part.end, least[part.segment], counts[part.segment]);
        });
        std::vector<int64_t> totals(n, 0);
        for (size_t i = 0; i < parts.size(); ++i) totals[parts[i].segment] += found[i].found;
        again = false;
        for (size_t i = 0; i < parts.size(); ++i) {
            const int64_t s = parts[i].segment;
            if (totals[s] >= counts[s]) continue;
            if (parts[i].begin == 0) {  // the hint was misleading, or the sample: then take any
                least[s] = hints[s] ? sampled_threshold(buffer + table[s].start, table[s].numel, counts[s]) : 0;
                hints[s] = 0;
            }
            found[i].found = 0;
            again = true;
        }
    }
    std::vector<int64_t> first(n, -1);  // the first part of each segment
    for (int64_t i = static_cast<int64_t>(parts.size()) - 1; i >= 0; --i) first[parts[i].segment] = i;
    parallel_for(n, threads, [&](int64_t s) {
        if (first[s] < 0) return;
        Candidates<T> joined, *all = &found[first[s]];
        int64_t last = first[s], total = 0;
        for (; last < static_cast<int64_t>(parts.size()) && parts[last].segment == s; ++last) total += found[last].found;
        if (last > first[s] + 1) {
            all = &joined;
            joined.make_room(total);
            for (int64_t i = first[s]; i < last; ++i) joined.append(found[i]);
        }
        hints[s] = expected_next<T>(all->keep_largest(counts[s]) - 1, counts[s]);
        std::copy(all->positions.get(), all->positions.get() + counts[s], positions + offsets[s]);
    });
    return DONE;
}
