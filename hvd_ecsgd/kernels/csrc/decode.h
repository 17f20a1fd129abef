// Payloads with a code for each element into one result, chunk by chunk: of several payloads it is written once, and what is then there is looked at while
// it is in the cache.

// What is asked of a buffer that a kernel writes: of each row Σ|v| or, `squares`, Σv², as kernels add that make a pass for it, and with `counts` how many
// elements are not zero. `sums` null: nothing.
struct Asked {
    int squares, counts;
    double* sums;
    int64_t* nonzero;
};

// The answer, of tiles that do not go beyond a row.
template <class T>
struct Seen {
    Asked asked;
    std::vector<double> sums;  // by tile
    std::vector<int64_t> nonzero;

    Seen(const Asked& asked_, size_t tiles) : asked(asked_), sums(asked_.sums ? tiles : 0), nonzero(sums.size()) {}

    explicit operator bool() const { return asked.sums != nullptr; }

    // The next n elements of tile t.
    INLINE void look_at(Sum<T>& sum, int64_t t, const T* p, int64_t n) {
        sum.add_norm(p, n, asked.squares);
        if (asked.counts) nonzero[t] += count_nonzero(p, n);
    }

    // row(t): that of tile t, of n_rows.
    template <class Row>
    void fold(int64_t n_rows, Row row) const {
        if (!asked.sums) return;
        std::fill(asked.sums, asked.sums + n_rows, 0.0);
        std::fill(asked.nonzero, asked.nonzero + n_rows, int64_t{0});
        for (size_t t = 0; t < sums.size(); ++t) asked.sums[row(t)] += sums[t], asked.nonzero[row(t)] += nonzero[t];
    }
};

// Payloads of one table, and what becomes of them: out ← alpha·Σ of what they decode to, in their order; or, `add`, out += that, the sum made first, where
// one alone is added with a single rounding.
struct Payloads {
    const uint8_t* const* of;
    int64_t n;
    double alpha;
    int add;
};

constexpr int64_t DECODED_AT_ONCE = 2048;  // it stays in the first cache

// Room for what a payload says of a chunk, and for a vector behind it.
template <class T>
using Decoded = T[DECODED_AT_ONCE + 64];

// Calls f(row, from, to) for the parts of [begin, end) that are in one row of `width` elements each.
template <class F>
INLINE static void each_row(int64_t begin, int64_t end, int64_t width, F f) {
    while (begin < end) {
        const int64_t row = begin / width, stop = std::min(end, (row + 1) * width);
        f(row, begin, stop);
        begin = stop;
    }
}

// decoder(payload, s, begin, count, scratch) gives what `Into::put` takes, of elements [begin, begin + count) of segment s; a chunk begins at a multiple of 64.
template <class T, class D>
INLINE static int64_t decode_all(void* out_, const Segment* table, int64_t n, const Payloads& payloads, const Asked& asked, int threads, D decoder) {
    T* out = static_cast<T*>(out_);
    const Into<T> into(table, n, payloads.alpha, payloads.add);
    const auto tiles = tiles_of(table, n);
    Seen<T> seen(asked, tiles.size());
    const bool at_once = payloads.n == 1 && (payloads.add || !seen);
    parallel_for(tiles.size(), useful(threads, elements(table, n)), [&](int64_t t) ISA {
        using L = Lanes<T>;
        const Tile& tile = tiles[t];
        const auto factor = L::all(into.alpha);
        alignas(WIDTH) Decoded<T> scratch, made;
        Sum<T> sum;
        for (int64_t begin = tile.begin; begin < tile.end; begin += DECODED_AT_ONCE) {
            const int64_t count = std::min(DECODED_AT_ONCE, tile.end - begin);
            T *p = out + table[tile.segment].start + begin, *result = p;
            if (at_once) {
                into.put(p, count, decoder(payloads.of[0], tile.segment, begin, count, scratch));
            } else {
                const int64_t last = payloads.n - 1;
                if (last == 0) std::fill(made, made + count + L::N, T(0));
                for (int64_t r = 0; r < last; ++r) {
                    const auto value = decoder(payloads.of[r], tile.segment, begin, count, scratch);
                    if (r == 0)
                        for (int64_t i = 0; i < count; i += L::N) L::store(made + i, fused(value(i), factor, typename L::V{}));
                    else
                        for (int64_t i = 0; i < count; i += L::N) L::store(made + i, fused(value(i), factor, L::load(made + i)));
                }
                const auto value = decoder(payloads.of[last], tile.segment, begin, count, scratch);
                const auto total = [&](int64_t i) ISA { return fused(value(i), factor, L::load(made + i)); };
                if (payloads.add) {
                    replace_each(p, count, [&](auto v, int64_t i) ISA { return v + total(i); });
                } else if (!seen) {
                    into.write(p, count, total);
                } else {
                    for (int64_t i = 0; i < count; i += L::N) L::store(made + i, total(i));
                    into.copy(p, made, count);
                    result = made;
                }
            }
            if (seen) seen.look_at(sum, t, result, count);
        }
        if (seen) seen.sums[t] = sum.total();
    });
    seen.fold(n, [&](int64_t t) { return tiles[t].segment; });
    return DONE;
}
