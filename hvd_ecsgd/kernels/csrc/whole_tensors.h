// Questions about whole tensors: is all finite, what are the bits.

// The bits of the largest magnitude of p[begin], …, p[end - 1].
template <class U>
INLINE static std::make_signed_t<U> largest_bits(const U* p, int64_t begin, int64_t end) {
    using I = std::make_signed_t<U>;
    I largest = 0;
    for (int64_t i = begin; i < end; ++i) largest = std::max<I>(largest, static_cast<I>(p[i] & static_cast<U>(std::numeric_limits<I>::max())));
    return largest;
}

template <class U, U INFINITE>
INLINE static bool finite_tile(const void* data, int64_t begin, int64_t end) {
    return largest_bits<U>(static_cast<const U*>(data), begin, end) < static_cast<std::make_signed_t<U>>(INFINITE);
}

// 1 when no element is inf or NaN, else 0.
inline int64_t all_finite(int type, const void* data, int64_t n, int threads) {
    std::atomic<bool> finite{true};
    const int64_t tiles = (n + TILE - 1) / TILE;
    parallel_for(tiles, useful(threads, n), [&](int64_t t) ISA {
        if (!finite.load(std::memory_order_relaxed)) return;
        const int64_t begin = t * TILE, end = std::min(begin + TILE, n);
        bool good = false;
        switch (type) {
            case FLOAT64: good = finite_tile<uint64_t, Bits<double>::INFINITE>(data, begin, end); break;
            case FLOAT16: good = finite_tile<uint16_t, 0x7c00>(data, begin, end); break;
            case BFLOAT16: good = finite_tile<uint16_t, 0x7f80>(data, begin, end); break;
            default: good = finite_tile<uint32_t, Bits<float>::INFINITE>(data, begin, end);
        }
        if (!good) finite = false;
    });
    return finite;
}

template <class T>
INLINE static T largest_magnitude(const T* p, int64_t n) {  // NaN when one is
    using U = typename Bits<T>::U;
    using I = typename Bits<T>::I;
    I largest = 0;
    for (int64_t i = 0; i < n; ++i) {
        U bits;
        std::memcpy(&bits, p + i, sizeof bits);
        largest = std::max(largest, static_cast<I>(bits & ~Bits<T>::SIGN));
    }
    T result;
    std::memcpy(&result, &largest, sizeof result);
    return result;
}

// Σ words_i·w_i modulo 2⁶⁴ with odd weights that depend on the place alone. Words of 2, 4 and 8 bytes are signed.
template <class I>
INLINE static uint64_t weighted(const void* data, int64_t begin, int64_t end) {
    const I* p = static_cast<const I*>(data);
    uint64_t total = 0;
    for (int64_t i = begin; i < end; ++i) {
        uint64_t w = static_cast<uint64_t>(i + 1) * static_cast<uint64_t>(-7046029254386353131);
        w ^= static_cast<uint64_t>(static_cast<int64_t>(w) >> 31);
        w = w * static_cast<uint64_t>(-4417276706812531889) | 1;
        total += w * static_cast<uint64_t>(static_cast<int64_t>(p[i]));
    }
    return total;
}

inline int64_t fingerprint(const void* data, int64_t n, int width, int64_t* result, int threads) {
    std::atomic<uint64_t> total{0};
    const int64_t tiles = (n + TILE - 1) / TILE;
    parallel_for(tiles, useful(threads, n), [&](int64_t t) ISA {
        const int64_t begin = t * TILE, end = std::min(begin + TILE, n);
        total += width == 8 ? weighted<int64_t>(data, begin, end) : width == 4 ? weighted<int32_t>(data, begin, end)
               : width == 2 ? weighted<int16_t>(data, begin, end) : weighted<uint8_t>(data, begin, end);
    });
    *result = static_cast<int64_t>(total.load());
    return DONE;
}
