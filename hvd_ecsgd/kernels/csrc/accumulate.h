// A step's way into a rule's state: e ← carry·e + what the gradients add, in one pass that reads each gradient once, and looks for inf and NaN in it.
//
// Chunk by chunk: a chunk of the gradient is looked at before anything of that chunk is written, and is in the cache when it is read again. The pass
// stops at the first chunk with a magnitude of 2¹⁶ or more, an inf or a NaN: then all that is left is looked at before the pass goes on. So what was
// written when an inf or NaN is found came of moderate numbers, and is taken back to rounding; nothing is lost beside a large finite number.

constexpr int64_t CHUNK = 512;

struct Factors {  // as hvd_ecsgd.kernels.accumulate writes them
    double carry;     // of the old e; 0: it is not read
    double gradient;  // of g in e
    double decay;     // of the parameters: in e, or with momentum in m
    double mu;        // of the old m
    double momentum;  // of the new m in e, and in the displacement
};

// Whether a magnitude of [begin, end) is `limit`, as bits, or more.
template <class U>
INLINE static bool reaches(const void* data, int64_t begin, int64_t end, U limit) {
    return largest_bits<U>(static_cast<const U*>(data), begin, end) >= static_cast<std::make_signed_t<U>>(limit);
}

// Whether an element is inf or NaN; `doubtful`: or of 2¹⁶ or more.
INLINE static bool suspect(int type, const void* data, int64_t begin, int64_t end, bool doubtful) {
    switch (type) {
        case FLOAT64: return reaches<uint64_t>(data, begin, end, doubtful ? 0x40f0000000000000u : Bits<double>::INFINITE);
        case FLOAT16: return reaches<uint16_t>(data, begin, end, 0x7c00);
        case BFLOAT16: return reaches<uint16_t>(data, begin, end, doubtful ? 0x4780 : 0x7f80);
        default: return reaches<uint32_t>(data, begin, end, doubtful ? 0x47800000u : Bits<float>::INFINITE);
    }
}

// Up to a chunk of numbers in the buffer's type: where they are, or widened into `scratch`.
INLINE static const double* in_type(int, const void* data, int64_t begin, int64_t, double*) { return static_cast<const double*>(data) + begin; }
INLINE static const float* in_type(int type, const void* data, int64_t begin, int64_t n, float* scratch) {
    if (type == FLOAT32) return static_cast<const float*>(data) + begin;
    const uint16_t* halves = static_cast<const uint16_t*>(data) + begin;
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) widen(halves + i, scratch + i, type == BFLOAT16);
    if (i < n) {
        uint16_t rest[64] = {};
        std::copy(halves + i, halves + n, rest);
        widen(rest, scratch + i, type == BFLOAT16);
    }
    return scratch;
}

template <class T>
struct Accumulation {
    T *e, *m, *d;  // flat buffers; m and d may be null
    int type;      // of gradients
    const void* const* gradients;
    int point_type;  // of parameters
    const void* const* points;  // null where the parameters are not read
    Factors by;
    bool cached;  // e is small enough to be in a cache, beside the gradients

    // `f` on up to a chunk of segment s: f(place in the buffers, g, x, n).
    template <class F>
    INLINE void on_chunk(const Segment* table, int64_t s, int64_t begin, int64_t end, F f) const {
        alignas(64) T of_gradient[CHUNK], of_point[CHUNK];
        const T* g = in_type(type, gradients[s], begin, end - begin, of_gradient);
        const T* x = points ? in_type(point_type, points[s], begin, end - begin, of_point) : nullptr;
        f(table[s].start + begin, g, x, end - begin);
    }

    INLINE void add(int64_t at, const T* g, const T* x, int64_t n) const {
        using L = Lanes<T>;
        int64_t i = 0;
        // Most rules. What waits for memory is 3 to 6 per cent faster when it does not come in such bursts, so only what a cache may hold goes this way.
        if (cached && !m && !x && by.carry == 1 && by.gradient == 1)
            for (T* to = e + at; i + L::N <= n; i += L::N) L::store(to + i, L::load(to + i) + L::load(g + i));
        for (; i + L::N <= n; i += L::N) add_vector(e + at + i, m ? m + at + i : nullptr, d ? d + at + i : nullptr, g + i, x ? x + i : nullptr);
        if (i == n) return;
        T parts[5][L::N] = {};
        T* places[] = {e + at + i, m ? m + at + i : nullptr, d ? d + at + i : nullptr};
        for (int k = 0; k < 3; ++k)
            if (places[k] && !(k == 0 && by.carry == 0)) std::copy(places[k], places[k] + (n - i), parts[k]);
        std::copy(g + i, g + n, parts[3]);
        if (x) std::copy(x + i, x + n, parts[4]);
        add_vector(parts[0], m ? parts[1] : nullptr, d ? parts[2] : nullptr, parts[3], x ? parts[4] : nullptr);
        for (int k = 0; k < 3; ++k)
            if (places[k]) std::copy(parts[k], parts[k] + (n - i), places[k]);
    }

    // The roundings are those of torch: one for each multiplication of a buffer, and one for each sum, the factor included.
    INLINE void add_vector(T* e_, T* m_, T* d_, const T* g_, const T* x_) const {
        using L = Lanes<T>;
        const auto g = L::load(g_), old = by.carry == 0 ? L::all(0) : L::load(e_) * L::all(static_cast<T>(by.carry));
        auto x = L::all(0), sum = old;
        if (x_) x = L::load(x_);
        const auto more = [](auto v, double factor, auto to) ISA { return factor == 1 ? to + v : fused(v, L::all(static_cast<T>(factor)), to); };
        if (m_) {
            auto momentum = L::load(m_) * L::all(static_cast<T>(by.mu)) + g;
            if (x_) momentum = more(x, by.decay, momentum);
            L::store(m_, momentum);
            if (d_) L::store(d_, more(momentum, by.momentum, L::load(d_)));
            sum = by.carry == 0 ? momentum * L::all(static_cast<T>(by.momentum)) : more(momentum, by.momentum, old);
            if (by.gradient != 0) sum = more(g, by.gradient, sum);
            if (by.gradient != 0 && x_) sum = more(x, by.decay, sum);
        } else {
            sum = by.carry == 0 ? g * L::all(static_cast<T>(by.gradient)) : more(g, by.gradient, old);
            if (x_) sum = more(x, by.decay, sum);
        }
        L::store(e_, sum);
    }

    // Reverses `add`, to rounding. With μ = 0 nothing of the old m is left; with carry = 0 nothing of the old e.
    INLINE void take(int64_t at, const T* g, const T* x, int64_t n) const {
        for (int64_t i = 0; i < n; ++i) {
            const double decayed = x ? by.decay * static_cast<double>(x[i]) : 0.0, velocity = m ? by.momentum * static_cast<double>(m[at + i]) : 0.0;
            if (d) d[at + i] = static_cast<T>(d[at + i] - velocity);
            const double added = velocity + (by.gradient != 0 || !m ? by.gradient * static_cast<double>(g[i]) + decayed : 0.0);
            if (by.carry != 0) e[at + i] = static_cast<T>((e[at + i] - added) / by.carry);
            if (m) m[at + i] = by.mu == 0 ? T(0) : static_cast<T>((m[at + i] - decayed - g[i]) / by.mu);
        }
    }
};

// The segments' tiles; where `ranges` of the buffer are given, which segments hold, tiles end with them, and row[t] is the range of tile t.
inline std::vector<Tile> tiles_of(const Segment* table, int64_t n, const Segment* ranges, int64_t n_ranges, std::vector<int64_t>& row) {
    if (n_ranges == 0) return tiles_of(table, n);
    std::vector<int64_t> order(n);  // segments by where they begin
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return table[a].start < table[b].start; });
    std::vector<Tile> tiles;
    for (const Tile& tile : tiles_of(ranges, n_ranges)) {
        const int64_t start = ranges[tile.segment].start;
        const auto after = std::upper_bound(order.begin(), order.end(), start, [&](int64_t at, int64_t s) { return at < table[s].start; });
        const int64_t s = *std::find_if(std::make_reverse_iterator(after), order.rend(), [&](int64_t i) { return table[i].numel > 0; });
        const int64_t shift = start - table[s].start;
        tiles.push_back({s, tile.begin + shift, tile.end + shift});
        row.push_back(tile.segment);
    }
    return tiles;
}

// 1, or 0 when a gradient holds an inf or NaN: then nothing is accumulated. Something is asked of e by `ranges`, which cover the segments then.
template <class T>
int64_t accumulate(void* e, const Segment* table, int64_t n, void* m, void* d, int type, const void* const* gradients, int point_type,
                   const void* const* points, const double* f, const Segment* ranges, int64_t n_ranges, const Asked& asked, int threads) {
    const Accumulation<T> all{static_cast<T*>(e), static_cast<T*>(m), static_cast<T*>(d), type, gradients, point_type, points, {f[0], f[1], f[2], f[3], f[4]},
                              elements(table, n) * static_cast<int64_t>(sizeof(T)) <= (int64_t{1} << 24)};
    std::vector<int64_t> row;
    const auto tiles = tiles_of(table, n, ranges, n_ranges, row);
    threads = useful(threads, elements(table, n));
    Seen<T> seen(asked, tiles.size());
    const auto look_at = [&](Sum<T>& sum, int64_t t, int64_t begin, int64_t end) ISA {
        seen.look_at(sum, t, all.e + table[tiles[t].segment].start + begin, end - begin);
    };
    std::vector<int64_t> done(tiles.size());  // elements of the segment, up to here
    for (size_t t = 0; t < tiles.size(); ++t) done[t] = tiles[t].begin;
    std::atomic<bool> stop{false};
    const auto add = [&](bool doubtful) ISA {
        parallel_for(tiles.size(), threads, [&](int64_t t) ISA {
            const int64_t s = tiles[t].segment;
            const bool looks = doubtful && seen;
            Sum<T> sum;
            while (done[t] < tiles[t].end && !(doubtful && stop.load(std::memory_order_relaxed))) {
                const int64_t end = std::min(done[t] + CHUNK, tiles[t].end);
                if (doubtful && suspect(type, gradients[s], done[t], end, true)) {
                    stop = true;
                    return;
                }
                all.on_chunk(table, s, done[t], end, [&](int64_t at, const T* g, const T* x, int64_t count) ISA { all.add(at, g, x, count); });
                if (looks) look_at(sum, t, done[t], end);
                done[t] = end;
            }
            if (looks) seen.sums[t] = sum.total();
        });
    };
    const auto fold = [&] { seen.fold(n_ranges, [&](int64_t t) { return row[t]; }); };
    add(true);
    if (!stop) {
        fold();
        return 1;
    }
    std::atomic<bool> finite{true};
    parallel_for(tiles.size(), threads, [&](int64_t t) ISA {
        if (finite.load(std::memory_order_relaxed) && suspect(type, gradients[tiles[t].segment], done[t], tiles[t].end, false)) finite = false;
    });
    if (finite) {
        add(false);
        if (seen)  // what was seen before the pass stopped may end within a tile
            parallel_for(tiles.size(), threads, [&](int64_t t) ISA {
                Sum<T> sum;
                seen.nonzero[t] = 0;
                look_at(sum, t, tiles[t].begin, tiles[t].end);
                seen.sums[t] = sum.total();
            });
        fold();
        return 1;
    }
    parallel_for(tiles.size(), threads, [&](int64_t t) ISA {
        for (int64_t begin = tiles[t].begin; begin < done[t]; begin += CHUNK)
            all.on_chunk(table, tiles[t].segment, begin, std::min(begin + CHUNK, done[t]),
                         [&](int64_t at, const T* g, const T* x, int64_t count) ISA { all.take(at, g, x, count); });
    });
    return 0;
}
