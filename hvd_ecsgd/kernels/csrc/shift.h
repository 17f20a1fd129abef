// Parameters are held at x − factor·t, and what was written is told from what somebody else writes by sums over their bits, made in the same pass.

// As hvd_ecsgd.kernels.reference.column_sums: 64-bit words in rows of 251; the sums of the columns, the words that fill no row, and the rest of a word.
constexpr int64_t COLUMNS = 251;
constexpr int64_t ROWS_AT_ONCE = 8;  // so many are a multiple of a vector

template <class T>
struct Words {
    static constexpr int64_t PER = 8 / static_cast<int64_t>(sizeof(T)), ROW = COLUMNS * PER;  // elements of a word, and of a row

    // Elements in full rows; 0 where there are fewer than two.
    static int64_t in_rows(int64_t numel) { return numel / ROW < 2 ? 0 : numel / ROW * ROW; }
};

template <class T>
INLINE static void add_rows(const T* p, int64_t rows, int64_t* sums) {
    typedef uint64_t V __attribute__((vector_size(WIDTH)));
    constexpr int64_t AT_ONCE = WIDTH / 8;
    const auto add = [&](auto total, int64_t c) ISA {
        std::memcpy(&total, sums + c, sizeof total);
        for (int64_t r = 0; r < rows; ++r) {
            decltype(total) words;
            std::memcpy(&words, p + r * Words<T>::ROW + c * Words<T>::PER, sizeof words);
            total += words;
        }
        std::memcpy(sums + c, &total, sizeof total);
    };
    int64_t c = 0;
    for (; c + AT_ONCE <= COLUMNS; c += AT_ONCE) add(V{}, c);
    for (; c < COLUMNS; ++c) add(uint64_t{0}, c);
}

template <class T>
INLINE static void copy_past_the_caches(T* p, const T* from, int64_t n) {
    using L = Lanes<T>;
    const int64_t past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(p) % WIDTH / sizeof(T)), head = std::min<int64_t>(n, past ? L::N - past : 0);
    std::copy(from, from + head, p);
    int64_t i = head;
    for (; i + L::N <= n; i += L::N) stream(p + i, L::load(from + i));
    std::copy(from + i, from + n, p + i);
}

// made ← x + factor·t, as torch adds with a factor.
template <class T>
INLINE static void shifted(const T* x, const T* t, T factor, T* made, int64_t n) {
    using L = Lanes<T>;
    const auto by = L::all(factor);
    int64_t i = 0;
    for (; i + L::N <= n; i += L::N) L::store(made + i, fused(L::load(t + i), by, L::load(x + i)));
    for (; i < n; ++i) made[i] = std::fma(t[i], factor, x[i]);
}

// parameters ← x + factor·t, and their sums, which are zeros, at `places`; without x the sums alone. `parameters`: of each segment.
template <class T>
int64_t shift(const void* x_, const Segment* table, int64_t n, const void* t_, double factor, void* const* parameters, int64_t* sums,
              const int64_t* places, int threads) {
    const T *x = static_cast<const T*>(x_), *t = static_cast<const T*>(t_);
    const int64_t total = elements(table, n);
    const bool streams = total * static_cast<int64_t>(sizeof(T)) > (int64_t{1} << 22);
    constexpr int64_t AT_ONCE = ROWS_AT_ONCE * Words<T>::ROW;
    const auto tiles = tiles_of(table, n, 8 * AT_ONCE);
    parallel_for(tiles.size(), useful(threads, total), [&](int64_t i) ISA {
        const Tile& tile = tiles[i];
        const int64_t start = table[tile.segment].start, in_rows = Words<T>::in_rows(table[tile.segment].numel);
        alignas(64) T made[AT_ONCE];
        int64_t of_tile[COLUMNS] = {};
        for (int64_t begin = tile.begin; begin < tile.end; begin += AT_ONCE) {
            const int64_t count = std::min(AT_ONCE, tile.end - begin);
            T* p = static_cast<T*>(parameters[tile.segment]) + begin;
            if (x) {
                shifted(x + start + begin, t + start + begin, static_cast<T>(factor), made, count);
                if (streams)
                    copy_past_the_caches(p, made, count);
                else
                    std::copy(made, made + count, p);
            }
            add_rows(x ? made : p, std::min(count, in_rows - begin) / Words<T>::ROW, of_tile);
        }
        if (in_rows)
            for (int64_t c = 0; c < COLUMNS; ++c) __atomic_fetch_add(sums + places[tile.segment] + c, of_tile[c], __ATOMIC_RELAXED);
#if defined(__x86_64__)
        if (streams) _mm_sfence();
#endif
    });
    for (int64_t s = 0; s < n; ++s) {
        const T* p = static_cast<const T*>(parameters[s]);
        const int64_t numel = table[s].numel;
        int64_t i = Words<T>::in_rows(numel), *at = sums + places[s] + (i ? COLUMNS : 0);
        for (; i + Words<T>::PER <= numel; i += Words<T>::PER) std::memcpy(at++, p + i, 8);
        for (; i < numel; ++i) {
            typename Bits<T>::I bits;
            std::memcpy(&bits, p + i, sizeof bits);
            *at++ = bits;
        }
    }
    return DONE;
}
