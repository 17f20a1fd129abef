// Natural: each element a power of two, rounded at random. Payload: the exponents of all elements (0: zero, 255: not finite), then each segment's signs.

constexpr int64_t NOT_FINITE = 255;

// Adding random bits to the mantissa carries into the exponent with exactly the right probability, subnormals included; a double is rounded in
// float32's range.
INLINE static uint8_t rounded_exponent(double v, uint64_t draw) {
    const double magnitude = std::fabs(v);
    const int64_t noise = draw & ((int64_t{1} << 52) - 1);
    int64_t code = static_cast<int64_t>((key_of(v) + noise) >> 52) - (1023 - 127);
    if (magnitude < 0x1p-126) code = static_cast<double>(noise) < magnitude * 0x1p178;
    return static_cast<uint8_t>(magnitude < std::numeric_limits<double>::infinity() ? std::clamp<int64_t>(code, 0, NOT_FINITE) : NOT_FINITE);
}

// The powers of codes; a NaN of 255, where the bits alone would be inf.
INLINE static Lanes<float>::V powers_of(Codes<float>::Code code) {
    const auto whole = widened(code);
    return reinterpret_cast<Lanes<float>::V>(whole << 23 | ((whole + 1) >> 8) << 22);
}
INLINE static Lanes<double>::V powers_of(Codes<double>::Code code) {
    typedef float Half __attribute__((vector_size(WIDTH / 2)));
    const auto whole = widened(code);
    return __builtin_convertvector(reinterpret_cast<Half>(whole << 23 | ((whole + 1) >> 8) << 22), Lanes<double>::V);
}

// codes ← exponents of p, whose rest stays. Draws are there for a vector behind the last.
INLINE static void round_to_powers(float* p, int64_t n, const uint32_t* draws, uint8_t* codes) {
    using L = Lanes<float>;
    replace_each(p, n, [&](auto v, int64_t i) ISA {
        const auto infinite = L::all_bits(Bits<float>::INFINITE), sign = L::all_bits(static_cast<int32_t>(Bits<float>::SIGN));
        L::M magnitude = L::magnitude_bits(v), draw;
        magnitude = (magnitude > infinite) ? infinite : magnitude;
        std::memcpy(&draw, draws + i, sizeof draw);
        const L::M code = (magnitude + (draw & 0x7fffff)) >> 23;
        store_codes(code, codes + i, n - i);
        const L::M sent = (code << 23 | ((v < 0) & sign)) & (code != static_cast<int32_t>(NOT_FINITE));
        return v - reinterpret_cast<L::V>(sent);
    });
}
INLINE static void round_to_powers(double* p, int64_t n, const uint64_t* draws, uint8_t* codes) {
    for (int64_t i = 0; i < n; ++i) {
        const uint8_t code = codes[i] = rounded_exponent(p[i], draws[i]);
        const float power = std::ldexp(1.0f, code - 127);
        p[i] -= code == 0 || code == NOT_FINITE ? 0.0 : static_cast<double>(p[i] < 0 ? -power : power);
    }
}

template <class T>
int64_t natural_extract(void* buffer_, const Segment* table, int64_t n, uint8_t* payload, const uint64_t* keys, int threads) {
    T* buffer = static_cast<T*>(buffer_);
    const auto first = offsets_of(table, n, 1), bytes = offsets_of(table, n, 8);
    const auto tiles = tiles_of(table, n);
    parallel_for(tiles.size(), useful(threads, first[n]), [&](int64_t t) ISA {
        constexpr int CHUNK = Draws<T>::CHUNK;
        const Tile& tile = tiles[t];
        Draws<T> draws(keys[tile.segment]);
        uint8_t *codes = payload + first[tile.segment], *signs = payload + first[n] + bytes[tile.segment];
        for (int64_t chunk = tile.begin; chunk < tile.end; chunk += CHUNK) {
            const int64_t count = std::min<int64_t>(CHUNK, tile.end - chunk);
            T* p = buffer + table[tile.segment].start + chunk;
            draws.from(chunk);
            pack_negative(p, count, signs + chunk / 8);
            round_to_powers(p, count, draws.raw, codes + chunk);
        }
    });
    return DONE;
}

template <class T>
int64_t natural_decode(void* out, const Segment* table, int64_t n, const Payloads& payloads, const Asked& asked, int threads) {
    using L = Lanes<T>;
    const auto first = offsets_of(table, n, 1), bytes = offsets_of(table, n, 8);
    return decode_all<T>(out, table, n, payloads, asked, threads, [&](const uint8_t* payload, int64_t s, int64_t begin, int64_t count, T*) ISA {
        const uint8_t *codes = payload + first[s] + begin, *signs = payload + first[n] + bytes[s] + begin / 8;
        const auto sign = L::all_bits(static_cast<typename Bits<T>::I>(Bits<T>::SIGN));
        return [=](int64_t i) ISA {
            typename Codes<T>::Code code = {};
            if (i + L::N <= count)
                std::memcpy(&code, codes + i, sizeof code);
            else
                for (int j = 0; i + j < count; ++j) code[j] = codes[i + j];
            const auto negative = mask_of<T>(word_at(signs, i / 8, (count + 7) / 8) >> i % 8) & sign;
            return reinterpret_cast<typename L::V>(reinterpret_cast<typename L::M>(powers_of(code)) ^ negative);
        };
    });
}
