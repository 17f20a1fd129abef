// Vectors of WIDTH bytes, in the instructions of this variant. Included once for each variant, in its namespace; so are all headers after this one.

template <class T>
struct Lanes {
    using I = typename Bits<T>::I;
    static constexpr int N = WIDTH / static_cast<int>(sizeof(T));
    typedef T V __attribute__((vector_size(WIDTH)));
    typedef I M __attribute__((vector_size(WIDTH)));  // integers; of a comparison all ones or all zeros

    INLINE static V load(const T* p) {
        V v;
        std::memcpy(&v, p, sizeof v);
        return v;
    }
    INLINE static void store(T* p, V v) { std::memcpy(p, &v, sizeof v); }
    INLINE static V all(T x) { return V{} + x; }
    INLINE static M all_bits(I x) { return M{} + x; }
    INLINE static V select(M m, V a, V b) { return reinterpret_cast<V>((reinterpret_cast<M>(a) & m) | (reinterpret_cast<M>(b) & ~m)); }
#if VARIANT_LEVEL == 2
    INLINE static V select(std::conditional_t<sizeof(T) == 4, __mmask16, __mmask8> m, V a, V b) {
        if constexpr (sizeof(T) == 4)
            return reinterpret_cast<V>(_mm512_mask_blend_ps(m, reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(a)));
        else
            return reinterpret_cast<V>(_mm512_mask_blend_pd(m, reinterpret_cast<__m512d>(b), reinterpret_cast<__m512d>(a)));
    }
#endif
    INLINE static M magnitude_bits(V v) { return reinterpret_cast<M>(v) & all_bits(static_cast<I>(~Bits<T>::SIGN)); }
    INLINE static V magnitude(V v) { return reinterpret_cast<V>(magnitude_bits(v)); }
};

// One bit for each lane, its sign, which is that of a comparison; the first in the lowest bit.
INLINE static uint64_t bits_of(Lanes<float>::M m) {
#if VARIANT_LEVEL == 2
    return _mm512_movepi32_mask(reinterpret_cast<__m512i>(m));
#elif VARIANT_LEVEL == 1
    return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(m)));
#elif defined(__x86_64__)
    return static_cast<uint32_t>(_mm_movemask_ps(reinterpret_cast<__m128>(m)));
#else
    uint64_t bits = 0;
    for (int j = 0; j < Lanes<float>::N; ++j) bits |= static_cast<uint64_t>(m[j] < 0) << j;
    return bits;
#endif
}
INLINE static uint64_t bits_of(Lanes<double>::M m) {
#if VARIANT_LEVEL == 2
    return _mm512_movepi64_mask(reinterpret_cast<__m512i>(m));
#elif VARIANT_LEVEL == 1
    return static_cast<uint32_t>(_mm256_movemask_pd(reinterpret_cast<__m256d>(m)));
#elif defined(__x86_64__)
    return static_cast<uint32_t>(_mm_movemask_pd(reinterpret_cast<__m128d>(m)));
#else
    uint64_t bits = 0;
    for (int j = 0; j < Lanes<double>::N; ++j) bits |= static_cast<uint64_t>(m[j] < 0) << j;
    return bits;
#endif
}

// a < b and a ≠ b, as `bits_of` takes them. (By instructions for AVX-512, where GCC 12 makes vectors of its masks and masks of these again.)
#if VARIANT_LEVEL == 2
INLINE static uint64_t bits_of(__mmask16 m) { return m; }
INLINE static uint64_t bits_of(__mmask8 m) { return m; }
#define COMPARISON(name, operation, predicate)                                                                      \
    INLINE static __mmask16 name(Lanes<float>::V a, Lanes<float>::V b) {                                            \
        return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), predicate);             \
    }                                                                                                               \
    INLINE static __mmask8 name(Lanes<double>::V a, Lanes<double>::V b) {                                           \
        return _mm512_cmp_pd_mask(reinterpret_cast<__m512d>(a), reinterpret_cast<__m512d>(b), predicate);           \
    }
#else
#define COMPARISON(name, operation, predicate)                                                                      \
    INLINE static Lanes<float>::M name(Lanes<float>::V a, Lanes<float>::V b) { return a operation b; }              \
    INLINE static Lanes<double>::M name(Lanes<double>::V a, Lanes<double>::V b) { return a operation b; }
#endif
COMPARISON(below, <, _CMP_LT_OQ)
COMPARISON(unequal, !=, _CMP_NEQ_UQ)
#undef COMPARISON

// Lanes whose bit is set in the lowest N bits of `bits`; with STRIDE 2 in the lowest of each pair of bits.
template <class T, int STRIDE = 1>
INLINE static typename Lanes<T>::M mask_of(uint64_t bits) {
#if VARIANT_LEVEL == 2
    const uint32_t lanes = STRIDE == 1 ? static_cast<uint32_t>(bits) : _pext_u32(static_cast<uint32_t>(bits), 0x55555555u);
    return reinterpret_cast<typename Lanes<T>::M>(sizeof(T) == 4 ? _mm512_movm_epi32(static_cast<__mmask16>(lanes)) : _mm512_movm_epi64(static_cast<__mmask8>(lanes)));
#else
    typename Lanes<T>::M place;
    for (int j = 0; j < Lanes<T>::N; ++j) place[j] = static_cast<typename Lanes<T>::I>(1) << (STRIDE * j);
    return (Lanes<T>::all_bits(static_cast<typename Lanes<T>::I>(bits)) & place) != 0;
#endif
}

// Small whole numbers as bytes. (Not in Lanes: GCC 12 cannot convert vectors whose type depends on a template's parameter twice.)
template <class T>
struct Codes;
template <>
struct Codes<float> {
    typedef int32_t Whole __attribute__((vector_size(WIDTH)));
    typedef uint8_t Code __attribute__((vector_size(WIDTH / 4)));
};
template <>
struct Codes<double> {
    typedef int32_t Whole __attribute__((vector_size(WIDTH / 2)));
    typedef uint8_t Code __attribute__((vector_size(WIDTH / 8)));
};
INLINE static Lanes<float>::V of_whole(Codes<float>::Whole c) { return __builtin_convertvector(c, Lanes<float>::V); }
INLINE static Lanes<double>::V of_whole(Codes<double>::Whole c) { return __builtin_convertvector(c, Lanes<double>::V); }
INLINE static Codes<float>::Whole to_whole(Lanes<float>::V v) { return __builtin_convertvector(v, Codes<float>::Whole); }
INLINE static Codes<double>::Whole to_whole(Lanes<double>::V v) { return __builtin_convertvector(v, Codes<double>::Whole); }
// (By instructions, since GCC 12 converts these byte by byte.)
INLINE static Codes<float>::Whole widened(Codes<float>::Code c) {
#if VARIANT_LEVEL == 2
    return reinterpret_cast<Codes<float>::Whole>(_mm512_cvtepu8_epi32(reinterpret_cast<__m128i>(c)));
#elif VARIANT_LEVEL == 1
    int64_t bits;
    std::memcpy(&bits, &c, sizeof bits);
    return reinterpret_cast<Codes<float>::Whole>(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bits)));
#elif defined(__x86_64__)
    int32_t bits;
    std::memcpy(&bits, &c, sizeof bits);
    const __m128i zero = _mm_setzero_si128(), bytes = _mm_cvtsi32_si128(bits);
    return reinterpret_cast<Codes<float>::Whole>(_mm_unpacklo_epi16(_mm_unpacklo_epi8(bytes, zero), zero));
#else
    return __builtin_convertvector(c, Codes<float>::Whole);
#endif
}
INLINE static Codes<double>::Whole widened(Codes<double>::Code c) {
#if VARIANT_LEVEL == 2
    int64_t bits;
    std::memcpy(&bits, &c, sizeof bits);
    return reinterpret_cast<Codes<double>::Whole>(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bits)));
#elif VARIANT_LEVEL == 1
    int32_t bits;
    std::memcpy(&bits, &c, sizeof bits);
    return reinterpret_cast<Codes<double>::Whole>(_mm_cvtepu8_epi32(_mm_cvtsi32_si128(bits)));
#else
    return __builtin_convertvector(c, Codes<double>::Whole);
#endif
}
INLINE static Lanes<float>::V of_codes(Codes<float>::Code c) { return of_whole(widened(c)); }
INLINE static Lanes<double>::V of_codes(Codes<double>::Code c) { return of_whole(widened(c)); }

// codes ← the first `room` of a vector's whole numbers, or all of them.
INLINE static void store_codes(Codes<float>::Whole code, uint8_t* codes, int64_t room) {
    const auto bytes = __builtin_convertvector(code, Codes<float>::Code);
    std::memcpy(codes, &bytes, std::min<int64_t>(room, Lanes<float>::N));
}
INLINE static void store_codes(Codes<double>::Whole code, uint8_t* codes, int64_t room) {
    const auto bytes = __builtin_convertvector(code, Codes<double>::Code);
    std::memcpy(codes, &bytes, std::min<int64_t>(room, Lanes<double>::N));
}

// The 4 bytes at `at`; beyond the `available` ones there are zeros.
INLINE static uint32_t word_at(const uint8_t* bytes, int64_t at, int64_t available) {
    uint32_t word = 0;
    if (at + 4 <= available)
        std::memcpy(&word, bytes + at, 4);
    else
        for (int64_t i = at; i < available; ++i) word |= static_cast<uint32_t>(bytes[i]) << 8 * (i - at);
    return word;
}

// a·b + c with one rounding, as torch adds with a factor.
INLINE static Lanes<float>::V fused(Lanes<float>::V a, Lanes<float>::V b, Lanes<float>::V c) {
#if VARIANT_LEVEL == 2
    return reinterpret_cast<Lanes<float>::V>(_mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif VARIANT_LEVEL == 1
    return reinterpret_cast<Lanes<float>::V>(_mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#else
    for (int j = 0; j < Lanes<float>::N; ++j) c[j] = std::fma(a[j], b[j], c[j]);
    return c;
#endif
}
INLINE static Lanes<double>::V fused(Lanes<double>::V a, Lanes<double>::V b, Lanes<double>::V c) {
#if VARIANT_LEVEL == 2
    return reinterpret_cast<Lanes<double>::V>(_mm512_fmadd_pd(reinterpret_cast<__m512d>(a), reinterpret_cast<__m512d>(b), reinterpret_cast<__m512d>(c)));
#elif VARIANT_LEVEL == 1
    return reinterpret_cast<Lanes<double>::V>(_mm256_fmadd_pd(reinterpret_cast<__m256d>(a), reinterpret_cast<__m256d>(b), reinterpret_cast<__m256d>(c)));
#else
    for (int j = 0; j < Lanes<double>::N; ++j) c[j] = std::fma(a[j], b[j], c[j]);
    return c;
#endif
}

// Calls f(i, full) for the vectors at i = 0, N, 2N, … of n elements; the last, when shorter, is copied into a vector that ends with zeros.
// f takes a vector and gives what replaces it: p ← f(p).
template <class T, class F>
INLINE static void replace_each(T* p, int64_t n, F f) {
    using L = Lanes<T>;
    int64_t i = 0;
    for (; i + L::N <= n; i += L::N) L::store(p + i, f(L::load(p + i), i));
    if (i < n) {
        T rest[L::N] = {};
        std::copy(p + i, p + n, rest);
        L::store(rest, f(L::load(rest), i));
        std::copy(rest, rest + (n - i), p + i);
    }
}

// p ← v past the caches, where p is a multiple of WIDTH and is not read soon.
template <class T>
INLINE static void stream(T* p, typename Lanes<T>::V v) {
#if VARIANT_LEVEL == 2
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), reinterpret_cast<__m512i>(v));
#elif VARIANT_LEVEL == 1
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(v));
#elif defined(__x86_64__)
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), reinterpret_cast<__m128i>(v));
#else
    Lanes<T>::store(p, v);
#endif
}

// Where decoded values go: `add` them, times alpha, to what is there, or write them over it. Results larger than a cache do not go through it.
template <class T>
struct Into {
    using L = Lanes<T>;
    T alpha;
    bool add, streams;

    Into(const Segment* table, int64_t n, double alpha_, int add_)
        : alpha(static_cast<T>(alpha_)), add(add_), streams(elements(table, n) * static_cast<int64_t>(sizeof(T)) > (int64_t{1} << 22)) {}

    // p ← from, of n elements
    INLINE void copy(T* p, const T* from, int64_t n) const {
        if (!streams) {
            std::memcpy(p, from, n * sizeof(T));
            return;
        }
        const int64_t past = reinterpret_cast<uintptr_t>(p) % WIDTH / sizeof(T), head = std::min<int64_t>(n, past ? L::N - past : 0);
        std::copy(from, from + head, p);
        int64_t i = head;
        for (; i + L::N <= n; i += L::N) stream(p + i, L::load(from + i));
        std::copy(from + i, from + n, p + i);
#if defined(__x86_64__)
        _mm_sfence();
#endif
    }

    // value(i): the vector of the decoded elements from i on, i a multiple of N; behind the last there may be any.
    template <class F>
    INLINE void put(T* p, int64_t n, F value) const {
        const auto factor = L::all(alpha);
        if (add)
            replace_each(p, n, [&](auto v, int64_t i) ISA { return fused(value(i), factor, v); });
        else
            write(p, n, [&](int64_t i) ISA { return fused(value(i), factor, typename L::V{}); });
    }

    // p ← the vectors that made_at(0), made_at(N), … give.
    template <class F>
    INLINE void write(T* p, int64_t n, F made_at) const {
        if (VARIANT_LEVEL > 0 && streams && n >= 4 * L::N) {
            put_past_the_caches(p, n, made_at);
            return;
        }
        constexpr int64_t CHUNK = 2048;
        alignas(WIDTH) T made[CHUNK];
        for (int64_t begin = 0; begin < n; begin += CHUNK) {
            const int64_t count = std::min(CHUNK, n - begin);
            for (int64_t i = 0; i < count; i += L::N) L::store(made + i, made_at(begin + i));
            copy(p + begin, made, count);
        }
    }

    // p ← the vectors that value(0), value(N), … give, in vectors that memory is divided in: of two neighbours each, where p begins elsewhere.
    template <class F>
    INLINE void put_past_the_caches(T* p, int64_t n, F value) const {
        const int64_t past = reinterpret_cast<uintptr_t>(p) % WIDTH / sizeof(T), head = past ? L::N - past : 0;
        auto before = value(0);
        T ends[2 * L::N];
        L::store(ends, before);
        std::copy(ends, ends + head, p);
        int64_t i = L::N;
        if (head == 0) {
            stream(p, before);
            for (; i + L::N <= n; i += L::N) stream(p + i, value(i));
            if (i < n) L::store(ends, value(i));
            std::copy(ends, ends + (n - i), p + i);
        } else {
            typename L::M lanes;
            for (int j = 0; j < L::N; ++j) lanes[j] = static_cast<typename L::I>(head + j);
            for (; i + head <= n; i += L::N) {
                const auto next = value(i);
                stream(p + (i - L::N + head), __builtin_shuffle(before, next, lanes));
                before = next;
            }
            L::store(ends, before);
            if (i < n) L::store(ends + L::N, value(i));
            std::copy(ends + head, ends + (n - i + L::N), p + (i - L::N + head));
        }
#if defined(__x86_64__)
        _mm_sfence();
#endif
    }
};

// The bits of `test` for up to 64 elements.
template <class T, class F>
INLINE static uint64_t test_64(const T* p, F test) {
    using L = Lanes<T>;
    uint64_t bits = 0;
#pragma GCC unroll 32
    for (int j = 0; j < 64; j += L::N) bits |= bits_of(test(L::load(p + j))) << j;
    return bits;
}

// Calls f(i, bits, count) for every 64 elements, and for the rest of fewer, whose missing elements are zeros to `test` and cleared in `bits`.
template <class T, class Test, class F>
INLINE static void each_64(const T* p, int64_t n, Test test, F f) {
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) f(i, test_64(p + i, test), 64);
    if (i < n) {
        T rest[64] = {};
        std::copy(p + i, p + n, rest);
        f(i, test_64(rest, test) & ((uint64_t{1} << (n - i)) - 1), static_cast<int>(n - i));
    }
}

// words ← the bits of `test` for 64 of n elements each, cleared behind the last. Returns how many are set.
template <class T, class Test>
INLINE static int64_t mark(const T* p, int64_t n, Test test, uint64_t* words) {
    int64_t count = 0;
    each_64(p, n, test, [&](int64_t i, uint64_t bits, int) ISA {
        words[i / 64] = bits;
        count += __builtin_popcountll(bits);
    });
    return count;
}

// places ← place + the index of each bit that is set in n words, ascending. Returns how many; there is room for 64 more.
// Mostly few are set, and nobody can foretell where: two places a word are written without asking, which few words have more of.
INLINE static int64_t places_of(const uint64_t* words, int64_t n, uint32_t place, uint32_t* places) {
    int64_t found = 0;
    for (int64_t w = 0; w < n; ++w, place += 64) {
        uint64_t bits = words[w];
        uint32_t* to = places + found;
        const int64_t set = __builtin_popcountll(bits);
        found += set;
#if VARIANT_LEVEL > 0
        to[0] = place + static_cast<uint32_t>(_tzcnt_u64(bits));
        bits &= bits - 1;
        to[1] = place + static_cast<uint32_t>(_tzcnt_u64(bits));
        bits &= bits - 1;
        if (__builtin_expect(set <= 2, 1)) continue;
#endif
#if VARIANT_LEVEL == 2
        if (set > 8) {
            bits = words[w];
#pragma GCC unroll 4
            for (int j = 0; j < 64; j += 16) {
                const auto of = static_cast<__mmask16>(bits >> j);
                const __m512i at = _mm512_add_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(place + j));
                _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(of, at));
                to += __builtin_popcount(of);
            }
            continue;
        }
#endif
#if VARIANT_LEVEL > 0
        to += 2;
#endif
        for (; bits; bits &= bits - 1) *to++ = place + static_cast<uint32_t>(__builtin_ctzll(bits));
    }
    return found;
}

// How many of n elements are not zero; a NaN is not.
template <class T>
INLINE static int64_t count_nonzero(const T* p, int64_t n) {
    int64_t count = 0;
    each_64(p, n, [](auto v) ISA { return unequal(v, Lanes<T>::all(0)); }, [&](int64_t, uint64_t bits, int) ISA { count += __builtin_popcountll(bits); });
    return count;
}

// The WIDTH/8 numbers from p on. (By instructions, since GCC 12 widens a vector in halves.)
typedef double Doubles __attribute__((vector_size(WIDTH)));
INLINE static Doubles doubles_at(const double* p) { return Lanes<double>::load(p); }
INLINE static Doubles doubles_at(const float* p) {
#if VARIANT_LEVEL == 2
    return reinterpret_cast<Doubles>(_mm512_cvtps_pd(_mm256_loadu_ps(p)));
#elif VARIANT_LEVEL == 1
    return reinterpret_cast<Doubles>(_mm256_cvtps_pd(_mm_loadu_ps(p)));
#elif defined(__x86_64__)
    return reinterpret_cast<Doubles>(_mm_cvtps_pd(_mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))));
#else
    return Doubles{p[0], p[1]};
#endif
}

// Sums in double in one order, whatever the variant: element i of a tile is added to lane i mod 32, and lanes are folded in halves.
template <class T>
struct Sum {
    static constexpr int PER = WIDTH / 8, PARTS = 32 / PER;
    Doubles lanes[PARTS];

    INLINE Sum() {
        for (auto& lane : lanes) lane = Doubles{};
    }
    // 32 elements: each lane ← f(element, lane)
    template <class F>
    INLINE void add_32(const T* p, F f) {
#pragma GCC unroll 16
        for (int j = 0; j < PARTS; ++j) lanes[j] = f(doubles_at(p + PER * j), lanes[j]);
    }
    template <class F>
    INLINE void add(const T* p, int64_t n, F f) {
        int64_t i = 0;
        for (; i + 32 <= n; i += 32) add_32(p + i, f);
        if (i < n) {
            T rest[32] = {};
            std::copy(p + i, p + n, rest);
            add_32(rest, f);
        }
    }
    // |p| or, `squares`, p²
    INLINE void add_norm(const T* p, int64_t n, bool squares);
    INLINE double total() const {
        double flat[32];
        std::memcpy(flat, lanes, sizeof flat);
        for (int width = 16; width; width /= 2)
            for (int j = 0; j < width; ++j) flat[j] += flat[j + width];
        return flat[0];
    }
};

template <class T>
INLINE void Sum<T>::add_norm(const T* p, int64_t n, bool squares) {
    if (squares)
        // In double the square of a float is exact, so there is one rounding either way.
        add(p, n, [](auto v, auto sum) ISA { return sizeof(T) == 4 && VARIANT_LEVEL > 0 ? fused(v, v, sum) : sum + v * v; });
    else
        add(p, n, [](auto v, auto sum) ISA {
#if VARIANT_LEVEL == 2  // v·±1, by (v & sign) | 1: processors that convert and add in the same places multiply in others
            const __m512i sign = _mm512_set1_epi64(std::numeric_limits<int64_t>::min()), one = reinterpret_cast<__m512i>(Lanes<double>::all(1));
            return fused(v, reinterpret_cast<Doubles>(_mm512_ternarylogic_epi64(reinterpret_cast<__m512i>(v), sign, one, 0xEA)), sum);
#else
            return sum + Lanes<double>::magnitude(v);
#endif
        });
}

// Σ|p| or, `squares`, Σp² of up to a tile.
template <class T>
INLINE static double sum_of(const T* p, int64_t n, bool squares) {
    Sum<T> sum;
    sum.add_norm(p, n, squares);
    return sum.total();
}

// The same of any length: tile after tile.
template <class T>
INLINE static double long_sum_of(const T* p, int64_t n, bool squares) {
    double total = 0;
    for (int64_t i = 0; i < n; i += TILE) total += sum_of(p + i, std::min(TILE, n - i), squares);
    return total;
}

// The ℓ1 or ℓ2 norm in the buffer's type, which overflows as a sum in that type does.
template <class T>
INLINE static T norm_of(double sum, bool l2) {
    return static_cast<T>(l2 ? std::sqrt(sum) : sum);
}
