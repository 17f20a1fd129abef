// What all kernels share, whatever instructions they use: the table of segments, tiles, results, the pool of threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <numeric>
#include <type_traits>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the kernels write packed payloads as little-endian words"
#endif

// One segment: its elements are [start, start + numel) of the flat buffer.
struct Segment {
    int64_t start, numel;
};

// Element types, as Python numbers them.
enum Type : int { FLOAT32 = 0, FLOAT64 = 1, FLOAT16 = 2, BFLOAT16 = 3 };

// What kernels return: DONE, -1 - i when the payload of segment i is wrong, or OUT_OF_MEMORY; some return a count instead of DONE.
constexpr int64_t DONE = 0;
constexpr int64_t OUT_OF_MEMORY = std::numeric_limits<int64_t>::min();

// The unit of work of a thread, and of the order of sums. A multiple of 64, so that packed signs of two tiles never share a byte.
constexpr int64_t TILE = 1 << 15;
// Fewer elements than this are not worth waking a thread.
constexpr int64_t WORTH_THREADS = 1 << 16;

struct Tile {
    int64_t segment, begin, end;  // elements [begin, end) of the segment
};

inline std::vector<Tile> tiles_of(const Segment* table, int64_t n, int64_t size = TILE) {
    std::vector<Tile> tiles;
    for (int64_t s = 0; s < n; ++s)
        for (int64_t begin = 0; begin < table[s].numel; begin += size) tiles.push_back({s, begin, std::min(begin + size, table[s].numel)});
    return tiles;
}

// first[s]: the first tile of segment s, of n.
inline std::vector<int64_t> first_tiles(const std::vector<Tile>& tiles, int64_t n) {
    std::vector<int64_t> first(n, 0);
    for (size_t t = 0; t < tiles.size(); ++t)
        if (tiles[t].begin == 0) first[tiles[t].segment] = t;
    return first;
}

inline int64_t elements(const Segment* table, int64_t n) {
    int64_t total = 0;
    for (int64_t s = 0; s < n; ++s) total += table[s].numel;
    return total;
}

// offsets[s]: units of the segments before s, where a segment of d elements takes ceil(d/per_unit); offsets[n] is the total.
inline std::vector<int64_t> offsets_of(const Segment* table, int64_t n, int64_t per_unit) {
    std::vector<int64_t> offsets(n + 1, 0);
    for (int64_t s = 0; s < n; ++s) offsets[s + 1] = offsets[s] + (table[s].numel + per_unit - 1) / per_unit;
    return offsets;
}

inline std::vector<int64_t> offsets_of(const int64_t* counts, int64_t n) {
    std::vector<int64_t> offsets(n + 1, 0);
    std::partial_sum(counts, counts + n, offsets.begin() + 1);
    return offsets;
}

// Calls first(t) for the tiles of a few segments, then between(s) for each of these, then second(t): what the first pass has read is in a cache still.
template <class First, class Between, class Second>
void in_two_passes(const std::vector<Tile>& tiles, int threads, First first, Between between, Second second) {
    constexpr int64_t AT_ONCE = 1 << 19;
    const int64_t n = tiles.size();
    for (int64_t begin = 0, end = 0; begin < n; begin = end) {
        for (int64_t numel = 0; end < n && (numel < AT_ONCE || tiles[end].segment == tiles[end - 1].segment); ++end) numel += tiles[end].end - tiles[end].begin;
        parallel_for(end - begin, threads, [&](int64_t i) { first(begin + i); });
        for (int64_t t = begin; t < end; ++t)
            if (tiles[t].begin == 0) between(tiles[t].segment);
        parallel_for(end - begin, threads, [&](int64_t i) { second(end - 1 - i); });
    }
}

inline int useful(int threads, int64_t elements) { return elements < WORTH_THREADS ? 1 : threads; }

// Calls task(context, i) for every i in [0, n), on up to `threads` threads, in any order. Throws std::bad_alloc when a task did.
void parallel(int64_t n, int threads, void (*task)(void*, int64_t), void* context);

template <class F>
void parallel_for(int64_t n, int threads, F f) {
    parallel(n, threads, [](void* context, int64_t i) { (*static_cast<F*>(context))(i); }, &f);
}

// The magnitude of a number as an integer of the same order; NaN counts as infinity.
template <class T>
struct Bits;
template <>
struct Bits<float> {
    using U = uint32_t;
    using I = int32_t;
    static constexpr U SIGN = 0x80000000u, INFINITE = 0x7f800000u;
};
template <>
struct Bits<double> {
    using U = uint64_t;
    using I = int64_t;
    static constexpr U SIGN = 0x8000000000000000u, INFINITE = 0x7ff0000000000000u;
};

template <class T>
inline typename Bits<T>::U key_of(T value) {
    typename Bits<T>::U bits;
    std::memcpy(&bits, &value, sizeof bits);
    return std::min<typename Bits<T>::U>(bits & ~Bits<T>::SIGN, Bits<T>::INFINITE);
}

// The k-th largest of n > 0 integers, 1 ≤ k ≤ n. Their order is lost, and what is left is a part of them.
template <class U>
inline U kth_largest(U* keys, int64_t n, int64_t k) {
    constexpr int64_t BUCKETS = 2048;
    while (n > 4096) {  // a histogram leaves the few keys of one bucket
        U least = keys[0], most = keys[0];
        for (int64_t i = 0; i < n; ++i) least = std::min(least, keys[i]), most = std::max(most, keys[i]);
        const U range = most - least;
        int shift = 0;
        while ((range >> shift) >= BUCKETS) ++shift;
        int64_t counts[BUCKETS] = {};
        for (int64_t i = 0; i < n; ++i) ++counts[(keys[i] - least) >> shift];
        int64_t bucket = BUCKETS - 1;
        for (; k > counts[bucket]; --bucket) k -= counts[bucket];
        if (shift == 0) return least + static_cast<U>(bucket);
        int64_t left = 0;
        for (int64_t i = 0; i < n; ++i) {
            const U key = keys[i];
            if (static_cast<int64_t>((key - least) >> shift) == bucket) keys[left++] = key;
        }
        n = left;
    }
    std::nth_element(keys, keys + (k - 1), keys + n, std::greater<U>());
    return keys[k - 1];
}

// NumPy's Philox4x64-10 with a key of 64 bits, from the beginning of its stream.
class Philox {
  public:
    explicit Philox(uint64_t key) : key_(key) {}

    uint64_t next() {
        if (at_ == 4) {
            block();
            at_ = 0;
        }
        return words_[at_++];
    }

    // floor(next·n / 2^64) for n < 2^32
    uint64_t below(uint64_t n) {
        const uint64_t word = next(), high = word >> 32, low = word & 0xffffffffu;
        return (high * n + (low * n >> 32)) >> 32;
    }

  private:
    void block() {
        uint64_t c0 = ++counter_, c1 = 0, c2 = 0, c3 = 0, k0 = key_, k1 = 0;
        for (int round = 0; round < 10; ++round) {
            const auto p0 = static_cast<unsigned __int128>(0xD2E7470EE14C6C93u) * c0, p1 = static_cast<unsigned __int128>(0xCA5A826395121157u) * c2;
            c0 = static_cast<uint64_t>(p1 >> 64) ^ c1 ^ k0;
            c2 = static_cast<uint64_t>(p0 >> 64) ^ c3 ^ k1;
            c1 = static_cast<uint64_t>(p1);
            c3 = static_cast<uint64_t>(p0);
            k0 += 0x9E3779B97F4A7C15u;
            k1 += 0xBB67AE8584CAA73Bu;
        }
        words_[0] = c0, words_[1] = c1, words_[2] = c2, words_[3] = c3;
    }

    uint64_t key_, counter_ = 0, words_[4];
    int at_ = 4;
};
