// The accumulate rules: a ← carry·a + eta·g + decay·x, and what is to be known of the result, in one pass.

// Converts 64 elements of a gradient or parameter.
template <class T>
INLINE static void load_64(int type, const void* data, int64_t i, int64_t count, T* to) {
    const auto copy = [&](const auto* p) ISA {
        if (count == 64)
            for (int j = 0; j < 64; ++j) to[j] = static_cast<T>(p[i + j]);
        else
            for (int64_t j = 0; j < 64; ++j) to[j] = j < count ? static_cast<T>(p[i + j]) : T(0);
    };
    if (type == FLOAT32) return copy(static_cast<const float*>(data));
    if (type == FLOAT64) return copy(static_cast<const double*>(data));
    uint16_t halves[64] = {};
    float wide[64];
    const uint16_t* p = static_cast<const uint16_t*>(data) + i;
    std::copy(p, p + count, halves);
    widen(halves, wide, type == BFLOAT16);
    for (int j = 0; j < 64; ++j) to[j] = static_cast<T>(wide[j]);
}

// gradients[s], parameters[s]: contiguous elements of segment s, of the types `gradient_type` and `parameter_type`; `parameters` are null without decay.
// statistics (3 of each segment): Σ|a|, Σa², max |a| (NaN when an element is) of the result. Returns 1 when all of it is finite, else 0.
template <class T>
int64_t accumulate(void* buffer_, const Segment* table, int64_t n, const void* const* gradients, int gradient_type, const void* const* parameters,
                   int parameter_type, double carry_, double eta_, double decay_, double* statistics, int threads) {
    T* buffer = static_cast<T*>(buffer_);
    const auto tiles = tiles_of(table, n);
    struct Found {
        double sum, squares, largest;
    };
    std::vector<Found> found(tiles.size());
    parallel_for(tiles.size(), useful(threads, elements(table, n)), [&](int64_t t) ISA {
        using L = Lanes<T>;
        const Tile& tile = tiles[t];
        T* p = buffer + table[tile.segment].start + tile.begin;
        const auto carry = L::all(static_cast<T>(carry_)), eta = L::all(static_cast<T>(eta_)), decay = L::all(static_cast<T>(decay_));
        const bool carries = carry_ != 1, decays = parameters != nullptr;
        Sum<T> sum, squares;
        typename L::M largest = {};
        const int64_t numel = tile.end - tile.begin;
        for (int64_t i = 0; i < numel; i += 64) {
            const int64_t count = std::min<int64_t>(64, numel - i);
            T g[64], x[64], a[64] = {};
            load_64(gradient_type, gradients[tile.segment], tile.begin + i, count, g);
            if (decays) load_64(parameter_type, parameters[tile.segment], tile.begin + i, count, x);
            std::copy(p + i, p + i + count, a);
#pragma GCC unroll 32
            for (int j = 0; j < 64; j += L::N) {
                auto v = L::load(a + j);
                if (carries) v = v * carry;
                v = fused(L::load(g + j), eta, v);
                if (decays) v = fused(L::load(x + j), decay, v);
                L::store(a + j, v);
                const auto bits = L::magnitude_bits(v);
                const auto larger = bits > largest;
                largest = (bits & larger) | (largest & ~larger);
            }
            for (int j = 0; j < 64; j += 32) {
                sum.add_32(a + j, [](auto v) ISA { return absolute(v); });
                squares.add_32(a + j, [](auto v) ISA { return v * v; });
            }
            std::copy(a, a + count, p + i);
        }
        T magnitudes[L::N];
        std::memcpy(magnitudes, &largest, sizeof magnitudes);
        found[t] = {sum.total(), squares.total(), static_cast<double>(largest_magnitude(magnitudes, L::N))};
    });
    std::fill(statistics, statistics + 3 * n, 0.0);
    bool finite = true;
    for (size_t t = 0; t < tiles.size(); ++t) {
        double* of = statistics + 3 * tiles[t].segment;
        of[0] += found[t].sum;
        of[1] += found[t].squares;
        of[2] = found[t].largest > of[2] || found[t].largest != found[t].largest ? found[t].largest : of[2];
        finite &= std::isfinite(found[t].largest);
    }
    return finite;
}
