// PowerSGD's products with matrices M, row-major segments of `rows[s]` rows, and thin ones: P of rows × a, Q of columns × a, both row-major and one
// segment after the other. Sums are in the type of M, in an order that is fixed by the place of an element alone.

struct Matrix {
    int64_t start, rows, columns, p, q;  // where its elements begin, and those of its P and Q
};

inline std::vector<Matrix> matrices_of(const Segment* table, int64_t n, const int64_t* rows, int64_t a) {
    std::vector<Matrix> result;
    int64_t p = 0, q = 0;
    for (int64_t s = 0; s < n; ++s) {
        result.push_back({table[s].start, rows[s], table[s].numel / rows[s], p, q});
        p += rows[s] * a;
        q += result.back().columns * a;
    }
    return result;
}

// `size` rows of each matrix are one piece of work.
inline std::vector<Tile> rows_of(const std::vector<Matrix>& matrices, int64_t size) {
    std::vector<Segment> rows;
    for (const Matrix& m : matrices) rows.push_back({0, m.rows});
    return tiles_of(rows.data(), rows.size(), size);
}

// The columns of each Q as rows: row j of matrix m begins at m.q + j·columns.
template <class T>
std::vector<T> transposed(const std::vector<Matrix>& matrices, const T* q, int64_t a) {
    std::vector<T> result;
    for (const Matrix& m : matrices)
        for (int64_t j = 0; j < a; ++j)
            for (int64_t c = 0; c < m.columns; ++c) result.push_back(q[m.q + c * a + j]);
    return result;
}

// Σ x·y: element i is added to lane i mod 64, and lanes are folded in halves.
template <class T>
INLINE static T product_of(const T* x, const T* y, int64_t n) {
    using L = Lanes<T>;
    constexpr int PARTS = 64 / L::N;
    typename L::V lanes[PARTS] = {};
    int64_t i = 0;
    for (; i + 64 <= n; i += 64)
#pragma GCC unroll 32
        for (int j = 0; j < PARTS; ++j) lanes[j] += L::load(x + i + j * L::N) * L::load(y + i + j * L::N);
    T flat[64];
    std::memcpy(flat, lanes, sizeof flat);
    for (int64_t j = 0; i + j < n; ++j) flat[j] += x[i + j] * y[i + j];
    for (int width = 32; width; width /= 2)
        for (int j = 0; j < width; ++j) flat[j] += flat[j + width];
    return flat[0];
}

// P ← MQ
template <class T>
int64_t low_rank_p(const void* buffer_, const Segment* table, int64_t n, const int64_t* rows, int64_t a, const void* q, void* p_, int threads) {
    const T* buffer = static_cast<const T*>(buffer_);
    T* p = static_cast<T*>(p_);
    const auto matrices = matrices_of(table, n, rows, a);
    const auto columns = transposed(matrices, static_cast<const T*>(q), a);
    const auto tiles = rows_of(matrices, 16);
    parallel_for(tiles.size(), useful(threads, elements(table, n)), [&](int64_t t) ISA {
        const Tile& tile = tiles[t];
        const Matrix& m = matrices[tile.segment];
        for (int64_t r = tile.begin; r < tile.end; ++r)
            for (int64_t j = 0; j < a; ++j) {
                T total = 0;
                for (int64_t c = 0; c < m.columns; c += 4096)
                    total += product_of(buffer + m.start + r * m.columns + c, columns.data() + m.q + j * m.columns + c, std::min<int64_t>(4096, m.columns - c));
                p[m.p + r * a + j] = total;
            }
    });
    return DONE;
}

// y += x·factor
template <class T>
INLINE static void add_scaled(T* y, const T* x, T factor, int64_t n) {
    using L = Lanes<T>;
    int64_t i = 0;
    for (; i + L::N <= n; i += L::N) L::store(y + i, L::load(y + i) + L::load(x + i) * L::all(factor));
    for (; i < n; ++i) y[i] += x[i] * factor;
}

// Q ← MᵀP, by sums over 128 rows
template <class T>
int64_t low_rank_q(const void* buffer_, const Segment* table, int64_t n, const int64_t* rows, int64_t a, const void* p_, void* q_, int threads) {
    constexpr int64_t AT_ONCE = 1024;  // columns, whose sums stay in the first cache
    const T *buffer = static_cast<const T*>(buffer_), *p = static_cast<const T*>(p_);
    T* q = static_cast<T*>(q_);
    const auto matrices = matrices_of(table, n, rows, a);
    const auto tiles = rows_of(matrices, 128);
    threads = useful(threads, elements(table, n));
    std::vector<std::vector<T>> sums(tiles.size());  // of each tile: row j the sums for column j of Q
    parallel_for(tiles.size(), threads, [&](int64_t t) ISA {
        const Tile& tile = tiles[t];
        const Matrix& m = matrices[tile.segment];
        sums[t].assign(a * m.columns, T(0));
        for (int64_t c = 0; c < m.columns; c += AT_ONCE)
            for (int64_t r = tile.begin; r < tile.end; ++r)
                for (int64_t j = 0; j < a; ++j)
                    add_scaled(sums[t].data() + j * m.columns + c, buffer + m.start + r * m.columns + c, p[m.p + r * a + j], std::min(AT_ONCE, m.columns - c));
    });
    const auto first = first_tiles(tiles, n);
    parallel_for(n, threads, [&](int64_t s) ISA {
        const Matrix& m = matrices[s];
        std::vector<T>& total = sums[first[s]];
        for (int64_t t = first[s] + 1; t < first[s] + (m.rows + 127) / 128; ++t) add_scaled(total.data(), sums[t].data(), T(1), a * m.columns);
        for (int64_t c = 0; c < m.columns; ++c)
            for (int64_t j = 0; j < a; ++j) q[m.q + c * a + j] = total[j * m.columns + c];
    });
    return DONE;
}

// out ← PQᵀ, by segment, and M ← M − P·keptᵀ where there is one.
template <class T>
int64_t low_rank_decode(void* buffer_, const Segment* table, int64_t n, const int64_t* rows, int64_t a, const void* p_, const void* q, const void* kept,
                        void* const* out, int threads) {
    T* buffer = static_cast<T*>(buffer_);
    const T* p = static_cast<const T*>(p_);
    const Into<T> into(table, n, 1.0, 0);
    const auto matrices = matrices_of(table, n, rows, a);
    const auto sent = transposed(matrices, static_cast<const T*>(q), a);
    const bool same = kept == q || kept == nullptr;
    const auto own = same ? std::vector<T>() : transposed(matrices, static_cast<const T*>(kept), a);
    const auto tiles = rows_of(matrices, 16);
    parallel_for(tiles.size(), useful(threads, elements(table, n)), [&](int64_t t) ISA {
        using L = Lanes<T>;
        constexpr int64_t CHUNK = 2048;
        alignas(WIDTH) T made[CHUNK];
        const Tile& tile = tiles[t];
        const Matrix& m = matrices[tile.segment];
        T* target = static_cast<T*>(out[tile.segment]);
        const auto row = [&](const T* columns, const T* factors, int64_t count) ISA {
            for (int64_t i = 0; i < count; i += L::N) {
                const bool whole = i + L::N <= count;
                typename L::V sum = {};
                for (int64_t j = 0; j < a; ++j) {
                    const T* x = columns + j * m.columns + i;
                    T rest[L::N] = {};
                    if (!whole) std::copy(x, x + (count - i), rest);
                    const auto term = L::load(whole ? x : rest) * L::all(factors[j]);
                    sum = j ? sum + term : term;
                }
                L::store(made + i, sum);
            }
        };
        for (int64_t r = tile.begin; r < tile.end; ++r)
            for (int64_t c = 0; c < m.columns; c += CHUNK) {
                const int64_t count = std::min(CHUNK, m.columns - c), at = r * m.columns + c;
                const T* factors = p + m.p + r * a;
                row(sent.data() + m.q + c, factors, count);
                into.copy(target + at, made, count);
                if (kept == nullptr) continue;
                if (!same) row(own.data() + m.q + c, factors, count);
                replace_each(buffer + m.start + at, count, [&](auto v, int64_t i) ISA { return v - L::load(made + i); });
            }
    });
    return DONE;
}
