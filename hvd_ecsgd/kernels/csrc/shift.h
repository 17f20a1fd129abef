// Parameters are held at x − factor·t, and what was written is told from what somebody else writes by sums over their bits, made in the same pass.

// As hvd_ecsgd.kernels.reference.column_sums: 64-bit words in rows of 251; the sums of the columns, the words that fill no row, and the rest of a word.
constexpr int64_t COLUMNS = 251;
constexpr int64_t WORDS_AT_ONCE = 8 * COLUMNS;  // of so many rows, which are a multiple of a vector

template <class T>
struct Words {
    static constexpr int64_t PER = 8 / static_cast<int64_t>(sizeof(T)), ROW = COLUMNS * PER;  // elements of a word, and of a row

    // Elements in full rows; 0 where there are fewer than two.
    static int64_t in_rows(int64_t numel) { return numel / ROW < 2 ? 0 : numel / ROW * ROW; }
};

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
    const bool large = total * static_cast<int64_t>(sizeof(T)) > (int64_t{1} << 22);
    constexpr int64_t PER = Words<T>::PER, AT_ONCE = WORDS_AT_ONCE * PER;
    const auto tiles = tiles_of(table, n, 32 * AT_ONCE);
    parallel_for(tiles.size(), useful(threads, total), [&](int64_t i) ISA {
        using L = Lanes<T>;
        typedef uint64_t V __attribute__((vector_size(WIDTH)));
        const Tile& tile = tiles[i];
        const int64_t start = table[tile.segment].start, in_rows = Words<T>::in_rows(table[tile.segment].numel);
        const auto by = L::all(static_cast<T>(factor));
        // Words are added in the order of memory, each to that at its place among eight rows; columns are put together at the end.
        alignas(64) uint64_t of_words[WORDS_AT_ONCE] = {};
        for (int64_t begin = tile.begin; begin < tile.end;) {
            T* p = static_cast<T*>(parameters[tile.segment]) + begin;
            const T *from = x ? x + start + begin : nullptr, *along = x ? t + start + begin : nullptr;
            // `made` gives what is at an element, of `whole` ones, and of as many in each of GROUPS stretches; a word of these is looked up once.
            const auto each = [&](auto groups, int64_t whole, auto made) ISA {
                for (int64_t e = 0; e < whole; e += L::N) {
                    V sum;
                    std::memcpy(&sum, of_words + e / PER, sizeof sum);
#pragma GCC unroll 4
                    for (int64_t g = 0; g < decltype(groups)::value; ++g) sum += reinterpret_cast<V>(made(e + g * AT_ONCE));
                    std::memcpy(of_words + e / PER, &sum, sizeof sum);
                }
            };
            const auto at = [&](int64_t e) ISA { return fused(L::load(along + e), by, L::load(from + e)); };
            const auto look_or_write = [&](auto groups, int64_t whole) ISA {
                if (!x) {
                    each(groups, whole, [&](int64_t e) ISA { return L::load(p + e); });
                } else if (large && reinterpret_cast<uintptr_t>(p) % WIDTH == 0) {
                    each(groups, whole, [&](int64_t e) ISA {
                        const auto v = at(e);
                        stream(p + e, v);
                        return v;
                    });
                } else {
                    each(groups, whole, [&](int64_t e) ISA {
                        const auto v = at(e);
                        L::store(p + e, v);
                        return v;
                    });
                }
            };
            const int64_t full = std::min(tile.end, in_rows) - begin;
            if (!x && full >= 4 * AT_ONCE) {
                look_or_write(std::integral_constant<int, 4>(), AT_ONCE);
                begin += 4 * AT_ONCE;
                continue;
            }
            if (x && full >= 2 * AT_ONCE) {
                look_or_write(std::integral_constant<int, 2>(), AT_ONCE);
                begin += 2 * AT_ONCE;
                continue;
            }
            const int64_t count = std::min(AT_ONCE, tile.end - begin);
            const int64_t words = std::max<int64_t>(0, std::min(count, full) / Words<T>::ROW) * COLUMNS, whole = words * PER / L::N * L::N;
            look_or_write(std::integral_constant<int, 1>(), whole);
            if (x) shifted(from + whole, along + whole, static_cast<T>(factor), p + whole, count - whole);
            for (int64_t w = whole / PER; w < words; ++w) {
                uint64_t word;
                std::memcpy(&word, p + w * PER, sizeof word);
                of_words[w] += word;
            }
            begin += count;
        }
        if (in_rows)
            for (int64_t c = 0; c < COLUMNS; ++c) {
                uint64_t column = 0;
                for (int64_t w = c; w < WORDS_AT_ONCE; w += COLUMNS) column += of_words[w];
                __atomic_fetch_add(sums + places[tile.segment] + c, static_cast<int64_t>(column), __ATOMIC_RELAXED);
            }
#if defined(__x86_64__)
        if (large) _mm_sfence();
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
