// Natural: each element a power of two, rounded at random. Payload: the exponents of all elements (0: zero, 255: not finite), then each segment's signs.

constexpr int64_t NOT_FINITE = 255;

// Adding random bits to the mantissa carries into the exponent with exactly the right probability, subnormals included.
INLINE static uint8_t rounded_exponent(float v, uint32_t draw) {
    return static_cast<uint8_t>((key_of(v) + (draw & 0x7fffffu)) >> 23);
}
INLINE static uint8_t rounded_exponent(double v, uint64_t draw) {  // of float32's range
    const double magnitude = std::fabs(v);
    const int64_t noise = draw & ((int64_t{1} << 52) - 1);
    int64_t code = static_cast<int64_t>((key_of(v) + noise) >> 52) - (1023 - 127);
    if (magnitude < 0x1p-126) code = static_cast<double>(noise) < magnitude * 0x1p178;
    return static_cast<uint8_t>(magnitude < std::numeric_limits<double>::infinity() ? std::clamp<int64_t>(code, 0, NOT_FINITE) : NOT_FINITE);
}

INLINE static float power_of(uint32_t code, uint32_t negative, bool nan) {
    uint32_t bits = code << 23 | negative << 31;
    if (nan) bits |= ((code + 1) >> 8) << 22;  // a NaN of 255, where the bits alone would be inf
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

template <class T>
int64_t natural_extract(void* buffer_, const Segment* table, int64_t n, uint8_t* payload, const uint64_t* seeds, int threads) {
    T* buffer = static_cast<T*>(buffer_);
    const auto first = offsets_of(table, n, 1), bytes = offsets_of(table, n, 8);
    parallel_for(n, useful(threads, first[n]), [&](int64_t s) ISA {
        constexpr int CHUNK = Draws<T>::CHUNK;
        Draws<T> draws(seeds[s]);
        for (int64_t chunk = 0; chunk < table[s].numel; chunk += CHUNK) {
            const int64_t count = std::min<int64_t>(CHUNK, table[s].numel - chunk);
            T* p = buffer + table[s].start + chunk;
            uint8_t* codes = payload + first[s] + chunk;
            draws.next();
            pack_negative(p, count, payload + first[n] + bytes[s] + chunk / 8);
#pragma GCC ivdep
            for (int64_t i = 0; i < count; ++i) {
                const uint32_t code = rounded_exponent(p[i], draws.raw[i]);
                codes[i] = static_cast<uint8_t>(code);
                p[i] -= code == NOT_FINITE ? T(0) : static_cast<T>(power_of(code, p[i] < 0, false));
            }
        }
    });
    return DONE;
}

template <class T>
int64_t natural_add(void* out_, const Segment* table, int64_t n, const uint8_t* payload, double alpha, int threads) {
    T* out = static_cast<T*>(out_);
    const auto first = offsets_of(table, n, 1), bytes = offsets_of(table, n, 8);
    const auto tiles = tiles_of(table, n);
    parallel_for(tiles.size(), useful(threads, first[n]), [&](int64_t t) ISA {
        using L = Lanes<T>;
        const Tile& tile = tiles[t];
        const int64_t numel = tile.end - tile.begin, available = (numel + 7) / 8;
        const uint8_t *codes = payload + first[tile.segment] + tile.begin, *signs = payload + first[n] + bytes[tile.segment] + tile.begin / 8;
        const auto factor = L::all(static_cast<T>(alpha));
        const auto sign = L::all_bits(static_cast<typename Bits<T>::I>(Bits<T>::SIGN));
        replace_each(out + table[tile.segment].start + tile.begin, numel, [&](auto v, int64_t i) ISA {
            T values[L::N] = {};
            const int count = static_cast<int>(std::min<int64_t>(L::N, numel - i));
            if (count == L::N)
                for (int j = 0; j < L::N; ++j) values[j] = static_cast<T>(power_of(codes[i + j], 0, true));
            else
                for (int j = 0; j < count; ++j) values[j] = static_cast<T>(power_of(codes[i + j], 0, true));
            const auto negative = mask_of<T>(word_at(signs, i / 8, available) >> i % 8) & sign;
            return fused(reinterpret_cast<typename L::V>(reinterpret_cast<typename L::M>(L::load(values)) ^ negative), factor, v);
        });
    });
    return DONE;
}
