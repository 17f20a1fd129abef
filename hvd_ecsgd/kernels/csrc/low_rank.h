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

// The columns of each Q as rows: row j of matrix m begins at m.q + j·columns. A vector that begins in one may end behind it.
template <class T>
std::vector<T> transposed(const std::vector<Matrix>& matrices, const T* q, int64_t a) {
    std::vector<T> result;
    for (const Matrix& m : matrices)
        for (int64_t j = 0; j < a; ++j)
            for (int64_t c = 0; c < m.columns; ++c) result.push_back(q[m.q + c * a + j]);
    result.resize(result.size() + Lanes<T>::N);
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
#pragma GCC unroll 32
    for (int j = 0; j < PARTS; ++j)
        if (i + (j + 1) * L::N <= n) lanes[j] += L::load(x + i + j * L::N) * L::load(y + i + j * L::N);
    T flat[64];
    std::memcpy(flat, lanes, sizeof flat);
    for (int64_t j = (n - i) / L::N * L::N; i + j < n; ++j) flat[j] += x[i + j] * y[i + j];
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

// y += Σ x_r·factor_r, one row r after the other: ROWS of them, each `width` behind that before, whose factors are `step` apart.
template <int ROWS, class T>
INLINE static void add_scaled(T* y, const T* x, int64_t width, const T* factors, int64_t step, int64_t n) {
    using L = Lanes<T>;
    typename L::V factor[ROWS];
    for (int r = 0; r < ROWS; ++r) factor[r] = L::all(factors[r * step]);
    int64_t i = 0;
    for (; i + L::N <= n; i += L::N) {
        auto sum = L::load(y + i);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) sum += L::load(x + r * width + i) * factor[r];
        L::store(y + i, sum);
    }
    for (; i < n; ++i)
        for (int r = 0; r < ROWS; ++r) y[i] += x[r * width + i] * factors[r * step];
}

// Q ← MᵀP, by sums over 128 rows
template <class T>
int64_t low_rank_q(const void* buffer_, const Segment* table, int64_t n, const int64_t* rows, int64_t a, const void* p_, void* q_, int threads) {
    constexpr int ROWS = 4;
    const int64_t at_once = std::max<int64_t>(1024, 4096 / a);  // columns, whose sums stay in the first cache
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
        for (int64_t c = 0; c < m.columns; c += at_once) {
            const int64_t count = std::min(at_once, m.columns - c);
            const auto add = [&](auto rows_at_once, int64_t r) ISA {
                for (int64_t j = 0; j < a; ++j)
                    add_scaled<rows_at_once>(sums[t].data() + j * m.columns + c, buffer + m.start + r * m.columns + c, m.columns, p + m.p + r * a + j, a, count);
            };
            int64_t r = tile.begin;
            for (; r + ROWS <= tile.end; r += ROWS) add(std::integral_constant<int, ROWS>(), r);
            for (; r < tile.end; ++r) add(std::integral_constant<int, 1>(), r);
        }
    });
    const auto first = first_tiles(tiles, n);
    const T one = 1;
    parallel_for(n, threads, [&](int64_t s) ISA {
        const Matrix& m = matrices[s];
        std::vector<T>& total = sums[first[s]];
        for (int64_t t = first[s] + 1; t < first[s] + (m.rows + 127) / 128; ++t) add_scaled<1>(total.data(), sums[t].data(), 0, &one, 0, a * m.columns);
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
        const Tile& tile = tiles[t];
        const Matrix& m = matrices[tile.segment];
        for (int64_t r = tile.begin; r < tile.end; ++r) {
            const int64_t columns = m.columns;
            const T* factors = p + m.p + r * a;
            const auto first = L::all(factors[0]);
            const auto product = [=](const T* x) ISA {
                auto sum = L::load(x) * first;
                for (int64_t j = 1; j < a; ++j) sum += L::load(x + j * columns) * L::all(factors[j]);
                return sum;
            };
            T* left = kept == nullptr ? nullptr : buffer + m.start + r * columns;
            const T *of_result = sent.data() + m.q, *of_left = same ? nullptr : own.data() + m.q;
            into.write(static_cast<T*>(out[tile.segment]) + r * columns, columns, [=](int64_t i) ISA {
                const auto made = product(of_result + i);
                if (left != nullptr) {
                    const auto taken = of_left == nullptr ? made : product(of_left + i);
                    if (i + L::N <= columns)
                        L::store(left + i, L::load(left + i) - taken);
                    else
                        for (int64_t j = 0; i + j < columns; ++j) left[i + j] -= taken[j];
                }
                return made;
            });
        }
    });
    return DONE;
}
